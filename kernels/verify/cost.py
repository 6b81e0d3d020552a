"""What a kernel costs: read from its HIVM file, and counted while its lowered form ran on x86

Not a measurement: a time here is bytes divided by a bandwidth.
"""

import math
import re
from dataclasses import dataclass

# Assumption: HBM bandwidth in bytes/s, from public descriptions of the 910B's variants; every core is given an equal share of it
HBM = dict(Ascend910B1=1.6e12, Ascend910B3=1.6e12, Ascend910B4=0.8e12, Ascend910_9382=1.6e12)
BITS = dict(i1=1, i8=8, i16=16, i32=32, i64=64, f16=16, bf16=16, f32=32, f64=64)
KINDS = dict(
    loads='load_gm_to_|nd2nz_', stores='store_ubuf_to_gm_|fixpipe_', cube='mma_'
)  # By the names of their calls


@dataclass(frozen=True)
class Cost:
    "What the HIVM file of one kernel says, per core"

    ub: int  # High-water mark in bytes: of the unified buffer,
    l1: int  # of L1 (cbuf),
    l0c: int  # of the cube's accumulator (cc)
    workspace: int  # Bytes of global memory between the cube and the vector core of one program
    doubled: int  # Buffers that alternate between two places, so that a load overlaps with work
    loads: int  # Calls in the program text, each counted once however often its loop runs: global memory to core,
    stores: int  # core to global memory,
    scalars: int  # single numbers from global memory,
    vector: int  # vector instructions,
    cube: int  # matrix instructions
    flags: int  # set_flag, wait_flag pairs between pipes
    barriers: int  # pipe_barrier
    blocks: int  # waits of the cube core for the vector core and back


def cost(hivm):
    "Return the `Cost` of the kernel in `hivm`"
    code = '\n'.join(line for line in hivm.splitlines() if 'func.func private' not in line)
    calls = re.findall(r'call @(\w+)\(', code)
    kinds = {kind: sum(bool(re.match(names, c)) for c in calls) for kind, names in KINDS.items()}
    memory = {name: _high_water(code, space) for name, space in dict(ub='ub', l1='cbuf', l0c='cc').items()}
    return Cost(
        **memory,
        workspace=_workspace(code),
        doubled=_doubled(code),
        **kinds,
        scalars=len(re.findall(r'memref\.load .*address_space<gm>', code)),
        vector=len(calls) - sum(kinds.values()),
        flags=code.count('hir.wait_flag'),
        barriers=code.count('pipe_barrier'),
        blocks=code.count('sync_block_wait'),
    )


def _functions(code):
    return re.split(r'^  func\.func ', code, flags=re.M)[1:]


def _high_water(code, space):
    "Return the last byte that a buffer in `space` occupies"
    ends = [0]
    for function in _functions(code):
        named = re.findall(r'(%\S+) = arith\.constant (\d+) : i64', function)
        constants = {name: int(value) for name, value in named}
        for offset, rest in re.findall(rf'pointer_cast\((.*?)\) : memref<(.*address_space<{space}>.*)', function):
            *shape, kind = re.match(r'[\w?]+', rest)[0].split('x')
            ends.append(constants[offset] + (math.prod(map(int, shape)) * BITS[kind] + 7) // 8)
    return max(ends)


def _doubled(code):
    "Return how many buffers are two places that a loop takes in turn"
    pairs = set()
    for i, function in enumerate(_functions(code)):
        places = dict(re.findall(r'(%\S+) = hivm\.hir\.pointer_cast\((.*?)\)', function))
        chosen = re.findall(r'arith\.select .*, (%\S+), (%\S+) : memref<', function)
        pairs |= {(i, places[a], places[b]) for a, b in chosen if a in places and b in places}
    return len(pairs)


def _workspace(code):
    "Return the bytes of workspace that the kernel asks for"
    sizes = re.findall(r'infer_workspace_shape_function\(\).*\n.*arith\.constant (\d+) : index', code)
    return int(sizes[0]) if sizes else 0


def ideal_seconds(launch, target):
    "Return the time of a launch at HBM bandwidth: its busiest core moves its bytes at an equal share"
    cores = target.cube_cores if launch.lowered.mode != 'aiv' else target.cores
    busiest = max(sum(launch.moved[i::cores]) for i in range(cores))
    return busiest * cores / HBM[target.name]
