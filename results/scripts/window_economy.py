"""A small window that learns against the model's full window that does not: perplexity, FLOPs and time on the same chunks of a book

python results/scripts/window_economy.py TEXT READING.json OUT.json [EVERY]

READING.json is what `nld perplexity` wrote of both methods; every EVERYth chunk is compared.
"""

import json
import math
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.foundations.model_shape import read_flops, shape_of
from npu_lora_decoding.foundations.timing import stopwatch
from npu_lora_decoding.temp_lora.adapter import learn, temporary
from npu_lora_decoding.temp_lora.budget import learn_flops, memory_of
from npu_lora_decoding.temp_lora.cache_reuse import Reader
from npu_lora_decoding.temp_lora.generation import TempLoRA
from npu_lora_decoding.temp_lora.perplexity import change, document_ids, read_text

DTYPES = dict(bfloat16='bf16', float32='fp32')
FULL = 'full window'
SMALL = 'small window'
LEARNING = 'small window, learning'


def settings_of(row):
    "Return the settings of a row; files of version 0.1 call `max_repetition` guard"
    given = dict(row['settings'])
    if 'guard' in given:
        given['max_repetition'] = given.pop('guard')
    return TempLoRA(**given)


def fresh(lm, ids, settings, start):
    "Score the chunk at `start` with as many tokens before it as the window holds; return nats and seconds"
    with stopwatch(ids.device) as clock:
        losses = Reader(lm.model, settings).losses(ids, start, start + settings.chunk)
        nats = losses.double().sum().item()
    return nats, clock['s']


def learning(lm, ids, settings, start):
    "Return the seconds of scoring and of learning the chunk at `start`; what is learned is discarded"
    chunk = ids[max(0, start - settings.train_context) : start + settings.chunk]
    with temporary(lm.model, settings) as phi:
        with phi.bank.attached([0]):
            _, read_s = fresh(lm, ids, settings, start)
        with stopwatch(ids.device) as clock:
            learn(phi, chunk, settings.chunk)
    return read_s + clock['s']


def flops(shape, s):
    "Return the FLOPs of one chunk in the middle of a text: the window is read again, and what is new is learned"
    r = s.r if s.epochs else 0
    context = s.latest + s.chunk - 1
    return read_flops(shape, r, context, context, s.chunk) + s.epochs * learn_flops(
        shape, r, s.train_context + s.chunk - 1, s.chunk
    )


def measured(lm, ids, starts, full, small):
    "Return the full window's nats, and the seconds of all three ways, chunk by chunk"
    nats = []
    times = {FULL: [], SMALL: [], LEARNING: []}
    for start in starts:
        loss, seconds = fresh(lm, ids, full, start)
        nats.append(loss)
        times[FULL].append(seconds)
        times[SMALL].append(fresh(lm, ids, replace(small, epochs=0), start)[1])
        times[LEARNING].append(learning(lm, ids, small, start))
        perplexity = math.exp(sum(nats) / (len(nats) * small.chunk))
        print(f'{start:>9,}  full window {perplexity:.3f}', flush=True)
    return nats, times


def row(name, settings, nats, reference, times):
    "Return what is measured of one way of reading"
    tokens = [settings.chunk] * len(nats)
    by = change(nats, reference, tokens)
    ratios = sorted(own / full for own, full in zip(times[name], times[FULL]))
    quality = dict(perplexity=math.exp(sum(nats) / sum(tokens)), change=by.mean, interval=[by.low, by.high])
    time = dict(time=statistics.median(ratios), time_spread=[ratios[0], ratios[-1]])
    return dict(method='window economy', arm=name, chunks=len(nats)) | quality | time | dict(settings=asdict(settings))


def report(row):
    low, high = row['interval']
    print(
        f'{row["arm"]:<24} perplexity {row["perplexity"]:.3f} ({row["change"]:+.1f}%, {low:+.1f} to {high:+.1f})  '
        f'FLOPs {row["flops"]:.2f}  time {row["time"]:.2f}  memory {row["memory"]:.2f}'
    )


def main(text, reading, out, every=20):
    readings = {row['method']: row for row in json.loads(Path(reading).read_text())}
    base = readings['base']
    temp = readings['temp_lora']
    lm = load(dtype=DTYPES[base['dtype']])
    ids = document_ids(lm, read_text(text))
    small = settings_of(temp)
    full = TempLoRA(chunk=small.chunk, window=lm.context, epochs=0)
    old, learned = ({start: nats for start, nats, _ in row['chunks']} for row in (base, temp))
    stop = min(max(old), max(learned)) - small.chunk
    starts = [*range(full.latest, stop, int(every) * small.chunk)]
    nats, times = measured(lm, ids, starts, full, small)
    shape = shape_of(lm.model, small.targets)
    found = {
        FULL: (full, nats),
        SMALL: (replace(small, epochs=0), [old[start] for start in starts]),
        LEARNING: (small, [learned[start] for start in starts]),
    }
    rows = []
    for name, (settings, own) in found.items():
        counted = dict(
            flops=flops(shape, settings) / flops(shape, full),
            memory=memory_of(shape, settings) / memory_of(shape, full),
        )
        rows.append(row(name, settings, own, nats, times) | counted | dict(text=Path(text).name))
        report(rows[-1])
    save_rows(rows + [environment()], out)


if __name__ == '__main__':
    main(*sys.argv[1:])
