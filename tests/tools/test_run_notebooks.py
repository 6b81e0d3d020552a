"The tool that runs notebooks in place: tools/run_notebooks.py"

import json
from pathlib import Path
import pytest
from run_notebooks import clean_outputs, run_notebook, without_bars, without_paths


def code(source, *outputs):
    return dict(cell_type='code', source=source, outputs=list(outputs), metadata={}, execution_count=None, id='a1')


def stream(text, name='stdout'):
    return dict(output_type='stream', name=name, text=text.splitlines(True))


def shown(**data):
    return dict(output_type='display_data', metadata={}, data={k.replace('_', '/'): v for k, v in data.items()})


def test_bars_go_and_other_lines_stay():
    bar = '\rLoading weights:   0%|          | 0/3 [00:00<?, ?it/s]\rLoading weights: 100%|##########| 3/3 [00:00<00:00, 9it/s]\n'
    assert without_bars(f'before\n{bar}after 50% of it\n') == 'before\nafter 50% of it\n'
    assert without_bars('half\rdone\n') == 'done\n'
    assert clean_outputs([stream(bar, 'stderr'), shown(text_html='<progress value=1>'), stream('kept\n')]) == [
        stream('kept\n')
    ]


def test_paths_become_relative():
    f = lambda o: without_paths(o, Path('/home/ann/code/proj'), Path('/home/ann'))
    assert f('/home/ann/code/proj/nbs/a.ipynb in /home/ann/code/proj') == './nbs/a.ipynb in .'
    assert f('/home/ann/code/proj2/a.py') == '~/code/proj2/a.py'
    assert f('/home/ann/.cache and /home/anna') == '~/.cache and /home/anna'
    assert without_paths('/usr/lib', Path('/p'), Path('/')) == '/usr/lib'


def write(path, *cells):
    path.write_text(json.dumps(dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5)))
    return path


def outputs(path):
    return [c['outputs'] for c in json.loads(path.read_text())['cells']]


def test_run_replaces_outputs_except_where_flagged(tmp_path, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')  # run_notebook sets it: this puts it back
    old = stream('old\n')
    nb = write(
        tmp_path / 'a.ipynb',
        code("print('new')", old),
        code('x = 1', old),
        code("#| eval: false\nprint('new')", old),
        code("#| slow\nprint('new')", old),
    )
    assert run_notebook(nb, {'slow'}) == ''
    assert outputs(nb) == [[stream('new\n')], [], [old], [old]]


def test_a_failing_notebook_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    nb = write(tmp_path / 'a.ipynb', code("print('new')"), code('1/0'))
    before = nb.read_text()
    assert 'ZeroDivisionError' in run_notebook(nb, set())
    assert nb.read_text() == before
