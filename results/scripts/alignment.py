"""Harmonised alignment, efficient form against the literal one: seconds and peak memory of a training step

python results/scripts/alignment.py OUT.json   (nothing else should run on the machine)
"""

import json
import subprocess
import sys
import torch
from transformers import AutoConfig
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.foundations.models import embedded_folder
from npu_lora_decoding.foundations.timing import peak_memory, time_interleaved
from npu_lora_decoding.hass.alignment import aligned_step, next_inputs
from npu_lora_decoding.hass.head import DraftHead, head_config
from npu_lora_decoding.hass.initialization import random_start

LENGTHS = ((256, 4), (512, 2), (1024, 1))  # Tokens of a row, and rows
STEPS = (1, 3, 5)
ROUNDS = 3


def visible_keys(steps, segments):
    "Return which key of which step each column attends to `(b, steps, t, t)`: one step for each column, within a segment"
    t = segments.shape[1]
    distance = torch.arange(t)[:, None] - torch.arange(t)
    step = (steps - distance).clamp(min=1)
    sees = torch.stack([(distance >= 0) & (step == s + 1) for s in range(steps)])
    return sees & (segments[:, None, :, None] == segments[:, None, None])


def literal_attention(q, keys, values, segments):
    "Return attention over all steps' keys at once, `(steps, t, t)` scores, of which the mask leaves one step for each column"
    _, h, _, k = q.shape
    sees = visible_keys(len(keys), segments)
    keys, values = (
        torch.stack(x, 2).repeat_interleave(h // x[0].shape[1], 1) for x in (keys, values)
    )  # (b, h, j, t, k)
    scores = (q[:, :, None] @ keys.mT).float() * k**-0.5
    scores = scores.masked_fill(~sees[:, None], torch.finfo(torch.float32).min)
    p = scores.permute(0, 1, 3, 2, 4).flatten(3).softmax(-1).to(q.dtype)
    return p @ values.flatten(2, 3)


def literal(head, e, f, segments, rotations, target, n):
    "Make all steps in one graph and go back through them together"
    inputs = [f]
    us = []
    loss = 0.0
    for _ in range(n):
        us.append(head.fuse_inputs(e, inputs[-1]))
        keys, values = zip(*(head.qkv(u, rotations, 'kv') for u in us))
        (q,) = head.qkv(us[-1], rotations, 'q')
        drafted = head.finish(us[-1], literal_attention(q, keys, values, segments))
        loss = loss + (drafted - target).float().square().mean()
        inputs.append(next_inputs(inputs[-1], drafted, segments))
    loss.backward()
    return loss.item()


def efficient(head, e, f, segments, rotations, target, n):
    "Make each step and go back through it before the next"
    inputs = [f]
    total = 0.0
    for _ in range(n):
        drafted = aligned_step(head, e, inputs, rotations, segments)
        loss = (drafted - target).float().square().mean()
        loss.backward()
        total += loss.item()
        inputs.append(next_inputs(inputs[-1], drafted, segments))
    return total


FORMS = dict(literal=literal, efficient=efficient)


def case(t, b, dtype=torch.bfloat16):
    "Return a head of the embedded model's size and random inputs for it"
    g = generator(0)
    config = AutoConfig.from_pretrained(embedded_folder())
    head = random_start(DraftHead(head_config(config))).to(dtype)
    e, f, target = (torch.randn(b, t, config.hidden_size, generator=g).to(dtype) for _ in range(3))
    segments = torch.zeros(b, t, dtype=torch.long)
    rotations = head.rotations(torch.arange(t).expand(b, t))
    return head, e, f, segments, rotations, target


def alone(form, t, b, n):
    "Print loss and growth of the peak memory of one form, for a process of its own"
    args = case(t, b)
    with peak_memory() as before:
        pass
    with peak_memory() as peak:
        loss = FORMS[form](*args, n)
    print(json.dumps(dict(loss=loss, mb=peak['mb'] - before['mb'])))


def memory_of(form, t, b, n):
    "Return loss and memory of one form, from a process of its own"
    command = [sys.executable, __file__, form, str(t), str(b), str(n)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(t, b, n):
    "Yield a row for each form: both timed in turns, memory measured alone"
    args = case(t, b)
    times = time_interleaved({name: (lambda f=f: f(*args, n)) for name, f in FORMS.items()}, ROUNDS)
    first = times['literal'].median
    for form in FORMS:
        time = times[form]
        ratios = dict(step_to_literal=time.median / first, spread=(time.low / first, time.high / first))
        yield dict(method='alignment', form=form, t=t, batch=b, n=n) | ratios | memory_of(form, t, b, n)


def main(out):
    rows = []
    for t, b in LENGTHS:
        for n in STEPS:
            for row in rows_of(t, b, n):
                rows.append(row)
                print(row, flush=True)
    save_rows(rows + [environment()], out)


if __name__ == '__main__':
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        alone(sys.argv[1], *map(int, sys.argv[2:]))
