"Scores whose intervals are known: those of a normal distribution"

import math
import torch
from npu_lora_decoding.foundations.devices import generator

N = 400
SCORES = torch.randn(N, generator=generator(0), dtype=torch.float64)  # Around 0
ERROR = SCORES.std(correction=0).item() / math.sqrt(N)  # Of their mean
WIDTH = 1.96  # Of 95%, in standard errors: an interval of 90% has 1.645, one of 99% 2.576


def is_95(low, high, mean, error):
    "Whether both ends are as far from the mean as those of 95%, but for the noise of resampling"
    return all(math.isclose(end, WIDTH * error, rel_tol=0.08) for end in (mean - low, high - mean))
