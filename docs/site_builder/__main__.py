"Build the site and check it: python -m site_builder, in docs/"
import json
import re
import shutil
import subprocess
from . import DOCS, OUT, fail
from .browser import browse
from .checks import problems_of
from .pages import Book, Site

SERVER_FILES = ('404.html', 'sitemap.xml', 'sitemap.xml.gz')
# Addresses in scripts of the theme and of MathJax that no page uses: diagrams, a repository's stars, formulas read aloud
UNUSED = r'https://(unpkg\.com|api\.github\.com|cdn\.jsdelivr\.net)'

def render(navigation):
    "Turn the pages into a site with mkdocs, which has an environment of its own"
    tools = DOCS/'.venv'
    mathjax = next(tools.glob('lib/python*/site-packages/mathjax/static/mathjax/es5/tex-svg-full.js'))
    shutil.copy(mathjax, OUT/'pages'/'assets'/'mathjax.js')
    settings = dict(INHERIT='../mkdocs.yml', docs_dir='pages', site_dir='site', nav=navigation)
    (OUT/'mkdocs.yml').write_text(json.dumps(settings))
    command = [tools/'bin'/'mkdocs', 'build', '--strict', '-q', '-f', OUT/'mkdocs.yml']
    if subprocess.run(command).returncode: fail('mkdocs did not build the site: see its messages above.')

def tidy(site):
    "Remove what only a server needs, and addresses that no page uses"
    shutil.rmtree(site/'assets'/'javascripts'/'lunr')  # languages other than English
    for path in (*(site/name for name in SERVER_FILES), *site.rglob('*.map')): path.unlink(missing_ok=True)
    for path in (*site.rglob('bundle*.js'), site/'assets'/'mathjax.js'):
        path.write_text(re.sub(UNUSED, '', path.read_text(encoding='utf-8')), encoding='utf-8')

def check(site):
    "Read the built site, and open it where there is a Chromium"
    if found := problems_of(site): fail('the site was built, but:\n  ' + '\n  '.join(found))
    print(f'site: {len(list(site.rglob("*.html")))} pages, every link leads somewhere, nothing is loaded from elsewhere', flush=True)
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if not chromium:
        print('site: NOT opened in a browser, because there is no Chromium (Debian: apt install chromium)')
        return
    if found := browse(site, chromium): fail('in Chromium:\n  ' + '\n  '.join(found))
    print('site: Chromium, without a network, shows formulas and finds words')

def main():
    print('site 1/3: pages', flush=True)
    shutil.rmtree(OUT, ignore_errors=True)
    pages = Site(Book())
    pages.write()
    print('site 2/3: mkdocs', flush=True)
    render(pages.navigation())
    site = OUT/'site'
    tidy(site)
    print('site 3/3: checks', flush=True)
    check(site)
    print(f'site: {site}/index.html')

if __name__ == '__main__': main()
