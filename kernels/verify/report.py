"""The table in kernels/README.md: what was verified and what each kernel costs

It holds no times or anything else that depends on the machine.
"""

from pathlib import Path
from npu_lora_kernels.targets import ASCEND
from .cost import ideal_seconds
from .plan import ARCHS

README = Path(__file__).parent.parent / 'README.md'
START = '<!-- report -->'
END = '<!-- end of report -->'
CLAIM = (
    "*lowered and memory-planned for Ascend 910B by Huawei's bishengir-compile 1.2.0; the lowered IR validated numerically on x86; "
    'final code generation and execution on an NPU not performed.*'
)
CORES = dict(aiv='vector', aic='cube', mix='cube, vector')
LIMITS = {space: getattr(ASCEND['Ascend910B3'], space) for space in ('ub', 'l0c', 'l1')}  # Bytes; all four are alike
PLANNED = (
    'A configuration is a kernel with its types, blocks and whatever else Triton compiles in. Memory is the most that any '
    'of them uses, with its share of what a core has. The last column: the same source compiled to machine code for '
    '{target} by Triton {triton}; not run.'
)
COSTS = (
    'fp16, planned for 910B3. Counted while the lowered program ran: "moved" is all bytes between global memory '
    'and the cores, "/ floor" is moved over the floor (each byte that it touches read once, each result\n'
    'written once), "busiest" the part of the program that moves most; what cube and vector cores exchange '
    'through a workspace is not in it. "Ideal" is the time of those bytes when 1.6 TB/s (910B3) or 0.8 TB/s '
    '(910B4), an\n'
    'assumption, are shared equally by all cores: arithmetic, not a measurement. Read from the compiled file: UB '
    'in use; "doubled", buffers with two places, so that loading overlaps with work; loads, stores, vector and '
    'cube\n'
    'calls, flags (set and wait) and barriers in the program text, each counted once however often its loop runs.'
)


def report(findings, mutants, cuda):
    "Return the report as Markdown"
    counts = (
        f'{len(findings)} cases (shape and dtype) agree with their torch references, the programs run first to last and last '
        f'to first. {mutants} of {mutants} planted bugs are caught. SmolLM2-135M with an adapter, every operator served by '
        'lowered code, writes the 12 tokens that the references write for a verse: greedy, CoLD, and CoLD over trees, in '
        'fp32. Of every kernel, a configuration with larger blocks is refused (fp16, 910B3).'
    )
    kernels = {key: value for f in findings for key, value in f.kernels.items()}
    planned = ['### Planned', _planned(kernels, cuda['counts']), PLANNED.format(**cuda)]
    costs = ['### Cost', _costs([row for f in findings for row in f.rows]), COSTS]
    return '\n\n'.join([CLAIM, counts, *planned, *costs])


def _table(columns, rows, words):
    "Return Markdown; the first `words` columns hold words, the others numbers"
    bars = ['---'] * words + ['--:'] * (len(columns) - words)
    return '\n'.join('| ' + ' | '.join(map(str, r)) + ' |' for r in [columns, bars, *rows])


def _planned(kernels, cuda):
    "Return the table of what was planned for Ascend and compiled for CUDA, a line a kernel"
    rows = []
    for name in dict.fromkeys(lowered.name for lowered, _ in kernels.values()):
        mine = {key: value for key, value in kernels.items() if value[0].name == name}
        modes = {lowered.mode for lowered, _ in mine.values()}
        most = {space: max(getattr(cost, space) for _, cost in mine.values()) for space in LIMITS}
        used = [f'{n:,} ({n / LIMITS[space]:.0%})' if n else '' for space, n in most.items()]
        planned = [sum(target == a for target, _ in mine) for a in ARCHS]
        rows.append([f'`{name}`', *(CORES[m] for m in modes), *planned, *used, cuda[name]])
    targets = [f'planned for {a.removeprefix("Ascend")}' for a in ARCHS]
    return _table(['kernel', 'cores', *targets, 'UB', 'L0C', 'L1', 'compiled for CUDA'], rows, words=2)


def _costs(rows):
    "Return the table of what realistic work costs, a line a launch"
    traffic = ['programs', 'moved', '/ floor', 'busiest', 'ideal B3', 'ideal B4']
    code = ['UB', 'doubled', 'loads', 'stores', 'vector', 'cube', 'flags', 'barriers']
    return _table(['work', 'kernel', *traffic, *code], [_cost(*row) for row in rows], words=2)


def _cost(work, launch, cost):
    "Return the line of one launch"
    moved = sum(launch.moved)
    ideal = [f'{1e6 * ideal_seconds(launch, ASCEND[t]):.2f} µs' for t in ('Ascend910B3', 'Ascend910B4')]
    traffic = [len(launch.moved), f'{moved:,}', f'{moved / launch.distinct:.2f}', f'{max(launch.moved):,}', *ideal]
    code = [f'{cost.ub:,}', cost.doubled, cost.loads, cost.stores, cost.vector, cost.cube, cost.flags, cost.barriers]
    return [work, f'`{launch.lowered.name}`', *traffic, *code]


def committed(text):
    "Return the report inside README text, or nothing"
    return text.partition(START)[2].partition(END)[0].strip()


def written(text, new):
    "Return README text with its report replaced by `new`, at its end when it has none"
    before, mark, rest = text.partition(START)
    return f'{before.rstrip()}\n\n{START}\n{new}\n{END}{rest.partition(END)[2] or chr(10)}'
