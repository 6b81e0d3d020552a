"""Twenty thousand tokens continued from a chapter: does what was written repeat itself, and how likely does the base find it?

python results/scripts/long_writing.py TEXT OUT.json [TOKENS] [TEMPERATURE] [TOP_P] [WAY,...]   (what OUT.json holds already is left out)
"""

import json, math, sys
from dataclasses import asdict, replace
from pathlib import Path
import torch
from npu_lora_decoding.temp_lora.cache_reuse import Reader
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.foundations.files import save_rows
from npu_lora_decoding.temp_lora.perplexity import document_ids, read_text
from npu_lora_decoding.speculation.head_drafter import HASS
from npu_lora_decoding.temp_lora.generation import TempLoRA
from npu_lora_decoding.temp_lora.generation import repetition

HEAD, CHAPTER = Path(__file__).parent.parent / 'heads' / 'smollm2-135m', 4096
MEMORY = TempLoRA(chunk=1024, window=2048, train_context=128, epochs=1, lr=1e-4, dropout=0.0)
SAMPLING = dict(do_sample=True, eos_token_id=None, chat=False)
WAYS = {
    'base': replace(MEMORY, epochs=0),
    'Temp-LoRA': MEMORY,
    'Temp-LoRA, guarded': replace(MEMORY, max_repetition=0.3),
}


def perplexities(lm, text, start):
    "Return how likely the base finds every thousand tokens after `start`, with the tokens before them in sight"
    reader, out = Reader(lm.model, replace(MEMORY, epochs=0)), []
    for a in range(0, len(text) - MEMORY.chunk + 1, MEMORY.chunk):
        loss = reader.losses(text, a, a + MEMORY.chunk).mean().item()
        if a >= start:
            out.append(math.exp(loss))
    return out


def write(lm, chapter, memory, n, drafter, sampling):
    "Return the text, and how many tokens a pass brought in each thousand of passes' tokens"
    torch.manual_seed(0)
    out = lm.generate(chapter.tolist(), memory=memory, drafter=drafter, max_new_tokens=n, record=False, **sampling)
    gained, taus, passes = 0, [], 0
    for step in out.steps:
        gained, passes = gained + len(step.tokens[0]), passes + 1
        if gained >= 1024 * (len(taus) + 1):
            taus.append(1024 / passes)
            passes = 0
    return torch.cat([chapter, torch.tensor([t.id for t in out.tokens[0]], device=chapter.device)]), taus, out.notes


def main(path, out, tokens=20480, temperature=0.8, top_p=0.95, only=None):
    lm, rows, sampling = load(dtype='bf16'), [], SAMPLING | dict(temperature=float(temperature), top_p=float(top_p))
    if Path(out).exists():
        rows = [r for r in json.loads(Path(out).read_text()) if 'way' in r]
    chapter = document_ids(lm, read_text(path))[:CHAPTER]
    for name in only.split(',') if only else WAYS:
        if any((r['way'], r['sampling']) == (name, sampling) for r in rows):
            continue
        text, taus, notes = write(lm, chapter, WAYS[name], int(tokens), HASS(HEAD), sampling)
        new = text[CHAPTER:]
        rows.append(
            dict(
                method='long writing',
                way=name,
                text=Path(path).name,
                tokens=len(new),
                perplexities=perplexities(lm, text, CHAPTER),
                repetition=[repetition(c) for c in new.split(1024)],
                repetition_all=repetition(new),
                taus=taus,
                notes=notes,
                settings=asdict(WAYS[name]),
                sampling=sampling,
                beginning=lm.tokenizer.decode(new[:200]),
                end=lm.tokenizer.decode(new[-200:]),
            )
        )
        print(
            f'{name:<20} perplexity {math.exp(sum(map(math.log, rows[-1]["perplexities"])) / len(rows[-1]["perplexities"])):.2f}  4-grams seen before {rows[-1]["repetition_all"]:.0%}  tokens a pass {sum(taus) / len(taus):.2f}',
            flush=True,
        )
        save_rows(rows + [environment()], out)


if __name__ == '__main__':
    main(*sys.argv[1:])
