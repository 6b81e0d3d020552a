"Where processes that a test starts import from"

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def import_path():
    "Return a PYTHONPATH with the checkout, the tests and what it was before"
    before = os.environ.get('PYTHONPATH', '')
    return os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [before])])


def environment(**more):
    "Return the environment of a process that imports as the tests do"
    return os.environ | dict(PYTHONPATH=import_path()) | more
