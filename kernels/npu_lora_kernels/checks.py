"""What every host function asks of its arguments, in one sentence that names the remedy"""
import torch
from npu_lora_decoding.foundations.errors import require  # raises DecodingError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

def check_tensor(name, x, shape, dtypes=FLOATS, device=None):
    "Check one tensor's shape (None in `shape` takes any size), dtype, device and contiguity"
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    wanted = ', '.join('any' if n is None else str(n) for n in shape)
    fits = x.dim() == len(shape) and all(n is None or n == m for n, m in zip(shape, x.shape))
    require(fits, f'{name} has shape {tuple(x.shape)}', f'give it shape ({wanted})')
    require(x.dtype in dtypes, f'{name} is {_short(x.dtype)}', f'convert it to {" or ".join(map(_short, dtypes))}')
    here = device is None or x.device == device
    require(here, f'{name} is on {x.device}, the other arguments are on {device}', 'move it there')
    require(x.is_contiguous(), f'{name} is not contiguous', f'pass {name}.contiguous()')

def _short(dtype): return str(dtype).removeprefix('torch.')
