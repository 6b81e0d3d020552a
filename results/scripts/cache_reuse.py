"""Keys that older versions of the adapter made, against fresh ones: perplexity and time on the same chunks of a book

python results/scripts/cache_reuse.py TEXT OUT.json [TOKENS] [TARGETS,...] [WINDOW]   (rows that OUT.json holds are left out)

Learning does not look at the KV cache, so one adapter serves both ways of reading: each chunk is read twice, in turns, and learned
once.
"""

import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
import torch
from transformers import DynamicCache
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.foundations.timing import stopwatch
from npu_lora_decoding.temp_lora.adapter import learn, temporary
from npu_lora_decoding.temp_lora.cache_reuse import Reader
from npu_lora_decoding.temp_lora.generation import TempLoRA
from npu_lora_decoding.temp_lora.perplexity import change, document_ids, read_text

# A prefill serves four chunks; in a window of 1,536 it serves two
SETTINGS = TempLoRA(chunk=512, window=2560, context=512, train_context=128, epochs=1, lr=1e-3, dropout=0.0)


class Fresh(Reader):
    "The same tokens in context as the policy gives, and no stale key"

    def losses(self, text, start, stop, version=0):
        first = self.ledger.first
        if self.ledger.spans and start + self.settings.chunk - first <= self.settings.window:
            self.cache = DynamicCache(config=self.model.config)
            with torch.no_grad():
                self.model.base_model(text[None, first : self.ledger.stop], past_key_values=self.cache, use_cache=True)
        return super().losses(text, start, stop, version)


@dataclass
class Reading:
    "What both readers found, chunk by chunk"

    nats: dict = field(default_factory=lambda: dict(stale=[], fresh=[]))
    seconds: dict = field(default_factory=lambda: dict(stale=[], fresh=[]))
    learned: list = field(default_factory=list)  # Seconds of learning
    ages: list = field(default_factory=list)  # How many versions old the oldest key in context was


def read(lm, text, settings):
    "Return what both readers found"
    found = Reading()
    with temporary(lm.model, settings) as phi:
        readers = dict(stale=Reader(lm.model, settings), fresh=Fresh(lm.model, settings))
        for i, start in enumerate(range(0, len(text) - settings.chunk + 1, settings.chunk)):
            stop = start + settings.chunk
            for name in sorted(readers, reverse=i % 2 == 0):
                with stopwatch(text.device) as clock, phi.bank.attached([0]):
                    loss = readers[name].losses(text, start, stop, phi.version)
                found.nats[name].append(loss.double().sum().item())
                found.seconds[name].append(clock['s'])
            found.ages.append(phi.version - min(version for *_, version in readers['stale'].ledger.spans))
            with stopwatch(text.device) as clock:
                learn(phi, text[max(0, start - settings.train_context) : stop], settings.chunk)
            found.learned.append(clock['s'])
    return found


def time_ratios(found, settings, learning):
    "Return the time of stale keys over that of fresh ones, round by round of a prefill and the chunks that it serves; sorted"
    n = (settings.window - settings.latest) // settings.chunk
    ratios = []
    for first in range(n, len(found.learned), n):
        chunks = slice(first, first + n)
        learned = learning * sum(found.learned[chunks])
        ratios.append((sum(found.seconds['stale'][chunks]) + learned) / (sum(found.seconds['fresh'][chunks]) + learned))
    return sorted(ratios)


def summary(ratios):
    return dict(median=statistics.median(ratios), spread=[ratios[0], ratios[-1]])


def row(found, settings):
    "Return what reuse costs in perplexity and saves in time"
    tokens = [settings.chunk - (i == 0) for i in range(len(found.learned))]
    by = change(found.nats['stale'], found.nats['fresh'], tokens)
    perplexity = {f'perplexity_{k}': math.exp(sum(v) / sum(tokens)) for k, v in found.nats.items()}
    times = dict(
        reading=summary(time_ratios(found, settings, learning=0)),
        reading_and_learning=summary(time_ratios(found, settings, learning=1)),
    )
    about = dict(method='cache reuse', targets=settings.targets, window=settings.window)
    gain = dict(change=by.mean, interval=[by.low, by.high])
    rest = dict(oldest=max(found.ages), chunks=len(found.learned), nats=found.nats, settings=asdict(settings))
    return about | perplexity | gain | times | rest


def report(row):
    low, high = row['interval']
    print(
        f'{row["targets"]:<6} fresh {row["perplexity_fresh"]:.3f}  stale {row["perplexity_stale"]:.3f} '
        f'({row["change"]:+.2f}%, {low:+.2f} to {high:+.2f})  reading {row["reading"]["median"]:.2f}  '
        f'with learning {row["reading_and_learning"]["median"]:.2f}',
        flush=True,
    )


def main(path, out, tokens=12288, only='all,q,down', window=SETTINGS.window):
    lm = load(dtype='bf16')
    rows = []
    if Path(out).exists():
        rows = [r for r in json.loads(Path(out).read_text()) if 'targets' in r]
    text = document_ids(lm, read_text(path))[: int(tokens)]
    for targets in only.split(','):
        settings = replace(SETTINGS, targets=targets, window=int(window))
        if any((r['targets'], r['window']) == (targets, settings.window) for r in rows):
            continue
        rows.append(row(read(lm, text, settings), settings) | dict(text=Path(path).name))
        report(rows[-1])
        save_rows(rows + [environment()], out)


if __name__ == '__main__':
    main(*sys.argv[1:])
