"The documentation site: what its builder promises, without the generator, which has an environment of its own (`make site`)"

import ast
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'docs'))
from site_builder import PACKAGE
from site_builder.api import entry, module_md, params, undocumented
from site_builder.checks import asked, problems_of
from site_builder.markdown import linked, readdressed, spaced
from site_builder.pages import Book, contents, site_page
from notebook_markdown import outside_code

MODULES = sorted(path for path in (ROOT / PACKAGE).rglob('[!_]*.py'))


def dotted(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


# --- Navigation


def test_every_notebook_is_a_lesson_and_every_module_has_one():
    book = Book()
    notebooks = {path for path in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts}
    assert {path.relative_to(ROOT / 'nbs').parts[0] for path in notebooks - {*book.notebooks}} == {
        'index.ipynb',
        'pages',
    }
    assert {f'{PACKAGE}.{name}' for name in book.modules.values()} == {dotted(path) for path in MODULES}


@pytest.mark.parametrize(
    'path, page',
    [
        ('README.md', 'index.md'),
        ('docs/pages/limits.md', 'limits.md'),
        ('kernels/README.md', 'kernels/index.md'),
        ('nbs/2_cold/01_rule.ipynb', 'lessons/2_cold/01_rule.md'),
        ('nbs/2_cold/README.md', 'lessons/2_cold/index.md'),
        ('CHANGELOG.md', 'CHANGELOG.md'),
    ],
)
def test_the_site_mirrors_the_repository(path, page):
    assert site_page(path) == page


def test_the_use_part_is_what_the_list_of_pages_links_to():
    parts = contents()
    found = {path: title for files in parts.values() for path, title in files.items()}
    assert [*parts][:2] == ['Using it', 'What is known'] and all(parts.values())
    assert found['docs/pages/install.md'] == 'Install' and 'README.md' not in found
    assert all((ROOT / path).is_file() for path in found)
    assert len({*map(site_page, found)}) == len(found)


# --- Prose


def test_names_lead_somewhere_but_not_in_code_headings_links_or_on_their_own_page():
    targets = {'CoLD': 'api/cold.rule.md#CoLD', '2_cold/01_rule': 'lessons/2_cold/01_rule.md'}

    def f(text, page='lessons/1_decoding/a.md'):
        return outside_code(text, lambda prose: linked(prose, targets, page))

    cold = '../../api/cold.rule.md#CoLD'
    got = f('`CoLD`, `CoLD(.1, .5)`, `2_cold/01_rule`, `other`')
    assert got == f'[`CoLD`]({cold}), [`CoLD(.1, .5)`]({cold}), [`2_cold/01_rule`](../2_cold/01_rule.md), `other`'
    for same in ('# `CoLD`\n', '[`CoLD`](x)', '```\n`CoLD`\n```\n', '``CoLD``'):
        assert f(same) == same
    assert f('`2_cold/01_rule`', 'lessons/2_cold/01_rule.md') == '`2_cold/01_rule`'


def test_links_between_files_become_links_between_pages():
    where = {
        'docs/pages/limits.md': 'limits.md',
        'nbs/2_cold/README.md': 'lessons/2_cold/index.md',
        'a.png': 'pictures/a.png',
    }

    def f(text, source='docs/pages/b.md', page='b.md'):
        return readdressed(text, source, page, where)

    assert (
        f('[l](limits.md#hardware) [c](../../nbs/2_cold) [`f`](../../setup.py)')
        == '[l](limits.md#hardware) [c](lessons/2_cold/index.md) `f`'
    )
    assert f('![picture](a.png)', 'README.md', 'index.md') == '![picture](pictures/a.png)'
    for same in ('[x](https://a.b)', '[y](#here)', '[z](mailto:a@b.c)'):
        assert f(same) == same
    assert f('[l](../docs/pages/limits.md)', 'kernels/README.md', 'kernels/index.md') == '[l](../limits.md)'


def test_lists_get_their_blank_line():
    assert spaced('words:\n- a\n- b\n1. c\n') == 'words:\n\n- a\n- b\n1. c\n'
    assert spaced('- a\n  more\n- b\n') == '- a\n  more\n- b\n'


# --- API


# fmt: off  # docments stand beside their parameters
def whole(
    a:int,  # First
    b, c=2,  # Sizes
    *rest,  # More
    d:str='x|y',  # `p | q`, or a | b
) -> int:  # The sum
    "Return a sum"
# fmt: on


def silent(a, b: int = 1):
    "Return nothing"


def wordless(a):  # First
    pass


@dataclass
class Base:
    "A base"

    x: int  # Its x


@dataclass
class Derived(Base):
    "Derived"

    y: float = 1.0  # Its y
    z: int = 0


class Plain:
    "Plain"

    def __init__(self, a):  # First
        pass

    def loud(self, q):
        "Return it loudly"

    def quiet(self):
        pass


class Oops(ValueError):
    "Somebody else's arguments"


def module(**names):
    return SimpleNamespace(__name__='m', __all__=list(names), **names)


def test_what_is_undocumented_is_found():
    assert undocumented(module(whole=whole, Base=Base, Plain=Plain, Oops=Oops, VALUE=3)) == []
    assert undocumented(module(silent=silent)) == [
        'm.silent: parameter a has no comment',
        'm.silent: parameter b has no comment',
    ]
    assert undocumented(module(wordless=wordless)) == ['m.wordless has no docstring']
    assert undocumented(module(Derived=Derived)) == ['m.Derived: parameter z has no comment']
    with pytest.raises(AttributeError):
        undocumented(SimpleNamespace(__name__='m', __all__=['gone']))


def test_an_entry_shows_signature_docstring_and_table():
    table = [
        '| parameter | type | default | notes |',
        '| --- | --- | --- | --- |',
        '| `a` | `int` |  | First |',
        '| `b` |  |  | Sizes |',
        '| `c` | `int` | `2` | Sizes |',
        '| `rest` |  |  | More |',
        "| `d` | `str` | `'x|y'` | `p | q`, or a \\| b |",
    ]
    head = "## whole { #whole }\n\n```python\nwhole(a, b, c=2, *rest, d='x|y')\n```\n\nReturn a sum\n\n"
    assert entry('whole', whole, '') == head + '\n'.join(table) + '\n\nReturns `int`: The sum'


def test_a_class_shows_its_documented_methods():
    got = entry('Plain', Plain, '')
    assert '### Plain.loud { #Plain.loud }' in got and 'quiet' not in got
    assert '| `a` | First |' in got and '`q`' not in got
    assert [*params(Derived)] == ['x', 'y', 'z'] and params(Derived)['x'].docment == 'Its x'


def test_a_value_shows_its_comment():
    assert entry('V', (1, 2), 'U = 1  # not this\nV = (1,\n').endswith('V = (1, 2)\n```')
    assert entry('V', 3, 'V = 3  # Of it\n').endswith('```\n\nOf it')


@pytest.mark.parametrize('path', MODULES, ids=dotted)
def test_every_public_name_and_parameter_of_the_library_is_described(path):
    m = importlib.import_module(dotted(path))
    assert undocumented(m) == []
    text = module_md(m, 'here')
    for name in m.__all__:
        assert f'\n## {name} {{ #{name} }}\n' in text


def test_values_stand_below_classes_and_functions():
    m = importlib.import_module(f'{PACKAGE}.evaluation.judging')
    names = re.findall(r'(?m)^## (\w+)', module_md(m, 'here'))
    values = [not callable(getattr(m, name)) for name in names]
    assert values == sorted(values) and any(values) and {*names} == {*m.__all__}


# --- Links, and what leaves this computer

FINE = (
    '<link rel="stylesheet" href="a.css"><a href="b.html#there">b</a> <a href="#here">h</a> <a href="https://arxiv.org/abs/1">x</a> '
    '<a href="mailto:a@b.org">m</a><h1 id="here"></h1><img src="data:image/png;base64,aa"><script src="a.js"></script>'
)


@pytest.fixture
def site(tmp_path):
    (tmp_path / 'index.html').write_text(FINE)
    (tmp_path / 'b.html').write_text('<h2 id="there">b</h2> <a href="index.html">i</a>')
    (tmp_path / 'a.css').write_text('a { background: url(data:image/svg+xml;aa); b: url(x.png) }')
    (tmp_path / 'a.js').write_text('/* https://licence.org */ f("http://www.w3.org/2000/svg")')
    return tmp_path


def test_a_sound_site_has_no_problems(site):
    assert problems_of(site) == []


@pytest.mark.parametrize(
    'bad, message',
    [
        ('<a href="c.html">c</a>', 'c.html does not exist'),
        ('<a href="b.html#gone">b</a>', 'b.html#gone: no such anchor'),
        ('<a href="#gone">b</a>', '#gone: no such anchor'),
        ('<a href="/b.html">b</a>', '/b.html does not exist'),
        ('<a href="../b.html">b</a>', '../b.html does not exist'),
        ('<img src="gone.png">', 'gone.png does not exist'),
        ('<a href="https://no host/">x</a>', 'malformed link'),
        ('<a href="http://nodot">x</a>', 'malformed link'),
        ('<script src="https://cdn.org/a.js"></script>', 'loads https://cdn.org/a.js'),
        ('<script src="//cdn.org/a.js"></script>', 'loads //cdn.org/a.js'),
        ('<link rel="preconnect" href="https://fonts.org">', 'loads https://fonts.org'),
        ('<img src="HTTP://a.org/x.png">', 'loads HTTP://a.org/x.png'),
        ('<iframe src="https://a.org"></iframe>', 'loads https://a.org'),
        ('<script>fetch("https://a.org/x")</script>', 'its script asks https://a.org'),
        ('<style>@import "https://a.org/f.css";</style>', 'its style asks https://a.org/f.css'),
        ('<p style="background:url(//a.org/x)">', 'its style asks //a.org/x'),
        ('<code>#| export</code>', None),
        ('<pre>\n#| export\n</pre>', 'shows an nbdev directive'),
    ],
)
def test_what_is_broken_or_remote_is_found(site, bad, message):
    (site / 'index.html').write_text(FINE + bad)
    found = problems_of(site)
    if message is None:
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith('index.html: ') and message in found[0], found


def test_styles_and_scripts_are_read_too(site):
    (site / 'a.css').write_text("@font-face { src: url('https://fonts.org/a.woff2') }")
    (site / 'a.js').write_text(r'x = "https:\/\/cdn.org/a.js"; y = new WebSocket("wss://b.org")')
    assert problems_of(site) == [
        'a.css: asks https://fonts.org/a.woff2',
        r'a.js: asks https:\/\/cdn.org',
        'a.js: asks wss://b.org',
    ]
    assert problems_of(site / 'empty') == [f'{site/"empty"} has no pages']


def test_data_fetches_nothing_and_code_may():
    index = 'var __index = {"docs":[{"text":"ask(\'http://a.b\')"}]}'
    assert asked('script', index) == [] and asked('script', index + ';\n') == []
    fetching = [
        index + ';fetch("http://a.b")',
        index.replace('}]}', '}], "x": fetch("http://a.b")}'),
        'fetch("http://a.b")',
    ]
    for code in fetching:
        assert 'http://a.b' in asked('script', code)


@pytest.mark.parametrize('path', MODULES, ids=dotted)
def test_no_docstring_lost_a_backslash(path):
    r"`\beta` in a string that is not raw is a control character and `eta`, and its formula cannot be drawn"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    documented = [o for o in ast.walk(tree) if isinstance(o, (ast.FunctionDef, ast.ClassDef, ast.Module))]
    assert not [o for o in documented if re.search(r'[\x00-\x08\x0b-\x1f]', ast.get_docstring(o) or '')]
