"""Compile every configuration of every kernel for CUDA with the original Triton, offline

`python -m verify.cuda`, with that Triton in front of the path, prints how many configurations of each kernel became machine
code. This shows that one source serves both. Nothing is run: that takes a device (`nld doctor --kernels --device cuda`).
"""

import collections
import json
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource
from npu_lora_kernels.cases import FAMILIES, family
from npu_lora_kernels.launch import _OPTIONS, running
from npu_lora_kernels.targets import gpu, using

CAPABILITY = 90  # H100, H200
TYPES = {
    torch.float16: '*fp16',
    torch.bfloat16: '*bf16',
    torch.float32: '*fp32',
    torch.int32: '*i32',
    torch.int64: '*i64',
}


def kind(a):
    "Return the type of a launch's argument; a list is a table of addresses"
    if isinstance(a, torch.Tensor):
        return TYPES[a.dtype]
    if isinstance(a, list):
        return '*i64'
    if isinstance(a, float):
        return 'fp32'
    return 'i32' if abs(a) < 2**31 else 'i64'


def configurations():
    "Return {(kernel's name, types, constants): (kernel, types, constants)} of all launches of all cases on a GPU of 132 processors"
    found = {}

    def take(kernel, grid, args, constants):
        types = list(map(kind, args))
        found.setdefault((kernel.fn.__name__, *types, *constants.items()), (kernel, types, constants))

    for case in [c for name in FAMILIES for c in family(name).CASES]:
        for dtype in case.dtypes:
            with running(take), using(gpu(f'sm_{CAPABILITY}', 132)):
                case.host(*case.arguments(dtype))
    return found


def compiles(kernel, types, constants):
    "Return whether a kernel becomes machine code; a compiler's error is the caller's to see"
    free = [p.name for p in kernel.params if not p.is_constexpr]
    signature = dict(zip(free, types)) | dict.fromkeys(constants, 'constexpr')
    values = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs={})
    compiled = triton.compile(source, target=GPUTarget('cuda', CAPABILITY, 32), options=_OPTIONS['cuda'])
    return bool(compiled.asm['cubin'])


if __name__ == '__main__':
    every = configurations().values()
    counts = collections.Counter(kernel.fn.__name__ for kernel, *rest in every if compiles(kernel, *rest))
    print(json.dumps(dict(triton=triton.__version__, target=f'sm_{CAPABILITY}', counts=counts)))
