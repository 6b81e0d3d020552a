"""Run one case and say how its results differ from the reference's"""

import contextlib
import torch


class Mismatch(AssertionError):
    "The kernel's results are wrong; the message tells which and by how much"


@contextlib.contextmanager
def poisoned():
    "Fill what `torch.empty` returns inside the block with NaN or the largest integer"
    before = torch.are_deterministic_algorithms_enabled()
    # A property that its module adds to itself, so type checkers do not know it
    settings = torch.utils.deterministic
    name = 'fill_uninitialized_memory'
    filled = getattr(settings, name)
    torch.use_deterministic_algorithms(True, warn_only=True)
    setattr(settings, name, True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        setattr(settings, name, filled)


def outcome(function, arguments, mutates):
    "Call `function` and return every tensor that it returns or may change; no other may change"
    kept = [(i, t, t.clone()) for i, a in enumerate(arguments) if i not in mutates for t in _tensors(a)]
    with poisoned():
        returned = function(*arguments)
    for i, now, before in kept:
        if not torch.equal(_bits(now), _bits(before)):
            raise Mismatch(f'argument {i} was changed')
    return [*_tensors(returned), *(t for i in mutates for t in _tensors(arguments[i]))]


def _tensors(x):
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for y in x for t in _tensors(y)] if isinstance(x, (tuple, list)) else []


def check(case, dtype, host=None):
    "Raise `Mismatch` unless `host` (the case's own) gives what the reference gives"
    wanted = outcome(case.reference, case.arguments(dtype), case.mutates)
    got = outcome(host or case.host, case.arguments(dtype), case.mutates)
    if not wanted or len(got) != len(wanted):
        raise Mismatch(f'{len(got)} results, the reference gives {len(wanted)}')
    tolerance = case.tolerance and case.tolerance[dtype]
    for i, (g, w) in enumerate(zip(got, wanted)):
        _compare(f'result {i}', g, w, tolerance)


def _compare(name, got, wanted, tolerance):
    if (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
        reference = f'the reference gives {wanted.dtype} {tuple(wanted.shape)}'
        raise Mismatch(f'{name} is {got.dtype} {tuple(got.shape)}, {reference}')
    same = _bits(got) == _bits(wanted)
    if wanted.is_floating_point() and tolerance:
        same |= got.isnan() & wanted.isnan()
        same |= torch.isclose(got.double(), wanted.double(), atol=tolerance[0], rtol=tolerance[1])
    if same.all():
        return
    at = tuple((~same).nonzero()[0].tolist())
    first = f'first at {at}: {got[at].item()!r}, the reference gives {wanted[at].item()!r}'
    raise Mismatch(f'{name}: {(~same).sum()} of {same.numel()} differ, {first}')


def _bits(x):
    "Return `x` as integers, because -0. == 0. and NaN != NaN"
    if not x.is_floating_point():
        return x
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
