"""The one seam between a kernel's host function and whatever runs the kernel"""
import contextlib, functools, threading
import torch

_local = threading.local()

def launch(kernel, grid, *args, **constants):
    """Run `kernel` once for each program of `grid`; `args` follow its parameters, `constants` are its `tl.constexpr`s.

    A list of tensors reaches the kernel as one int64 tensor of their addresses.
    On a device this is Triton's own launch. Inside `running(...)` somebody else takes the call: the verification lowers it for Ascend, plans its memory and executes the lowered code on x86.
    """
    runner = getattr(_local, 'runner', None)
    # no fused multiply-add: every device rounds as often as the reference does
    if runner is None: kernel[grid](*map(_table, args), enable_fp_fusion=False, **constants)
    else: runner(kernel, grid, args, constants)

def _table(a): return _addresses(tuple(x.data_ptr() for x in a), a[0].device) if isinstance(a, list) else a

@functools.lru_cache(4096)
def _addresses(addresses, device):
    "Return the addresses on `device`: they are copied there once, so tensors that stay where they are cost nothing more, and a captured graph finds their table where it was"
    return torch.tensor(addresses, dtype=torch.int64).to(device)

@contextlib.contextmanager
def running(runner):
    "Let `runner(kernel, grid, args, constants)` take every launch of the block"
    before, _local.runner = getattr(_local, 'runner', None), runner
    try: yield runner
    finally: _local.runner = before
