"""What changes to Temp-LoRA are worth: each variant reads the same development text, chunk by chunk

python results/scripts/memory_ablation.py TEXT OUT.json [TOKENS] [VARIANT,...]   (variants that OUT.json holds are left out)
"""

import json
import math
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
import torch
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.foundations.timing import stopwatch
from npu_lora_decoding.temp_lora.adapter import learn, temporary
from npu_lora_decoding.temp_lora.cache_reuse import Reader
from npu_lora_decoding.temp_lora.generation import TempLoRA
from npu_lora_decoding.temp_lora.perplexity import document_ids, read_text

CHOSEN = TempLoRA(chunk=1024, window=1536, train_context=128, epochs=1, lr=1e-3, dropout=0.0)


class Learner:
    "Learns every chunk after it was scored"

    def __init__(self, phi, text):
        self.phi = phi
        self.text = text
        self.settings = phi.settings

    def chunk(self, start):
        s = self.settings
        learn(self.phi, self.text[max(0, start - s.train_context) : start + s.chunk], s.chunk)

    def __call__(self, start, losses):
        self.chunk(start)


class Gated(Learner):
    "Leaves out a chunk that was predicted better than the last eight were on average"

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def __call__(self, start, losses):
        recent = self.seen[-8:]
        loss = losses.mean().item()
        self.seen.append(loss)
        if not recent or loss >= sum(recent) / len(recent):
            self.chunk(start)


class Decayed(Learner):
    "Draws the adapter a hundredth towards nothing after every chunk"

    def __call__(self, start, losses):
        self.chunk(start)
        with torch.no_grad():
            for b in self.phi.B.values():
                b.mul_(0.99)
        self.phi.refresh()


class Replayed(Learner):
    "Learns one older chunk after every new one"

    def __init__(self, *args):
        super().__init__(*args)
        self.draw = random.Random(0)

    def __call__(self, start, losses):
        self.chunk(start)
        if start:
            older = self.draw.randrange(start // self.settings.chunk)
            self.chunk(older * self.settings.chunk)


class Delayed(Learner):
    "Learns a chunk while the next one is read, as two devices would: the adapter is one chunk late"

    def __init__(self, *args):
        super().__init__(*args)
        self.waits = None

    def __call__(self, start, losses):
        if self.waits is not None:
            self.chunk(self.waits)
        self.waits = start


VARIANTS = {
    'base': (replace(CHOSEN, epochs=0), Learner),
    'chosen': (CHOSEN, Learner),
    'two updates': (replace(CHOSEN, epochs=2), Learner),
    'long prefix': (replace(CHOSEN, train_context=1024), Learner),
    'published rate': (replace(CHOSEN, lr=5e-5), Learner),
    'lower rate': (replace(CHOSEN, lr=3e-4), Learner),
    'dropout': (replace(CHOSEN, dropout=0.05), Learner),
    'gated': (CHOSEN, Gated),
    'decay': (CHOSEN, Decayed),
    'replay': (CHOSEN, Replayed),
    'delayed': (CHOSEN, Delayed),
    'attention only': (replace(CHOSEN, targets='attention'), Learner),
    'queries only': (replace(CHOSEN, targets='q'), Learner),
    'down only': (replace(CHOSEN, targets='down'), Learner),
}


def read(lm, text, settings, learner):
    "Return the loss of every chunk, and the seconds of reading and of learning"
    losses = []
    read_s = learn_s = 0.0
    with temporary(lm.model, settings) as phi:
        reader = Reader(lm.model, settings)
        learner = learner(phi, text)
        for start in range(0, len(text) - settings.chunk + 1, settings.chunk):
            with stopwatch(text.device) as clock, phi.bank.attached([0]):
                found = reader.losses(text, start, start + settings.chunk, phi.version)
            read_s += clock['s']
            with stopwatch(text.device) as clock:
                if settings.epochs:
                    learner(start, found)
            learn_s += clock['s']
            losses.append(found.mean().item())
    return losses, read_s, learn_s


def main(path, out, tokens=65536, only=None):
    lm = load(dtype='bf16')
    rows = []
    if Path(out).exists():
        rows = [row for row in json.loads(Path(out).read_text()) if 'variant' in row]
    text = document_ids(lm, read_text(path))[: int(tokens)]
    for name in only.split(',') if only else VARIANTS:
        if any(row['variant'] == name for row in rows):
            continue
        settings, learner = VARIANTS[name]
        losses, read_s, learn_s = read(lm, text, settings, learner)
        perplexity = math.exp(sum(losses) / len(losses))
        about = dict(method='memory ablation', variant=name, text=Path(path).name, tokens=len(text))
        found = dict(perplexity=perplexity, losses=losses, read_s=read_s, learn_s=learn_s)
        rows.append(about | found | dict(settings=asdict(settings)))
        print(
            f'{name:<22} perplexity {perplexity:.3f}  learning {learn_s / (read_s + learn_s):.0%} of the time',
            flush=True,
        )
        save_rows(rows + [environment()], out)


if __name__ == '__main__':
    main(*sys.argv[1:])
