"""What a kernel has to know about the device it runs on: cores to fill, memory to fit, block sizes

Ascend 910B: a vector core plans with 192 KB of UB, a cube core with 128 KB of L0C and 512 KB of L1. Double buffering halves
what a tile may use, and a tile of fp16 is cast to fp32 beside its copy; the budget is therefore
0.8 * (192 KB / 2) / 4 live buffers = 19 KB, a block of about 8,192 fp16 or 4,096 fp32 numbers. Rows of 512 bytes and more are
transferred at full speed. The four 910B that are verified have the same memories, so one table of blocks serves them; the
compiler's own plan for each configuration is in kernels/README.md. CUDA takes nearly the same blocks until somebody measures
better ones there.
"""
import contextlib
import functools
import threading
from dataclasses import dataclass
import torch

@dataclass(frozen=True)
class Blocks:
    "Largest block of each kernel, in elements"
    rank: int = 16  # Ranks of a LoRA tile: fewer when that fills more cores
    width: int = 512  # Columns of a LoRA tile: rank * width numbers live in UB as fp16 and as fp32
    tokens: int = 64  # Rows of a cube tile: 64 x 128 fp32 is a quarter of L0C
    tile_width: int = 128  # Columns of a cube tile
    # Tokens of one step over a row of logits: the compiler plans 158 KB of UB for a selection, and refuses 4,096
    vocabulary: int = 2048
    noise: int = 1024  # The same where each token gets noise, whose arithmetic takes more buffers
    heads: int = 16  # KV heads whose path one program moves: 16 x 128 numbers are 4 KB of fp16

@dataclass(frozen=True)
class Target:
    "One kind of device"
    name: str
    cores: int  # Vector cores: work is split until it fills them
    cube_cores: int  # Cores for matrix products, likewise
    persistent: bool = True  # Launch one program a core and loop over tiles inside; a GPU takes one program a tile
    ub: int = 192 << 10  # Bytes a vector core plans with
    l0c: int = 128 << 10  # Bytes of a cube core's accumulator,
    l1: int = 512 << 10  # and of its buffer for operands
    blocks: Blocks = Blocks()

    def programs(self, tiles, cube=False):
        "Return the grid for `tiles` tiles of work"
        most = self.cube_cores if cube else self.cores
        return (max(1, min(tiles, most) if self.persistent else tiles),)

# Name -> vector cores, cube cores
_CORES = {'Ascend910B1': (48, 24), 'Ascend910B3': (40, 20), 'Ascend910B4': (40, 20), 'Ascend910_9382': (48, 24)}
ASCEND = {name: Target(name, *cores) for name, cores in _CORES.items()}

def gpu(name, processors):
    "Return the target for a GPU: one program a tile, memory left to its compiler"
    blocks = Blocks(tile_width=64)  # fp32 tiles of 128 columns want more shared memory than small GPUs have
    return Target(name, processors, processors, persistent=False, ub=0, l0c=0, l1=0, blocks=blocks)

_local = threading.local()

@contextlib.contextmanager
def using(target):
    "Plan every launch of the block for `target`, wherever the tensors lie"
    before = getattr(_local, 'target', None)
    _local.target = target
    try: yield target
    finally: _local.target = before

def target_of(device):
    "Return the `Target` that work on `device` is planned for"
    chosen = getattr(_local, 'target', None)
    return chosen or _target_of(device.type, device.index or 0)

@functools.lru_cache(None)
def _target_of(kind, index):
    if kind == 'cuda':
        return gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).multi_processor_count)
    if kind == 'npu': return _npu_target(index)
    return ASCEND['Ascend910B3']  # the interpreter on a CPU plays the middle one

def _npu_target(index):
    "Ask triton-ascend's driver for the cores, because a product number does not tell all of them"
    from triton.runtime import driver
    npu = getattr(torch, 'npu')  # torch_npu adds it
    cores = driver.active.utils.get_device_properties(index)
    return Target(npu.get_device_name(index), cores['num_vectorcore'], cores['num_aicore'])
