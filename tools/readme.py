"Print README.md: nbs/index.ipynb as Markdown, with its stored outputs"
import json, re, sys
from pathlib import Path

INDEX = Path(__file__).parent.parent/'nbs'/'index.ipynb'

def fenced(
    text:str,  # What goes between the fences
    lang:str='',  # Language of the block
) -> str:  # Markdown
    "Return `text` as a fenced block, with a fence longer than any in the text"
    ticks = max([3] + [len(o)+1 for o in re.findall('^`{3,}', text, re.M)])
    return f'{"`"*ticks}{lang}\n{text.rstrip()}\n{"`"*ticks}'

def output_md(
    out:dict,  # One stored output
    image:str='',  # What to write for a picture
) -> str:  # Markdown
    "Return the text of an output"
    if out['output_type'] == 'stream': return fenced(''.join(out['text']))
    if out['output_type'] == 'error': sys.exit(f'readme: a cell of {INDEX.name} stored an error: run make notebooks.')
    data = out['data']
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    if any(o.startswith('image/') for o in data): return image
    return fenced(''.join(data['text/plain']))

def cell_md(
    cell:dict,  # One notebook cell
) -> list:  # Its pieces of Markdown
    """Return the Markdown of a cell, without its directives

    `#| hide` leaves all of it out, `#| echo: false` its code; `#| image: PATH TEXT` names the file of the picture that it shows.
    """
    source = ''.join(cell['source'])
    if cell['cell_type'] != 'code': return [source]
    flags = re.findall(r'^#\| *(\w+)', source, re.M)
    if 'hide' in flags: return []
    code = '' if re.search(r'^#\| *echo: *false', source, re.M) else re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
    image = ''.join(f'![{text}]({path})' for path, text in re.findall(r'^#\| *image: *(\S+) *(.*)', source, re.M))
    return [fenced(code, 'python')] * bool(code) + [output_md(o, image) for o in cell['outputs']]

def notebook_md(
    nb:dict,  # Parsed notebook
) -> str:  # The whole page
    "Return a notebook as Markdown"
    return '\n\n'.join(p.strip('\n') for c in nb['cells'] for p in cell_md(c) if p.strip()) + '\n'

if __name__ == '__main__':
    if not INDEX.exists(): sys.exit('readme: nbs/index.ipynb is missing, and README.md is made from it.')
    sys.stdout.write(notebook_md(json.loads(INDEX.read_text(encoding='utf-8'))))
