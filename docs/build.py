"""Builds the documentation site from nbs/, docs/pages/ and the modules' docments into docs/_build/site, and checks it. `docs/run` calls it.

Notebooks are not run: code, outputs and pictures are as stored. Opening the site must ask no other computer for anything: `problems_of` reads every page, style and script for that, and `browse` lets Chromium try.
"""
import ast, base64, importlib, inspect, json, os, re, shutil, subprocess, sys, tempfile, textwrap
from dataclasses import is_dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from fastcore.docments import docments
from nbdev.process import NBProcessor

DOCS = Path(__file__).resolve().parent
ROOT, OUT, PACKAGE = DOCS.parent, DOCS/'_build', 'npu_lora_decoding'
sys.path[:0] = [str(ROOT), str(ROOT/'tools')]
from readme import fenced

# The notebooks of each chapter by number; `14` is every 14 but those that stand elsewhere
CHAPTERS = {'Basics': '00 01 02 03 04', 'CoLD': '05 12e 12f 12g', 'Tree and loop': '06 07', 'HASS: the head': '08', 'HASS: training': '09 10 11', 'HASS: decoding': '12', 'Temp-LoRA': '13 14',
            'Measuring': '14a 14b 14c 14h 14i 14j 14k 15', 'Showing': '16', 'Command line': '16a 16b 16d 17', 'Tutorials': 'tutorials'}
USE = {'which_method.md': 'Which method?', 'recipes.md': 'Recipes', 'limits.md': 'Honest limits', 'cards': 'Models and heads', 'kernels.md': 'Device kernels', 'cite.md': 'How to cite'}
NAMED = {'www.w3.org', 'www.mathjax.org', 'bit.ly'}  # hosts that scripts name but never ask: namespaces, a link in a menu, one in an error message
UNUSED = r'https://(unpkg\.com|api\.github\.com|cdn\.jsdelivr\.net)'  # of the theme and MathJax: diagrams, a repository's stars, formulas read aloud; no page uses them

def fail(why): sys.exit(f'site: {why}')

# --- From notebooks to Markdown

def notebooks(): return sorted(o for o in (ROOT/'nbs').rglob('*.ipynb') if o.name != 'index.ipynb' and '.ipynb_checkpoints' not in o.parts)

def chapter_of(path):
    "Return the chapter of a notebook; one that no chapter names is an error"
    key = path.parent.name if path.parent.name == 'tutorials' else re.match(r'\d*[a-z]?', path.stem)[0]
    found = [name for k in (key, re.sub(r'(?<=\d)[a-z]$', '', key)) for name, keys in CHAPTERS.items() if k in keys.split()]
    return found[0] if found else fail(f'{path.name} is in no chapter: give its number a place in CHAPTERS, docs/build.py.')

def prose(text, f): return ''.join(o if i % 2 else f(o) for i, o in enumerate(re.split(r'(?ms)(^```.*?^```\s*?$)', text)))  # all but fenced code

def spaced(text): return re.sub(r'(?m)^((?![-*>|#\s]|\d+\. ).+\n)(?=[-*] |\d+\. )', r'\1\n', text)  # Python-Markdown wants a blank line before a list

def linked(text, targets, page):
    "Return prose of `page` whose code that names a notebook or something public leads there; headings and links stay as they are"
    def link(m):
        to = targets.get(re.sub(r'\(.*\)$', '', m[1]))
        return f'[`{m[1]}`]({os.path.relpath(to, Path(page).parent)})' if to and to != page else m[0]
    return ''.join(l if l.startswith('#') else re.sub(r'(?<![`\[])`([^`\n]+)`(?![`\]])', link, l) for l in text.splitlines(True))

def output_md(out, picture):
    "Return a stored output as Markdown; `picture` turns a PNG's bytes into what shows it"
    if out['output_type'] == 'error': fail('a notebook stores an error: run make notebooks.')
    if out['output_type'] == 'stream': return fenced(''.join(out['text']), '{ .text .output }')
    data = {k: v if isinstance(v, str) else ''.join(v) for k, v in out['data'].items()}
    if 'image/png' in data: return picture(base64.b64decode(data['image/png']))
    if 'text/html' in data: return '<div class="output">' + re.sub(r'\n\s*\n', '\n', data['text/html']) + '</div>'
    return data.get('text/markdown') or fenced(data['text/plain'], '{ .text .output }')

def notebook_md(nb, picture=lambda png: '', write=lambda text: text):
    "Return a notebook, as `NBProcessor` leaves it, as a page: `hide` leaves a cell out, `echo: false` its code, no directive is shown; `write` has a last word on prose"
    parts = []
    for c in nb.cells:
        flags = getattr(c, 'directives_', {})
        if c.cell_type != 'code': parts.append(prose(c.source, lambda o: write(spaced(o))))
        elif 'hide' not in flags:
            code = re.sub(r'\A(\s*#\s*\|.*\n?)+', '', c.source).strip()
            if code and flags.get('echo:') != ['false']: parts.append(fenced(code, 'python'))
            parts += [output_md(o, picture) for o in c.outputs]
    return '\n\n'.join(p.strip('\n') for p in parts if p.strip()) + '\n'

# --- From modules to Markdown

def params(o):
    "Return fastcore's docments of what a caller of `o` gives; a comment speaks for all parameters of its line, and what another library's base class asks for is left out"
    top, found, data = lambda c: c.__module__.partition('.')[0], {}, inspect.isclass(o) and is_dataclass(o)
    ours = [c for c in o.__mro__ if top(c) == top(o) and (data or '__init__' in vars(c))] if inspect.isclass(o) else [o]
    for c in ours[::-1] if data else ours[:1]: found |= {k: v for k, v in docments(c, full=True, returns=False, args_kwargs=True).items() if v.docment or k not in found}
    if data: found = {k: v for k, v in found.items() if any(k in vars(c).get('__annotations__', {}) for c in ours)}
    elif ours:
        args = ast.parse(textwrap.dedent(inspect.getsource(ours[0].__init__ if inspect.isclass(o) else o))).body[0].args
        line = {a.arg: a.lineno for a in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg) if a}
        for k, v in found.items(): v.docment = v.docment or next((found[n].docment for n in found if line.get(n, n) == line.get(k) and found[n].docment), None)
    return {k: v for k, v in found.items() if k not in ('self', 'cls')}

def described(o): return inspect.isclass(o) or inspect.isfunction(inspect.unwrap(o)) if callable(o) else False

def undocumented(module):
    "Return what the public names of a module leave unsaid: a docstring, a parameter"
    public = {f'{module.__name__}.{k}': getattr(module, k) for k in module.__all__}
    return [f'{k} has no docstring' for k, o in public.items() if described(o) and not (o.__doc__ or '').strip()] + [
        f'{k}: parameter {p} has no comment' for k, o in public.items() if described(o) for p, v in params(inspect.unwrap(o)).items() if not (v.docment or '').strip()]

def brief(o, most=60):
    text = o.__name__ if inspect.isfunction(o) or inspect.isclass(o) else re.sub(r'<function (\S+) at 0x\w+>', r'\1', repr(o))
    return text if len(text) <= most else f'{type(o).__name__}(...)'

def type_of(v): return '' if v.anno is inspect.Parameter.empty else re.sub(r'\b(?:\w+\.)+(?=\w)', '', inspect.formatannotation(v.anno)).strip("'")

def table(rows):
    "Return rows of cells, the heading first, as a table without its empty columns"
    cell = lambda s: ''.join(o if i % 2 else o.replace('|', '\\|') for i, o in enumerate(re.split('(`[^`]*`)', s.replace('\n', ' '))))
    rows = list(zip(*[c for c in zip(*rows) if any(c[1:])]))
    return '' if len(rows[0]) < 2 else '\n'.join(f'| {" | ".join(map(cell, r))} |' for r in (rows[0], ('---',) * len(rows[0]), *rows[1:]))

def entry(name, o, source, level=2):
    "Return the entry of a public name: signature, docstring, docment table; below a class its documented methods. `source` holds the comments of values"
    head, empty = f'{"#"*level} {name} {{ #{name} }}', inspect.Parameter.empty
    if not described(o): return '\n\n'.join([head, fenced(f'{name} = {brief(o, 400)}', 'python'), *re.findall(rf'(?m)^{name}\s*=.*?  #\s*(.*)$', source)])
    f, star, code = inspect.unwrap(o), {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}, lambda s: f'`{s}`' if s else ''
    found = params(f)
    shown = [star.get(v.kind, '') + k + ('' if v.default is empty else f'={brief(v.default)}') for k, v in found.items()]
    call = f'{name}({", ".join(shown)})' if len(str(shown)) < 100 else f'{name}(\n    ' + ',\n    '.join(shown) + ',\n)'
    parts = [head, fenced(call, 'python'), (o.__doc__ or '').strip()]
    if found: parts.append(table([('parameter', 'type', 'default', 'notes')] + [(code(k), code(type_of(v)), '' if v.default is empty else code(brief(v.default)), v.docment or '') for k, v in found.items()]))
    if inspect.isclass(o): parts += [entry(f'{name}.{k}', m, source, level + 1) for k, v in vars(o).items() if k[0] != '_' and inspect.isfunction(m := inspect.unwrap(getattr(v, '__func__', v))) and m.__doc__]
    elif (back := docments(f, full=True)['return']) and (back.docment or type_of(back)): parts.append(': '.join(filter(None, [f'Returns {code(type_of(back))}', back.docment])))
    return '\n\n'.join(filter(None, parts))

# --- The pages, and what leads to them

def write_pages():
    "Write docs/_build/pages and return mkdocs' navigation; something public that is not described is an error"
    pages, lessons, api, cards, targets, modules = OUT/'pages', {}, {}, [], {}, {}
    shutil.rmtree(OUT, ignore_errors=True); shutil.copytree(DOCS/'pages', pages); shutil.copytree(DOCS/'assets', pages/'assets'); (pages/'pictures').mkdir()
    def save(page, text): (pages/page).parent.mkdir(exist_ok=True); (pages/page).write_text(text, encoding='utf-8')
    books = {p: NBProcessor(p).nb for p in notebooks()}
    for p, nb in books.items():
        targets |= {k: f'lessons/{p.stem}.md' for k in (p.stem, p.relative_to(ROOT/'nbs').with_suffix('').as_posix(), p.relative_to(ROOT).as_posix())}
        for name in [v[0] for c in nb.cells for k, v in getattr(c, 'directives_', {}).items() if k == 'default_exp']: modules[p] = importlib.import_module(f'{PACKAGE}.{name}')
    stem = lambda m: m.__name__.rpartition('.')[2]
    own = {m: {k: f'api/{stem(m)}.md#{k}' for k in m.__all__} for m in modules.values()}
    names = [k for o in own.values() for k in o]
    targets |= {k: to for o in own.values() for k, to in o.items() if names.count(k) == 1 and (k[0].isupper() or '_' in k)}  # `run` or `write` may be anything
    if lost := {o.stem for o in (ROOT/PACKAGE).glob('[!_]*.py')} - set(map(stem, own)): fail(f'no notebook exports {", ".join(sorted(lost))}: run nbdev_export.')
    if gaps := [o for m in own for o in undocumented(m)]: fail('the API pages would have gaps:\n  ' + '\n  '.join(gaps))
    def lesson(nb, page, more):
        title, n = nb.cells[0].source.splitlines()[0].lstrip('# '), iter(range(1, 1000))
        def picture(png):
            (pages/'pictures'/(file := f'{Path(page).stem}_{(i := next(n))}.png')).write_bytes(png)
            return f'![Picture {i} of “{title}”]({os.path.relpath(f"pictures/{file}", Path(page).parent)})'
        return title, notebook_md(nb, picture, lambda o: linked(o, targets | more, page))
    for p, nb in books.items():
        page, m = f'lessons/{p.stem}.md', modules.get(p)
        title, text = lesson(nb, page, own.get(m, {}))
        first, exports = re.search(r'\n\n|\Z', text).end(), f', exports [`{m.__name__}`](../api/{stem(m)}.md)' if m else ''
        save(page, f'{text[:first].rstrip()}\n\n`{p.relative_to(ROOT).as_posix()}`{exports}\n{{ .source }}\n\n{text[first:]}')
        lessons.setdefault(chapter_of(p), []).append({title: page})
        if not m: continue
        save(f'api/{stem(m)}.md', '\n\n'.join([f'# {stem(m)}\n\n`{m.__name__}`, exported by the lesson [{title}](../{page}).', *(entry(k, getattr(m, k), inspect.getsource(m)) for k in m.__all__)]))
        api.setdefault(chapter_of(p), []).append({stem(m): f'api/{stem(m)}.md'})
    save('index.md', '---\nhide: [navigation]\n---\n\n' + lesson(NBProcessor(ROOT/'nbs'/'index.ipynb').nb, 'index.md', {stem(m): f'api/{stem(m)}.md' for m in own})[1])
    for o in (*(DOCS/'pages').glob('*.md'), ROOT/'kernels'/'README.md'):
        page = 'kernels.md' if o.name == 'README.md' else o.name
        save(page, prose(o.read_text(encoding='utf-8'), lambda s: linked(spaced(s), targets, page)))
    for o in sorted((ROOT/'results').glob('*/*/README.md')):
        page, text = f'cards/{o.parent.parent.name}_{o.parent.name}.md', re.sub(r'(?s)\A---\n.*?\n---\n', '', o.read_text(encoding='utf-8'))
        save(page, f'{text}\n`{o.parent.relative_to(ROOT).as_posix()}`\n{{ .source }}\n'); cards.append({text.splitlines()[0].lstrip('# '): page})
    order = lambda d: [{c: d[c]} for c in CHAPTERS if c in d]
    return [{'Home': 'index.md'}, {'Use': [{t: cards if f == 'cards' else f} for f, t in USE.items()]}, {'Lessons': order(lessons)}, {'API': order(api)}]

# --- Checks of what was built

class Page(HTMLParser):
    "The anchors of a page (`ids`), its addresses, clicked (`links`) or fetched at once (`loads`), and its own styles and scripts (`inline`)"
    def __init__(self, text): super().__init__(); self.ids, self.links, self.loads, self.inline, self._in = set(), [], [], [], None; self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = {k: v or '' for k, v in attrs}
        self._in = tag if tag in ('script', 'style') else None
        self.ids |= {a[k] for k in ('id', 'name') if k in a}
        if 'style' in a: self.inline.append(('style', a['style']))
        if 'href' in a: (self.links if tag in ('a', 'area') else self.loads).append(a['href'])
        self.loads += [a[k] for k in ('src', 'srcset', 'data', 'poster', 'action') if k in a]
    def handle_data(self, data): self.inline += [(self._in, data)] if self._in else []
    def handle_endtag(self, tag): self._in = None

def remote(url): return bool(re.match(r'(?:[a-z][a-z+.-]*:)?//', url.strip(), re.I))

def is_data(script):
    "Whether a script gives a name to JSON and does nothing else, as the search index does: what it quotes is not fetched"
    m = re.fullmatch(r'(?s)\s*var \w+\s*=\s*(.*?);?\s*', script)
    try: return bool(m) and isinstance(json.loads(m[1]), dict)
    except ValueError: return False

def asked(kind, text):
    "Return the addresses elsewhere that a style or script may fetch"
    if kind == 'style': return [u for u in re.findall(r'(?:url\(|@import)\s*["\']?\s*([^"\')\s;]+)', text) if remote(u)]
    if is_data(text): return []
    return [u for u in re.findall(r'(?:https?|wss?):\\?/\\?/[\w.-]+', re.sub(r'(?s)/\*.*?\*/', '', text)) if re.split(r'[/\\]+', u)[1] not in NAMED]

def problems_of(site):
    "Return every link or anchor of the built site that leads nowhere, every malformed external link, and everything that would be fetched from another computer"
    pages = {p: Page(p.read_text(encoding='utf-8')) for p in sorted(site.rglob('*.html'))}
    out = [] if pages else [f'{site} has no pages']
    for p, page in pages.items():
        say = lambda what: out.append(f'{p.relative_to(site)}: {what}')
        for u in page.loads:
            if remote(u): say(f'loads {u} from another computer')
        for u in [o for o in page.loads + page.links if not remote(o) and urlsplit(o).scheme not in ('data', 'mailto')]:
            to, at = urlsplit(u), p
            if to.path: at = Path(os.path.normpath(p.parent/unquote(to.path)))
            if to.path.startswith('/') or to.scheme or not at.is_file() or site not in at.parents: say(f'{u} does not exist')
            elif to.fragment and at in pages and unquote(to.fragment) not in pages[at].ids: say(f'{u}: no such anchor')
        for u in filter(remote, page.links):
            if not re.fullmatch(r'https?://[\w-]+(\.[\w-]+)+(:\d+)?(/\S*)?', u): say(f'malformed link {u}')
        for kind, text in page.inline: out += [f'{p.relative_to(site)}: its {kind} asks {u}' for u in asked(kind, text)]
        if re.search(r'(?m)^#\s*\|\s*\w', re.sub('<[^>]+>', '', p.read_text(encoding='utf-8'))): say('shows an nbdev directive')
    for p in sorted(o for o in site.rglob('*') if o.suffix in ('.css', '.js')):
        out += [f'{p.relative_to(site)}: asks {u}' for u in asked('style' if p.suffix == '.css' else 'script', p.read_text(encoding='utf-8'))]
    return out

def opened(url, chromium):
    "Open a page in Chromium without a network; return it as a reader has it, and the addresses elsewhere that it asked for"
    with tempfile.TemporaryDirectory() as d:
        dom = subprocess.run([chromium, '--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--host-resolver-rules=MAP * ~NOTFOUND', f'--user-data-dir={d}/user',
                              f'--log-net-log={d}/log', '--virtual-time-budget=20000', '--dump-dom', url], capture_output=True, text=True, timeout=300).stdout
        return dom, set(re.findall(r'"network_isolation_key":"file:[^"]*".*?"url":"((?:http|ws)s?://[^"]+)"', (Path(d)/'log').read_text(errors='replace')))  # Chromium's own requests have other keys

def browse(site, chromium):
    "Open pages from disk; return what does not work there: formulas, search, staying on this computer"
    control, formulas = OUT/'control.html', [m[0] for p in sorted(site.rglob('*.html')) for m in re.finditer(r'(?s)<(span|div) class="arithmatex">.*?</\1>', p.read_text(encoding='utf-8'))]
    set_up = re.search(r'<script>window\.MathJax.*?</script>', (site/'index.html').read_text(encoding='utf-8'))[0]
    control.write_text('\n'.join(['<script src="https://example.org/a.js"></script>', set_up, '<script src="site/assets/mathjax.js"></script>', *formulas]), encoding='utf-8')
    dom, asks = opened(control.as_uri(), chromium)
    out = [] if asks == {'https://example.org/a.js'} else ['a script from elsewhere went unnoticed, so that this check shows nothing']
    drawn, wrong = dom.count('<mjx-container'), dom.count('<g data-mml-node="merror"')
    if drawn < len(formulas) or wrong: out.append(f'{drawn} of {len(formulas)} formulas are drawn, {wrong} of them as errors')
    for page, wanted in {'index.html': '<mjx-container', 'api/cold.html': 'id="CoLD"', 'index.html?q=plausible': 'md-search-result__item'}.items():
        dom, asks = opened(f'{site.as_uri()}/{page}', chromium)
        out += [f'{page}: Chromium shows no {wanted}'] * (wanted not in dom) + [f'{page}: asked {u}' for u in sorted(asks)]
    return out

def main():
    nav, site, tools = write_pages(), OUT/'site', DOCS/'.venv'
    shutil.copy(next(tools.glob('lib/python*/site-packages/mathjax/static/mathjax/es5/tex-svg-full.js')), OUT/'pages'/'assets'/'mathjax.js')
    (OUT/'mkdocs.yml').write_text(json.dumps(dict(INHERIT='../mkdocs.yml', docs_dir='pages', site_dir='site', nav=nav)))
    if subprocess.run([tools/'bin'/'mkdocs', 'build', '--strict', '-q', '-f', OUT/'mkdocs.yml']).returncode: fail('mkdocs did not build the site: see its messages above.')
    shutil.rmtree(site/'assets'/'javascripts'/'lunr')  # languages other than English
    for o in (site/'404.html', site/'sitemap.xml', site/'sitemap.xml.gz', *site.rglob('*.map')): o.unlink(missing_ok=True)  # for a server
    for o in (*site.rglob('bundle*.js'), site/'assets'/'mathjax.js'): o.write_text(re.sub(UNUSED, '', o.read_text(encoding='utf-8')), encoding='utf-8')
    if found := problems_of(site): fail('the site was built, but:\n  ' + '\n  '.join(found))
    print(f'site: {len(list(site.rglob("*.html")))} pages, every link leads somewhere, nothing is loaded from elsewhere')
    if chromium := shutil.which('chromium') or shutil.which('google-chrome'):
        if found := browse(site, chromium): fail('in Chromium:\n  ' + '\n  '.join(found))
        print('site: Chromium, without a network, shows formulas and finds words')
    else: print('site: NOT opened in a browser, because there is no Chromium (Debian: apt install chromium)')
    print(f'site: {site}/index.html')

if __name__ == '__main__': main()
