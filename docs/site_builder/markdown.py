"The prose of a page: lists, links to other pages, and names in code that lead somewhere"
import os
import re
from pathlib import Path

CODE = re.compile(r'(?<![`\[])`([^`\n]+)`(?![`\]])')
LINK = re.compile(r'(!?)\[((?:[^\[\]]|`[^`]*`)*)\]\(([^)\s#]*)(#[^)\s]*)?\)')


def spaced(text):
    "Return `text` with the blank line that Python-Markdown wants before a list"
    return re.sub(r'(?m)^((?![-*>|#\s]|\d+\. ).+\n)(?=[-*] |\d+\. )', r'\1\n', text)


def relative(target, page):
    "Return the address of one page of the site from another"
    path, hash_sign, anchor = target.partition('#')
    address = os.path.relpath(path, Path(page).parent)
    return Path(address).as_posix() + hash_sign + anchor


def linked(text, targets, page):
    "Return prose of `page` whose code that names a notebook or something public leads there; headings stay as they are"
    def link(match):
        name = re.sub(r'\(.*\)$', '', match[1])
        target = targets.get(name)
        if not target or target == page:
            return match[0]
        return f'[`{match[1]}`]({relative(target, page)})'

    lines = text.splitlines(keepends=True)
    return ''.join(line if line.startswith('#') else CODE.sub(link, line) for line in lines)


def readdressed(text, source, page, where):
    """Return prose of the file `source` whose links lead to pages of the site.

    `where` is a dictionary from paths in the repository to paths in the site; a link to a file without a page becomes plain text.
    """
    folder = Path(source).parent

    def link(match):
        image, label, address, anchor = match.groups()
        if not address or re.match(r'[a-z]+:', address):
            return match[0]
        path = Path(os.path.normpath(folder/address)).as_posix()
        target = where.get(path) or where.get(f'{path}/README.md')
        if not target:
            return label
        return f'{image}[{label}]({relative(target, page)}{anchor or ""})'

    return LINK.sub(link, text)
