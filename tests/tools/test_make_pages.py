"README, the pages and the chapters' lists: made from notebooks by tools/make_pages.py, and every link of theirs leads somewhere"

import ast
import builtins
import json
import os
import re
import subprocess
import sys
from urllib.parse import unquote
import pytest
import make_pages
import npu_lora_decoding
from make_pages import LIST, ROOT, chapter_md, difference, page_md, pages, turned
from notebook_markdown import directives, fenced, heading, notebook_md


def code(source, *outputs):
    return dict(cell_type='code', source=source, outputs=list(outputs), metadata={}, execution_count=None, id='a1')


def text(source):
    return dict(cell_type='markdown', source=source, metadata={}, id='b1')


def stream(words):
    return dict(output_type='stream', name='stdout', text=words.splitlines(keepends=True))


def shown(**data):
    return dict(output_type='display_data', metadata={}, data={k.replace('_', '/'): v for k, v in data.items()})


def page(*cells, **options):
    return notebook_md(dict(cells=list(cells)), **options)


# --- A notebook as Markdown


def test_text_code_and_outputs_are_kept():
    cells = [
        text(['# Title\n', '\n', 'Words']),
        code('1+1', shown(text_plain=['2'])),
        code("print('a')", stream('a\n')),
    ]
    assert (
        page(*cells)
        == "# Title\n\nWords\n\n```python\n1+1\n```\n\n```\n2\n```\n\n```python\nprint('a')\n```\n\n```\na\n```\n"
    )


def test_directives_are_obeyed_and_not_shown():
    assert page(code('#| hide\nsecret()', stream('hidden\n'))) == '\n'
    assert page(code('#| export\n#| slow\ndef f(): pass')) == '```python\ndef f(): pass\n```\n'
    assert page(code('#|echo: false\nquiet()', stream('loud\n'))) == '```\nloud\n```\n'
    assert page(code('#| eval: false\nx = 1\ny = "#| export"')) == '```python\nx = 1\ny = "#| export"\n```\n'
    assert directives('#| export\n#| default_exp a.b\nx')[0] == {'export': '', 'default_exp': 'a.b'}


def test_code_is_folded_only_where_it_is_asked_for():
    folded = code('#| code-fold: true\nplot()')
    assert '<details' not in page(folded)
    assert page(folded, fold=True).startswith(
        '<details class="code" markdown="1"><summary>Code</summary>\n\n```python\nplot()'
    )
    assert '<details' not in page(code('#| code-fold: false\nplot()'), fold=True)


def test_outputs_are_shown_as_the_page_can_show_them():
    picture = code('plot()', shown(image_png='aaaa', text_plain='<Figure>'))
    html = code('x', shown(text_html='<b>\n\n1</b>', text_plain='1'))
    assert page(picture) == '```python\nplot()\n```\n'
    assert page(picture, picture=lambda png: f'({png})') == '```python\nplot()\n```\n\n(aaaa)\n'
    assert page(html) == '```python\nx\n```\n\n```\n1\n```\n'
    assert page(html, html=True) == '```python\nx\n```\n\n<div class="output"><b>\n1</b></div>\n'


def test_prose_is_changed_and_code_is_not():
    cells = [text('a\n\n```\na\n```\n\na'), code('a', shown(text_markdown='a')), code('a', stream('a'))]
    changed = page(*cells, prose=lambda o: o.replace('a', 'b'))
    assert changed == 'b\n\n```\na\n```\n\nb\n\n```python\na\n```\n\nb\n\n```python\na\n```\n\n```\na\n```\n'


def test_a_stored_error_is_refused():
    with pytest.raises(ValueError, match='stores an error'):
        page(code('x', dict(output_type='error')))


def test_fence_outgrows_its_text():
    assert fenced('```\na\n```').startswith('````\n')


def test_heading():
    assert heading(dict(cells=[text('# A title\n> What it says\n\nMore')])) == ('A title', 'What it says')
    assert heading(dict(cells=[text('# Alone')])) == ('Alone', '')


# --- Links and lists, in a small repository


@pytest.fixture
def root(tmp_path):
    for folder in ('nbs/2_cold', 'nbs/pages', 'docs/pages'):
        (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / 'nbs/2_cold/01_rule.ipynb', text('# The rule\n> One | two'), code('#| default_exp cold.rule'))
    write(tmp_path / 'nbs/2_cold/02_more.ipynb', text('# More\n> Uses `2_cold/01_rule`'))
    (tmp_path / 'nbs/2_cold/README.md').write_text('# CoLD\n> Contrast\n')
    write(
        tmp_path / 'nbs/index.ipynb',
        text('# Name\nSee [the rule](2_cold/01_rule.ipynb#a), [results](pages/results.ipynb), `2_cold/01_rule`.'),
    )
    write(
        tmp_path / 'nbs/pages/results.ipynb',
        text('# Results\n[home](../index.ipynb), [limits](../../docs/pages/limits.md), [x](https://a.b)'),
    )
    return tmp_path


def write(path, *cells):
    path.write_text(json.dumps(dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5)))


def test_links_lead_from_the_page(root):
    readme = page_md(root / 'nbs/index.ipynb', root)
    rule = 'nbs/2_cold/01_rule.ipynb'
    assert (
        readme == f'# Name\nSee [the rule]({rule}#a), [results](docs/pages/results.md), [`2_cold/01_rule`]({rule}).\n'
    )
    results = page_md(root / 'nbs/pages/results.ipynb', root)
    assert results.splitlines()[1] == '<!-- Made by `make readme` from nbs/pages/results.ipynb: edit that notebook. -->'
    assert results.endswith('[home](../../README.md), [limits](limits.md), [x](https://a.b)\n')


def test_only_notebooks_that_exist_become_links(root):
    source = root / 'nbs/index.ipynb'
    target = root / 'README.md'
    for same in ('`2_cold/09_none`', '[`2_cold/01_rule`](https://a.b)', '``2_cold/01_rule``', '[a](#b)'):
        assert turned(same, source, target, root) == same


def test_a_page_written_by_hand_gets_links_on_notebooks(root):
    page = root / 'docs' / 'pages' / 'limits.md'
    page.write_text(
        '# Limits\n`2_cold/01_rule`, [`2_cold/02_more`](../../nbs/2_cold/07_more.ipynb), [x](results.md#a)\n\n```\n'
        '`2_cold/01_rule`\n```\n'
    )
    rule, more = ('../../nbs/2_cold/' + name for name in ('01_rule.ipynb', '02_more.ipynb'))
    linked = f'[`2_cold/01_rule`]({rule}), [`2_cold/02_more`]({more}), [x](results.md#a)'
    assert pages(root)[page] == f'# Limits\n{linked}\n\n```\n`2_cold/01_rule`\n```\n'


def test_a_chapter_lists_its_notebooks(root):
    made = chapter_md(root / 'nbs/2_cold', root)
    assert made.startswith(f'# CoLD\n> Contrast\n\n{LIST}\n\n| notebook')
    assert '| [01_rule](01_rule.ipynb) | `cold.rule` | **The rule.** One \\| two |' in made
    assert '| [02_more](02_more.ipynb) |  | **More.** Uses [`2_cold/01_rule`](01_rule.ipynb) |' in made
    (root / 'nbs/2_cold/README.md').write_text(made)
    assert chapter_md(root / 'nbs/2_cold', root) == made
    (root / 'nbs/2_cold/README.md').unlink()
    with pytest.raises(SystemExit, match='nbs/2_cold/README.md is missing'):
        chapter_md(root / 'nbs/2_cold', root)


def test_a_long_readme_and_a_stored_error_are_refused(root):
    write(root / 'nbs/pages/results.ipynb', code('x', dict(output_type='error')))
    with pytest.raises(SystemExit, match='nbs/pages/results.ipynb: a cell stores an error'):
        pages(root)
    write(root / 'nbs/pages/results.ipynb', text('# Results'))
    write(root / 'nbs/index.ipynb', text('# Name\n' + 'word ' * 2000))
    with pytest.raises(SystemExit, match='more than 8192'):
        pages(root)


def test_a_difference_is_shown(root):
    made = pages(root)
    path = root / 'README.md'
    assert difference(path, made[path])
    path.write_text(made[path])
    assert difference(path, made[path]) == []
    assert '+New' in difference(path, made[path] + 'New\n')


# --- This repository


def written():
    "Return the pages that people read in the repository's own file view"
    found = [
        ROOT / name
        for name in (
            'README.md',
            'CONTRIBUTING.md',
            'CHANGELOG.md',
            'docs/README.md',
            'kernels/README.md',
            'results/README.md',
        )
    ]
    return [*found, *sorted((ROOT / 'docs' / 'pages').glob('*.md')), *sorted((ROOT / 'nbs').glob('*/README.md'))]


def anchors(path):
    "Return the anchors of a page, as a repository's file view makes them"
    headings = re.findall(r'(?m)^#+ (.*)', path.read_text(encoding='utf-8'))
    plain = [re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading) for heading in headings]
    return {re.sub(r'[^\w -]', '', heading.lower()).strip().replace(' ', '-') for heading in plain}


def lost_links(path):
    "Yield the links of a page that lead nowhere in the repository"
    prose = re.sub(r'(?ms)^```.*?^```|`[^`\n]*`', '', path.read_text(encoding='utf-8'))
    for address in re.findall(r'\]\(([^)\s]+)\)', prose):
        where, _, anchor = address.partition('#')
        if re.match(r'[a-z]+:', address):
            continue
        target = (path.parent / unquote(where)).resolve() if where else path
        if not target.exists() or (anchor and target.suffix == '.md' and anchor not in anchors(target)):
            yield address


@pytest.mark.parametrize('path', written(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(path):
    assert list(lost_links(path)) == []


def test_every_page_is_in_the_list_of_pages():
    listed = (ROOT / 'docs' / 'README.md').read_text(encoding='utf-8')
    for path in (ROOT / 'docs' / 'pages').glob('*.md'):
        assert f'(pages/{path.name})' in listed


def test_pages_are_what_the_notebooks_make():
    stale = [path.relative_to(ROOT).as_posix() for path, made in pages().items() if difference(path, made)]
    assert stale == [], 'run make readme'


def test_every_notebook_named_in_prose_exists():
    for path in written():
        for name in re.findall(r'`(\d_\w+/\w+)`', path.read_text(encoding='utf-8')):
            assert (make_pages.ROOT / 'nbs' / f'{name}.ipynb').exists(), f'{path.name}: {name}'


# --- README's example


def example():
    "Return README's complete example, and the output that it shows"
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    found = re.search(r'(?ms)^## In Python\n.*?^```python\n(.*?)^```\n+^```\n(.*?)^```', readme)
    return found[1], found[2]


@pytest.mark.slow
def test_the_example_runs_as_it_stands(tmp_path):
    source, output = example()
    script = tmp_path / 'example.py'
    script.write_text(source, encoding='utf-8')
    options = dict(cwd=tmp_path, env=os.environ | {'PYTHONPATH': f'{ROOT}:{ROOT/"kernels"}', 'OMP_NUM_THREADS': '1'})
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == output


def test_the_example_defines_every_name_that_it_uses():
    tree = ast.parse(example()[0])
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    made = imported | {node.id for node in names if isinstance(node.ctx, ast.Store)} | {*dir(builtins)}
    assert {node.id for node in names} <= made
    assert imported <= {*npu_lora_decoding.__all__}
