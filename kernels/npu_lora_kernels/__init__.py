"Ascend kernels for decoding with LoRA adapters"
