"""What was measured, in one picture: speed with a draft head, perplexity along a book with a memory, quality with contrast

python results/scripts/overview.py OUT.png
"""

import sys
from pathlib import Path
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from npu_lora_decoding.cli.memory import recent_perplexity
from npu_lora_decoding.evaluation.plots import read_rows
from npu_lora_decoding.foundations.pictures import PALETTE, use_style
from npu_lora_decoding.foundations.statistics import paired

DATA = Path(__file__).parent.parent / 'data'
LAST = 32768  # Tokens whose perplexity a point shows
# File -> name, unit, and what turns its scores into points
TASKS = {
    'king_james': ('King James\n(chrF)', 1),
    'wikisql': ('WikiSQL\n(% correct)', 100),
    'gsm8k': ('GSM8K\n(% correct)', 100),
}
METHODS = {
    'hass_tree': 'HASS, tree',
    'hass_chain': 'HASS, chain',
    'lookup': 'prompt lookup',
    'greedy': 'no drafter',
    'vllm_head': 'vLLM, our head',
    'vllm': 'vLLM, greedy',
    'transformers_greedy': 'transformers, greedy',
    'transformers_lookup': 'transformers, prompt lookup',
}


def draw_speed(ax):
    "Draw how many times as fast as transformers' greedy each method decodes, and its spread over texts"
    rows = {row['method']: row for row in read_rows(DATA / 'speculation_1.json')}
    reference = rows['transformers_greedy']['ms_per_token']
    for place, (method, name) in enumerate(reversed(METHODS.items())):
        row = rows[method]
        speed = reference / row['ms_per_token']
        slow, fast = sorted(reference / ms for ms in row['ms_spread'])
        color = PALETTE.third_party if row['peer'] else PALETTE.ours
        ax.barh(place, speed, color=color, height=0.72)
        ax.plot([slow, fast], [place, place], c=PALETTE.neutral, lw=1)
        ax.text(max(speed, fast), place, f'  {speed:.1f}', va='center', fontsize=8.5)
    ax.set_yticks(range(len(METHODS)), [*reversed(METHODS.values())])
    ax.tick_params('y', length=0)
    ax.set(
        xlabel="times as fast as transformers' greedy, batch 1, bf16",
        xlim=(0, 5.4),
        title='HASS: faster with draft tokens',
    )
    ours = Patch(color=PALETTE.ours, label='this package')
    others = Patch(color=PALETTE.third_party, label='third party')
    spread = Line2D([], [], c=PALETTE.neutral, lw=1, label='spread over texts')
    ax.legend(handles=[ours, others, spread], loc='lower right')


def draw_book(ax):
    "Draw the change in perplexity along a book"
    base, memory = (row for row in read_rows(DATA / 'reading_1024.json') if 'chunks' in row)
    at = np.linspace(LAST, base['tokens'], 200)
    change = 100 * (recent_perplexity(memory, at, LAST) / recent_perplexity(base, at, LAST) - 1)
    ax.axhline(0, c=PALETTE.base, lw=1.6)
    ax.plot(at / 1000, change, c=PALETTE.ours, lw=2)
    ax.text(base['tokens'] / 1000, 0.6, 'base, the same window', color='#A66F00', ha='right', fontsize=8.5)
    ax.text(25, -23.5, 'Temp-LoRA', color='#1F7FB5', fontsize=8.5)
    ax.set(ylim=(-32, 3.5), xlim=(0, base['tokens'] / 1000), xlabel='thousand tokens of Les Misérables read so far')
    ax.set(ylabel='change in perplexity (%)', title='Temp-LoRA: lower perplexity along a book')


def draw_quality(ax):
    "Draw the paired gain of contrast over greedy on each task, with its 95% interval"
    for place, (task, (_, points)) in enumerate(reversed(TASKS.items())):
        rows = {row['arm']: row for row in read_rows(DATA / f'{task}_test.json') if 'arm' in row}
        cold = next(row for arm, row in rows.items() if arm.startswith('cold:0.1:0.1'))
        gain = paired([points * s for s in cold['scores']], [points * s for s in rows['greedy']['scores']])
        ax.plot([gain.low, gain.high], [place, place], c=PALETTE.ours, lw=2.5, solid_capstyle='round')
        ax.plot(gain.mean, place, 'o', c=PALETTE.ours, ms=7)
        ax.text(gain.high, place, f'  {gain.mean:+.2f}', va='center', fontsize=8.5)
    ax.axvline(0, c=PALETTE.base, lw=1.6)
    ax.text(-0.08, len(TASKS) - 0.6, 'greedy', color='#A66F00', ha='right', fontsize=8.5)
    ax.set_yticks(range(len(TASKS)), [name for name, _ in reversed(TASKS.values())])
    ax.tick_params('y', length=0)
    ax.set(xlabel='points gained, 500 held-out items, 95% intervals', ylim=(-0.5, len(TASKS) - 0.4), xlim=(-2.6, 2.6))
    ax.set(title='CoLD: no gain shown with this model')


def main(out):
    use_style()
    fig, axs = plt.subplots(1, 3, figsize=(13, 3.5), width_ratios=[1.05, 1, 0.9], layout='constrained')
    fig.get_layout_engine().set(wspace=0.06)
    draw_speed(axs[0])
    draw_book(axs[1])
    draw_quality(axs[2])
    fig.savefig(out, dpi=110, metadata={'Software': None})


if __name__ == '__main__':
    main(*sys.argv[1:])
