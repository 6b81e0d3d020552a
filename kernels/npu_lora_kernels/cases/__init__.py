"""What is verified: the cases and the planted bugs of each family of kernels

A family's module holds `CASES: list[Case]`, `MUTANTS: list[tuple[str, str]]` (text in a kernel's source, its replacement: a
bug that some case must catch) and, if it likes, `random_case(draw) -> Case`, where `draw` draws from a hypothesis strategy.
"""

import functools
import importlib
from dataclasses import dataclass
from typing import Callable
import torch
from . import compare

FAMILIES = 'lora', 'cold', 'sample', 'commit', 'distill'


@dataclass(frozen=True)
class Case:
    "One configuration of one host function, with the torch function it must agree with"

    family: str
    name: str  # the configuration in words: 'shrink r=16 d=577'
    host: Callable  # function of npu_lora_kernels
    reference: Callable  # torch function with the same signature
    make: Callable  # make(dtype, generator) -> arguments, fresh tensors at each call
    dtypes: tuple = (torch.float16, torch.bfloat16, torch.float32)
    tolerance: dict | None = None  # {dtype: (atol, rtol)}; None: equal bit for bit
    mutates: tuple = ()  # positions of arguments that are changed in place, compared besides what is returned
    work: str = ''  # what a realistic shape is, in words: the cost report is made from these

    def arguments(self, dtype):
        "Return the arguments, the same at every call"
        return self.make(dtype, torch.Generator().manual_seed(0))

    def check(self, dtype, host=None):
        "Raise `compare.Mismatch` unless `host` (the case's own) gives what the reference gives"
        compare.check(self, dtype, host)


@functools.lru_cache(None)
def family(name):
    "Return the module of a family"
    return importlib.import_module(f'{__name__}.{name}')


def find(name, case):
    "Return the case called `case` of family `name`"
    return next(c for c in family(name).CASES if c.name == case)
