"""Keys that older versions of the adapter made, against keys computed anew: perplexity and time on the same chunks of a book

python results/scripts/cache_reuse.py TEXT OUT.json [TOKENS] [TARGETS,...] [WINDOW]   (what OUT.json holds already is left out)

Learning does not look at the cache, so one adapter serves both ways of reading: each chunk is read twice, in turns, and learned once.
"""

import json, math, statistics, sys
from dataclasses import asdict, replace
from pathlib import Path
import torch
from transformers import DynamicCache
from npu_lora_decoding.temp_lora.cache_reuse import Reader
from npu_lora_decoding.foundations.timing import stopwatch
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.temp_lora.perplexity import change, document_ids, read_text
from npu_lora_decoding.temp_lora.generation import TempLoRA
from npu_lora_decoding.temp_lora.adapter import learn, temporary

SETTINGS = TempLoRA(
    chunk=512, window=2560, context=512, train_context=128, epochs=1, lr=1e-3, dropout=0.0
)  # a prefill serves four chunks; in a window of 1,536 it serves two


class Fresh(Reader):
    "The same tokens in sight as the policy gives, and no stale key"

    def losses(self, text, start, stop, version=0):
        if self.ledger.spans and start + self.settings.chunk - self.ledger.first <= self.settings.window:
            self.cache = DynamicCache(config=self.model.config)
            with torch.no_grad():
                self.model.base_model(
                    text[None, self.ledger.first : self.ledger.stop], past_key_values=self.cache, use_cache=True
                )
        return super().losses(text, start, stop, version)


def read(lm, text, settings):
    "Return nats and seconds of every chunk for both readers, seconds of learning, and how many versions old the oldest key in sight was"
    nats, seconds, learned, ages = dict(stale=[], fresh=[]), dict(stale=[], fresh=[]), [], []
    with temporary(lm.model, settings) as phi:
        readers = dict(stale=Reader(lm.model, settings), fresh=Fresh(lm.model, settings))
        for i, start in enumerate(range(0, len(text) - settings.chunk + 1, settings.chunk)):
            for name in sorted(readers, reverse=i % 2 == 0):
                with stopwatch(text.device) as clock, phi.bank.attached([0]):
                    loss = readers[name].losses(text, start, start + settings.chunk, phi.version)
                nats[name].append(loss.double().sum().item())
                seconds[name].append(clock['s'])
            ages.append(phi.version - min(v for *_, v in readers['stale'].ledger.spans))
            with stopwatch(text.device) as clock:
                learn(phi, text[max(0, start - settings.train_context) : start + settings.chunk], settings.chunk)
            learned.append(clock['s'])
    return nats, seconds, learned, ages


def row(name, nats, seconds, learned, ages, settings):
    "Return what reuse costs in perplexity and saves in time"
    tokens = [settings.chunk - (i == 0) for i in range(len(learned))]
    by, ppl = change(nats['stale'], nats['fresh'], tokens), {k: math.exp(sum(v) / sum(tokens)) for k, v in nats.items()}
    n = (settings.window - settings.latest) // settings.chunk
    turns = range(n, len(learned), n)  # rounds of one prefill and the chunks that it serves
    ratio = lambda extra: sorted(
        sum(s + extra * l for s, l in zip(seconds['stale'][a : a + n], learned[a : a + n]))
        / sum(f + extra * l for f, l in zip(seconds['fresh'][a : a + n], learned[a : a + n]))
        for a in turns
    )
    about = lambda r: dict(median=statistics.median(r), spread=[r[0], r[-1]])
    return dict(
        method='cache reuse',
        targets=settings.targets,
        window=settings.window,
        perplexity_fresh=ppl['fresh'],
        perplexity_stale=ppl['stale'],
        change=by.mean,
        interval=[by.low, by.high],
        reading=about(ratio(0)),
        reading_and_learning=about(ratio(1)),
        oldest=max(ages),
        chunks=len(learned),
        nats=nats,
        settings=asdict(settings),
    )


def main(path, out, tokens=12288, only='all,q,down', window=SETTINGS.window):
    lm, rows = load(dtype='bf16'), []
    if Path(out).exists():
        rows = [r for r in json.loads(Path(out).read_text()) if 'targets' in r]
    text = document_ids(lm, read_text(path))[: int(tokens)]
    for targets in only.split(','):
        settings = replace(SETTINGS, targets=targets, window=int(window))
        if any((r['targets'], r['window']) == (targets, settings.window) for r in rows):
            continue
        rows.append(row(targets, *read(lm, text, settings), settings) | dict(text=Path(path).name))
        r = rows[-1]
        print(
            f'{targets:<6} fresh {r["perplexity_fresh"]:.3f}  stale {r["perplexity_stale"]:.3f} ({r["change"]:+.2f}%, {r["interval"][0]:+.2f} to {r["interval"][1]:+.2f})  reading {r["reading"]["median"]:.2f}  with learning {r["reading_and_learning"]["median"]:.2f}',
            flush=True,
        )
        save_rows(rows + [environment()], out)


if __name__ == '__main__':
    main(*sys.argv[1:])
