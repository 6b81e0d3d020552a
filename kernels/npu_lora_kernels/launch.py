"""The one seam between a kernel's host function and whatever runs the kernel"""
import contextlib
import functools
import threading
import torch

_local = threading.local()

def launch(kernel, grid, arguments, **constants):
    """Run `kernel` once for each program of `grid`; `arguments` are its parameters by name, `constants` its `tl.constexpr`s

    A list of tensors reaches the kernel as one int64 tensor of their addresses.
    On a device this is Triton's own launch. Inside `running(...)` somebody else takes the call: the verification lowers it
    for Ascend, plans its memory and executes the lowered code on x86.
    """
    args = in_order(kernel, arguments, constants)
    runner = getattr(_local, 'runner', None)
    if runner is not None: return runner(kernel, grid, args, constants)
    device = _device_of(args)
    with _current(device): kernel[grid](*map(_table, args), **_OPTIONS.get(device.type, {}), **constants)

def in_order(kernel, arguments, constants):
    "Return the values of `arguments` in the order of the kernel's parameters"
    names = [name for name in kernel.arg_names if name not in constants]
    assert set(names) == set(arguments), f'the kernel takes {names}, got {list(arguments)}'
    return tuple(arguments[name] for name in names)

def _device_of(args):
    "Return the device of the first tensor"
    flat = [x for a in args for x in (a if isinstance(a, list) else [a])]
    return next(x.device for x in flat if isinstance(x, torch.Tensor))

_OPTIONS = dict(cuda=dict(enable_fp_fusion=False))  # rounds as often as the reference does; triton-ascend has no such choice

def _current(device):
    "Return a block in which Triton, which asks for the current device and stream, finds those of the tensors"
    return contextlib.nullcontext() if device.type == 'cpu' else torch.get_device_module(device).device(device)

def _table(a):
    "Return an argument as the kernel takes it"
    return _addresses(tuple(x.data_ptr() for x in a), a[0].device) if isinstance(a, list) else a

@functools.lru_cache(64)
def _addresses(addresses, device):
    """Return the addresses on `device`, copied there once

    Tensors that stay where they are (a static cache) cost one small blocking copy, a growing cache one at every step.
    """
    return torch.tensor(addresses, dtype=torch.int64).to(device)

@contextlib.contextmanager
def running(runner):
    "Let `runner(kernel, grid, args, constants)` take every launch of the block"
    before = getattr(_local, 'runner', None)
    _local.runner = runner
    try: yield runner
    finally: _local.runner = before
