"The two tools that turn notebooks into what readers see: tools/readme.py and tools/run_notebooks.py"
import json, re
from pathlib import Path
import pytest
from readme import cell_md, fenced, notebook_md
from run_notebooks import clean_outputs, run_notebook, without_bars, without_paths

def code(source, *outputs): return dict(cell_type='code', source=source, outputs=list(outputs), metadata={}, execution_count=None, id='a1')
def stream(text, name='stdout'): return dict(output_type='stream', name=name, text=text.splitlines(True))
def shown(**data): return dict(output_type='display_data', metadata={}, data={k.replace('_', '/'): v for k,v in data.items()})

def test_readme_keeps_text_and_code():
    nb = dict(cells=[dict(cell_type='markdown', source=['# Title\n', '\n', 'Words']), code('1+1', shown(text_plain=['2'])), code("print('a')", stream('a\n'))])
    assert notebook_md(nb) == "# Title\n\nWords\n\n```python\n1+1\n```\n\n```\n2\n```\n\n```python\nprint('a')\n```\n\n```\na\n```\n"

def test_readme_leaves_out_hidden_cells_directives_and_images():
    assert cell_md(code('#| hide\nsecret()')) == []
    assert cell_md(code('#| eval: false\nx')) == ['```python\nx\n```']
    assert notebook_md(dict(cells=[code('plot()', shown(image_png='aaaa', text_plain=['<Figure>']))])) == '```python\nplot()\n```\n'

def test_readme_links_a_picture_that_has_a_file():
    picture = code('#| echo: false\n#| image: results/a.png What it shows\nImage("a.png")', shown(image_png='aaaa', text_plain=['<Image>']))
    assert notebook_md(dict(cells=[picture])) == '![What it shows](results/a.png)\n'
    import readme
    for path in re.findall(r'!\[.*\]\((.+)\)', notebook_md(json.loads(readme.INDEX.read_text(encoding='utf-8')))): assert (readme.INDEX.parent.parent/path).exists(), path

def test_readme_refuses_a_stored_error():
    with pytest.raises(SystemExit, match='stored an error'): cell_md(code('x', dict(output_type='error')))

def test_fence_outgrows_its_text(): assert fenced('```\na\n```').startswith('````\n')

def test_bars_go_and_other_lines_stay():
    bar = '\rLoading weights:   0%|          | 0/3 [00:00<?, ?it/s]\rLoading weights: 100%|##########| 3/3 [00:00<00:00, 9it/s]\n'
    assert without_bars(f'before\n{bar}after 50% of it\n') == 'before\nafter 50% of it\n'
    assert without_bars('half\rdone\n') == 'done\n'
    assert clean_outputs([stream(bar, 'stderr'), shown(text_html='<progress value=1>'), stream('kept\n')]) == [stream('kept\n')]

def test_paths_become_relative():
    f = lambda o: without_paths(o, Path('/home/ann/code/proj'), Path('/home/ann'))
    assert f('/home/ann/code/proj/nbs/a.ipynb in /home/ann/code/proj') == './nbs/a.ipynb in .'
    assert f('/home/ann/code/proj2/a.py') == '~/code/proj2/a.py'
    assert f('/home/ann/.cache and /home/anna') == '~/.cache and /home/anna'
    assert without_paths('/usr/lib', Path('/p'), Path('/')) == '/usr/lib'

def write(path, *cells): path.write_text(json.dumps(dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5))); return path

def outputs(path): return [c['outputs'] for c in json.loads(path.read_text())['cells']]

def test_run_replaces_outputs_except_where_flagged(tmp_path, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')  # run_notebook sets it: this puts it back
    old = stream('old\n')
    nb = write(tmp_path/'a.ipynb', code("print('new')", old), code('x = 1', old), code("#| eval: false\nprint('new')", old), code("#| slow\nprint('new')", old))
    assert run_notebook(nb, {'slow'}) == ''
    assert outputs(nb) == [[stream('new\n')], [], [old], [old]]

def test_a_failing_notebook_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    nb = write(tmp_path/'a.ipynb', code("print('new')"), code('1/0'))
    before = nb.read_text()
    assert 'ZeroDivisionError' in run_notebook(nb, set())
    assert nb.read_text() == before
