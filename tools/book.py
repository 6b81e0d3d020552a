"""Check that the notebooks form one book, in the order of chapters and numbers

    python tools/book.py                 everything out of order, a sentence each
    python tools/book.py --order         the notebooks in order
    python tools/book.py --kernelspec    give every notebook the same kernel, so that JupyterLab does not ask for one
"""
import argparse
import ast
import json
import re
import sys
import tokenize
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from style import is_exported, parsed, without_magics

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'npu_lora_decoding'
# nbdev_clean gives the display name its name
KERNELSPEC = dict(display_name='python3', language='python', name='python3')
REFERENCE = re.compile(r'`(\d_\w+/\d\d_\w+|tutorials/\w+)`')
OLD_REFERENCE = re.compile(r'`(\d\d[a-z]?_\w+)`')


@dataclass
class Notebook:
    "One notebook of the book"
    name:str  # `2_cold/01_rule`, as prose refers to it
    path:Path
    cells:list
    metadata:dict

    @property
    def module(self):
        "Return the module it should export, by chapter and name: `cold.rule`"
        return '.'.join(re.sub(r'^\d+_', '', part) for part in self.name.split('/'))

    def sources(self, kind):
        "Return the sources of its code cells or Markdown cells"
        return [''.join(c['source']) for c in self.cells if c['cell_type'] == kind]


def notebook(path, root=ROOT):
    "Return a notebook read from its file"
    nb = json.loads(path.read_text(encoding='utf-8'))
    name = path.relative_to(root/'nbs').with_suffix('').as_posix()
    return Notebook(name, path, nb['cells'], nb['metadata'])


def all_notebooks(root=ROOT):
    "Return every notebook, the index and the tutorials too"
    paths = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    return [notebook(p, root) for p in paths]


def book(root=ROOT):
    "Return the numbered notebooks, in order"
    return [nb for nb in all_notebooks(root) if re.match(r'\d_\w+/\d\d_', nb.name)]


# --- Names, numbers, kernels

def naming_problems(chapters):
    "Yield a sentence for each number that is left out and each module that does not have its notebook's name"
    expected = {}
    for nb in chapters:
        folder, name = nb.name.split('/')
        expected[folder] = expected.get(folder, 0) + 1
        if int(name[:2]) != expected[folder]:
            yield f'{nb.name}: expected number {expected[folder]:02}'
        exported = re.findall(r'^#\| *default_exp +(\S+)', '\n'.join(nb.sources('code')), re.M)
        if exported != [nb.module]:
            yield f'{nb.name}: expected `#| default_exp {nb.module}`, got {exported}'


def kernel_problems(notebooks):
    "Yield a sentence for each notebook for which JupyterLab would ask for a kernel"
    for nb in notebooks:
        if nb.metadata.get('kernelspec') != KERNELSPEC:
            yield f'{nb.name}: has no kernel: run python tools/book.py --kernelspec'


def set_kernels(root=ROOT):
    "Give every notebook the same metadata"
    for nb in all_notebooks(root):
        whole = json.loads(nb.path.read_text(encoding='utf-8'))
        wanted = dict(kernelspec=KERNELSPEC)
        if whole['metadata'] != wanted:
            whole['metadata'] = wanted
            nb.path.write_text(json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')


# --- Next

def next_of(nb):
    "Return the notebook to which the last section of a notebook leads, or nothing"
    last = (nb.sources('markdown') or [''])[-1]
    found = re.findall(r'\bNext: +(.*)', last)
    reference = REFERENCE.match(found[-1]) if found else None
    return reference and reference[1]


def next_problems(chapters):
    "Yield a sentence for each notebook that does not lead to the one after it"
    for nb, following in zip(chapters, [*chapters[1:], None]):
        found = next_of(nb)
        if found is None:
            wanted = following.name if following else 'tutorials/00_tour'
            yield f'{nb.name}: its last section does not say where to go on: write "Next: `{wanted}`"'
        elif following and found != following.name:
            yield f'{nb.name}: leads to `{found}`, expected `{following.name}`'


def walk(chapters):
    "Return the names visited by following every Next from the first notebook"
    by_name = {nb.name: nb for nb in chapters}
    visited = []
    name = chapters[0].name
    while name in by_name and name not in visited:
        visited.append(name)
        name = next_of(by_name[name])
    return visited


# --- Imports

def front_door(root=ROOT):
    "Return where the package takes each of its lazy names from: name -> module"
    path = root/PACKAGE/'__init__.py'
    tree = ast.parse(path.read_text(encoding='utf-8')) if path.exists() else ast.Module([], [])
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict) and all(isinstance(o, ast.Constant) for o in [*node.keys, *node.values]):
            found.update({k.value: v.value for k, v in zip(node.keys, node.values)})
    return found


def modules_of(node, doors):
    "Return the modules of the package that an import statement names, without the package's own name"
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        names = [node.module] + [f'{node.module}.{alias.name}' for alias in node.names]
    else:
        return []
    inside = [name.removeprefix(f'{PACKAGE}.') for name in names if name.startswith(f'{PACKAGE}.')]
    return [str(doors.get(name, name)).removeprefix(f'{PACKAGE}.').lstrip('.') for name in inside]


def import_problems(chapters, doors):
    "Yield a sentence for each import of a module that stands later in the book"
    place = {nb.module: i for i, nb in enumerate(chapters)}
    for i, nb in enumerate(chapters):
        for source in nb.sources('code'):
            for node in ast.walk(parsed(without_magics(source))):
                for module in modules_of(node, doors):
                    j = place.get(module, -1)
                    if j > i:
                        yield f'{nb.name}: imports {module}, which stands later, in {chapters[j].name}: "{ast.unparse(node)}"'


def commented_lines(source):
    "Return the lines that have a comment, and those after a line of nothing else"
    found = set()
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith('#|'):
            alone = token.line.strip().startswith('#')
            found.add(token.start[0] + alone)
    return found


def hidden_imports(source):
    "Return the imports of the package in the bodies of functions"
    functions = [o for o in ast.walk(parsed(without_magics(source))) if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inner = {id(node): node for function in functions for node in ast.walk(function)}
    return [node for node in inner.values() if modules_of(node, {}) or (isinstance(node, ast.ImportFrom) and node.level)]


def hidden_problems(chapters):
    "Yield a sentence for each import of the package that an exported function hides without a reason"
    for nb in chapters:
        for source in filter(is_exported, nb.sources('code')):
            for node in hidden_imports(source):
                if node.lineno not in commented_lines(source):
                    yield f'{nb.name}: a function hides "{ast.unparse(node)}": import at the top, or write the reason beside it'


# --- References

def prose_files(root=ROOT):
    "Return the texts that refer to notebooks, by name"
    texts = {nb.name: '\n'.join(''.join(c['source']) for c in nb.cells) for nb in all_notebooks(root)}
    pages = [*root.glob('*.md'), *(root/'docs'/'pages').glob('*.md'), *(root/'kernels').glob('*.md'), *(root/'tests').glob('*.md')]
    return texts | {p.relative_to(root).as_posix(): p.read_text(encoding='utf-8') for p in pages}


def reference_problems(root=ROOT):
    "Yield a sentence for each reference to a notebook that does not exist"
    known = {nb.name for nb in all_notebooks(root)}
    for name, text in prose_files(root).items():
        for found in REFERENCE.findall(text):
            if found not in known:
                yield f'{name}: refers to `{found}`, which does not exist'
        for found in OLD_REFERENCE.findall(text):
            yield f'{name}: refers to `{found}` without its chapter: write it as `2_cold/01_rule`'


# --- All of it

def problems(root=ROOT):
    "Return a sentence for everything that is out of order"
    chapters = book(root)
    return [
        *naming_problems(chapters),
        *kernel_problems(all_notebooks(root)),
        *next_problems(chapters),
        *import_problems(chapters, front_door(root)),
        *hidden_problems(chapters),
        *reference_problems(root),
    ]


def main():
    "Check, list or mend"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--order', action='store_true', help='list the notebooks in order')
    parser.add_argument('--kernelspec', action='store_true', help='give every notebook the same kernel')
    options = parser.parse_args()
    if options.order:
        print('\n'.join(nb.name for nb in book()))
    elif options.kernelspec:
        set_kernels()
    else:
        found = problems()
        print('\n'.join(found) or f'{len(book())} notebooks in order')
        sys.exit(bool(found))


if __name__ == '__main__':
    main()
