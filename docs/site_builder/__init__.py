"""Builds the documentation site from the repository into docs/_build/site, and checks it; docs/run calls it.

| module | does |
|---|---|
| `markdown` | links, lists and names of a page's prose |
| `api` | a module's docments as a page |
| `pages` | writes every page and the navigation |
| `checks` | reads the built pages: links that lead nowhere, anything that would be fetched from another computer |
| `browser` | opens pages in Chromium without a network |

Notebooks are not run: code, outputs and pictures are as stored.
"""
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
OUT = DOCS/'_build'
PACKAGE = 'npu_lora_decoding'
sys.path[:0] = [str(ROOT), str(ROOT/'tools')]

def fail(why): sys.exit(f'site: {why}')
