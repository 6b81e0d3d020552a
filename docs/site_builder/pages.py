"""Writes docs/_build/pages, which mkdocs turns into the site, and returns the navigation.

The site mirrors the repository: a notebook nbs/2_cold/01_rule.ipynb is lessons/2_cold/01_rule.md, its module api/cold.rule.md,
and README.md is index.md. Nothing is listed by hand: chapters are the folders of nbs/, their titles the headings of the folders'
README.md, and the part "Use" holds what docs/README.md links to, in that order.
"""
import base64
import importlib
import re
import shutil
from pathlib import Path
from make_pages import ROOT as REPOSITORY, chapters, module_of, read_notebook
from notebook_markdown import heading, notebook_md, outside_code
from . import DOCS, OUT, PACKAGE, fail
from .api import module_md, undocumented
from .markdown import linked, readdressed, relative, spaced

LINK = re.compile(r'\[([^\]]+)\]\(([^)#\s]+)\)')
PICTURE = re.compile(r'!\[[^\]]*\]\(([^)\s:]+)\)')


# --- What there is

class Book:
    "The notebooks of the repository: what each is called, and which module it exports"
    def __init__(self, root=REPOSITORY):
        self.root = root
        self.chapters = chapters(root)
        paths = [path for folder in self.chapters for path in sorted(folder.glob('*.ipynb'))]
        self.notebooks = {path: read_notebook(path) for path in paths}
        self.titles = {path: heading(nb)[0] for path, nb in self.notebooks.items()}
        exports = {path: module_of(nb) for path, nb in self.notebooks.items()}
        self.modules = {path: name for path, name in exports.items() if name}

    def of(self, folder):
        return [path for path in self.notebooks if path.parent == folder]

    def named(self, path):
        "Return a path as it is written in the repository"
        return path.relative_to(self.root).as_posix()


def contents(root=REPOSITORY):
    "Return the files that docs/README.md links to, by its headings and in its order, as dictionaries from paths to titles"
    found = {}
    for line in (root/'docs'/'README.md').read_text(encoding='utf-8').splitlines():
        if line.startswith('## '):
            part = found.setdefault(line.removeprefix('## '), {})
        for title, address in LINK.findall(line) if found else []:
            path = (root/'docs'/address).resolve().relative_to(root)
            if path.suffix == '.md':
                part[path.as_posix()] = title
    return {heading: files for heading, files in found.items() if files}


def imported(book):
    "Return the modules by name; a module without a notebook, and something public without a description, stop the build"
    modules = {name: importlib.import_module(f'{PACKAGE}.{name}') for name in book.modules.values()}
    package = book.root/PACKAGE
    exported = {'.'.join(path.relative_to(package).with_suffix('').parts) for path in package.rglob('[!_]*.py')}
    lost = exported - {*modules}
    if lost:
        fail(f'no notebook exports {", ".join(sorted(lost))}: run nbdev_export.')
    gaps = [gap for module in modules.values() for gap in undocumented(module)]
    if gaps:
        fail('the API pages would have gaps:\n  ' + '\n  '.join(gaps))
    return modules


# --- Where it goes

def site_page(path):
    "Return where the page of a repository's file lies in the site"
    path = path.removeprefix('docs/pages/')
    if path.startswith('nbs/'):
        path = 'lessons/' + path.removeprefix('nbs/')
    if path.endswith('.ipynb'):
        path = path.removesuffix('.ipynb') + '.md'
    folder, slash, name = path.rpartition('/')
    return folder + slash + 'index.md' if name == 'README.md' else path


def api_page(module):
    return f'api/{module}.md'


def addresses(modules):
    "Return where the public names lead that only one module has, in capitals or of several words: `run` may be anything"
    every = [name for module in modules.values() for name in module.__all__]
    found = {}
    for page, module in modules.items():
        for name in module.__all__:
            if every.count(name) == 1 and (name[0].isupper() or '_' in name):
                found[name] = f'{api_page(page)}#{name}'
    return found


def title_of(text):
    return next((line.lstrip('# ') for line in text.splitlines() if line.startswith('# ')), '')


# --- The pages

class Site:
    "The pages that are written: where each file of the repository goes, and where each name leads"
    def __init__(self, book, out=OUT/'pages'):
        self.book = book
        self.out = out
        self.use = contents(book.root)
        self.modules = imported(book)
        notebooks = [book.named(path) for path in book.notebooks]
        readmes = [self.readme(folder) for folder in book.chapters]
        used = [path for files in self.use.values() for path in files]
        self.where = {path: site_page(path) for path in ('README.md', *used, *notebooks, *readmes)}
        self.targets = addresses(self.modules)
        self.targets |= {path.removeprefix('nbs/').removesuffix('.ipynb'): self.where[path] for path in notebooks}
        self.targets |= {full: api_page(name) for name in self.modules for full in (name, f'{PACKAGE}.{name}')}

    def readme(self, folder):
        return f'{self.book.named(folder)}/README.md'

    def read(self, source):
        return (self.book.root/source).read_text(encoding='utf-8')

    def save(self, page, text):
        path = self.out/page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')

    def own_names(self, module):
        "Return where the public names of a module lead"
        if module not in self.modules:
            return {}
        return {name: f'{api_page(module)}#{name}' for name in self.modules[module].__all__}

    def prose(self, source, module=''):
        "Return what turns prose of a repository's file into prose of its page; the names of `module` go before all others"
        page = self.where[source]
        targets = self.targets | self.own_names(module)

        def change(text):
            text = readdressed(spaced(text), source, page, self.where)
            return linked(text, targets, page)

        return change

    def picture_of(self, path):
        "Return what saves a picture of the notebook `path` and shows it"
        page = self.where[self.book.named(path)]
        saved = []

        def show(png):
            file = f'pictures/{path.parent.name}_{path.stem}_{len(saved) + 1}.png'
            saved.append(file)
            (self.out/file).write_bytes(base64.b64decode(png))
            return f'![Picture {len(saved)} of “{self.book.titles[path]}”]({relative(file, page)})'

        return show

    def write_lesson(self, path):
        "Write the page of a notebook: below its title the file, and the module that it exports"
        source = self.book.named(path)
        page = self.where[source]
        module = self.book.modules.get(path, '')
        options = dict(picture=self.picture_of(path), html=True, block='{ .text .output }', fold=True)
        text = notebook_md(self.book.notebooks[path], prose=self.prose(source, module), **options)
        first = re.search(r'\n\n|\Z', text).end()
        about = f'`{source}`'
        if module:
            about += f', exports [`{PACKAGE}.{module}`]({relative(api_page(module), page)})'
        self.save(page, f'{text[:first].rstrip()}\n\n{about}\n{{ .source }}\n\n{text[first:]}')

    def write_module(self, path):
        "Write the page of the module that a notebook exports"
        module = self.book.modules[path]
        lesson = self.where[self.book.named(path)]
        link = f'[{self.book.titles[path]}]({relative(lesson, api_page(module))})'
        self.save(api_page(module), module_md(self.modules[module], link))

    def write_file(self, source):
        "Write the page of a Markdown file of the repository, without front matter and comments"
        text = re.sub(r'(?s)\A---\n.*?\n---\n', '', self.read(source))
        text = re.sub(r'(?m)^<!--.*-->\n', '', text)
        for address in PICTURE.findall(text):
            self.copy_picture(Path(source).parent/address)
        page = self.where[source]
        settings = '---\nhide: [navigation]\n---\n\n' if page == 'index.md' else ''
        self.save(page, settings + outside_code(text, self.prose(source)))

    def copy_picture(self, path):
        page = f'pictures/{path.name}'
        shutil.copy(self.book.root/path, self.out/page)
        self.where[path.as_posix()] = page

    def write_front_door(self):
        "Write the page of the names that the package itself offers"
        package = importlib.import_module(PACKAGE)
        rows = ['| name | what it is |', '|---|---|']
        for name in package.__all__:
            if name.startswith('_'):
                continue
            o = getattr(package, name)
            about = (o.__doc__ or '').strip().partition('\n')[0]
            module = getattr(o, '__module__', '').removeprefix(f'{PACKAGE}.')
            target = self.own_names(module).get(name)
            place = f'[`{name}`]({relative(target, "api/index.md")})' if target else f'`{name}`'
            rows.append(f'| {place} | {about} |')
        words = f'What `from {PACKAGE} import ...` offers. Everything else is in the modules of the chapters.'
        self.save('api/index.md', '# The front door\n\n' + words + '\n\n' + '\n'.join(rows) + '\n')

    def write(self):
        "Write every page"
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(DOCS/'assets', self.out/'assets')
        (self.out/'pictures').mkdir()
        for path in self.book.notebooks:
            self.write_lesson(path)
        for path in self.book.modules:
            self.write_module(path)
        for source in [*self.where]:
            if source.endswith('.md'):
                self.write_file(source)
        self.write_front_door()

    # --- What leads to them

    def navigation(self):
        "Return mkdocs' navigation"
        lessons = []
        api = [{'The front door': 'api/index.md'}]
        for folder in self.book.chapters:
            readme = self.readme(folder)
            number = folder.name[0] if folder.name[0].isdigit() else ''
            title = f'{number} {title_of(self.read(readme))}'.strip()
            own = self.book.of(folder)
            pages = [{self.book.titles[path]: self.where[self.book.named(path)]} for path in own]
            lessons.append({title: [self.where[readme], *pages]})
            names = [self.book.modules[path] for path in own if path in self.book.modules]
            if names:
                api.append({title: [{name: api_page(name)} for name in names]})
        use = [{part: [{title: self.where[path]} for path, title in files.items()]} for part, files in self.use.items()]
        return [{'Home': 'index.md'}, {'Use': use}, {'Lessons': lessons}, {'API': api}]
