"""Twenty thousand tokens continued from a chapter: does the output repeat itself, and how likely does the base find it?

python results/scripts/long_writing.py TEXT OUT.json [TOKENS] [TEMPERATURE] [TOP_P] [WAY,...]   (rows that OUT.json holds are left out)
"""

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
import torch
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.speculation.head_drafter import HASS
from npu_lora_decoding.temp_lora.cache_reuse import Reader
from npu_lora_decoding.temp_lora.generation import TempLoRA, repetition
from npu_lora_decoding.temp_lora.perplexity import document_ids, read_text

HEAD = Path(__file__).parent.parent / 'heads' / 'smollm2-135m'
CHAPTER = 4096  # Tokens of the book that are continued
STRETCH = 1024  # Tokens over which tokens per forward pass and repetition are reported
MEMORY = TempLoRA(chunk=1024, window=2048, train_context=128, epochs=1, lr=1e-4, dropout=0.0)
SAMPLING = dict(do_sample=True, eos_token_id=None, chat=False)
WAYS = {
    'base': replace(MEMORY, epochs=0),
    'Temp-LoRA': MEMORY,
    'Temp-LoRA, guarded': replace(MEMORY, max_repetition=0.3),
}


def perplexities(lm, text):
    "Return how likely the base finds every thousand tokens after the chapter, with the tokens before them in context"
    reader = Reader(lm.model, replace(MEMORY, epochs=0))
    found = []
    for start in range(0, len(text) - MEMORY.chunk + 1, MEMORY.chunk):
        loss = reader.losses(text, start, start + MEMORY.chunk).mean().item()
        if start >= CHAPTER:
            found.append(math.exp(loss))
    return found


def taus_of(steps):
    "Return the tokens per forward pass of each thousand tokens"
    gained = passes = 0
    taus = []
    for step in steps:
        gained += len(step.tokens[0])
        passes += 1
        if gained >= STRETCH * (len(taus) + 1):
            taus.append(STRETCH / passes)
            passes = 0
    return taus


def continued(lm, chapter, memory, n, sampling):
    "Return the text with its continuation, and the result of decoding"
    torch.manual_seed(0)
    out = lm.generate(chapter.tolist(), memory=memory, drafter=HASS(HEAD), max_new_tokens=n, record=False, **sampling)
    new = torch.tensor([token.id for token in out.tokens[0]], device=chapter.device)
    return torch.cat([chapter, new]), out


def row(lm, way, text, out, sampling):
    "Return what is measured of one text"
    new = text[CHAPTER:]
    about = dict(
        method='long writing', way=way, tokens=len(new), notes=out.notes, settings=asdict(WAYS[way]), sampling=sampling
    )
    measured = dict(
        perplexities=perplexities(lm, text),
        repetition=[repetition(part) for part in new.split(STRETCH)],
        repetition_all=repetition(new),
        taus=taus_of(out.steps),
    )
    return about | measured | dict(beginning=lm.tokenizer.decode(new[:200]), end=lm.tokenizer.decode(new[-200:]))


def report(row):
    found = row['perplexities']
    perplexity = math.exp(sum(map(math.log, found)) / len(found))
    tau = sum(row['taus']) / len(row['taus'])
    print(
        f'{row["way"]:<20} perplexity {perplexity:.2f}  4-grams seen before {row["repetition_all"]:.0%}  '
        f'tokens a forward pass {tau:.2f}',
        flush=True,
    )


def main(path, out, tokens=20480, temperature=0.8, top_p=0.95, only=None):
    lm = load(dtype='bf16')
    sampling = SAMPLING | dict(temperature=float(temperature), top_p=float(top_p))
    rows = []
    if Path(out).exists():
        rows = [r for r in json.loads(Path(out).read_text()) if 'way' in r]
    chapter = document_ids(lm, read_text(path))[:CHAPTER]
    for way in only.split(',') if only else WAYS:
        if any((r['way'], r['sampling']) == (way, sampling) for r in rows):
            continue
        text, result = continued(lm, chapter, WAYS[way], int(tokens), sampling)
        rows.append(row(lm, way, text, result, sampling) | dict(text=Path(path).name))
        report(rows[-1])
        save_rows(rows + [environment()], out)


if __name__ == '__main__':
    main(*sys.argv[1:])
