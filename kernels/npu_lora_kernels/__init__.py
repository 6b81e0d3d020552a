"Triton kernels of the operators `npu_lora::*`, one source for Ascend (triton-ascend) and CUDA (triton)"

def kernels():
    "Return the host function of every operator, by name; needs Triton"
    from . import cold, commit, distill, lora, sample
    hosts = [
        lora.lora_shrink, lora.lora_expand, lora.lora, cold.cold_scores, cold.cold_select, sample.cold_sample,
        sample.plain_sample, commit.kv_commit, distill.topk_loss_forward, distill.topk_loss_backward,
    ]
    return {host.__name__: host for host in hosts}
