"What a built site must not have: links that lead nowhere, and anything that is fetched from another computer"
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAMED = {'www.w3.org', 'www.mathjax.org', 'bit.ly'}  # hosts that scripts name and never ask: namespaces, a link in a menu
FETCHED = ('src', 'srcset', 'data', 'poster', 'action')
WELL_FORMED = re.compile(r'https?://[\w-]+(\.[\w-]+)+(:\d+)?(/\S*)?')


class Page(HTMLParser):
    "The anchors of a page (`ids`), its addresses, clicked (`links`) or fetched at once (`loads`), and its styles and scripts"
    def __init__(self, text):
        super().__init__()
        self.ids = set()
        self.links = []
        self.loads = []
        self.inline = []  # pairs of 'style' or 'script' and their text
        self.inside = None  # the style or script that is being read
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = {k: v or '' for k, v in attrs}
        self.inside = tag if tag in ('script', 'style') else None
        self.ids |= {a[k] for k in ('id', 'name') if k in a}
        if 'style' in a:
            self.inline.append(('style', a['style']))
        if 'href' in a:
            addresses = self.links if tag in ('a', 'area') else self.loads
            addresses.append(a['href'])
        self.loads += [a[k] for k in FETCHED if k in a]

    def handle_data(self, data):
        if self.inside:
            self.inline.append((self.inside, data))

    def handle_endtag(self, tag):
        self.inside = None


def is_remote(url):
    return bool(re.match(r'(?:[a-z][a-z+.-]*:)?//', url.strip(), re.I))


def is_data(script):
    "Whether a script gives a name to JSON and does nothing else, as the search index does: what it quotes is not fetched"
    match = re.fullmatch(r'(?s)\s*var \w+\s*=\s*(.*?);?\s*', script)
    if not match:
        return False
    try:
        return isinstance(json.loads(match[1]), dict)
    except ValueError:
        return False


def asked(kind, text):
    "Return the addresses elsewhere that a style or script may fetch"
    if kind == 'style':
        urls = re.findall(r'(?:url\(|@import)\s*["\']?\s*([^"\')\s;]+)', text)
        return [url for url in urls if is_remote(url)]
    if is_data(text):
        return []
    without_comments = re.sub(r'(?s)/\*.*?\*/', '', text)
    urls = re.findall(r'(?:https?|wss?):\\?/\\?/[\w.-]+', without_comments)
    return [url for url in urls if re.split(r'[/\\]+', url)[1] not in NAMED]


def lost_link(url, path, site, pages):
    "Return what is wrong with a link within the site, or ''"
    parts = urlsplit(url)
    target = path
    if parts.path:
        target = Path(os.path.normpath(path.parent/unquote(parts.path)))
    outside = parts.path.startswith('/') or parts.scheme or site not in target.parents
    if outside or not target.is_file():
        return f'{url} does not exist'
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
        return f'{url}: no such anchor'
    return ''


def page_problems(path, page, site, pages):
    "Yield what is wrong with one page"
    for url in page.loads:
        if is_remote(url):
            yield f'loads {url} from another computer'
    for url in page.loads + page.links:
        is_inner = not is_remote(url) and urlsplit(url).scheme not in ('data', 'mailto')
        if is_inner and (problem := lost_link(url, path, site, pages)):
            yield problem
    for url in page.links:
        if is_remote(url) and not WELL_FORMED.fullmatch(url):
            yield f'malformed link {url}'
    for kind, text in page.inline:
        for url in asked(kind, text):
            yield f'its {kind} asks {url}'
    shown = re.sub('<[^>]+>', '', path.read_text(encoding='utf-8'))
    if re.search(r'(?m)^#\s*\|\s*\w', shown):
        yield 'shows an nbdev directive'


def problems_of(site):
    "Return every link or anchor that leads nowhere, every malformed external link, and everything fetched from another computer"
    pages = {path: Page(path.read_text(encoding='utf-8')) for path in sorted(site.rglob('*.html'))}
    found = [] if pages else [f'{site} has no pages']
    for path, page in pages.items():
        found += [f'{path.relative_to(site)}: {problem}' for problem in page_problems(path, page, site, pages)]
    for path in sorted(site.rglob('*')):
        kind = {'.css': 'style', '.js': 'script'}.get(path.suffix)
        if kind:
            text = path.read_text(encoding='utf-8')
            found += [f'{path.relative_to(site)}: asks {url}' for url in asked(kind, text)]
    return found
