"""Plant bugs, one at a time, and see which ones no test finds

    python tools/mutants.py                          ten bugs in every module (hours)
    python tools/mutants.py hass.losses cold.rule    in these modules only
    python tools/mutants.py --sample 3 --seed 1      other bugs, and fewer
    python tools/mutants.py --slow                   ask the slow tests too

A bug changes one comparison, sum, number, condition, return value, bound or statement of an exported cell, in the notebook
and in the module made of it. It counts as found when the tests of its module (tests/<chapter>/test_<module>.py, or those
named in TESTS) or its notebook fail, or take much more processor time than without it. Nothing in the checkout is touched:
each worker has a copy. The survivors are printed with their place and their diff; tests/README.md says what became of them.
"""
import argparse
import ast
import difflib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
import book
from style import is_exported, parsed

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ['torch', 'transformers', 'peft', 'accelerate', 'matplotlib.pyplot', 'hypothesis', 'pytest', 'nbdev.test']
COPIED = ['nbs', 'npu_lora_decoding', 'tests', 'tools', 'kernels', 'settings.ini', 'pyproject.toml', 'setup.py', 'README.md']
LINKED = ['results', 'docs']
IDLE = 10  # Times the processor time that a trial may take, until it counts as waiting for ever

# Where the tests of a module are if not, or not only, in the file of its name; the quickest first
TESTS = {
    'foundations.errors': ['foundations/test_files.py'],
    'foundations.devices': ['foundations/test_files.py'],
    'foundations.timing': ['foundations/test_files.py'],
    'foundations.adapters': ['foundations/test_adapter_config.py', 'foundations/test_targets.py', 'foundations/test_models.py'],
    'foundations.models': ['foundations/test_prompts.py', 'foundations/test_models.py'],
    'foundations.model_shape': ['temp_lora/test_adapter.py'],
    'foundations.training': ['temp_lora/test_adapter.py', 'hass/test_train.py'],
    'decoding.runner': ['decoding/test_loop.py'],
    'decoding.sampling': ['decoding/test_sampling.py', 'decoding/test_loop.py'],
    'decoding.hf_bridge': ['decoding/test_options.py', 'decoding/test_loop.py'],
    'decoding.capabilities': ['decoding/test_capabilities.py', 'decoding/test_families.py'],
    'decoding.loop': ['decoding/test_peft.py', 'decoding/test_options.py', 'decoding/test_loop.py'],
    'cold.tune': ['evaluation/test_html_report.py'],
    'hass.checkpoint': ['hass/test_head.py'],
    'hass.ring_cache': ['hass/test_self_chat.py'],
    'hass.continuous_batching': ['hass/test_self_chat.py'],
    'hass.config': ['hass/test_train.py'],
    'hass.training_step': ['hass/test_train.py'],
    'speculation.joint': ['speculation/test_prompt_lookup.py'],
    'speculation.compiled_draft': ['speculation/test_head_drafter.py'],
    'temp_lora.checkpoint': ['temp_lora/test_adapter.py'],
    'temp_lora.budget': ['temp_lora/test_generation.py'],
    'evaluation.judging': ['evaluation/test_benchmark.py'],
    'evaluation.methods': ['evaluation/test_benchmark.py'],
    'evaluation.equivalence': ['evaluation/test_benchmark.py'],
    'evaluation.recommend': ['evaluation/test_html_report.py'],
    'evaluation.draft_plots': ['serving/test_web_demo.py'],
    'evaluation.pareto': ['evaluation/test_html_report.py'],
    'evaluation.lm_eval': ['decoding/test_options.py'],
    'serving.vllm_worker': ['serving/test_vllm_process.py'],
    'serving.vllm_client': ['serving/test_vllm_plugin.py'],
    'serving.vllm_pairing': ['serving/test_vllm_plugin.py'],
    'cli.registry': ['cli/test_main.py'],
    'cli.decoding': ['cli/test_numbers.py', 'cli/test_main.py'],
    'cli.memory': ['cli/test_numbers.py', 'cli/test_main.py'],
    'cli.compare': ['cli/test_main.py'],
    'cli.adapter': ['cli/test_main.py'],
    'cli.doctor': ['evaluation/test_kernel_check.py'],
}


# --- Bugs

@dataclass
class Mutant:
    "One bug: an exported cell before and after"
    module:str
    notebook:str
    cell:str  # Its id
    line:int  # In the cell
    kind:str
    before:str
    after:str

    @property
    def place(self):
        "Return where it is, as tools/style.py writes places"
        return f'nbs/{self.notebook}.ipynb#{self.cell}:{self.line}'

    def diff(self):
        "Return what changed, with a line around it"
        lines = difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), n=1, lineterm='')
        return '\n'.join(list(lines)[2:])


COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}
COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.MatMult: ast.Mult,
}


def changed_comparison(node):
    "Yield a comparison with one sign changed"
    if isinstance(node, ast.Compare):
        for i, sign in enumerate(node.ops):
            new = deepcopy(node)
            new.ops[i] = COMPARED[type(sign)]()
            yield 'comparison', new


def is_text(node):
    "Return whether a node is a text"
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def changed_arithmetic(node):
    "Yield a sum as a difference, and so on; texts that are joined stay"
    joins = isinstance(node, ast.BinOp) and (is_text(node.left) or is_text(node.right))
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in COMPUTED and not joins:
        new = deepcopy(node)
        new.op = COMPUTED[type(node.op)]()
        yield 'arithmetic', new


def is_number(node):
    "Return whether a node is a number"
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool)


def changed_constant(node):
    "Yield True for False, and a number that is a little larger"
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield 'constant', ast.Constant(not node.value)
    elif is_number(node):
        yield 'constant', ast.Constant(node.value + 1 if isinstance(node.value, int) else node.value * 1.5 + .01)


def changed_condition(node):
    "Yield `or` for `and`, and a condition without its `not`, or with one"
    if isinstance(node, ast.BoolOp):
        new = deepcopy(node)
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield 'condition', new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield 'condition', deepcopy(node.operand)
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(node.test, (ast.BoolOp, ast.Compare, ast.UnaryOp)):
        yield 'condition', (node.test, ast.UnaryOp(ast.Not(), deepcopy(node.test)))


def changed_return(node):
    "Yield a function that returns nothing"
    if isinstance(node, ast.Return) and node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
        yield 'return', ast.Return(ast.Constant(None))


def changed_bound(node):
    "Yield a slice or a range that ends one later"
    if isinstance(node, ast.Slice):
        for bound in filter(None, (node.lower, node.upper)):
            if not is_number(bound):
                yield 'bound', (bound, ast.BinOp(deepcopy(bound), ast.Add(), ast.Constant(1)))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'range' and not is_number(node.args[-1]):
        yield 'bound', (node.args[-1], ast.BinOp(deepcopy(node.args[-1]), ast.Sub(), ast.Constant(1)))


def removed_statement(node):
    "Yield nothing in the place of a call, or of an assignment to part of something"
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Await))
    is_part = isinstance(node, ast.Assign) and all(isinstance(o, (ast.Attribute, ast.Subscript)) for o in node.targets)
    if is_call or is_part or isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue, ast.Break)):
        yield 'removed', ast.Pass()


CHANGES = [changed_comparison, changed_arithmetic, changed_constant, changed_condition, changed_return, changed_bound, removed_statement]


def quiet_nodes(tree):
    "Return the ids of nodes in which a change does no harm: hints, docstrings, `__all__`, the texts of messages"
    quiet = set()
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            parts = [node.returns]
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            parts = [node.annotation]
        elif isinstance(node, ast.FormattedValue):
            parts = [node]
        elif isinstance(node, ast.Assign) and any(isinstance(o, ast.Name) and o.id == '__all__' for o in node.targets):
            parts = [node]
        quiet |= {id(o) for part in parts if part is not None for o in ast.walk(part)}
    return quiet


def replaced(source, node, new):
    "Return `source` with the text of `node` replaced by that of `new`"
    lines = source.encode().split(b'\n')  # columns are counted in bytes
    first = lines[node.lineno - 1][:node.col_offset]
    last = lines[node.end_lineno - 1][node.end_col_offset:]
    text = ast.unparse(ast.fix_missing_locations(new))
    is_inner = isinstance(node, ast.expr) and not isinstance(new, (ast.Constant, ast.Name, ast.Call))
    middle = f'({text})' if is_inner else text
    return b'\n'.join([*lines[:node.lineno - 1], first + middle.encode() + last, *lines[node.end_lineno:]]).decode()


def mutants_of_cell(nb, cell):
    "Yield every bug of one exported cell"
    source = ''.join(cell['source'])
    tree = parsed(source)
    quiet = quiet_nodes(tree)
    for node in ast.walk(tree):
        if id(node) in quiet:
            continue
        for kind, new in (o for change in CHANGES for o in change(node)):
            target, new = new if isinstance(new, tuple) else (node, new)
            after = replaced(source, target, new)
            try:
                parsed(after)
            except SyntaxError:  # the braces of an f-string have no place of their own before Python 3.12
                continue
            yield Mutant(
                module=nb.module, notebook=nb.name, cell=cell['id'], line=target.lineno, kind=kind, before=source, after=after)


def mutants_of(nb):
    "Return every bug of a notebook's exported cells"
    cells = [c for c in nb.cells if c['cell_type'] == 'code' and is_exported(''.join(c['source']))]
    return [o for c in cells for o in mutants_of_cell(nb, c)]


# --- Copies of the checkout

def copy_checkout(folder):
    "Copy what tests read, and link what is large"
    ignored = shutil.ignore_patterns('.*', '__pycache__')
    for name in COPIED:
        source = ROOT/name
        if source.is_dir():
            shutil.copytree(source, folder/name, ignore=ignored)
        else:
            shutil.copy(source, folder/name)
    for name in LINKED:
        (folder/name).symlink_to(ROOT/name)


def plant(folder, mutant):
    "Write a bug into the notebook of a copy, which the trial exports; return what undoes both"
    notebook = folder/'nbs'/f'{mutant.notebook}.ipynb'
    module = folder/'npu_lora_decoding'/(mutant.module.replace('.', '/') + '.py')
    kept = {path: path.read_text(encoding='utf-8') for path in (notebook, module)}
    nb = json.loads(kept[notebook])
    cell, = (c for c in nb['cells'] if c['id'] == mutant.cell)
    cell['source'] = mutant.after
    notebook.write_text(json.dumps(nb), encoding='utf-8')
    return lambda: [path.write_text(text, encoding='utf-8') for path, text in kept.items()]


# --- Trials

def trial(folder, tests, notebook, slow, *, seconds):
    "Export the notebook, run the tests and then the notebook; leave with status 0 where nothing fails"
    os.setsid()  # so that what the tests start can be ended with them
    # Of the processor: a busy or suspended machine must not look like a bug that was found
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder/'kernels')]
    os.environ['PYTHONPATH'] = os.pathsep.join(sys.path[:2])
    sys.stdout = sys.stderr = open(os.devnull, 'w')
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    path = folder/'nbs'/f'{notebook}.ipynb'
    from nbdev.export import nb_export
    nb_export(path, lib_path=folder/'npu_lora_decoding')
    import pytest
    marks = [] if slow else ['-m', 'not slow']
    status = pytest.main(['-x', '-q', '-p', 'no:cacheprovider', *marks, *tests]) if tests else 0
    if status not in (0, 5):  # 5: none was chosen
        sys.exit(1)
    from nbdev.test import test_nb
    ok, _ = test_nb(path, skip_flags=['notest', 'npu', 'slow'], showerr=False)
    sys.exit(not ok)


def ends_well(folder, nb, options, seconds):
    "Return whether a trial in a process of its own ends in time and with status 0"
    context = multiprocessing.get_context('forkserver')
    process = context.Process(
        target=trial,
        args=(folder, tests_of(nb.module), nb.name, options.slow),
        kwargs=dict(seconds=math.ceil(seconds)))
    process.start()
    process.join(IDLE * seconds)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode == 0


def tests_of(module):
    "Return the files with the tests of a module"
    chapter, name = module.split('.')
    files = TESTS.get(module, [f'{chapter}/test_{name}.py'])
    return [f'tests/{o}' for o in files if (ROOT/'tests'/o).exists()]


def work(nb, sample, folder, options):
    "Try the bugs of one notebook in a copy of the checkout; return the survivors"
    began = time.perf_counter()
    if not ends_well(folder, nb, options, options.longest):
        print(f'{nb.module}: its tests fail without any bug: left out', flush=True)
        return []
    seconds = 30 + 4 * (time.perf_counter() - began)
    survivors = []
    for mutant in sample:
        undo = plant(folder, mutant)
        if ends_well(folder, nb, options, seconds):
            survivors.append(mutant)
        undo()
    print(f'{nb.module}: {len(sample) - len(survivors)} of {len(sample)} found', flush=True)
    return survivors


def report(survivors, tried):
    "Return what survived, with its place and its diff"
    kinds = Counter(o.kind for o in survivors)
    head = f'{tried - len(survivors)} of {tried} bugs were found; survivors by kind: {dict(kinds)}'
    each = [f'{o.place} ({o.kind})\n{o.diff()}' for o in survivors]
    return '\n\n'.join([head, *each])


def arguments():
    "Return the parsed command line"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('modules', nargs='*', help='such as hass.losses (default: all)')
    parser.add_argument('--sample', type=int, default=10, help='bugs a module (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='which ones (default: %(default)s)')
    parser.add_argument('--slow', action='store_true', help='ask the slow tests too')
    parser.add_argument('--longest', type=float, default=600, help='seconds that the tests of a module may take without a bug')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='modules at a time (default: the number of cores)')
    parser.add_argument('--count', action='store_true', help='only say how many bugs there are')
    options = parser.parse_args()
    known = {nb.module for nb in book.book()}
    if unknown := set(options.modules) - known:
        parser.error(f'no module {", ".join(sorted(unknown))}: name some of {", ".join(sorted(known))}')
    return options


def samples(options):
    "Return the chosen notebooks, each with its sample of bugs"
    chosen = [nb for nb in book.book() if not options.modules or nb.module in options.modules]
    found = []
    for nb in chosen:
        every = mutants_of(nb)
        size = len(every) if options.count else min(options.sample, len(every))
        found.append((nb, random.Random(f'{options.seed} {nb.module}').sample(every, size)))
    return found


def main():
    "Plant bugs in copies of the checkout and print those that no test finds"
    options = arguments()
    jobs = samples(options)
    if options.count:
        print('\n'.join(f'{nb.module}: {len(sample)}' for nb, sample in jobs))
        return
    os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', HF_HUB_DISABLE_PROGRESS_BARS='1', TOKENIZERS_PARALLELISM='false')
    multiprocessing.get_context('forkserver').set_forkserver_preload(HEAVY)
    with tempfile.TemporaryDirectory() as top, ThreadPoolExecutor(options.workers) as pool:
        def job(numbered):
            number, (nb, sample) = numbered
            folder = Path(top)/str(number)
            folder.mkdir()
            copy_checkout(folder)
            return work(nb, sample, folder, options)
        survivors = [o for found in pool.map(job, enumerate(jobs)) for o in found]
    print(report(survivors, sum(len(sample) for _, sample in jobs)))


if __name__ == '__main__':
    main()
