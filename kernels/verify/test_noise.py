"""The noise of the kernels is the noise of the references, in every value it can take

Each value is computed by the lowered kernel on x86, from bits that stand for it; and whole positions, keys and all.
"""

import pytest
import torch
import triton
import triton.language as tl
from npu_lora_decoding.foundations import ops
from npu_lora_kernels.launch import launch
from npu_lora_kernels.sample import _gumbel_of, _key, _mix
from verify.runner import Runner, take

BLOCK = 1024


@triton.jit
def value_kernel(out, hashed, n, BLOCK: tl.constexpr):
    for k in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = k + tl.arange(0, BLOCK)
        tl.store(out + at, _gumbel_of(tl.load(hashed + at, mask=at < n, other=0)), mask=at < n)


@triton.jit
def position_kernel(out, keys, v, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    first, second = _key(keys, row)
    for k in range(0, v, BLOCK):
        at = k + tl.arange(0, BLOCK)
        tl.store(out + row * v + at, _gumbel_of(_mix(first + at * second)), mask=at < v)


def values(hashed):
    "Return the noise of each hash by the lowered kernel"
    out = torch.empty(len(hashed))
    launch(value_kernel, (8,), dict(out=out, hashed=hashed, n=len(hashed)), BLOCK=BLOCK)
    return out


def positions(keys, v):
    out = torch.empty(len(keys), v)
    launch(position_kernel, (len(keys),), dict(out=out, keys=keys, v=v), BLOCK=BLOCK)
    return out


@pytest.mark.parametrize('part', range(8))
def test_every_value(part):
    size = 2**20
    hashed = (torch.arange(part * size, (part + 1) * size) * 2 + 1 - 2**23).int() << 8
    assert torch.equal(take(Runner(), 'Ascend910B3', values, hashed), ops._gumbel_of(hashed))


def test_every_token_of_some_positions():
    sequences = torch.tensor([[0, 0], [-1, -1], [2**31 - 1, -(2**31)], [12345, 678]], dtype=torch.int32)
    keys = ops.position_keys(sequences, torch.tensor([[0, 1, 10**6]])).view(-1, 2)
    assert torch.equal(take(Runner(), 'Ascend910B3', positions, keys, 49153), ops.gumbel(keys, 49153))
