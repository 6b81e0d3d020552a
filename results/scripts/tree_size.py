"""How much faster decoding gets with trees of each size, as measured and as the cost curve predicts, and where the time of a step goes

python results/scripts/tree_size.py OUT.json   (nothing else should run on the machine)
"""

import statistics, sys
from pathlib import Path
from npu_lora_decoding.hass.acceptance import Text, measure_acceptance
from npu_lora_decoding.foundations.timing import stopwatch
from npu_lora_decoding.hass.head import draft_rows, target_weights
from npu_lora_decoding.hass.checkpoint import load_head
from npu_lora_decoding.hass.features import target_features
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.foundations.models import encode_one
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.decoding.runner import CompiledRunner
from npu_lora_decoding.speculation.adaptive import pass_seconds
from npu_lora_decoding.speculation.head_drafter import HASS
from npu_lora_decoding.foundations.tasks import read_jsonl

import torch

HEADS, SIZES = Path(__file__).parent.parent / 'heads', (2, 4, 8, 16, 32)
DEPTH, TOP_K = 5, 8


def clocked(call, times, device):
    "Return `call`, which notes how long it took"

    def timed(*args):
        with stopwatch(device) as clock:
            out = call(*args)
        times.append(clock['s'])
        return out

    return timed


class Clocked(HASS):
    "A head whose drafts, and whose target's passes, are timed"

    def bind(self, rows):
        guesses, self.drafts, self.passes = super().bind(rows), [], []
        guesses.propose, rows.forward = clocked(guesses.propose, self.drafts, rows.model.device), clocked(
            rows.forward, self.passes, rows.model.device
        )
        return guesses


def decode(lm, prompt, n, drafter):
    "Return what was written, and seconds: a token, and the medians of a whole step, of its pass and of its draft"
    out = lm.generate(prompt, drafter=drafter, max_new_tokens=n, eos_token_id=None, compile=True, record=False)
    steps = [s.seconds for s in out.steps[1:]]
    middle = lambda times: statistics.median(times) if times else None
    return (
        out,
        sum(steps) / (len(out.tokens[0]) - 1),
        middle(steps),
        middle(getattr(drafter, 'passes', [])),
        middle(getattr(drafter, 'drafts', [])),
    )


def predicted_tau(lm, head, prompts, answers):
    "Return the tokens a pass of each size, from a replay against the answers"
    frozen, ids = target_weights(lm.model), [torch.cat([p, torch.tensor(a)]) for p, a in zip(prompts, answers)]
    texts = [Text(x, len(p), f) for x, p, f in zip(ids, prompts, target_features(lm, ids))]
    return {
        n: measure_acceptance(
            head,
            frozen.embed,
            draft_rows(head, frozen),
            texts,
            head.vocab,
            (1,),
            dict(depth=DEPTH - 1, top_k=TOP_K, nodes=n),
        )[f'tree {n}'].tau
        for n in SIZES
    }


def costs(lm, prompt, n):
    "Return seconds of a pass of each size, measured as a drafter does it at load"
    rows = CompiledRunner(
        lm.model, ('expert',), 1, len(prompt) + n, draft_capacity=max(SIZES), keep_hidden=True, max_draft_depth=DEPTH
    )
    with torch.no_grad():
        rows.prefill(prompt[None], torch.ones_like(prompt)[None])
        return pass_seconds(rows, (1, *SIZES), rounds=15)


def main(out, questions=6, new_tokens=64, rounds=3):
    lm = load(dtype='bf16')
    head = load_head(HEADS / 'smollm2-135m', lm.model)
    prompts = [encode_one(lm, q.prompt) for q in read_jsonl(HEADS / 'questions.jsonl', answer=None)[-questions:]]
    ways = {1: None} | {
        n: Clocked(HEADS / 'smollm2-135m', nodes=n, depth=DEPTH, top_k=TOP_K, adaptive=False) for n in SIZES
    }
    answers = [[t.id for t in decode(lm, p, new_tokens, None)[0].tokens[0]] for p in prompts]
    for drafter in ways.values():
        decode(lm, prompts[0], new_tokens, drafter)  # compiles
    found = {n: [] for n in ways}
    for _ in range(rounds):
        for prompt in prompts:
            for n, drafter in ways.items():
                found[n].append(decode(lm, prompt, new_tokens, drafter))
    cost, tau, plain = (
        costs(lm, prompts[0], new_tokens),
        predicted_tau(lm, head, prompts, answers),
        [f[1] for f in found[1]],
    )
    middle = lambda n, k: statistics.median(f[k] for f in found[n])
    rows = []
    for n in SIZES:
        ratios, step, passed, draft = (
            sorted(p / f[1] for p, f in zip(plain, found[n])),
            middle(n, 2),
            middle(n, 3),
            middle(n, 4),
        )
        rows.append(
            dict(
                method='tree size',
                nodes=n,
                speedup=statistics.median(ratios),
                spread=(ratios[0], ratios[-1]),
                predicted=tau[n] * cost[1] / (cost[n] + draft),
                tau=statistics.mean(f[0].tau for f in found[n]),
                predicted_tau=tau[n],
                cost=cost[n] / cost[1],
                draft=draft / cost[1],
                shares=dict(target=passed / step, draft=draft / step, rest=1 - (passed + draft) / step),
            )
        )
        print(rows[-1], flush=True)
    save_rows(rows + [environment()], out)


if __name__ == '__main__':
    main(sys.argv[1])
