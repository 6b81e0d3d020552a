"""Lower one launch to Ascend linalg MLIR, the input of bishengir-compile: offline, without CANN, torch_npu or a device"""

import functools
import re
import subprocess
from dataclasses import dataclass
from triton._C.libtriton import ir
from triton.backends.ascend import compiler as ascend
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

ARCH = 'Ascend910B3'  # the lowered text is the same for every 910B: planning tells them apart


@dataclass(frozen=True)
class Lowered:
    "One configuration: a kernel lowered for given argument types and constants"

    name: str
    mode: str  # aiv: vector cores, aic: cube cores, mix: both
    signature: tuple  # ((parameter, type), ...) of the arguments that are passed at run time
    constants: tuple  # ((parameter, value), ...), with the integers that are 1: Triton compiles those in
    text: str

    def __str__(self):
        blocks = ' '.join(f'{k}={v}' for k, v in self.constants)
        return f'{self.name}({" ".join(t for _, t in self.signature if t.startswith("*"))}; {blocks})'


@functools.lru_cache(None)
def _backend():
    return ascend.AscendBackend(GPUTarget('npu', ARCH, 0))


def specialise(kernel, args, constants):
    "Return (signature, constants, attributes) exactly as Triton's own launch on an NPU derives them from the arguments' values"
    if kernel.binder is None:
        kernel.create_binder(_backend())
    bound, types, *_ = kernel.binder(*args, **constants)
    attributes = _backend().get_attrs_descriptor(kernel.params, tuple(bound.values()))
    free = [p for p in kernel.params if not p.is_constexpr]
    fixed = {p.name: bound[p.name] for p in kernel.params if p.is_constexpr or p.num in attributes.get_constants()}
    return {p.name: t for p, t in zip(free, types)}, fixed, attributes


def lower(kernel, args, constants):
    "Return the `Lowered` form of `kernel` for these arguments and constants"
    return _lower(kernel, *_hashable(*specialise(kernel, args, constants)))


def _hashable(signature, constants, attributes):
    "Return what `specialise` found as a key of the cache"
    return tuple(signature.items()), tuple(constants.items()), _Attributes(attributes)


class _Attributes:
    "Triton's attributes, equal when they say the same: the key of the cache"

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return self.value.hash() == other.value.hash()

    def __hash__(self):
        return hash(self.value.hash())


def _to_linalg(ttir, meta, options, tries=3):
    """Return linalg MLIR

    The tool died of a segmentation fault once in many thousand calls, and not again on the same input: a death by signal, and
    nothing else, is tried again.
    """
    for left in reversed(range(tries)):
        try:
            return ascend.ttir_to_linalg(ttir, meta, options, named_ops=True)
        except subprocess.CalledProcessError as e:
            if e.returncode >= 0 or not left:
                raise


@functools.lru_cache(None)
def _lower(kernel, signature, constants, attributes):
    backend = _backend()
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    source = ASTSource(fn=kernel, signature=dict(signature), constants=dict(constants), attrs=attributes.value)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    meta = {'hash': 'unused', 'target': backend.target, **options.__dict__}
    linalg = _to_linalg(ascend.make_ttir(module, meta, options), meta, options)
    text, meta = ascend._parse_linalg_metadata(linalg, meta)
    fixed = dict(constants)
    passed = tuple((k, t) for k, t in signature if k not in fixed)
    return Lowered(meta['kernel_name'], meta['mix_mode'], passed, constants, text)
