"""Tokens a forward pass of sampling: drafts that do not know the noise of the target's draws, and drafts that do

python results/scripts/sampled_acceptance.py DATA OUT.json   (rows that OUT.json holds are left out)

What is sampled does not depend on the draft, so each set of texts is generated once and every draft is replayed against it. DATA
holds gsm8k_train.jsonl and prompts_dev.jsonl, whose lines of kind `user` are instructions that people wrote.
"""

import json
import sys
from pathlib import Path
import torch
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.decoding.sampling import SharedNoise, sequence_key
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.foundations.statistics import bootstrap
from npu_lora_decoding.hass.acceptance import (
    collate_texts,
    humaneval_prompts,
    target_texts,
    text_positions,
    tree_acceptance,
)
from npu_lora_decoding.hass.alignment import aligned_step
from npu_lora_decoding.hass.checkpoint import load_head
from npu_lora_decoding.hass.head import draft_rows, target_weights

HEADS = Path(__file__).parent.parent / 'heads'
PROMPTS = 40
NEW_TOKENS = 64
SEED = 7
SHAPES = {'chain of 5': dict(depth=4, top_k=1, nodes=6), 'tree of 60': dict(depth=6, top_k=10, nodes=60)}


def column(path, name, **only):
    "Return one column of a file of JSON lines, from the lines that have these values"
    lines = map(json.loads, Path(path).read_text(encoding='utf-8').splitlines())
    chosen = [line[name] for line in lines if all(line[key] == value for key, value in only.items())]
    return chosen[:PROMPTS]


def prompt_sets(data):
    "Return the prompts of each set"
    return dict(
        chat=column(HEADS / 'questions.jsonl', 'prompt'),
        HumanEval=humaneval_prompts(PROMPTS),
        GSM8K=column(f'{data}/gsm8k_train.jsonl', 'question'),
        instructions=column(f'{data}/prompts_dev.jsonl', 'prompt', kind='user'),
    )


class Draft:
    "The shipped head, and what it borrows from its target"

    def __init__(self, lm):
        self.head = load_head(HEADS / 'smollm2-135m', lm.model).requires_grad_(False)
        self.weights = target_weights(lm.model)
        self.rows = draft_rows(self.head, self.weights)

    def replay(self, texts, shape, noise):
        "Return how many tokens each text gets from a forward pass, and how often the first draft is right"
        ids, features, _, start, end = collate_texts(texts, self.head.fc.weight)
        how = dict(features=features, start=start, end=end, vocab=self.head.vocab, noise=noise, **shape)
        found = tree_acceptance(self.head, self.weights.embed, self.rows, ids, **how)
        first = found.accepted[:, 0].sum() / found.tried[:, 0].sum()
        return dict(taus=[tau for tau in found.tau.tolist() if tau == tau], first=float(first))

    @torch.no_grad()
    def overlap(self, texts, temperature):
        "Return the mean of sum min(p, q) over the places of all answers: as often two draws can be equal"
        return bootstrap([self._overlap(text, temperature) for text in texts if len(text.ids) > text.prompt + 1])

    def _overlap(self, text, temperature):
        ids, features, segments, *_ = collate_texts([text], self.head.fc.weight)
        rotations = self.head.rotations(text_positions(segments))
        embedded = self.weights.embed[ids.roll(-1, 1)]
        drafted = aligned_step(self.head, embedded, [features], rotations, segments)[0, text.prompt - 1 : -2]
        q = self._distribution(drafted, self.rows, temperature)
        p = self._distribution(features[0, text.prompt : -1], self.weights.lm_head, temperature)
        p = p if self.head.vocab is None else p[:, self.head.vocab]
        return float(torch.minimum(p, q).sum(-1).mean())

    def _distribution(self, features, rows, temperature):
        return ((features @ rows.T).float() / temperature).softmax(-1)


def measured(draft, texts, temperature):
    "Return what each shape of draft is worth without the noise (before) and with it (after)"
    keys = [sequence_key(SEED, 0, text.ids[: text.prompt]) for text in texts]
    noise = SharedNoise(torch.tensor(keys, dtype=torch.int32), temperature)
    rows = []
    for name, shape in SHAPES.items():
        before = draft.replay(texts, shape, None)
        after = draft.replay(texts, shape, noise)
        gains = [b / a - 1 for a, b in zip(before['taus'], after['taus'])]
        values = dict(before=before['taus'], after=after['taus'], gain=gains)
        intervals = {key: list(bootstrap(x)) for key, x in values.items()}
        first = dict(first_before=before['first'], first_after=after['first'])
        rows.append(dict(shape=name, texts=len(gains)) | intervals | first)
    return rows


def report(row):
    before, after, gain = (row[key] for key in ('before', 'after', 'gain'))
    print(
        f'{row["set"]:<13} {row["temperature"]} {row["shape"]}: {before[0]:.2f} -> {after[0]:.2f} '
        f'({gain[0]:+.0%}, {gain[1]:+.0%} to {gain[2]:+.0%}); first draft token {row["first_before"]:.2f} -> '
        f'{row["first_after"]:.2f}, overlap {row["overlap"][0]:.2f}',
        flush=True,
    )


def main(data, out):
    lm = load(dtype='bf16')
    draft = Draft(lm)
    rows = []
    if Path(out).exists():
        rows = [row for row in json.loads(Path(out).read_text()) if 'set' in row]
    known = {(row['set'], row['temperature']) for row in rows}
    for name, prompts in prompt_sets(data).items():
        for temperature in (0.7, 1.0):
            if (name, temperature) in known:
                continue
            texts = target_texts(lm, prompts, NEW_TOKENS, temperature, seed=SEED, batch=PROMPTS)
            overlap = list(draft.overlap(texts, temperature))
            about = dict(method='sampled acceptance', set=name, temperature=temperature, overlap=overlap)
            rows += [about | row for row in measured(draft, texts, temperature)]
            for row in rows[-len(SHAPES) :]:
                report(row)
            save_rows(rows + [environment()], out)


if __name__ == '__main__':
    main(*sys.argv[1:])
