"""Make README.md, docs/pages/ and the chapters' README.md from notebooks, or check that they are made.

python tools/make_pages.py           write what changed
python tools/make_pages.py --check   write nothing, show what would change, end with status 1 if anything would

nbs/index.ipynb makes README.md, nbs/pages/NAME.ipynb makes docs/pages/NAME.md, and in the README.md of a chapter everything
below `LIST` is a table of its notebooks. Nothing is run: outputs are as stored. Links are written from the notebook's folder, so
that they work in JupyterLab, and turned here so that they work from the page. A notebook named in code, such as `2_cold/01_rule`,
becomes a link, in pages that are written by hand too.
"""
import argparse
import difflib
import json
import os
import re
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS))
from notebook_markdown import directives, heading, joined, notebook_md, outside_code

ROOT = TOOLS.parent
LIST = '<!-- The table is made by `make readme`: edit the notebooks. -->'
README_BYTES = 8192  # A stranger reads it in ten minutes
LINK = re.compile(r'(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?\)')
NAME = r'`((?:\d_\w+|tutorials)/\w+)`'  # A notebook named in code
NOTEBOOK = re.compile(rf'(?<![`\[]){NAME}(?![`\]])')
LINKED = re.compile(rf'\[{NAME}\]\([^)\s]*\.ipynb\)')
HANDWRITTEN = ('CONTRIBUTING.md', 'docs/README.md', 'kernels/README.md', 'results/README.md')


def fail(why):
    sys.exit(f'pages: {why}')


# --- Where things are

def sources(root=ROOT):
    "Return the notebooks that make pages"
    return [root/'nbs'/'index.ipynb', *sorted((root/'nbs'/'pages').glob('*.ipynb'))]


def page_of(path, root=ROOT):
    "Return the page that a notebook makes, or None"
    if path == root/'nbs'/'index.ipynb':
        return root/'README.md'
    if path.parent == root/'nbs'/'pages':
        return root/'docs'/'pages'/f'{path.stem}.md'
    return None


def chapters(root=ROOT):
    "Return the folders of chapters in order, the tutorials last"
    numbered = sorted(folder for folder in (root/'nbs').glob('[0-9]_*') if folder.is_dir())
    tutorials = root/'nbs'/'tutorials'
    return [*numbered, tutorials] if tutorials.is_dir() else numbered


def read_notebook(path):
    return json.loads(path.read_text(encoding='utf-8'))


# --- Links

def turned(text, source, page, root=ROOT):
    "Return prose of the notebook `source` with its links turned to lead from `page`, and notebooks named in code linked"
    def relative(target):
        return Path(os.path.relpath(target, page.parent)).as_posix()

    def link(match):
        before, address, anchor = match.groups()
        if re.match(r'[a-z]+:', address):
            return match[0]
        target = Path(os.path.normpath(source.parent/address))
        target = page_of(target, root) or target
        return f'{before}{relative(target)}{anchor or ""})'

    def name(match):
        target = root/'nbs'/f'{match[1]}.ipynb'
        return f'[{match[0]}]({relative(target)})' if target.exists() else match[0]

    text = LINKED.sub(r'`\1`', text)  # a notebook that was renamed gets its link again
    return NOTEBOOK.sub(name, LINK.sub(link, text))


# --- Pages

def page_md(source, root=ROOT):
    "Return the page that the notebook `source` makes"
    page = page_of(source, root)
    try:
        text = notebook_md(read_notebook(source), prose=lambda text: turned(text, source, page, root))
    except ValueError as e:
        fail(f'{source.relative_to(root)}: {e}')
    if page.name == 'README.md':
        return text
    title, _, rest = text.partition('\n')
    made_from = source.relative_to(root).as_posix()
    return f'{title}\n<!-- Made by `make readme` from {made_from}: edit that notebook. -->\n{rest}'


def module_of(nb):
    "Return the module that a notebook exports, without the package's name, or ''"
    for cell in nb['cells']:
        if cell['cell_type'] == 'code':
            flags, _ = directives(joined(cell['source']))
            if 'default_exp' in flags:
                return flags['default_exp']
    return ''


def row_of(path, readme, root=ROOT):
    "Return a notebook's row in the table of its chapter"
    nb = read_notebook(path)
    title, summary = heading(nb)
    module = module_of(nb)
    about = turned(f'**{title}.** {summary}', path, readme, root).replace('|', '\\|')
    exports = f'`{module}`' if module else ''
    return f'| [{path.stem}]({path.name}) | {exports} | {about} |'


def chapter_md(folder, root=ROOT):
    "Return the README.md of a chapter: its own words, and a table of its notebooks"
    readme = folder/'README.md'
    if not readme.exists():
        fail(f'{readme.relative_to(root)} is missing: give the chapter a title and a line.')
    words = turned(readme.read_text(encoding='utf-8').partition(LIST)[0].rstrip(), readme, readme, root)
    rows = [row_of(path, readme, root) for path in sorted(folder.glob('*.ipynb'))]
    table = '\n'.join(['| notebook | module | what it holds |', '|---|---|---|', *rows])
    return f'{words}\n\n{LIST}\n\n{table}\n'


def handwritten_md(path, root=ROOT):
    "Return a page that is written by hand, with links on the notebooks that it names"
    text = path.read_text(encoding='utf-8')
    return outside_code(text, lambda text: turned(text, path, path, root))


def pages(root=ROOT):
    "Return every page, as a dictionary from its path to its text"
    made = {page_of(source, root): page_md(source, root) for source in sources(root)}
    made |= {folder/'README.md': chapter_md(folder, root) for folder in chapters(root)}
    others = [root/name for name in HANDWRITTEN if (root/name).exists()]
    others += [path for path in sorted((root/'docs'/'pages').glob('*.md')) if path not in made]
    made |= {path: handwritten_md(path, root) for path in others}
    size = len(made[root/'README.md'].encode())
    if size > README_BYTES:
        fail(f'README.md would have {size} bytes, more than {README_BYTES}: move something to a page.')
    return made


def difference(path, text):
    "Return the lines in which a file differs from what is made"
    old = path.read_text(encoding='utf-8') if path.exists() else ''
    if old == text:
        return []
    return [*difflib.unified_diff(old.splitlines(), text.splitlines(), 'it is', 'it would be', lineterm='', n=0)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='write nothing, and end with status 1 if anything would be written')
    check = parser.parse_args().check
    made = pages()
    stale = {path: lines for path, text in made.items() if (lines := difference(path, text))}
    for path, lines in stale.items():
        if check:
            print(f'{path.relative_to(ROOT)}:', *lines, sep='\n')
        else:
            path.write_text(made[path], encoding='utf-8')
    if check and stale:
        fail(f'{len(stale)} of {len(made)} pages are not as they are made: run make readme.')
    print(f'pages: {len(made)} pages, {len(stale)} of them {"differ" if check else "written"}')


if __name__ == '__main__':
    main()
