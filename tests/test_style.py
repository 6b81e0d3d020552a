"Lines, calls and words: nothing grows beyond tools/style.json, whose counts only shrink"

import json
import pytest
import style
from style import Piece, measure


def faults_of(source):
    "Return how many faults of each kind a piece of code has"
    counts = measure(Piece('planted.py', source))
    return {name: n for name, n in counts.faults.items() if name in style.MEASURES}


def test_the_project_keeps_its_style():
    found = style.measure_all()
    held = json.loads(style.RATCHET.read_text())
    assert list(style.problems(found, held)) == []


@pytest.mark.parametrize(
    'source, faults',
    [
        ('x = 1  # ' + '-' * 140, {'long': 1}),
        ('x = 1; y = 2', {'semicolon': 1}),
        ('plot();', {}),
        ('f(1, 2, 3, 4, 5, 6, 7)', {'arguments': 1}),
        ('f(1, 2, 3, 4, 5, 6, seven=7)', {}),
        ('a, b = 1, 2', {'tuple': 1}),
        ('a, b = pair', {}),
        ('def f():\n' + '    x = 1\n' * 41, {'function': 1}),
        ('def f():\n    "Return 1"\n' + '    # why\n' * 40 + '    return 1', {}),
    ],
)
def test_planted_faults_are_counted(source, faults):
    assert faults_of(source) == faults


@pytest.mark.parametrize(
    'source, kind',
    [
        ('def f():\n    "Return what was a guess"', 'docstrings'),
        ("require(x, 'no guesses were given')", 'messages'),
        ("message = f'{n} guesses'", 'messages'),
        ('def f(guess): pass', 'names'),
        ('firstGuess = 1', 'names'),
        ('x = 1  # guessed', 'docstrings'),
    ],
)
def test_planted_words_are_counted(source, kind):
    words = measure(Piece('planted.py', source)).words
    assert words == {(kind, 'guess'): 1}


@pytest.mark.parametrize(
    'text, word',
    [
        ('one pass over the tree', 'pass'),
        ('one forward pass', None),
        ('pass a list', None),
        ('the head is no head', 'is no'),
        ('there is no head', None),
        ('it is no longer', None),
    ],
)
def test_words_are_told_apart(text, word):
    words = measure(Piece('planted.md', text, is_code=False, has_docs=True)).words
    assert words == ({('prose', word): 1} if word else {})


def test_the_code_of_a_notebook_is_read_by_cell(tmp_path):
    cells = [
        dict(cell_type='code', id='aa', source='#| export\nx = 1; y = 2'),
        dict(cell_type='code', id='bb', source='%matplotlib inline\nx = 1'),
        dict(cell_type='markdown', id='cc', source='A guess'),
    ]
    (tmp_path / '01_a.ipynb').write_text(json.dumps(dict(cells=cells)))
    counts = style.measure_files([tmp_path / '01_a.ipynb'])
    places = [(name, place.split('#')[1], line) for name, place, line, _ in counts.places]
    assert places == [('semicolon', 'aa', 2), ('words', 'cc', 1)]


def test_the_ratchet_only_shrinks():
    found = {'tests': measure(Piece('planted.py', 'x = 1; y = 2; z = 3'))}
    held = {'tests': style.totals({'tests': measure(Piece('planted.py', 'x = 1; y = 2'))})['tests']}
    assert [o for o in style.problems(found, held) if 'statements after' in o]
    assert style.shrunk(found, held)['tests']['semicolon'] == 1
