"""What a training step of a draft head costs: vocabularies, alignment steps, drawn steps, remembered targets

python results/scripts/head_cost.py OUT.json   (nothing else should run on the machine)
"""

import sys, tempfile
from dataclasses import replace
from pathlib import Path
from npu_lora_decoding.hass.chat_data import encode_all, read_conversations
from npu_lora_decoding.foundations.timing import time_interleaved
from npu_lora_decoding.hass.features import OnlineFeatures, draft_vocabulary
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.hass.config import RECIPES, HeadTraining
from npu_lora_decoding.hass.train import start_run
from npu_lora_decoding.hass.training_step import train_step

BASE = HeadTraining(steps=1000, tokens=4096, vocab=8192, start='random')
CASES = {  # the first is what the others are compared with
    'n = 3, 8,192 tokens': BASE,
    'n = 3, all 49,152 tokens': replace(BASE, vocab=0),
    'n = 3, 8,192 tokens, remembered': replace(BASE, cache_targets=True),
    'n = 3, all 49,152 tokens, remembered': replace(BASE, vocab=0, cache_targets=True),
    **{
        f'step {j+1} of 3 alone, 8,192 tokens, remembered': replace(
            BASE, cache_targets=True, sample_one_step=True, step_weights=tuple(float(i == j) for i in range(3))
        )
        for j in range(3)
    },
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


def updates(run, count):
    "Make the updates of `count` different batches, always the same ones"
    for step in range(count):
        train_step(run, step)


def main(out, conversations=96, count=2, rounds=3):
    lm = load(dtype='bf16')
    examples, _ = encode_all(
        lm, read_conversations(Path(__file__).parent.parent / 'heads/conversations')[:conversations]
    )
    store, v = Kept(lm, examples), lm.model.config.vocab_size
    ids, counts, _ = draft_vocabulary(examples, BASE.vocab, v)
    runs = {
        name: start_run(lm, store, tempfile.mkdtemp(), c, vocab=(ids, counts) if c.vocab else None)
        for name, c in CASES.items()
    }
    for run in runs.values():
        updates(run, count)  # fills the memory, where there is one
    times = time_interleaved({name: (lambda run=run: updates(run, count)) for name, run in runs.items()}, rounds)
    first = times[next(iter(CASES))].median
    rows = [
        dict(method='head cost', case=name, step_to_first=t.median / first, spread=(t.low / first, t.high / first))
        for name, t in times.items()
    ]
    for r in rows:
        print(r, flush=True)
    save_rows(rows + [environment()], out)


if __name__ == '__main__':
    main(sys.argv[1])
