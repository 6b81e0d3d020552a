"""What shared noise costs: choosing a token with it and without it, beside whole decoding steps, alone and in a tree of 16

python results/scripts/noise_cost.py OUT.json [--rounds 40] [--tokens 32] [--eager]   (nothing else should run on the machine)

All take turns in one process. The cost of noise is what choosing takes longer than without it, as a share of a step that draws
with noise; without it the same token is chosen greedily, at the same nodes.
"""

import argparse
import npu_lora_decoding  # before torch: it sets how torch's threads wait
import torch
from pathlib import Path
from statistics import median, quantiles
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.decoding.sampling import DecodingState, Plain, SamplingRules, choose_tokens, shared_noise
from npu_lora_decoding.decoding.tree import Tree
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.foundations.timing import stopwatch
from npu_lora_decoding.speculation.head_drafter import HASS

HEAD = Path(__file__).parent.parent / 'heads' / 'smollm2-135m'
PROMPT = 'Why is the sky blue?'
SIZES = (1, 16)
SAMPLING = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, seed=0)


def bush(size):
    "Return a tree whose nodes have two children each, with different tokens"
    parents = torch.arange(size)[None].sub(1).div(2, rounding_mode='floor')
    parents[:, 0] = -1
    return Tree(torch.arange(size)[None] + 100, parents)


def choosing(vocab, size, noisy):
    "Return a function that chooses the tokens at all nodes of a tree of bf16 logits"
    logits = torch.randn(1, size, vocab, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.arange(20)[None]
    noise = shared_noise(ids, torch.ones_like(ids), seed=0) if noisy else None
    state = DecodingState([ids[0]], torch.zeros(1, dtype=torch.bool), 0, prompt=10, noise=noise)
    rules = SamplingRules(sample=noisy, noise=noise)
    return lambda: choose_tokens(Plain(), bush(size), (logits,), state, rules)


def seconds_of(call, device):
    with stopwatch(device) as clock:
        call()
    return clock['s']


def stepping(lm, size, compiled, tokens):
    "Return a function that decodes and gives the seconds of its steps, the first of which reads the prompt"
    drafter = None if size == 1 else HASS(HEAD, nodes=size, adaptive=False)
    how = dict(max_new_tokens=tokens, eos_token_id=None, record=False, compile=compiled, **SAMPLING)
    return lambda: [step.seconds for step in lm.generate(PROMPT, drafter=drafter, **how).steps[1:]]


def measured(lm, size, asked, compiled):
    "Return a row: medians of choosing with and without noise, and of a step"
    vocab = lm.model.config.vocab_size
    plain, noisy = (choosing(vocab, size, noise) for noise in (False, True))
    steps = stepping(lm, size, compiled, asked.tokens)
    found = dict(plain=[], noisy=[], step=[])
    for call in (plain, noisy, steps):  # compiles, and fills tables
        call()
    for _ in range(asked.rounds):
        found['plain'].append(seconds_of(plain, lm.device))
        found['noisy'].append(seconds_of(noisy, lm.device))
        found['step'] += steps()
    middle = {name: median(times) for name, times in found.items()}
    shares = [(noisy - plain) / middle['step'] for noisy, plain in zip(found['noisy'], found['plain'])]
    spread = quantiles(shares, n=4)[::2]
    about = dict(method='noise cost', nodes=size, compiled=compiled, rounds=asked.rounds)
    return about | dict(share=median(shares), quartiles=spread) | middle


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('out')
    parser.add_argument('--rounds', type=int, default=40)
    parser.add_argument('--tokens', type=int, default=32)
    parser.add_argument('--eager', action='store_true', help='leave the compiled rows out')
    asked = parser.parse_args()
    lm = load(dtype='bf16')
    rows = []
    for compiled in (False,) if asked.eager else (False, True):
        for size in SIZES:
            rows.append(measured(lm, size, asked, compiled))
            print(rows[-1], flush=True)
            save_rows(rows + [environment()], asked.out)


if __name__ == '__main__':
    main()
