"The built site in Chromium, from disk and without a network: formulas are drawn, search finds words, nothing else is asked"
import re
import subprocess
import tempfile
from pathlib import Path

ELSEWHERE = 'https://example.org/a.js'
# Requests of a page have its file in their key; Chromium's own requests have other keys
REQUEST = re.compile(r'"network_isolation_key":"file:[^"]*".*?"url":"((?:http|ws)s?://[^"]+)"')
FORMULA = re.compile(r'(?s)<(span|div) class="arithmatex">.*?</\1>')
MATHJAX = re.compile(r'<script>window\.MathJax.*?</script>')
WANTED = {
    'index.html': 'md-typeset',
    'api/cold.rule.html': 'id="CoLD"',
    'lessons/2_cold/01_rule.html': '<mjx-container',
    'index.html?q=plausible': 'md-search-result__item',
}
OPTIONS = [
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking',
    '--host-resolver-rules=MAP * ~NOTFOUND', '--virtual-time-budget=20000', '--dump-dom',
]


def opened(url, chromium):
    "Open a page without a network; return it as a reader has it, and the addresses elsewhere that it asked for"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder)/'log'
        own = [f'--user-data-dir={folder}/user', f'--log-net-log={log}']
        done = subprocess.run([chromium, *OPTIONS, *own, url], capture_output=True, text=True, timeout=300)
        return done.stdout, set(REQUEST.findall(log.read_text(errors='replace')))


def control_page(site):
    "Return a page with every formula of the site and one script from elsewhere, and how many formulas it has"
    pages = [path.read_text(encoding='utf-8') for path in sorted(site.rglob('*.html'))]
    formulas = [match[0] for page in pages for match in FORMULA.finditer(page)]
    setups = [match[0] for page in pages if (match := MATHJAX.search(page))]
    scripts = [f'<script src="{ELSEWHERE}"></script>', *setups[:1], f'<script src="{site.name}/assets/mathjax.js"></script>']
    return '\n'.join(scripts + formulas), len(formulas)


def formula_problems(site, chromium):
    "Return what is wrong with the formulas, all on one page; and with the check itself, when a script from elsewhere goes unnoticed"
    control = site.parent/'control.html'
    text, formulas = control_page(site)
    control.write_text(text, encoding='utf-8')
    dom, asks = opened(control.as_uri(), chromium)
    drawn = dom.count('<mjx-container')
    wrong = dom.count('<g data-mml-node="merror"')
    if asks != {ELSEWHERE}:
        yield 'a script from elsewhere went unnoticed, so this check shows nothing'
    if drawn < formulas or wrong:
        yield f'{drawn} of {formulas} formulas are drawn, {wrong} of them as errors'


def browse(site, chromium):
    "Open pages from disk; return what does not work there"
    found = [*formula_problems(site, chromium)]
    for page, wanted in WANTED.items():
        dom, asks = opened(f'{site.as_uri()}/{page}', chromium)
        if wanted not in dom:
            found.append(f'{page}: Chromium shows no {wanted}')
        found += [f'{page}: asked {url}' for url in sorted(asks)]
    return found
