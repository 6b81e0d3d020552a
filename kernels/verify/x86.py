"""Compile lowered Ascend MLIR for x86

bishengir-opt takes it down to LLVM's dialect, Triton's own translator to LLVM IR, llvmlite to machine code. Everything comes
from PyPI, at the versions that lowered the kernel: a distribution's LLVM would be a second, different one, and needs root to
install.
"""

import ctypes
import functools
import re
import subprocess
import tempfile
from pathlib import Path
import ascendnpuir
import llvmlite.binding as llvm
from triton._C import libtriton
from .memory import STATE, TOUCH

OPT = Path(ascendnpuir.__file__).parent / 'bin/bishengir-opt'
# Tensors become buffers without `eliminate-empty-tensors`, which would let a kernel compute in global memory: on the device it
# computes on chip and copies
BUFFERS = '''--execution-engine-convert-hfusion-to-upstream --execution-engine-convert-hivm-to-upstream
    --convert-elementwise-to-linalg --empty-tensor-to-alloc-tensor --one-shot-bufferize=allow-return-allocs-from-loops=true'''
# bf16 is expanded into integer operations and is stored as i16: for the type itself LLVM calls compiler-rt, which no wheel
# carries
LOOPS = '''--convert-linalg-to-loops --lower-affine --annotation-lowering --convert-scf-to-cf --memref-expand
    --expand-strided-metadata --lower-affine --convert-math-to-llvm --convert-math-to-libm --convert-cf-to-llvm
    --arith-expand=include-bf16=true --convert-arith-to-llvm --convert-vector-to-llvm --convert-index-to-llvm
    --finalize-memref-to-llvm --convert-func-to-llvm --reconcile-unrealized-casts'''
ARGUMENTS = dict(i1=ctypes.c_bool, i32=ctypes.c_int32, i64=ctypes.c_int64, fp32=ctypes.c_float)
SIZES = dict(i1=1, i8=1, i16=2, half=2, i32=4, float=4, i64=8, double=8)
FEATURES = {'x86_64': '+f16c'}  # fp16 conversions in hardware, for the same reason as bf16's


class ExecutionError(RuntimeError):
    "The lowered program could not be built or did something illegal"


def _opt(text, passes):
    "Return `text` after bishengir-opt's `passes`"
    done = subprocess.run([OPT, *passes.split(), '-'], input=text, capture_output=True, text=True)
    if done.returncode:
        raise ExecutionError(f'bishengir-opt: {done.stderr.strip().splitlines()[0]}')
    return done.stdout


def addressed(text):
    """Return lowered `text` with every cast of an address to a tensor as a view from address 0: there the absent lock lies

    Off the device bishengir-opt has no word for such a cast.
    """
    cast = r'(%\w+) = hivm\.hir\.pointer_cast\((%\w+)\) \[(%\w+)\] : (memref<\?x\w+>)\n\s*annotation\.mark \1 .*'

    def view(m):
        at = f'%at{m[1][1:]}'
        index = f'{at} = arith.index_cast {m[2]} : i64 to index'
        return f'{index}\n{m[1]} = memref.view %arg0[{at}][{m[3]}] : memref<?xi8> to {m[4]}'

    return re.sub(cast, view, text)


def llvm_dialect(text):
    """Return lowered `text` in MLIR's LLVM dialect, every copy spelled out as a loop

    Then loads and stores are all that touches memory.
    """
    copy = r'memref\.copy (%\S+), (%\S+) : (.*) to (memref<.*>)$'
    buffers = re.sub(copy, r'linalg.copy ins(\1 : \3) outs(\2 : \4)', _opt(addressed(text), BUFFERS), flags=re.M)
    attributes = r' \{tt\.[^}]*\}|\) attributes \{[^{}]*\}'
    return re.sub(attributes, lambda m: ')' if m[0][0] == ')' else '', _opt(buffers, LOOPS))


def llvm_ir(text):
    "Return MLIR's LLVM dialect as LLVM IR"
    context = libtriton.ir.context()
    libtriton.ir.load_dialects(context)
    with tempfile.NamedTemporaryFile('w', suffix='.mlir') as file:
        file.write(text)
        file.flush()
        module = libtriton.ir.parse_mlir_module(file.name, context)
    module.context = context
    ir = str(libtriton.llvm.to_module(module, libtriton.llvm.context()))
    return re.sub('0xR([0-9A-F]{4})', lambda m: str(int(m[1], 16)), ir).replace('bfloat', 'i16')


def watched(ir):
    "Return LLVM IR in which every load and store passes its address through `touch`, and `malloc` is the one of memory.py"

    def watch(m):
        write = 'true' if m['store'] else 'false'
        name = f'%watched.{m.start()}'
        call = f'  {name} = call ptr @touch(ptr {m["pointer"]}, i64 {SIZES[m["type"]]}, i1 {write})'
        return f'{call}\n{m["before"]}ptr {name}'

    access = r'^(?P<before>  (?:%\S+ = load|(?P<store>store)) (?P<type>[^ ,]+)(?: \S+)?, )ptr (?P<pointer>%[^ ,\n]+)'
    ir = re.sub(access, watch, ir, flags=re.M)
    left = re.search(r'^(?!.*%watched).* (?:load|store|call void @(?:memrefCopy|llvm\.mem)).*', ir, flags=re.M)
    if left:
        raise ExecutionError(f'unwatched: {left[0].strip()}')
    return re.sub(r'^declare .*@malloc\(.*$', '', ir, flags=re.M) + TOUCH


@functools.lru_cache(None)
def _machine():
    "Return the machine to compile for; not optimised, which would take seconds a kernel: the programs run for milliseconds"
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(opt=0, jit=True, features=FEATURES.get(target.triple.partition('-')[0], ''))


def _missing(module):
    "Return the functions that a module calls and nothing here has"
    wanted = [f.name for f in module.functions if f.is_declaration and not f.name.startswith('llvm.')]
    return [name for name in wanted if not hasattr(ctypes.CDLL(None), name)]


class Program:
    "Machine code of one lowered kernel: `program(arguments, grid, index)` runs one program of the grid"

    def __init__(self, lowered):
        ir = watched(llvm_ir(llvm_dialect(lowered.text)))
        machine = _machine()
        module = llvm.parse_assembly(ir)
        if missing := _missing(module):
            raise ExecutionError(f'no such function: {missing[0]}')
        self.engine = llvm.create_mcjit_compiler(module, machine)
        self.engine.finalize_object()
        self.state = STATE.from_address(self.engine.get_global_value_address('state'))
        self.types = [t for _, t in lowered.signature]
        self.function = ctypes.CFUNCTYPE(None)(self.engine.get_function_address(lowered.name))

    def __call__(self, arguments, grid, index):
        "Run the program at `index` of `grid`; pointers come as (address, elements)"
        typed = zip(self.types, arguments, strict=True)
        flat = [f for t, a in typed for f in (_memref(*a) if t[0] == '*' else [ARGUMENTS[t](a)])]
        # the first two, lock and workspace, are absent here and any use of them is reported
        self.function(*_memref(0, 0), *_memref(0, 0), *flat, *map(ctypes.c_int32, grid), *map(ctypes.c_int32, index))


def _memref(address, elements):
    "Return the fields of a one-dimensional memref: allocated, aligned, offset, size, stride"
    pointers = [ctypes.c_void_p(address)] * 2
    return [*pointers, ctypes.c_int64(0), ctypes.c_int64(elements), ctypes.c_int64(1)]
