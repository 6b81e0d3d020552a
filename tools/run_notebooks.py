"Run notebooks in place and store their outputs, without progress bars and without the paths of this machine"
import multiprocessing, os, re, sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from execnb.nbio import nb2dict, write_nb
from execnb.shell import CaptureShell
from fastcore.script import call_parse
from fastcore.xtras import working_directory
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
HOME = Path.home()
WIDGET = 'application/vnd.jupyter.widget-view+json'

def without_bars(
    text:str,  # What a cell wrote
) -> str:  # The same without progress bars
    "Return `text` as a terminal would leave it after carriage returns, less the lines of tqdm and fastprogress"
    lines = [o.rstrip('\r').split('\r')[-1] for o in text.split('\n')]
    return '\n'.join(o for o in lines if not re.search(r'\d+%\|.*\||\d+it \[\d+:\d+|\|[█-]{20,}\|', o))

def without_library_warnings(
    text:str,  # What a cell wrote
) -> str:  # The same without warnings of installed libraries
    "Return `text` less the warnings that a library raises about itself, which name the folder it is installed in"
    return re.sub(r'^.*site-packages.*Warning:.*\n(?:  .*\n?)?', '', text, flags=re.M)

def without_paths(
    text:str,  # Any text of an output
    root:Path=ROOT,  # Folder whose files are named relative to it
    home:Path=HOME,  # Folder that is written as ~
) -> str:  # The same for every reader
    "Return `text` with paths relative to the checkout and the home directory"
    for folder, name in (root, '.'), (home, '~'):  # the checkout first: it may lie in the home directory
        if folder != Path(folder.anchor): text = re.sub(re.escape(str(folder)) + r'(?![\w.-])', name, text)
    return text

def map_text(
    o,  # Nested dicts and lists of an output
    f,  # Function from text to text
):
    "Return `o` with `f` applied to every string but the images; the lines of one text are joined first"
    if isinstance(o, dict): return {k: v if k.startswith('image/') and 'svg' not in k else map_text(v, f) for k,v in o.items()}
    if isinstance(o, list) and all(isinstance(x, str) for x in o): return f(''.join(o)).splitlines(True)
    if isinstance(o, list): return [map_text(x, f) for x in o]
    return f(o) if isinstance(o, str) else o

def is_bar(
    out:dict,  # One stored output
) -> bool:  # Whether nothing of it is worth storing
    "Whether `out` is a progress bar: a widget, fastprogress's HTML, or an empty stream"
    if out['output_type'] == 'stream': return not ''.join(out['text']).strip()
    html = ''.join(out.get('data', {}).get('text/html', ''))
    return WIDGET in out.get('data', {}) or '<progress' in html or 'progress-bar-interrupted' in html

def clean_stream(
    out:dict,  # One stored output
) -> dict:  # The same where it is not what a cell printed
    "Return an output whose printed text has no progress bars and no warnings of libraries"
    if out['output_type'] != 'stream': return out
    text = without_library_warnings(without_bars(''.join(out['text'])))
    return out | dict(text=text.splitlines(True))

def clean_outputs(
    outs:list,  # Outputs of one cell
) -> list:  # Those to store
    "Return `outs` without progress bars and without absolute paths"
    return [map_text(o, without_paths) for o in map(clean_stream, outs) if not is_bar(o)]

def run_notebook(
    path:Path,  # Notebook to run and to write
    skip:set,  # Flags whose cells are left as they are
) -> str:  # The traceback that stopped it, empty when all went well
    "Run every cell of `path` outside `skip` and write the outputs back; a notebook that fails is not written"
    os.environ['IN_TEST'] = '1'  # the closing nbdev_export cell does nothing under it
    nb = NBProcessor(path, rm_directives=False, process=True).nb
    def left_alone(c):
        d = getattr(c, 'directives_', {}) or {}
        if c.cell_type != 'code' or d.get('eval:', [''])[0].lower() == 'false' or skip & d.keys(): return True
        c.outputs = []  # execnb keeps the old ones where a cell prints nothing any more
    def store(c): c.outputs = clean_outputs(nb2dict(c.outputs))
    shell = CaptureShell(path, mpl_format='png')  # 'retina' makes images four times the size
    try:
        with working_directory(path.parent): shell.run_all(nb, exc_stop=True, preproc=left_alone, postproc=store)
    except Exception: return shell.prettytb(fname=path)
    write_nb(nb, path)
    return ''

@call_parse
def main(
    path:str=None,  # Notebook or folder (default: all)
    flags:str='',  # Flags to run that are normally skipped, such as 'slow'
):
    "Run notebooks in place and store their outputs"
    skip = set(get_config().tst_flags.split()) - set(flags.split())
    files = [Path(path)] if path and path.endswith('.ipynb') else nbglob(path, as_path=True).sorted()
    # A fresh process for each: no notebook may lean on the imports, seeds or memory of the one before.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn'), max_tasks_per_child=1) as pool:
        for f in files:
            print(f'running {f.name}', flush=True)
            if err := pool.submit(run_notebook, f.absolute(), skip).result(): sys.exit(f'{err}\n{f.name} failed and was left as it was.')
            nbdev_clean(f)
