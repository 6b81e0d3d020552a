"""The three questions in one picture: are answers better, is decoding faster, is a long text read better?

python results/scripts/overview.py OUT.png
"""
import sys
from pathlib import Path
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt
from npu_lora_decoding.cli.memory import plot_gain
from npu_lora_decoding.foundations.statistics import paired
from npu_lora_decoding.evaluation.plots import read_rows

HERE, OURS, THEIRS = Path(__file__).parent.parent/'data', 'tab:blue', 'silver'
TASKS = {'king_james': ('King James\n(chrF)', 1), 'wikisql': ('WikiSQL\n(% right)', 100), 'gsm8k': ('GSM8K\n(% right)', 100)}  # file: its name, and what turns its scores into points
WAYS = {'transformers_greedy': 'transformers', 'transformers_lookup': 'its prompt lookup', 'vllm': 'vLLM', 'vllm_head': 'vLLM, our head', 'greedy': 'our loop', 'lookup': 'copies', 'hass_chain': 'HASS chain', 'hass_tree': 'HASS tree'}

def better(ax):
    "Draw the paired gain of contrast over greedy on each task, with its 95% interval"
    for i, (task, (_, points)) in enumerate(TASKS.items()):
        rows = {r['arm']: r for r in read_rows(HERE/f'{task}_test.json') if 'arm' in r}
        greedy, cold = rows['greedy'], next(r for arm, r in rows.items() if arm.startswith('cold:0.1:0.1'))
        gain = paired([points * s for s in cold['scores']], [points * s for s in greedy['scores']])
        ax.errorbar(i, gain.mean, [[gain.mean - gain.low], [gain.high - gain.mean]], fmt='o', c=OURS, capsize=4)
    ax.axhline(0, c='gray', lw=.8); ax.set_xticks(range(len(TASKS)), [name for name, _ in TASKS.values()], fontsize=8)
    ax.set(title='CoLD: better?', ylabel='points over greedy\n(500 items, 95%)', xlim=(-.6, len(TASKS) - .4))

def faster(ax):
    "Draw how many times as fast as transformers' greedy each way decodes"
    rows = {r['method']: r for r in read_rows(HERE/'speculation_1.json')}
    names = [n for n in WAYS if n in rows]
    for i, n in enumerate(reversed(names)):
        x = rows[n]['tokens_per_s'] / rows['transformers_greedy']['tokens_per_s']
        ax.barh(i, x, color=THEIRS if rows[n]['peer'] else OURS); ax.text(x, i, f' {x:.1f}', va='center', fontsize=8)
    ax.set_yticks(range(len(names)), [WAYS[n] for n in reversed(names)], fontsize=8); ax.margins(x=.12)
    ax.set(title='HASS: faster?', xlabel='times as fast, batch 1, greedy, bf16')

def longer(ax):
    "Draw the change in perplexity along a book"
    base, memory = (r for r in read_rows(HERE/'reading_1024.json') if 'chunks' in r)
    plot_gain([base, memory], ax, ['Temp-LoRA'], 32768)
    ax.get_legend().remove(); ax.set(title='Temp-LoRA: longer?', ylabel='perplexity of the last 32,768 tokens,\nchange against the base (%)', xlabel='thousand tokens of Les Misérables'); ax.set_ylim(top=2)

def main(out):
    fig, axs = plt.subplots(1, 3, figsize=(12, 3.2))
    better(axs[0]); faster(axs[1]); longer(axs[2])
    fig.tight_layout(); fig.savefig(out, dpi=90, metadata={'Software': None})

if __name__ == '__main__': main(*sys.argv[1:])
