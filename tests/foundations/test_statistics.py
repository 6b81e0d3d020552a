"The bootstrap's intervals: as wide as 95% are, and as often right"

import math
import pytest
import torch
from helpers.intervals import ERROR, N, SCORES, is_95
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.statistics import bootstrap, paired


def test_the_interval_of_a_mean():
    mean, low, high = bootstrap((5 + SCORES).tolist())
    assert math.isclose(mean, 5 + SCORES.mean().item())
    assert is_95(low, high, mean, ERROR)


def test_the_interval_of_a_difference_does_not_see_what_both_share():
    shared = 100 * torch.randn(N, generator=generator(1), dtype=torch.float64)
    mean, low, high = paired((shared + SCORES).tolist(), shared.tolist())
    assert math.isclose(mean, SCORES.mean().item(), abs_tol=1e-9)
    assert is_95(low, high, mean, ERROR)


def test_coverage():
    "Of 300 true means 15 lie outside an interval of 95%, give or take; outside one of 90%, 30"
    g = generator(2)
    samples = [torch.randn(60, generator=g).tolist() for _ in range(300)]
    intervals = [bootstrap(o, draws=1000) for o in samples]
    missed = sum(not i.low <= 0 <= i.high for i in intervals)
    assert 8 <= missed <= 24


def test_the_seed_decides():
    scores = SCORES.tolist()
    assert bootstrap(scores) == bootstrap(scores) != bootstrap(scores, seed=1)


def test_draws_are_as_many_as_asked(monkeypatch):
    drawn = []
    randint = torch.randint
    monkeypatch.setattr(torch, 'randint', lambda high, size, **kw: drawn.append(size[0]) or randint(high, size, **kw))
    bootstrap(SCORES.tolist(), draws=3000)
    assert sum(drawn) == 3000


def test_what_cannot_be_paired():
    with pytest.raises(DecodingError, match='2 scores .* 3'):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])
