"""How the waiting of torch's threads decides the speed of decoding, on a quiet machine and beside busy neighbours

python results/scripts/threads.py OUT.json [--tokens 32] [--rounds 3] [--kinds bf16,fp32] [--spins 500,1000] [--loads 0,1]
(nothing else should run on the machine; a run that was stopped continues)

The variables act before torch is loaded, so every setting gets a process of its own. The parent starts it, lets it warm up, and
then asks for the same answer at every load; settings take turns. A neighbour is a process that counts.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

NAMES = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME', 'OMP_NUM_THREADS')
NEIGHBOURS = (0, 1, 2)
PROMPT = 'Why is the sky blue?'


@dataclass(frozen=True)
class Setting:
    "How threads wait, and how many there are"

    wait: str  # As it is shown
    threads: int
    variables: tuple = ()  # Pairs of name and value

    @property
    def environment(self):
        "Return the environment of a process with this setting and no other"
        kept = {name: value for name, value in os.environ.items() if name not in NAMES}
        return kept | dict(self.variables) | dict(OMP_NUM_THREADS=str(self.threads))


def of_spins(spins):
    "Return a setting for each number of turns"
    return [Setting(f'{n:,} spins', 2, (('GOMP_SPINCOUNT', str(n)),)) for n in spins]


def settings():
    "Return all settings; the first is what the others are compared with"
    policies = [Setting(f'{policy} policy', 2, (('OMP_WAIT_POLICY', policy.upper()),)) for policy in ('active', 'passive')]
    return [Setting('default', 2), *policies, *of_spins((0, 1000, 1500, 2000, 10000, 100000)), Setting('default', 1)]


# --- The process that decodes


def serve(kind, tokens):
    "Load the model, then print the seconds of one answer for every line that is read"
    import torch  # first: a package of ours sets a way to wait, and torch is to be measured without it
    from npu_lora_decoding.decoding.loop import load

    dtype, *compiled = kind.split('+')
    lm = load(dtype=dtype)
    how = dict(max_new_tokens=tokens, compile=bool(compiled), record=False, eos_token_id=None)
    lm.generate(PROMPT, **how)
    print(torch.get_num_threads(), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        lm.generate(PROMPT, **how)
        print(time.perf_counter() - start, flush=True)


# --- The process that measures


# It ends with the process that started it, however that ended
BUSY = 'import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass'


class Neighbours:
    "Processes that keep cores busy inside a block"

    def __init__(self, count):
        self.count = count

    def __enter__(self):
        self.processes = [subprocess.Popen([sys.executable, '-c', BUSY]) for _ in range(self.count)]
        time.sleep(0.5)

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.wait()


def measured(setting, kind, tokens, loads):
    "Return the seconds of one answer beside each number of neighbours"
    command = [sys.executable, __file__, kind, '--serve', '--tokens', str(tokens)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=setting.environment)
    with subprocess.Popen(command, **pipes) as child:
        assert int(child.stdout.readline()) == setting.threads
        return [asked(child, count) for count in loads]


def asked(child, count):
    "Return the seconds of one answer beside so many neighbours"
    with Neighbours(count):
        child.stdin.write('\n')
        child.stdin.flush()
        return float(child.stdout.readline())


def known(out):
    "Return the rows of a run that was stopped"
    from npu_lora_decoding.foundations.files import json_rows

    return [row for row in json_rows(out) if row['method'] == 'threads'] if Path(out).exists() else []


def due(rows, rounds, kinds, wanted):
    "Return what is not in the rows: round, kind and setting, in turns that change direction"
    done = {(row['round'], row['kind'], row['wait'], row['threads']) for row in rows}
    turns = [(turn, kind, s) for turn in range(rounds) for kind in kinds for s in wanted[:: -1 if turn % 2 else 1]]
    return [(turn, kind, s) for turn, kind, s in turns if (turn, kind, s.wait, s.threads) not in done]


def main(out, asked_for):
    from npu_lora_decoding.evaluation.benchmark import environment
    from npu_lora_decoding.foundations.files import save_rows

    rows = known(out)
    tokens = asked_for.tokens
    loads = asked_for.loads
    wanted = of_spins(asked_for.spins) if asked_for.spins else settings()
    for turn, kind, setting in due(rows, asked_for.rounds, asked_for.kinds.split(','), wanted):
        seconds = measured(setting, kind, tokens, loads)
        about = dict(method='threads', kind=kind, wait=setting.wait, threads=setting.threads, round=turn, tokens=tokens)
        rows += [about | dict(neighbours=count, seconds=s) for count, s in zip(loads, seconds)]
        save_rows(rows + [environment()], out)
        print(turn, kind, setting.threads, f'{setting.wait:<16}', *(f'{s:7.2f}' for s in seconds), flush=True)
    print(table(rows))


def table(rows):
    "Return Markdown: the median time of each setting and load, in times of the first setting when the machine is quiet"
    cells = {}
    for row in rows:
        cells.setdefault((row['kind'], row['threads'], row['wait'], row['neighbours']), []).append(row['seconds'])
    loads = list(dict.fromkeys(row['neighbours'] for row in rows))
    head = ' | '.join(f'{count} neighbours' for count in loads)
    lines = [f'| kind | threads | waiting | {head} |', '|---|--:|---|' + '--:|' * len(loads)]
    first = rows[0]['wait']
    for kind, threads, wait in dict.fromkeys(key[:3] for key in cells):
        quiet = statistics.median(cells[kind, 2, first, 0])
        shown = [_ratio(cells[kind, threads, wait, count], quiet) for count in loads]
        lines.append(f'| {kind} | {threads} | {wait} | ' + ' | '.join(shown) + ' |')
    return '\n'.join(lines)


def numbers(text):
    "Return the numbers between commas"
    return [int(n) for n in text.split(',')]


def _ratio(seconds, quiet):
    "Return the median of some times over another, with the spread"
    middle, low, high = (f(seconds) / quiet for f in (statistics.median, min, max))
    return f'{middle:.2f} ({low:.2f} to {high:.2f})'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out')
    parser.add_argument('--tokens', type=int, default=32)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--kinds', default='bf16,fp32', help='number types, with +compile for compiled programs')
    parser.add_argument('--spins', type=numbers, help='these lengths of a spin instead of all settings')
    parser.add_argument('--loads', type=numbers, default=list(NEIGHBOURS), help='numbers of busy neighbours, 0 among them')
    parser.add_argument('--serve', action='store_true', help='decode for another process; OUT is the kind')
    asked_for = parser.parse_args()
    if asked_for.serve:
        serve(asked_for.out, asked_for.tokens)
    else:
        main(asked_for.out, asked_for)
