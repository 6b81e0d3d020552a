"""How work is cut: every core gets some, no part is empty, and the grid fits the device"""

import pytest
import torch
from npu_lora_decoding.foundations import ops
from npu_lora_kernels import lora
from npu_lora_kernels.targets import ASCEND, gpu, using

TARGETS = *ASCEND.values(), gpu('a GPU', 132)


@pytest.mark.parametrize('target', TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize('t', [1, 4, 16, 70])
@pytest.mark.parametrize('d', [1, 31, 256, 576, 2048, 4096, 14336])
def test_parts_cover_the_width_and_none_is_empty(target, t, d):
    for b, z, r in ((1, 1, 1), (2, 1, 16), (2, 3, 16), (16, 1, 64), (64, 2, 256)):
        x = torch.empty(b, t, d, device='meta')
        with using(target):
            parts = lora.shrink_parts(x, torch.empty(z, 1, r, d, device='meta'))
        width = lora.part_width(d, parts)
        assert width == ops.part_width(d, parts), 'the reference cuts elsewhere'
        assert 1 <= parts <= lora.MAX_PARTS and (parts - 1) * width < d <= parts * width
        assert parts == 1 or width % lora.ALIGN == 0


@pytest.mark.parametrize('target', ASCEND.values(), ids=lambda t: t.name)
@pytest.mark.parametrize('width', [2560, 4096, 8192])
def test_one_pair_fills_the_cores(target, width):
    "Only the expert row of a CoLD pair has work: half the tiles of a shrink, and of an expand, with the base row's copies"
    block_r, parts = lora.shrink_plan(2, 1, 16, width, target)
    assert parts * lora.cdiv(16, block_r) >= 0.8 * target.cores
    _, block_o = lora.expand_plan(2, 16, [width], target)
    assert 2 * lora.cdiv(width, block_o) >= 0.8 * target.cores


def test_grids():
    target = ASCEND['Ascend910B3']
    device = gpu('a GPU', 132)
    assert [target.programs(n) for n in (1, 39, 41, 1000)] == [(1,), (39,), (40,), (40,)]
    assert target.programs(1000, cube=True) == (20,)
    assert device.programs(1000) == device.programs(1000, cube=True) == (1000,)
