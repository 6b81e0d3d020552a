"""Every case, and shapes drawn at random, under Triton's interpreter: run with TRITON_INTERPRET=1, in a process of its own

fp16 and fp32 only: the interpreter keeps bf16 as integers, so that arithmetic on it is wrong.
"""

import os
import hypothesis
import pytest
import torch
from hypothesis import strategies
from triton.language import standard
from triton.triton_patch.language import standard as ascend
from npu_lora_kernels.cases import FAMILIES, family
from npu_lora_kernels.targets import ASCEND, gpu, using

CHOSEN = os.environ.get('VERIFY_FAMILIES', ' '.join(FAMILIES)).split()
DTYPES = torch.float16, torch.float32
TARGETS = ASCEND['Ascend910B3'], ASCEND['Ascend910B1'], gpu('a GPU', 132)
CASES = [
    pytest.param(c, d, id=f'{name}: {c.name}, {d}')
    for name in CHOSEN
    for c in family(name).CASES
    for d in c.dtypes
    if d in DTYPES
]

# The interpreter takes a whole block at once only for the reductions that it knows by name, and triton-ascend's maximum and
# minimum have others
standard._elementwise_max = ascend._elementwise_max_default
standard._elementwise_min = ascend._elementwise_min


@pytest.fixture(autouse=True, scope='module')
def interpreted():
    assert os.environ.get('TRITON_INTERPRET') == '1', 'set TRITON_INTERPRET=1: without it Triton looks for an NPU'


@pytest.mark.parametrize('case, dtype', CASES)
def test_case(case, dtype):
    case.check(dtype)


@pytest.mark.parametrize('name', [n for n in CHOSEN if hasattr(family(n), 'random_case')])
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
@hypothesis.given(strategies.data())
def test_random_case(name, data):
    with using(data.draw(strategies.sampled_from(TARGETS))):  # another number of cores cuts the work elsewhere
        case = family(name).random_case(data.draw)
        hypothesis.note(case.name)
        case.check(data.draw(strategies.sampled_from([d for d in case.dtypes if d in DTYPES])))
