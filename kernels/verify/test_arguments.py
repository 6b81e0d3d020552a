"""What a kernel cannot take is refused with one sentence that names the remedy, before anything is launched"""

import pytest
import torch
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_kernels import cold, commit, distill, lora, sample
from npu_lora_kernels.launch import running


def never(*_):
    raise AssertionError('a kernel was launched')


def refused(host, args, message):
    with running(never), pytest.raises(DecodingError, match=message):
        host(*args)


def int32(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


ADAPTERS = dict(ranks=int32(1, 3) + 4, ids=torch.tensor([0, -1]))


def shrink(**changed):
    args = dict(x=torch.randn(2, 1, 8), A=torch.randn(1, 3, 4, 8), scale=torch.ones(1, 3), **ADAPTERS, parts=1)
    return list((args | changed).values())


def expand(**changed):
    args = dict(y=[torch.randn(2, 1, 6)], h=torch.randn(1, 2, 1, 1, 4), B=[torch.randn(3, 4, 6)], **ADAPTERS)
    return list((args | changed).values())


@pytest.mark.parametrize(
    'changed, message',
    [
        (dict(x=torch.randn(2, 1, 8).half()), 'A is float32: convert it to float16'),
        (dict(x=torch.randn(2, 1, 8).double()), 'x is float64: convert it to float16 or bfloat16 or float32'),
        (dict(x=torch.randn(2, 8)), r'x has shape \(2, 8\): give it shape \(any, any, any\)'),
        (dict(x=torch.randn(2, 8, 3).mT), r'x is not contiguous: pass x.contiguous\(\)'),
        (dict(x=torch.randn(2, 0, 8)), 'there is nothing to do'),
        (dict(x=torch.randn(0, 1, 8), ids=torch.tensor([], dtype=torch.long)), 'there is nothing to do'),
        (dict(A=torch.randn(1, 3, 0, 8)), 'the rank is 0: use adapters of rank 1 to 256'),
        (dict(A=torch.randn(1, 3, 257, 8)), 'the rank is 257: use adapters of rank 1 to 256'),
        (dict(A=torch.randn(1, 3, 4, 9)), 'A has shape'),
        (dict(A=torch.randn(1, 3, 8, 4).mT), 'A is not contiguous'),
        (dict(scale=torch.ones(1, 2)), 'scale has shape'),
        (dict(scale=torch.ones(1, 3).half()), 'scale is float16: convert it to float32'),
        (dict(ranks=torch.full((1, 3), 4)), 'ranks is int64: convert it to int32'),
        (dict(ids=int32(2)), 'ids is int32: convert it to int64'),
        (dict(ids=torch.tensor([0])), 'ids has shape'),
        (dict(parts=0), 'parts is 0: take it from shrink_parts'),
        (dict(parts=17), 'parts is 17'),
    ],
)
def test_shrink(changed, message):
    refused(lora.lora_shrink, shrink(**changed), message)


@pytest.mark.parametrize(
    'changed, message',
    [
        (dict(y=[torch.randn(2, 1, 6).half()]), r'B\[0\] is float32: convert it to float16'),
        (dict(h=torch.randn(1, 2, 1, 1, 4).half()), 'h is float16: convert it to float32'),
        (dict(y=[torch.randn(2, 6, 3).mT], h=torch.randn(1, 2, 3, 1, 4)), r'y\[0\] is not contiguous'),
        (dict(B=[torch.randn(3, 6, 4).mT]), r'B\[0\] is not contiguous'),
        (
            dict(y=[torch.randn(2, 1, 0)], B=[torch.randn(3, 4, 0)]),
            r'y\[0\] has shape \(2, 1, 0\): leave out slices of width zero',
        ),
        (dict(y=[]), 'there are 0 outputs and 1 Bs for 1 slices'),
        (dict(y=[torch.randn(3, 1, 6)]), r'y\[0\] has shape'),
        (dict(B=[torch.randn(2, 4, 6)]), r'B\[0\] has shape'),
        (dict(ids=torch.tensor([0, 1, 2])), 'ids has shape'),
        (dict(h=torch.randn(17, 2, 1, 1, 4)), 'h has 17 parts'),
    ],
)
def test_expand(changed, message):
    refused(lora.lora_expand, expand(**changed), message)


def test_expand_of_two_dtypes():
    y = [torch.randn(2, 1, 6), torch.randn(2, 1, 6).half()]
    args = [y, torch.randn(1, 2, 1, 2, 4), [torch.randn(3, 4, 6)] * 2, int32(2, 3) + 4, torch.tensor([0, -1])]
    refused(lora.lora_expand, args, 'y.1. is torch.float16, y.0. is torch.float32')


e = torch.randn(2, 9)
one = torch.ones(2, 1)


@pytest.mark.parametrize('host', [cold.cold_select, cold.cold_scores])
@pytest.mark.parametrize(
    'args, message',
    [
        ((e, e.half(), one, one), 'a is float16: convert it to float32'),
        ((e, torch.randn(2, 8), one, one), 'a has shape'),
        ((torch.randn(9, 2).mT, e, one, one), 'e is not contiguous'),
        ((e.double(), e.double(), one, one), 'e is float64'),
        ((e, e, one.double(), one), 'alpha is float64: convert it to float32'),
        ((e[:0], e[:0], one[:0], one[:0]), 'e holds 0 logits'),
    ],
)
def test_cold(host, args, message):
    refused(host, args, message)


keys = int32(2, 2)


@pytest.mark.parametrize(
    'changed, message',
    [
        ((e, one.double(), keys), 'temperature is float64: convert it to float32'),
        ((e, torch.ones(3, 1), keys), 'temperature has shape'),
        ((e, one, keys.long()), 'keys is int64: convert it to int32'),
        ((e, one, keys[:1]), r'keys has shape \(1, 2\): give it shape \(2, 2\)'),
        ((e, one, int32(2, 4)[:, ::2]), 'keys is not contiguous'),
        ((e[:0], one[:0], keys[:0]), 'e holds 0 logits'),
    ],
)
def test_sample(changed, message):
    logits, temperature, keys = changed
    refused(sample.plain_sample, (logits, temperature, keys), message)
    refused(sample.cold_sample, (logits, logits, one, one, temperature, keys), message)


planes = [torch.randn(2, 3, 9, 4)]
order = torch.tensor([[0, 2], [0, 1]])
count = torch.tensor([2, 1])


@pytest.mark.parametrize(
    'args, message',
    [
        (([], order, count, 3), 'planes is empty'),
        (([torch.randn(2, 3, 4)], order, count, 3), 'give it shape'),
        ((planes + [torch.randn(2, 3, 8, 4)], order, count, 3), r'planes\[1\] has shape'),
        ((planes + [planes[0].half()], order, count, 3), r'planes\[1\] is float16: convert it to float32'),
        (([planes[0].mT], order, count, 3), r'planes\[0\] is not contiguous'),
        ((planes, order.int(), count, 3), 'order is int32: convert it to int64'),
        ((planes, order[:1], count, 3), 'order has shape'),
        ((planes, order, count[:1], 3), 'count has shape'),
        ((planes, order, count, 10), 'start is 10, the cache has 9 columns'),
        ((planes, order, count, -1), 'start is -1'),
    ],
)
def test_commit(args, message):
    refused(commit.kv_commit, args, message)


@pytest.mark.parametrize(
    'args, message',
    [
        ((e, torch.randn(2, 8), 3), 'target has shape'),
        ((e, e, 0), 'k is 0 for a vocabulary of 9'),
        ((e, e, 10), 'k is 10 for a vocabulary of 9'),
        ((e[0], e[0], 3), 'draft has shape'),
        ((torch.randn(9, 2).mT, e, 3), 'draft is not contiguous'),
        ((e.double(), e.double(), 3), 'draft is float64'),
    ],
)
def test_topk_loss(args, message):
    refused(distill.topk_loss_forward, args, message)
