"""How often a sampled text is the same alone and in batches of 4 and 16, in bf16, beside greedy decoding

python results/scripts/sampled_bf16.py OUT.json [--prompts 48] [--new-tokens 24]

In fp32 all are equal (`nld verify`). In bf16 the sums of a batch round in another order, and where the two best (noisy) scores lie
closer than that, texts part.
"""

import argparse
import math
import torch
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding.sampling import Plain
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.evaluation.equivalence import check
from npu_lora_decoding.evaluation.judging import batches_of
from npu_lora_decoding.evaluation.methods import SAMPLING, load_target, speculative
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.foundations.tasks import prompts_of

BATCHES = (4, 16)
TARGETS = dict(greedy=Plain(), cold=CoLD(0.1, 0.5))
TEMPERATURES = (None, 0.7, 1.0)  # None takes the best token


def remembered(run):
    "Return the same way of decoding, one prompt after the other, each of them once"
    known = {}

    def alone(ids, mask, n):
        rows = []
        for row, m in zip(ids, mask):
            prompt = row[m.bool()][None]
            key = tuple(prompt[0].tolist())
            if key not in known:
                known[key] = run(prompt, torch.ones_like(prompt), n)
            rows.append(known[key])
        return torch.cat(rows)

    return alone


def compared(lm, folder, asked, name, temperature):
    "Yield a row for each batch size: how many texts, and tokens before the first difference, are those of each prompt alone"
    target = TARGETS[name]
    drawn = {} if temperature is None else SAMPLING | dict(temperature=temperature)
    run = speculative(target, lambda: None, **drawn).build(lm, folder)
    alone = remembered(run)
    for size, batches in asked.batches.items():
        label = f'{name} at {temperature}, batch of {size}'
        how = dict(batches=batches, new_tokens=asked.new_tokens, temperature=temperature)
        found = check(lm, label, target, run, alone, **how)
        leads = [d.lead for d in found.differences]
        seen = [lead for lead in leads if math.isfinite(lead)]
        yield dict(
            method='sampled bf16',
            target=name,
            temperature=temperature,
            batch=size,
            prompts=found.prompts,
            equal_texts=found.equal / found.prompts,
            equal_tokens=found.tokens / (found.prompts * asked.new_tokens),
            largest_lead=max(seen, default=0.0),
            forbidden=len(leads) - len(seen),  # the other token is not plausible here, by a rounding
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('out')
    parser.add_argument('--prompts', default='48')
    parser.add_argument('--new-tokens', type=int, default=24)
    asked = parser.parse_args()
    lm, folder = load_target(None, None, 'bf16')
    items = prompts_of(asked.prompts, None)
    asked.batches = {size: batches_of(lm, items, size) for size in BATCHES}
    rows = []
    for name in TARGETS:
        for temperature in TEMPERATURES:
            for row in compared(lm, folder, asked, name, temperature=temperature):
                rows.append(row | dict(new_tokens=asked.new_tokens, model=lm.name, dtype='bf16'))
                print(rows[-1], flush=True)
                save_rows(rows + [environment()], asked.out)


if __name__ == '__main__':
    main()
