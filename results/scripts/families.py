"""Every family of transformers' causal language models, small and random, in every way of decoding: equal, or refused

python results/scripts/families.py OUT.json [MODEL ...]   (a run that was stopped continues; with models only those, again)
"""

import argparse
import multiprocessing
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import torch
import transformers
from npu_lora_decoding.evaluation.benchmark import environment
from npu_lora_decoding.foundations.files import json_rows, save_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'tests'))
from helpers.families import UNBUILT, cases
from helpers.family_sweep import WAYS, sweep

PROCESSES = 2


def swept(task):
    "Return a row: what became of some ways of decoding with one model"
    case, ways = task
    warnings.simplefilter('ignore')
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = sweep(case, ways, Path(folder) / 'head')
    found = {row.way: row.outcome for row in rows}
    messages = {row.way: row.message for row in rows if row.message}
    first = rows[0]
    return dict(method='families', model=first.model, family=first.family, kind=first.kind, ways=found, messages=messages)


def due(rows, names):
    "Return what is not in the rows: cases and ways, captures last, because they take longest"
    captured = tuple(way for way in WAYS if way.startswith('static'))
    parts = tuple(way for way in WAYS if way not in captured), captured
    chosen = [case for case in cases() if case.name in (names or [case.name])]
    missing = [(case, tuple(way for way in part if way not in _ways(rows, case))) for part in parts for case in chosen]
    return [(case, ways) for case, ways in missing if ways]


def _ways(rows, case):
    return rows[case.name]['ways'] if case.name in rows else {}


def joined(old, new):
    "Return a row with the ways of both"
    if old is None:
        return new
    return new | {part: old[part] | new[part] for part in ('ways', 'messages')}


def unbuilt():
    "Return the rows of families that are left out, with the reason"
    return [dict(method='families', model=family, family=family, unbuilt=why) for family, why in UNBUILT.items()]


def ordered(rows):
    names = [case.name for case in cases()]
    return [rows[name] for name in names if name in rows] + unbuilt() + [environment()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='JSON file')
    parser.add_argument('models', nargs='*', help='only these, again')
    args = parser.parse_args()
    kept = json_rows(args.out) if args.out.exists() else []
    rows = {row['model']: row for row in kept if 'ways' in row and row['model'] not in args.models}
    context = multiprocessing.get_context('fork')  # imports take longer than a model
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        for number, row in enumerate(pool.map(swept, due(rows, args.models)), 1):
            name = row['model']
            rows[name] = joined(rows.get(name), row)
            save_rows(ordered(rows), args.out)
            found = ', '.join(f'{way} {outcome}' for way, outcome in row['ways'].items())
            print(f'{number:4} {name}: {found}', flush=True)


if __name__ == '__main__':
    main()
