"From a target to a head in one call: what its comparison of heads says"

import math
from helpers.intervals import ERROR, N, SCORES, is_95
from npu_lora_decoding.hass.pipeline import acceptance_gain


def test_the_interval_of_a_gain_is_that_of_95_percent():
    "Over a base whose accepted runs are all 2 long: the ratio's error is half of the head's"
    taus = {'new': (4 + SCORES).tolist(), 'old': [2.0] * N}
    rows = [dict(method='acceptance', head=head, set='chat', draft='tree', taus=each) for head, each in taus.items()]
    (row,) = acceptance_gain(rows, 'new', 'old')
    assert math.isclose(row['gain'], (4 + SCORES.mean().item()) / 2 - 1)
    assert is_95(*row['interval'], row['gain'], ERROR / 2)
