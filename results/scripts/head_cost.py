"""What a training step of a draft head costs: vocabularies, alignment steps, sampled steps, cached targets

python results/scripts/head_cost.py OUT.json   (nothing else should run on the machine)
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.foundations.timing import time_interleaved
from npu_lora_decoding.hass.chat_data import encode_all, read_conversations
from npu_lora_decoding.hass.config import RECIPES, HeadTraining
from npu_lora_decoding.hass.features import OnlineFeatures, draft_vocabulary
from npu_lora_decoding.hass.train import start_run
from npu_lora_decoding.hass.training_step import train_step

TEXTS = Path(__file__).parent.parent / 'heads' / 'conversations'
CONVERSATIONS = 96
BATCHES = 2
ROUNDS = 3
BASE = HeadTraining(steps=1000, tokens=4096, vocab=8192, start='random')


def one_step(step):
    "Return the settings that train one of three alignment steps alone"
    weights = tuple(float(step == i) for i in range(3))
    return replace(BASE, cache_targets=True, sample_one_step=True, step_weights=weights)


# The first is what the others are compared with; the names are those of the committed file
CASES = {
    'n = 3, 8,192 tokens': BASE,
    'n = 3, all 49,152 tokens': replace(BASE, vocab=0),
    'n = 3, 8,192 tokens, remembered': replace(BASE, cache_targets=True),
    'n = 3, all 49,152 tokens, remembered': replace(BASE, vocab=0, cache_targets=True),
    **{f'step {step + 1} of 3 alone, 8,192 tokens, remembered': one_step(step) for step in range(3)},
    'n = 1, 8,192 tokens': replace(BASE, **RECIPES['topk']),
    'n = 1, 8,192 tokens, remembered': replace(BASE, **RECIPES['topk'], cache_targets=True),
}


class Kept(OnlineFeatures):
    "Features that the target has made once"

    def __init__(self, lm, examples):
        super().__init__(lm, examples)
        self.rows = super().read(range(len(examples)))

    def read(self, numbers):
        return [self.rows[i] for i in numbers]


def updates(run):
    "Make the updates of a few different batches, always the same ones"
    for step in range(BATCHES):
        train_step(run, step)


def main(out):
    lm = load(dtype='bf16')
    examples, _ = encode_all(lm, read_conversations(TEXTS)[:CONVERSATIONS])
    store = Kept(lm, examples)
    ids, counts, _ = draft_vocabulary(examples, BASE.vocab, lm.model.config.vocab_size)
    runs = {}
    for name, settings in CASES.items():
        vocab = (ids, counts) if settings.vocab else None
        runs[name] = start_run(lm, store, tempfile.mkdtemp(), settings, vocab=vocab)
        updates(runs[name])  # fills the cache of targets, where there is one
    times = time_interleaved({name: (lambda run=run: updates(run)) for name, run in runs.items()}, ROUNDS)
    first = times[next(iter(CASES))].median
    rows = []
    for name, time in times.items():
        spread = (time.low / first, time.high / first)
        rows.append(dict(method='head cost', case=name, step_to_first=time.median / first, spread=spread))
        print(rows[-1], flush=True)
    save_rows(rows + [environment()], out)


if __name__ == '__main__':
    main(sys.argv[1])
