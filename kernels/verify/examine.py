"""What is done with each case, each planted bug and each kernel, as functions that a pool of processes can take"""

import functools
import importlib.util
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
import torch
from npu_lora_kernels.cases import compare
from . import cost
from npu_lora_kernels.cases import family, find
from .lower import lower
from .plan import ARCHS, PlanError, plan
from .runner import IllegalAccess, OrderMatters, Recorder, Runner, take
from npu_lora_kernels.targets import ASCEND

REPORTED = 'Ascend910B3'  # the cost report's target: the middle one
EXECUTED = REPORTED, 'Ascend910B1'  # one for each number of cores
CAUGHT = compare.Mismatch, IllegalAccess, OrderMatters
planned = functools.lru_cache(None)(plan)


@dataclass
class Finding:
    "What came of one case in one dtype"

    failures: list = field(default_factory=list)
    kernels: dict = field(
        default_factory=dict
    )  # {(target, lowered text): (lowered, cost)} of each configuration that was planned
    rows: list = field(default_factory=list)  # (the work in words, launch, cost) of each launch, for the report


def examine(name, case, dtype):
    "Run one case on x86 and plan its launches for every target; return the `Finding`"
    finding = Finding()
    case = find(name, case)
    for target in EXECUTED:
        _execute(finding, case, dtype, target)
    for target in ARCHS:
        _plan(finding, case, dtype, target)
    return finding


def _cost(lowered, target):
    "Return what a kernel costs as it is planned for a target"
    return cost.cost(planned(lowered.text, target))


def _execute(finding, case, dtype, target):
    "Run a case; note its failure, or what a realistic one costs"
    runner = Runner()
    try:
        take(runner, target, compare.check, case, dtype)
    except Exception as e:
        return finding.failures.append(_failure(case, dtype, f'executed as on {target}', e))
    if case.work and dtype == case.dtypes[0] and target == REPORTED:
        finding.rows = [(case.work, launch, _cost(launch.lowered, target)) for launch in runner.launches]


def _plan(finding, case, dtype, target):
    "Plan every launch of a case; note its failure, or its cost"
    recorder = Recorder()
    try:
        take(recorder, target, case.host, *case.arguments(dtype))
    except Exception as e:
        return finding.failures.append(_failure(case, dtype, 'lowered', e))
    for lowered in [launch.lowered for launch in recorder.launches]:
        try:
            finding.kernels[target, lowered.text] = lowered, _cost(lowered, target)
        except PlanError as e:
            finding.failures.append(_failure(case, dtype, f'{lowered} planned for {target}', e))


def _failure(case, dtype, doing, error):
    "Return one line about a failure"
    kind = '' if isinstance(error, (*CAUGHT, PlanError)) else f'{type(error).__name__}: '
    return f'{case.family}: {case.name}, {str(dtype).removeprefix("torch.")}, {doing}: {kind}{" ".join(str(error).split())}'


def mutated(module, text, replacement):
    "Return a copy of `module` with one piece of its source replaced"
    folder = Path(_scratch().name)
    file = folder / f'mutant_{len(list(folder.iterdir()))}.py'
    file.write_text(Path(module.__file__).read_text().replace(text, replacement))
    spec = importlib.util.spec_from_file_location(f'{module.__package__}.{file.stem}', file)
    copy = sys.modules[spec.name] = importlib.util.module_from_spec(
        spec
    )  # Triton finds a kernel's source through sys.modules
    spec.loader.exec_module(copy)
    return copy


@functools.lru_cache(None)
def _scratch():
    return tempfile.TemporaryDirectory()  # until the process ends: Triton reads a source late


def survives(name, index):
    "Return why planted bug `index` of a family is not caught, or nothing when a case fails because of it"
    text, replacement = family(name).MUTANTS[index]
    cases = sorted(family(name).CASES, key=lambda c: bool(c.work))
    sources = {m: Path(sys.modules[m].__file__).read_text().count(text) for m in {c.host.__module__ for c in cases}}
    found = sum(sources.values())
    if found != 1:
        return f'{name}: mutant {text!r} is found {found} times in {", ".join(sources)}'
    module = next(m for m, n in sources.items() if n)
    copy = mutated(sys.modules[module], text, replacement)
    mine = [c for c in cases if c.host.__module__ == module]
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    pairs = [(c, d) for d in dtypes for c in mine if d in c.dtypes]
    # those for one dtype were made to catch what all others miss
    for case, dtype in sorted(pairs, key=lambda pair: len(pair[0].dtypes) > 1):
        host = getattr(copy, case.host.__name__)
        try:
            take(Runner(), REPORTED, compare.check, case, dtype, host)
        except CAUGHT:
            return
        except Exception as e:
            return _failure(case, dtype, f'mutant {text!r} -> {replacement!r} does not run', e)
    return f'{name}: mutant {text!r} -> {replacement!r} survives every case'


def overflows(name):
    "Return the failures of a family whose kernels are not refused, however large their blocks become"
    recorder = Recorder()
    for case in family(name).CASES:
        take(recorder, REPORTED, case.host, *case.arguments(case.dtypes[0]))
    return [problem for kernel in recorder.kernels.values() if (problem := _overflow(*kernel))]


def _overflow(kernel, args, constants):
    "Return why larger and larger blocks of a kernel are not refused for their size, or nothing"
    for factor in (4, 16, 64, 256):
        grown = {k: v * factor if k.startswith('BLOCK') else v for k, v in constants.items()}
        try:
            plan(lower(kernel, args, grown).text, REPORTED)
        except PlanError as e:
            if 'overflow' in str(e):
                return None
            return f'{kernel.__name__}: {factor} times its blocks are refused for another reason: {e}'
    return f'{kernel.__name__}: 256 times its blocks are planned, so the planner refuses nothing'
