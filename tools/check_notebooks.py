"""Run notebooks as tests: every cell outside the flags of settings.ini, each notebook in a process of its own

    python tools/check_notebooks.py                  all but the slow ones, as `make test` does
    python tools/check_notebooks.py --slow           the slow ones, which `make test-all` runs
    python tools/check_notebooks.py nbs/2_cold       those of a folder, or one notebook

The processes are forked from one that has imported torch and transformers, so that none of them has to do it again.
"""
import argparse
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ['torch', 'transformers', 'peft', 'matplotlib.pyplot', 'nbdev.test']

# What `make test` leaves to `make test-all`: the longest, none of which builds one of the three methods
SLOW = [
    '0_foundations/10_ops', '3_hass/08_continuous_batching', '3_hass/09_self_chat', '3_hass/10_features',
    '3_hass/11_acceptance', '3_hass/12_initialization', '3_hass/15_train', '3_hass/16_pipeline',
    '3_hass/17_draft_adapter',
    '4_speculation/04_compiled_draft', '4_speculation/05_head_drafter', '5_temp_lora/06_budget',
    '5_temp_lora/07_translation', '6_evaluation/03_flops', '6_evaluation/04_benchmark',
    '6_evaluation/05_equivalence', '6_evaluation/09_draft_plots', '6_evaluation/10_html_report',
    '6_evaluation/12_lm_eval', '7_serving/01_hf_generate', '7_serving/08_web_demo', '8_cli/04_memory',
    '8_cli/05_compare', 'tutorials/00_tour', 'tutorials/when_contrast_pays',
]


def check(path):
    "Run one notebook and leave with status 1 where a cell fails"
    from nbdev.config import get_config
    from nbdev.test import test_nb
    began = time.perf_counter()
    ok, _ = test_nb(path, skip_flags=get_config().tst_flags.split())
    print(f'{"ok" if ok else "FAILED"} {named(path)}: {time.perf_counter() - began:.0f} s', flush=True)
    sys.exit(not ok)


def named(path):
    "Return a notebook's name as prose has it: `2_cold/01_rule`"
    inside = path.is_relative_to(ROOT/'nbs')
    return path.relative_to(ROOT/'nbs').with_suffix('').as_posix() if inside else path.stem


def run_all(paths, workers):
    "Run notebooks, so many at a time; yield the names of those that fail"
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(HEAVY)
    waiting = list(paths)
    running = {}
    while waiting or running:
        while waiting and len(running) < workers:
            path = waiting.pop(0)
            process = context.Process(target=check, args=(path,), name=named(path))
            process.start()
            running[process.sentinel] = process
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                yield process.name


def chosen(paths, slow):
    "Return the notebooks to run: those under `paths`, or all of one speed"
    found = []
    for path in paths or [ROOT/'nbs']:
        path = path.resolve()
        inside = [path] if path.suffix == '.ipynb' else sorted(path.rglob('*.ipynb'))
        found += [o for o in inside if '.ipynb_checkpoints' not in o.parts]
    if paths:
        return found
    assert not set(SLOW) - {named(o) for o in found}, 'SLOW names a notebook that does not exist'
    return [o for o in found if (named(o) in SLOW) == slow]


def main():
    "Run notebooks, say how long each took, and fail where one does"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='*', type=Path, help='notebooks or folders')
    parser.add_argument('--slow', action='store_true', help='only those that `make test` leaves out')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='notebooks at a time (default: the number of cores)')
    options = parser.parse_args()
    failed = list(run_all(chosen(options.paths, options.slow), options.workers))
    if failed:
        sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__':
    main()
