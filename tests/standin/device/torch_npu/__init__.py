"""A stand-in for torch_npu: tensors of a device called npu, in host memory, with the CPU's kernels

`reads` counts, by call site, how often the host read a value of the device, or waited for it to finish. On a real NPU each
of them is a stall.
"""

import os, sys, types
from collections import Counter
from pathlib import Path
import torch

sys.path.insert(0, os.environ['NPU_STANDIN'])  # the folder of the extension, from helpers/standin.py
import npu_standin

__version__ = torch.__version__.partition('+')[0]
reads: Counter = Counter()  # 'operator file:line' of the first frame of the library or of a test -> how often

_ROOT = Path(__file__).resolve().parents[4]


def _site():
    "Return the innermost file and line of the checkout"
    frame = sys._getframe(2)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_ROOT) and not {'site-packages', 'torch_npu'} & {*file.parts}:
            return f'{file.relative_to(_ROOT)}:{frame.f_lineno}'
        frame = frame.f_back
    return 'elsewhere'


def _note(operator):
    reads[f'{operator} {_site()}'] += 1


npu_standin.on_read(_note)
torch.utils.rename_privateuse1_backend('npu')


def npu_fusion_attention(*args, **kwargs):
    "transformers imports it by name wherever a device of this kind is present"
    raise NotImplementedError('npu_fusion_attention of the stand-in')


class _Device:
    def __init__(self, device):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


npu = types.ModuleType('torch_npu.npu')
npu.is_available = npu.is_initialized = lambda: True
npu._is_in_bad_fork = lambda: False
npu.device_count = lambda: 1
npu.current_device = lambda: 0
npu.set_device = npu.manual_seed = npu.manual_seed_all = lambda x: None
npu.synchronize = lambda device=None: _note('synchronize')
npu.reset_peak_memory_stats = lambda device=None: None
npu.empty_cache = lambda: None
npu.get_rng_state = lambda device=None: torch.get_rng_state()
npu.set_rng_state = lambda state, device=None: None
npu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
npu.max_memory_allocated = npu.memory_allocated = lambda device=None: 0
npu.mem_get_info = lambda device=None: (10**10, 10**10)
npu.get_device_name = lambda device=None: 'stand-in'
npu.device = _Device
torch._register_device_module('npu', npu)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
