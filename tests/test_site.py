"The documentation site: what its build script promises, without the generator, which has an environment of its own (`make site`)"
import ast, importlib, importlib.util, re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
import pytest
from fastcore.xtras import dict2obj
from nbdev.process import NBProcessor

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location('docs_build', ROOT/'docs'/'build.py')
build = importlib.util.module_from_spec(spec); spec.loader.exec_module(build)

# --- Navigation

def test_every_notebook_has_a_chapter(): assert {build.chapter_of(p) for p in build.notebooks()} == set(build.CHAPTERS)

@pytest.mark.parametrize('name,chapter', [('5_temp_lora/02_cache_reuse', 'Temp-LoRA'), ('0_foundations/06_tasks', 'Measuring'), ('5_temp_lora/04_perplexity', 'Temp-LoRA'), ('6_evaluation/08_plots', 'Showing'), ('8_cli/01_registry', 'Command line'), ('tutorials/x', 'Tutorials')])
def test_chapters(name, chapter): assert build.chapter_of(Path(f'nbs/{name}.ipynb')) == chapter

@pytest.mark.parametrize('name', ['18_new', '1_short', 'loose', '99a_odd'])
def test_a_notebook_that_no_chapter_names_stops_the_build(name):
    with pytest.raises(SystemExit, match=f'{name}.ipynb is in no chapter'): build.chapter_of(Path(f'nbs/{name}.ipynb'))

# --- Notebooks

def code(source, *outputs): return dict(cell_type='code', source=source, outputs=list(outputs), metadata={}, execution_count=None, id='a')
def text(source): return dict(cell_type='markdown', source=source, metadata={}, id='b')
def stream(words): return dict(output_type='stream', name='stdout', text=[words])
def shown(**data): return dict(output_type='display_data', metadata={}, data={k.replace('_', '/'): v for k, v in data.items()})
def page(*cells, **kw): return build.notebook_md(NBProcessor(nb=dict2obj(dict(cells=[c | dict(idx_=i) for i, c in enumerate(cells)], metadata={}, nbformat=4, nbformat_minor=5))).nb, **kw)

def test_directives_are_obeyed_and_not_shown():
    got = page(code('#| export\n#| slow\ndef f(): pass', stream('out\n')), code('#| hide\nsecret()', stream('hidden\n')), code('#|echo: false\nquiet()', stream('loud\n')), code('#| eval: false\nx = 1\ny = "#| export"'))
    assert got == '```python\ndef f(): pass\n```\n\n```{ .text .output }\nout\n```\n\n```{ .text .output }\nloud\n```\n\n```python\nx = 1\ny = "#| export"\n```\n'

def test_no_notebook_shows_a_directive_or_loses_its_exports():
    for p in build.notebooks()[:8]:
        got = build.notebook_md(NBProcessor(p).nb)
        assert not [l for l in got.splitlines() if l.startswith('#|')] and 'nbdev_export' not in got
        for c in NBProcessor(p).nb.cells:
            if 'export' in getattr(c, 'directives_', {}): assert c.source.strip() in got

def test_outputs_are_as_stored():
    pictures = []
    got = page(code('x', shown(image_png='aGk=', text_plain='<Figure>'), shown(text_markdown='| a |', text_plain='a'), shown(text_html='<b>\n\n1</b>', text_plain='1'), shown(text_plain='2')), picture=lambda png: pictures.append(png) or 'PICTURE')
    assert pictures == [b'hi'] and got == '```python\nx\n```\n\nPICTURE\n\n| a |\n\n<div class="output"><b>\n1</b></div>\n\n```{ .text .output }\n2\n```\n'
    with pytest.raises(SystemExit, match='stores an error'): page(code('x', dict(output_type='error')))

def test_names_lead_somewhere_but_not_in_code_headings_links_or_on_their_own_page():
    targets = {'CoLD': 'api/cold.md#CoLD', '2_cold/01_rule': 'lessons/05_cold.md'}
    f = lambda s, at='lessons/a.md': build.prose(s, lambda o: build.linked(o, targets, at))
    assert f('`CoLD`, `CoLD(.1, .5)`, `2_cold/01_rule`, `other`') == '[`CoLD`](../api/cold.md#CoLD), [`CoLD(.1, .5)`](../api/cold.md#CoLD), [`2_cold/01_rule`](2_cold/01_rule.md), `other`'
    for same in '# `CoLD`\n', '[`CoLD`](x)', '```\n`CoLD`\n```\n', '``CoLD``': assert f(same) == same
    assert f('`2_cold/01_rule`', 'lessons/05_cold.md') == '`2_cold/01_rule`'

def test_lists_get_their_blank_line():
    assert build.spaced('words:\n- a\n- b\n1. c\n') == 'words:\n\n- a\n- b\n1. c\n'
    assert build.spaced('- a\n  more\n- b\n') == '- a\n  more\n- b\n'

# --- API

def whole(
    a:int,  # First
    b, c=2,  # Sizes
    *rest,  # More
    d:str='x|y',  # `p | q`, or a | b
) -> int:  # The sum
    "Return a sum"

def silent(a, b:int=1): "Return nothing"

def wordless(
    a,  # First
): pass

@dataclass
class Base:
    "A base"
    x:int  # Its x

@dataclass
class Derived(Base):
    "Derived"
    y:float=1.  # Its y
    z:int=0

class Plain:
    "Plain"
    def __init__(self,
        a,  # First
    ): pass
    def loud(self, q): "Return it loudly"
    def quiet(self): pass

class Oops(ValueError): "Somebody else's arguments"

def module(**names): return SimpleNamespace(__name__='m', __all__=list(names), **names)

def test_what_is_undocumented_is_found():
    assert build.undocumented(module(whole=whole, Base=Base, Plain=Plain, Oops=Oops, VALUE=3)) == []
    assert build.undocumented(module(silent=silent)) == ['m.silent: parameter a has no comment', 'm.silent: parameter b has no comment']
    assert build.undocumented(module(wordless=wordless)) == ['m.wordless has no docstring']
    assert build.undocumented(module(Derived=Derived)) == ['m.Derived: parameter z has no comment']
    with pytest.raises(AttributeError): build.undocumented(SimpleNamespace(__name__='m', __all__=['gone']))

def test_an_entry_shows_signature_docstring_and_table():
    assert build.entry('whole', whole, '') == ('## whole { #whole }\n\n```python\nwhole(a, b, c=2, *rest, d=\'x|y\')\n```\n\nReturn a sum\n\n| parameter | type | default | notes |\n| --- | --- | --- | --- |\n'
        "| `a` | `int` |  | First |\n| `b` |  |  | Sizes |\n| `c` | `int` | `2` | Sizes |\n| `rest` |  |  | More |\n| `d` | `str` | `'x|y'` | `p | q`, or a \\| b |\n\nReturns `int`: The sum")
    got = build.entry('Plain', Plain, '')
    assert '### Plain.loud { #Plain.loud }' in got and 'quiet' not in got and '| `a` | First |' in got and '`q`' not in got
    assert [*build.params(Derived)] == ['x', 'y', 'z'] and build.params(Derived)['x'].docment == 'Its x'
    assert build.entry('V', (1, 2), 'U = 1  # not this\nV = (1,\n')[-10:] == 'V = (1, 2)\n```'[-10:]
    assert build.entry('V', 3, 'V = 3  # Of it\n').endswith('```\n\nOf it')

@pytest.mark.parametrize('path', sorted((ROOT/build.PACKAGE).glob('[!_]*.py')), ids=lambda p: p.stem)
def test_every_public_name_and_parameter_of_the_library_is_described(path):
    m = importlib.import_module(f'{build.PACKAGE}.{path.stem}')
    assert build.undocumented(m) == []
    for k in m.__all__: assert build.entry(k, getattr(m, k), path.read_text()).startswith(f'## {k} {{ #{k} }}')

# --- Links, and what leaves this computer

FINE = '<link rel="stylesheet" href="a.css"><a href="b.html#there">b</a> <a href="#here">h</a> <a href="https://arxiv.org/abs/1">x</a> <a href="mailto:a@b.org">m</a><h1 id="here"></h1><img src="data:image/png;base64,aa"><script src="a.js"></script>'

@pytest.fixture
def site(tmp_path):
    (tmp_path/'index.html').write_text(FINE); (tmp_path/'b.html').write_text('<h2 id="there">b</h2> <a href="index.html">i</a>')
    (tmp_path/'a.css').write_text('a { background: url(data:image/svg+xml;aa); b: url(x.png) }'); (tmp_path/'a.js').write_text('/* https://licence.org */ f("http://www.w3.org/2000/svg")')
    return tmp_path

def test_a_sound_site_has_no_problems(site): assert build.problems_of(site) == []

@pytest.mark.parametrize('bad,says', [
    ('<a href="c.html">c</a>', 'c.html does not exist'), ('<a href="b.html#gone">b</a>', 'b.html#gone: no such anchor'), ('<a href="#gone">b</a>', '#gone: no such anchor'), ('<a href="/b.html">b</a>', '/b.html does not exist'),
    ('<a href="../b.html">b</a>', '../b.html does not exist'), ('<img src="gone.png">', 'gone.png does not exist'), ('<a href="https://no host/">x</a>', 'malformed link'), ('<a href="http://nodot">x</a>', 'malformed link'),
    ('<script src="https://cdn.org/a.js"></script>', 'loads https://cdn.org/a.js'), ('<script src="//cdn.org/a.js"></script>', 'loads //cdn.org/a.js'), ('<link rel="preconnect" href="https://fonts.org">', 'loads https://fonts.org'),
    ('<img src="HTTP://a.org/x.png">', 'loads HTTP://a.org/x.png'), ('<iframe src="https://a.org"></iframe>', 'loads https://a.org'), ('<script>fetch("https://a.org/x")</script>', 'its script asks https://a.org'),
    ('<style>@import "https://a.org/f.css";</style>', 'its style asks https://a.org/f.css'), ('<p style="background:url(//a.org/x)">', 'its style asks //a.org/x'), ('<code>#| export</code>', None), ('<pre>\n#| export\n</pre>', 'shows an nbdev directive')])
def test_what_is_broken_or_remote_is_found(site, bad, says):
    (site/'index.html').write_text(FINE + bad)
    found = build.problems_of(site)
    assert found == [] if says is None else len(found) == 1 and found[0].startswith('index.html: ') and says in found[0], found

def test_styles_and_scripts_are_read_too(site):
    (site/'a.css').write_text("@font-face { src: url('https://fonts.org/a.woff2') }"); (site/'a.js').write_text(r'x = "https:\/\/cdn.org/a.js"; y = new WebSocket("wss://b.org")')
    assert build.problems_of(site) == ['a.css: asks https://fonts.org/a.woff2', r'a.js: asks https:\/\/cdn.org', 'a.js: asks wss://b.org']
    assert build.problems_of(site/'empty') == [f'{site/"empty"} has no pages']

def test_data_fetches_nothing_and_code_may():
    index = 'var __index = {"docs":[{"text":"ask(\'http://a.b\')"}]}'
    assert build.asked('script', index) == [] and build.asked('script', index + ';\n') == []
    for code in (index + ';fetch("http://a.b")', index.replace('}]}', '}], "x": fetch("http://a.b")}'), 'fetch("http://a.b")'): assert 'http://a.b' in build.asked('script', code)

@pytest.mark.parametrize('path', sorted((ROOT/build.PACKAGE).glob('[!_]*.py')), ids=lambda p: p.stem)
def test_no_docstring_lost_a_backslash(path):
    r"`\beta` in a string that is not raw is a control character and `eta`, and its formula cannot be drawn"
    said = [ast.get_docstring(o) or '' for o in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(o, (ast.FunctionDef, ast.ClassDef, ast.Module))]
    assert not [s for s in said if re.search(r'[\x00-\x08\x0b-\x1f]', s)]
