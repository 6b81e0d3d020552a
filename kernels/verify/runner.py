"""Take a host function's launches: lower each, run its programs on x86 in both orders, record what it moved"""

import functools
import itertools
import math
from dataclasses import dataclass
import torch
from npu_lora_kernels.launch import running
from npu_lora_kernels.targets import ASCEND, using
from .lower import Lowered, lower
from .memory import Memory
from .x86 import ExecutionError, Program

program = functools.lru_cache(None)(Program)
memory = functools.lru_cache(None)(Memory)


class IllegalAccess(ExecutionError):
    "A program read or wrote outside of its arguments"


class OrderMatters(ExecutionError):
    "The result depends on which program ran first"


@dataclass(frozen=True)
class Launch:
    "One launch: its configuration and the bytes between global memory and the cores"

    lowered: Lowered
    grid: tuple
    moved: tuple  # bytes of each program
    distinct: int  # bytes that were read at least once, plus bytes that were written at least once


class Recorder:
    "Lower every launch and run none: enough to plan memory"

    def __init__(self):
        self.kernels = {}
        self.launches = []

    def __call__(self, kernel, grid, args, constants):
        # a list becomes a table of addresses
        args = [torch.zeros(len(a), dtype=torch.int64) if isinstance(a, list) else a for a in args]
        lowered = lower(kernel, args, constants)
        self.kernels.setdefault(lowered.name, (kernel, args, constants))
        self.launches.append(Launch(lowered, grid, (), 0))


class Runner(Recorder):
    "Lower and run every launch"

    def __call__(self, kernel, grid, args, constants):
        super().__call__(kernel, grid, args, constants)
        lowered = self.launches[-1].lowered
        passed = dict(zip([name for name in kernel.arg_names if name not in constants], args))
        arguments = {name: passed[name] for name, _ in lowered.signature}
        grid = (*grid, 1, 1)[:3]
        moved, distinct, forward = run(lowered, grid, arguments)
        if math.prod(grid) > 1 and run(lowered, grid, arguments, backwards=True)[2] != forward:
            raise OrderMatters(f'{lowered}: the result depends on the order of the programs')
        self.launches[-1] = Launch(lowered, grid, moved, distinct)
        memory().fetch()


def run(lowered, grid, arguments, backwards=False):
    "Run every program of `grid` on copies of the arguments; return (bytes moved by each program, distinct bytes, the memory afterwards)"
    compiled = program(lowered)
    tensors = _tensors(arguments)
    addresses = dict(zip(tensors, memory().place(list(tensors.values()))))
    for k, a in arguments.items():
        if isinstance(a, list):
            memory().write(addresses[k], [addresses[f'{k}[{i}]'] for i in range(len(a))])
    values = [(addresses[k], tensors[k].numel()) if k in tensors else a for k, a in arguments.items()]
    memory().attach(compiled.state)
    indices = list(itertools.product(*map(range, grid)))
    order = reversed(indices) if backwards else indices
    names = list(tensors)
    moved = tuple(_run_one(compiled, lowered, values, grid=grid, index=i, names=names) for i in order)
    return moved, compiled.state.read_once + compiled.state.written_once, memory().contents()


def _tensors(arguments):
    "Return every tensor by name; a list of tensors, and then the table of their addresses that the kernel is given"
    tables = {k: a for k, a in arguments.items() if isinstance(a, list)}
    tensors = {k: a for k, a in arguments.items() if isinstance(a, torch.Tensor)}
    members = {f'{k}[{i}]': x for k, a in tables.items() for i, x in enumerate(a)}
    return tensors | members | {k: torch.zeros(len(a), dtype=torch.int64) for k, a in tables.items()}


def _run_one(compiled, lowered, values, *, grid, index, names):
    "Run one program and return the bytes it moved"
    state = compiled.state
    before = state.read + state.written
    state.used = 0
    compiled(values, grid, index)
    if state.used == state.chip_size:
        raise ExecutionError(f'{lowered}: program {index} allocates more than {state.chip_size} bytes')
    if state.bad:
        does = 'writes' if state.bad_write else 'reads'
        raise IllegalAccess(f'{lowered}: program {index} {does} {memory().where(state.bad, names)}')
    return state.read + state.written - before


def take(runner, target, function, *args):
    "Call `function` with its launches taken by `runner`, planned for the Ascend called `target`"
    with running(runner), using(ASCEND[target]):
        return function(*args)
