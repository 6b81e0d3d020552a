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
from helpers.family_sweep import sweep

PROCESSES = 2


def swept(case):
    "Return a row: what became of each way of decoding with one model"
    warnings.simplefilter('ignore')
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = sweep(case, folder=Path(folder) / 'head')
    ways = {row.way: row.outcome for row in rows}
    messages = {row.way: row.message for row in rows if row.message}
    first = rows[0]
    return dict(
        method='families', model=first.model, family=first.family, kind=first.kind, ways=ways, messages=messages
    )


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
    due = [case for case in cases() if case.name not in rows and case.name in (args.models or [case.name])]
    context = multiprocessing.get_context('fork')  # imports take longer than a model
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        for row in pool.map(swept, due):
            rows[row['model']] = row
            save_rows(ordered(rows), args.out)
            print(
                f'{len(rows):4} {row["model"]}: {", ".join(f"{way} {outcome}" for way, outcome in row["ways"].items())}',
                flush=True,
            )


if __name__ == '__main__':
    main()
