"Bugs that are planted: each kind, where none belongs, and that a copy of the checkout is left as it was"

import ast
import json
from pathlib import Path
import pytest
from book import Notebook, book
from mutants import TESTS, mutants_of, plant

ROOT = Path(__file__).resolve().parents[2]


def notebook(*sources):
    "A notebook of exported cells"
    cells = [dict(cell_type='code', id=str(i), source=source) for i, source in enumerate(sources)]
    return Notebook('0_first/01_a', None, cells, {})


def planted(line):
    "Return what becomes of a line of an exported function"
    found = mutants_of(notebook(f'#| export\ndef f(x, y):\n    {line}'))
    return {(o.kind, o.after.split('\n')[2].strip()) for o in found}


@pytest.mark.parametrize(
    'line, kind, after',
    [
        ('if x < 1: g()', 'comparison', 'if (x <= 1): g()'),
        ('z = x - y', 'arithmetic', 'z = (x + y)'),
        ('z = x * 2', 'constant', 'z = x * 3'),
        ('z = g(flag=True)', 'constant', 'z = g(flag=False)'),
        ('z = x and y', 'condition', 'z = (x or y)'),
        ('z = x if y else 0', 'condition', 'z = x if (not y) else 0'),
        ('return x', 'return', 'return None'),
        ('z = x[:y]', 'bound', 'z = x[:(y + 1)]'),
        ('for i in range(x): pass', 'bound', 'for i in range((x - 1)): pass'),
        ('g(x)', 'removed', 'pass'),
        ('x.y = 1', 'removed', 'pass'),
    ],
)
def test_every_kind(line, kind, after):
    assert (kind, after) in planted(line)


@pytest.mark.parametrize('line', ["'a' + x", '"Return 1"', 'pass', 'z:"list[1]" = x', 'return None'])
def test_where_none_belongs(line):
    assert {kind for kind, _ in planted(line)} <= {'return'}


def test_every_bug_parses_and_changes_something():
    for mutant in mutants_of(
        notebook('#| export\ndef f(x):\n    "é"\n    return [o**2 for o in x[1:] if o != 3 and not g(o)]')
    ):
        assert ast.dump(ast.parse(mutant.after)) != ast.dump(ast.parse(mutant.before))


def test_cells_that_are_not_exported_have_none():
    assert mutants_of(notebook('x = 1 + 1')) == []


def test_a_bug_is_taken_out_again(tmp_path):
    (tmp_path / 'nbs' / '0_first').mkdir(parents=True)
    (tmp_path / 'npu_lora_decoding' / 'first').mkdir(parents=True)
    (tmp_path / 'npu_lora_decoding' / 'first' / 'a.py').write_text('x = 1\n')
    nb = notebook('#| export\nx = 1')
    path = tmp_path / 'nbs' / '0_first' / '01_a.ipynb'
    path.write_text(json.dumps(dict(cells=nb.cells)))
    before = path.read_text()
    (mutant,) = mutants_of(nb)
    undo = plant(tmp_path, mutant)
    assert 'x = 2' in path.read_text()
    undo()
    assert path.read_text() == before
    assert mutant.diff() == '@@ -1,2 +1,2 @@\n #| export\n-x = 1\n+x = 2'


def test_the_tests_of_a_module_are_there():
    assert set(TESTS) <= {nb.module for nb in book()}
    assert all((ROOT / 'tests' / file).exists() for files in TESTS.values() for file in files)
