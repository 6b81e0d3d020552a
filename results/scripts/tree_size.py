"""How much faster decoding gets with trees of each size, measured and predicted by the cost curve, and where the time of a step goes

python results/scripts/tree_size.py OUT.json   (nothing else should run on the machine)
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
import torch
from npu_lora_decoding.decoding.loop import Result, load
from npu_lora_decoding.decoding.runner import CompiledRunner
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.foundations.models import encode_one
from npu_lora_decoding.foundations.tasks import read_jsonl
from npu_lora_decoding.foundations.timing import stopwatch
from npu_lora_decoding.hass.acceptance import Text, measure_acceptance
from npu_lora_decoding.hass.checkpoint import load_head
from npu_lora_decoding.hass.features import target_features
from npu_lora_decoding.hass.head import draft_rows, target_weights
from npu_lora_decoding.speculation.adaptive import pass_seconds
from npu_lora_decoding.speculation.head_drafter import HASS

HEADS = Path(__file__).parent.parent / 'heads'
HEAD = HEADS / 'smollm2-135m'
SIZES = (2, 4, 8, 16, 32)
DEPTH = 5
TOP_K = 8
QUESTIONS = 6
NEW_TOKENS = 64
ROUNDS = 3


# --- One decoding, clocked


def clocked(call, times, device):
    "Return `call`, which notes how long it took"

    def timed(*args):
        with stopwatch(device) as clock:
            out = call(*args)
        times.append(clock['s'])
        return out

    return timed


class Clocked(HASS):
    "A head whose drafts, and whose target's forward passes, are timed"

    def bind(self, rows):
        proposer = super().bind(rows)
        device = rows.model.device
        self.drafts = []
        self.passes = []
        proposer.propose = clocked(proposer.propose, self.drafts, device)
        rows.forward = clocked(rows.forward, self.passes, device)
        return proposer


@dataclass
class Decoded:
    "A text, and seconds: a token, and the medians of a whole step, of its forward pass and of its draft"

    out: Result
    token: float
    step: float
    target: float | None
    draft: float | None


def median(times):
    return statistics.median(times) if times else None


def decode(lm, prompt, drafter):
    "Return the text and its times"
    out = lm.generate(prompt, drafter=drafter, max_new_tokens=NEW_TOKENS, eos_token_id=None, compile=True, record=False)
    steps = [step.seconds for step in out.steps[1:]]
    token = sum(steps) / (len(out.tokens[0]) - 1)
    parts = (median(getattr(drafter, name, [])) for name in ('passes', 'drafts'))
    return Decoded(out, token, median(steps), *parts)


# --- What is predicted


def predicted_tau(lm, head, prompts, answers):
    "Return the tokens per forward pass of each size, from a replay against the answers"
    frozen = target_weights(lm.model)
    ids = [torch.cat([prompt, torch.tensor(answer)]) for prompt, answer in zip(prompts, answers)]
    features = target_features(lm, ids)
    texts = [Text(x, len(prompt), f) for x, prompt, f in zip(ids, prompts, features)]
    found = {}
    for n in SIZES:
        tree = dict(depth=DEPTH - 1, top_k=TOP_K, nodes=n)
        rows = draft_rows(head, frozen)
        found[n] = measure_acceptance(head, frozen.embed, rows, texts, vocab=head.vocab, chain=(1,), tree=tree)[
            f'tree {n}'
        ].tau
    return found


def costs(lm, prompt):
    "Return seconds of a forward pass of each size, measured as a drafter does it at load"
    runner = CompiledRunner(
        lm.model,
        ('expert',),
        1,
        len(prompt) + NEW_TOKENS,
        draft_capacity=max(SIZES),
        keep_hidden=True,
        max_draft_depth=DEPTH,
    )
    with torch.no_grad():
        runner.prefill(prompt[None], torch.ones_like(prompt)[None])
        return pass_seconds(runner, (1, *SIZES), rounds=15)


# --- Both together


def measured(lm, prompts):
    "Return the decodings of every size, 1 being none, all taking turns"
    drafters = {n: Clocked(HEAD, nodes=n, depth=DEPTH, top_k=TOP_K, adaptive=False) for n in SIZES}
    drafters = {1: None} | drafters
    for drafter in drafters.values():
        decode(lm, prompts[0], drafter)  # compiles
    found = {n: [] for n in drafters}
    for _ in range(ROUNDS):
        for prompt in prompts:
            for n, drafter in drafters.items():
                found[n].append(decode(lm, prompt, drafter))
    return found


def row(n, found, cost, tau):
    "Return what is measured and predicted of trees of `n` nodes"
    step, target, draft = (
        statistics.median(getattr(one, name) for one in found[n]) for name in ('step', 'target', 'draft')
    )
    ratios = sorted(plain.token / one.token for plain, one in zip(found[1], found[n]))
    speed = dict(speedup=statistics.median(ratios), spread=(ratios[0], ratios[-1]))
    predicted = dict(predicted=tau * cost[1] / (cost[n] + draft), predicted_tau=tau)
    shares = dict(target=target / step, draft=draft / step, rest=1 - (target + draft) / step)
    mean_tau = statistics.mean(one.out.tau for one in found[n])
    rest = dict(tau=mean_tau, cost=cost[n] / cost[1], draft=draft / cost[1], shares=shares)
    return dict(method='tree size', nodes=n) | speed | predicted | rest


def main(out):
    lm = load(dtype='bf16')
    head = load_head(HEAD, lm.model)
    questions = read_jsonl(HEADS / 'questions.jsonl', answer=None)[-QUESTIONS:]
    prompts = [encode_one(lm, question.prompt) for question in questions]
    answers = [[token.id for token in decode(lm, prompt, None).out.tokens[0]] for prompt in prompts]
    found = measured(lm, prompts)
    cost = costs(lm, prompts[0])
    taus = predicted_tau(lm, head, prompts, answers)
    rows = []
    for n in SIZES:
        rows.append(row(n, found, cost, taus[n]))
        print(rows[-1], flush=True)
    save_rows(rows + [environment()], out)


if __name__ == '__main__':
    main(sys.argv[1])
