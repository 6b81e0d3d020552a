"""A small window that learns against the model's full window that does not: perplexity, work and time on the same chunks of a book

python results/scripts/window_economy.py TEXT READING.json OUT.json [EVERY]   (READING.json is what `nld perplexity` wrote of both methods; every EVERYth chunk is compared)
"""

import json, math, statistics, sys
from dataclasses import asdict, replace
from pathlib import Path
from npu_lora_decoding.temp_lora.cache_reuse import Reader
from npu_lora_decoding.foundations.timing import stopwatch
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.temp_lora.budget import learn_flops, memory_of
from npu_lora_decoding.foundations.model_shape import read_flops, shape_of
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.temp_lora.perplexity import change, document_ids, read_text
from npu_lora_decoding.temp_lora.generation import TempLoRA
from npu_lora_decoding.temp_lora.adapter import learn, temporary


def fresh(lm, ids, settings, start):
    "Score the chunk at `start` with as many tokens before it as the window holds; return nats and seconds"
    with stopwatch(ids.device) as clock:
        nats = Reader(lm.model, settings).losses(ids, start, start + settings.chunk).double().sum().item()
    return nats, clock['s']


def learning(lm, ids, settings, start):
    "Return the seconds of scoring and of learning the chunk at `start`; what is learned is thrown away"
    with temporary(lm.model, settings) as phi:
        with phi.bank.attached([0]):
            _, read_s = fresh(lm, ids, settings, start)
        with stopwatch(ids.device) as clock:
            learn(phi, ids[max(0, start - settings.train_context) : start + settings.chunk], settings.chunk)
    return read_s + clock['s']


def work(shape, s):
    "Return the FLOPs of one chunk in the middle of a text: the window is read anew, and what is new is learned"
    r, m = s.r if s.epochs else 0, s.latest + s.chunk - 1
    return read_flops(shape, r, m, m, s.chunk) + s.epochs * learn_flops(
        shape, r, s.train_context + s.chunk - 1, s.chunk
    )


def main(text, reading, out, every=20):
    base, temp = (
        next(r for r in json.loads(Path(reading).read_text()) if r['method'] == m) for m in ('base', 'temp_lora')
    )
    lm = load(dtype=dict(bfloat16='bf16', float32='fp32')[base['dtype']])
    ids = document_ids(lm, read_text(text))
    small = TempLoRA(
        **{dict(guard='max_repetition').get(k, k): v for k, v in temp['settings'].items()}
    )  # guard: its name in older files
    full = TempLoRA(chunk=small.chunk, window=lm.context, epochs=0)
    old, learned = ({c[0]: c[1] for c in r['chunks']} for r in (base, temp))
    starts = [s for s in range(full.latest, min(max(old), max(learned)) - small.chunk, int(every) * small.chunk)]
    nats, times = [], {'full window': [], 'small window': [], 'small window, learning': []}
    for s in starts:
        loss, seconds = fresh(lm, ids, full, s)
        nats.append(loss)
        times['full window'].append(seconds)
        times['small window'].append(fresh(lm, ids, replace(small, epochs=0), s)[1])
        times['small window, learning'].append(learning(lm, ids, small, s))
        print(f'{s:>9,}  full window {math.exp(sum(nats) / (len(nats) * small.chunk)):.3f}', flush=True)
    found = {
        'full window': (full, nats),
        'small window': (replace(small, epochs=0), [old[s] for s in starts]),
        'small window, learning': (small, [learned[s] for s in starts]),
    }
    shape, tokens, rows = shape_of(lm.model, small.targets), [small.chunk] * len(starts), []
    for name, (s, loss) in found.items():
        ratios = sorted(a / b for a, b in zip(times[name], times['full window']))
        by = change(loss, nats, tokens)
        rows.append(
            dict(
                method='window economy',
                arm=name,
                text=Path(text).name,
                chunks=len(starts),
                perplexity=math.exp(sum(loss) / sum(tokens)),
                change=by.mean,
                interval=[by.low, by.high],
                flops=work(shape, s) / work(shape, full),
                time=statistics.median(ratios),
                time_spread=[ratios[0], ratios[-1]],
                memory=memory_of(shape, s) / memory_of(shape, full),
                settings=asdict(s),
            )
        )
        r = rows[-1]
        print(
            f'{name:<24} perplexity {r["perplexity"]:.3f} ({by.mean:+.1f}%, {by.low:+.1f} to {by.high:+.1f})  work {r["flops"]:.2f}  time {r["time"]:.2f}  memory {r["memory"]:.2f}'
        )
    save_rows(rows + [environment()], out)


if __name__ == '__main__':
    main(*sys.argv[1:])
