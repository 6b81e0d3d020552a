"Triton kernels of the operators `npu_lora::*`, one source for Ascend (triton-ascend) and CUDA (triton)"

def kernels():
    "Return the host function of every operator, by name; needs Triton"
    from . import cold, commit, distill, lora
    return dict(lora_shrink=lora.lora_shrink, lora_expand=lora.lora_expand, lora=lora.lora, cold_scores=cold.cold_scores, cold_select=cold.cold_select, kv_commit=commit.kv_commit,
                topk_loss_forward=distill.topk_loss_forward, topk_loss_backward=distill.topk_loss_backward)
