"""Harmonised alignment, efficient form against the literal one: seconds and peak memory of a training step

python results/scripts/alignment.py OUT.json   (nothing else should run on the machine)
"""

import json, subprocess, sys
import torch
from npu_lora_decoding.hass.alignment import aligned_step, target_mask, own_step_mask, next_inputs
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.foundations.timing import peak_memory, time_interleaved
from npu_lora_decoding.hass.head import DraftHead, head_config
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.foundations.models import embedded_folder
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.hass.initialization import random_start
from transformers import AutoConfig


def literal_attention(q, keys, values, segments):
    "Return attention over all steps' keys at once, `(steps, t, t)` scores, of which the mask leaves one step for each column"
    (b, h, t, k), j = q.shape, len(keys)
    distance = torch.arange(t)[:, None] - torch.arange(t)
    sees = torch.stack([(distance >= 0) & ((j - distance).clamp(min=1) == s + 1) for s in range(j)]) & (
        segments[:, None, :, None] == segments[:, None, None]
    )
    keys, values = (
        torch.stack(x, 2).repeat_interleave(h // x[0].shape[1], 1) for x in (keys, values)
    )  # (b, h, j, t, k)
    scores = (q[:, :, None] @ keys.mT).float() * k**-0.5
    p = (
        scores.masked_fill(~sees[:, None], torch.finfo(torch.float32).min)
        .permute(0, 1, 3, 2, 4)
        .flatten(3)
        .softmax(-1)
        .to(q.dtype)
    )
    return p @ values.flatten(2, 3)


def literal(head, e, f, segments, rotations, target, n):
    "Make all steps in one graph and go back through them together"
    inputs, us, loss = [f], [], 0.0
    for j in range(n):
        us.append(head.fuse_inputs(e, inputs[-1]))
        pairs = [head.qkv(u, rotations, 'kv') for u in us]
        guess = head.finish(us[-1], literal_attention(*head.qkv(us[-1], rotations, 'q'), *zip(*pairs), segments))
        loss = loss + (guess - target).float().square().mean()
        inputs.append(next_inputs(inputs[-1], guess, segments))
    loss.backward()
    return loss.item()


def efficient(head, e, f, segments, rotations, target, n):
    "Make each step and go back through it before the next"
    inputs, total = [f], 0.0
    for j in range(n):
        guess = aligned_step(head, e, inputs, rotations, segments)
        loss = (guess - target).float().square().mean()
        loss.backward()
        total += loss.item()
        inputs.append(next_inputs(inputs[-1], guess, segments))
    return total


FORMS = dict(literal=literal, efficient=efficient)


def case(t, b, dtype=torch.bfloat16):
    "Return a head of the embedded model's size and random inputs for it"
    g, config = generator(0), AutoConfig.from_pretrained(embedded_folder())
    head, d = random_start(DraftHead(head_config(config))).to(dtype), config.hidden_size
    e, f, target = (torch.randn(b, t, d, generator=g).to(dtype) for _ in range(3))
    return head, e, f, torch.zeros(b, t, dtype=torch.long), head.rotations(torch.arange(t).expand(b, t)), target


def alone(form, t, b, n):
    "Print loss and growth of the peak memory of one form, for a process of its own"
    args = case(t, b)
    with peak_memory() as before:
        pass
    with peak_memory() as peak:
        loss = FORMS[form](*args, n)
    print(json.dumps(dict(loss=loss, mb=peak['mb'] - before['mb'])))


def main(out, cases=((256, 4), (512, 2), (1024, 1)), ns=(1, 3, 5), rounds=3):
    "Time both forms in turns, and measure each one's memory in a process of its own"
    rows = []
    for t, b in cases:
        for n in ns:
            args = case(t, b)
            times = time_interleaved({name: (lambda f=f: f(*args, n)) for name, f in FORMS.items()}, rounds)
            for form in FORMS:
                own = json.loads(
                    subprocess.run(
                        [sys.executable, __file__, form, str(t), str(b), str(n)],
                        check=True,
                        capture_output=True,
                        text=True,
                    ).stdout.splitlines()[-1]
                )
                rows.append(
                    dict(
                        method='alignment',
                        form=form,
                        t=t,
                        batch=b,
                        n=n,
                        step_to_literal=times[form].median / times['literal'].median,
                        spread=(times[form].low / times['literal'].median, times[form].high / times['literal'].median),
                        **own
                    )
                )
                print(rows[-1], flush=True)
    save_rows(rows + [environment()], out)


if __name__ == '__main__':
    main(sys.argv[1]) if len(sys.argv) == 2 else alone(sys.argv[1], *map(int, sys.argv[2:]))
