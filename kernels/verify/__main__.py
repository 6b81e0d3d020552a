"""Verify the kernels as far as it goes without an NPU: `python -m verify [--write] [family ...]`

The exit code is 1 when anything failed.
"""

import argparse
import collections
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
import torch
from . import examine, report
from npu_lora_kernels.cases import FAMILIES, family

HERE = Path(__file__).parent


def say(*words):
    print(*words, flush=True)


def tests(file, **environment):
    "Run a file of tests in its own process and return its failures"
    options = ['-q', '-p', 'no:cacheprovider', '--tb=short', '--disable-warnings']
    command = [sys.executable, '-m', 'pytest', *options, HERE / file]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    about = ' '.join([file, *environment.values()])
    say('tests', about, done.stdout if done.returncode else done.stdout.splitlines()[-1])
    return [f'{about}: see above'] if done.returncode else []


def all_tests(chosen):
    """Run every file of tests, as many at a time as there are cores

    They test whole decodes, the harness, what the kernels refuse, how work is cut, the noise, and each family under the
    interpreter.
    """

    def interpret(name):
        return tests('test_interpreter.py', TRITON_INTERPRET='1', VERIFY_FAMILIES=name)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        whole = pool.map(
            tests, ['test_decode.py', 'test_harness.py', 'test_arguments.py', 'test_plans.py', 'test_noise.py']
        )
        interpreted = pool.map(interpret, chosen)
        return [f for found in [*whole, *interpreted] for f in found]


def cuda():
    "Return what verify/cuda.py found: how many configurations of each kernel compile for CUDA, or a failure"
    path = f'{HERE}/.venv/cuda:{os.environ["PYTHONPATH"]}'
    environment = os.environ | dict(PYTHONPATH=path, TRITON_CACHE_DIR=f'{HERE}/.venv/cuda/cache')
    done = subprocess.run([sys.executable, '-m', 'verify.cuda'], env=environment, capture_output=True, text=True)
    say('cuda', done.stdout.strip() or done.stderr)
    return json.loads(done.stdout) if done.returncode == 0 else None


def progress(pool, function, tasks):
    "Yield function(*task) for each task, in order"
    for task, result in zip(tasks, pool.map(function, *zip(*tasks))):
        say(f'{function.__name__} {" ".join(map(str, task))}')
        yield result


def verify(chosen):
    "Return (findings, number of planted bugs, failures) of the chosen families"
    failures = all_tests(chosen)
    cases = [(name, c.name, dtype) for name in chosen for c in family(name).CASES for dtype in c.dtypes]
    mutants = [(name, i) for name in chosen for i in range(len(family(name).MUTANTS))]
    often = [case for case, n in collections.Counter(cases).items() if n > 1]
    failures += [f'{name}: two cases are called {case!r}' for name, case, _ in often]
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(os.cpu_count(), context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        findings = list(progress(pool, examine.examine, cases))
        failures += [f for finding in findings for f in finding.failures]
        failures += [f for found in progress(pool, examine.overflows, [(name,) for name in chosen]) for f in found]
        failures += list(filter(None, progress(pool, examine.survives, mutants)))
    return findings, len(mutants), failures


def main():
    parser = argparse.ArgumentParser(prog='verify', description=__doc__)
    write = 'write the report into kernels/README.md, instead of comparing it with the one there'
    parser.add_argument('--write', action='store_true', help=write)
    parser.add_argument('families', nargs='*', help=f'only these (then there is no report): {", ".join(FAMILIES)}')
    options = parser.parse_args()
    findings, mutants, failures = verify(options.families or FAMILIES)
    if not options.families:
        compiled = cuda()
        if compiled is None:
            failures.append('cuda: a kernel does not compile, see above')
        if not failures:
            failures = publish(report.report(findings, mutants, compiled), options.write)
    for failure in failures:
        say('FAILED', failure)
    say(f'{len(failures)} failures' if failures else 'verified')
    sys.exit(bool(failures))


def publish(new, write):
    "Write the report, or return a failure when the committed one differs"
    text = report.README.read_text()
    if write:
        report.README.write_text(report.written(text, new))
    elif report.committed(text) != new:
        return ['kernels/README.md: its report is not what was found: run kernels/verify/run --write']
    return []


if __name__ == '__main__':
    main()
