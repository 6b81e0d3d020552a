"""The table in kernels/README.md: what was verified and what each kernel costs, without times or anything else that depends on the machine"""
from pathlib import Path
from npu_lora_kernels.targets import ASCEND
from .cost import ideal_seconds
from .plan import ARCHS

README = Path(__file__).parent.parent/'README.md'
START, END = '<!-- report -->', '<!-- end of report -->'
CLAIM = ("*lowered and memory-planned for Ascend 910B by Huawei's bishengir-compile 1.2.0; the lowered IR validated numerically on x86; "
         'final code generation and execution on an NPU not performed.*')
NOTES = '''Per core, read from the compiled file: UB, L1 and L0C are the last byte in use; "doubled" counts buffers with two places, so that loading overlaps with work; calls, flags (set and wait) and barriers
are counted in the program text, not as often as its loops run. Counted while the lowered program ran: "moved" is all bytes between global memory and the cores, "busiest" the part of the program that moves
most, "/ floor" is moved over the floor: each byte that is needed read once and each result written once; what cube and vector cores exchange through the workspace is not in it. "Ideal" is the ideal time at
HBM bandwidth: the bytes of the core with most of them, when 1.6 TB/s (910B1, 910B3, 910_9382) or 0.8 TB/s (910B4), an assumption, are shared equally by all cores. It is arithmetic, not a measurement.'''
COLUMNS = 'shape, kernel, cores, UB, L1, L0C, workspace, doubled, loads, stores, scalar loads, vector calls, cube calls, flags, barriers, programs, moved, busiest, / floor, ideal B3, ideal B4'.split(', ')
CORES = dict(aiv='vector', aic='cube', mix='cube + vector')

def report(findings, mutants):
    "Return the report as Markdown"
    kernels = {key: name for f in findings for key, name in f.kernels.items()}
    planned = ', '.join(f'{a} {sum(t == a for t, _ in kernels)}' for a in ARCHS)
    counts = (f'{len(findings)} cases (shape and dtype) agree with their torch references, with the programs run first to last and last to first. Configurations planned (kernel, types, constants): {planned}. '
              f'Planted bugs caught: {mutants} of {mutants}.')
    rows = [_row(*row) for f in findings for row in f.rows]
    table = [COLUMNS, ['---'] * 3 + ['--:'] * (len(COLUMNS) - 3), *rows]
    return '\n\n'.join([CLAIM, counts, '\n'.join('| ' + ' | '.join(map(str, r)) + ' |' for r in table), NOTES])

def _row(name, launch, cost):
    "Return one launch as the cells of a line"
    times = [f'{1e6 * ideal_seconds(launch, ASCEND[t]):.2f} µs' for t in ('Ascend910B3', 'Ascend910B4')]
    return [name, f'`{launch.lowered.name}`', CORES[launch.lowered.mode], *(f'{b:,}' for b in (cost.ub, cost.l1, cost.l0c, cost.workspace)), cost.doubled, cost.loads, cost.stores, cost.scalars,
            cost.vector, cost.cube, cost.flags, cost.barriers, len(launch.moved), f'{sum(launch.moved):,}', f'{max(launch.moved):,}', f'{sum(launch.moved) / launch.distinct:.2f}', *times]

def committed(text):
    "Return the report inside README text, or nothing"
    return text.partition(START)[2].partition(END)[0].strip()

def written(text, new):
    "Return README text with its report replaced by `new`, at its end when it has none"
    before, mark, rest = text.partition(START)
    return f'{before.rstrip()}\n\n{START}\n{new}\n{END}{rest.partition(END)[2] or chr(10)}'
