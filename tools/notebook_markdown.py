"Turn a notebook, with its stored outputs, into Markdown: what README, the pages and the site are made of"
import re

DIRECTIVE = re.compile(r'[ \t]*#[ \t]*\|[ \t]*([\w-]+):?[ \t]*(.*)\n?')


def fenced(
    text:str,  # What goes between the fences
    language:str='',  # Language of the block, or attributes such as `{ .text .output }`
) -> str:  # Markdown
    "Return `text` as a fenced block, with a fence longer than any in the text"
    runs = re.findall('^`{3,}', text, re.M)
    fence = '`' * max([3] + [len(run) + 1 for run in runs])
    return f'{fence}{language}\n{text.rstrip()}\n{fence}'


def outside_code(
    text:str,  # Markdown
    change,  # Function from Markdown to Markdown
) -> str:  # Markdown
    "Return `text` with everything but its fenced code changed"
    parts = re.split(r'(?ms)(^```.*?^```\s*?$)', text)
    return ''.join(part if i % 2 else change(part) for i, part in enumerate(parts))


def directives(
    source:str,  # Source of a code cell
) -> tuple:  # Directives as a dictionary, and the code without them
    "Return the `#|` lines at the top of a cell, and what stands below them"
    found = {}
    while match := DIRECTIVE.match(source):
        found[match[1]] = match[2].strip()
        source = source[match.end():]
    return found, source.strip()


def joined(
    text,  # A string or its lines: notebooks store either
) -> str:
    return text if isinstance(text, str) else ''.join(text)


def output_md(
    output:dict,  # One stored output
    *,
    prose=lambda text: text,  # Function that has the last word on Markdown
    picture=None,  # Function from the base64 text of a PNG to Markdown; None leaves pictures out
    html:bool=False,  # Keep HTML, which the repository's own file view would not show
    block:str='',  # Language of a block of text
) -> str:  # Markdown
    "Return a stored output; raises `ValueError` for an error that was stored"
    kind = output['output_type']
    if kind == 'error':
        raise ValueError('a cell stores an error: run make notebooks.')
    if kind == 'stream':
        return fenced(joined(output['text']), block)
    data = output['data']
    if 'image/png' in data:
        return picture(joined(data['image/png'])) if picture else ''
    if 'text/markdown' in data:
        return outside_code(joined(data['text/markdown']), prose)
    if html and 'text/html' in data:
        text = re.sub(r'\n\s*\n', '\n', joined(data['text/html']))  # an empty line would end the block
        return f'<div class="output">{text}</div>'
    return fenced(joined(data['text/plain']), block)


def code_md(
    code:str,  # Python, without directives
    flags:dict,  # Directives of its cell
    fold:bool,  # Fold away what `#| code-fold` marks
) -> list:  # No piece of Markdown, or one
    "Return the code of a cell as it is shown"
    if not code or flags.get('echo') == 'false':
        return []
    shown = fenced(code, 'python')
    if not fold or flags.get('code-fold', 'false') == 'false':
        return [shown]
    return [f'<details class="code" markdown="1"><summary>Code</summary>\n\n{shown}\n\n</details>']


def notebook_md(
    nb:dict,  # Parsed notebook
    *,
    prose=lambda text: text,  # Function that has the last word on prose, and on Markdown that a cell shows
    fold:bool=False,  # Fold away what `#| code-fold` marks
    **outputs,  # Options of `output_md`
) -> str:  # The whole page
    "Return a notebook as Markdown: `hide` leaves a cell out, `echo: false` its code, and no directive is shown"
    parts = []
    for cell in nb['cells']:
        source = joined(cell['source'])
        if cell['cell_type'] != 'code':
            parts.append(outside_code(source, prose))
            continue
        flags, code = directives(source)
        if 'hide' in flags:
            continue
        parts += code_md(code, flags, fold)
        parts += [output_md(output, prose=prose, **outputs) for output in cell['outputs']]
    return '\n\n'.join(part.strip('\n') for part in parts if part.strip()) + '\n'


def heading(
    nb:dict,  # Parsed notebook
) -> tuple:  # Title, and the one line below it, or ''
    "Return the title of a notebook and its summary"
    texts = [joined(cell['source']) for cell in nb['cells'] if cell['cell_type'] == 'markdown']
    lines = texts[0].strip().splitlines()
    title = lines[0].lstrip('# ')
    summary = next((line[1:].strip() for line in lines if line.startswith('>')), '')
    return title, summary
