"Files of results: every file has a command and a line in results/README.md, and make.sh knows every name"

import re
import subprocess
from pathlib import Path
import pytest

RESULTS = Path(__file__).resolve().parents[2] / 'results'
LISTED = (RESULTS / 'README.md').read_text(encoding='utf-8')
NAMES = re.findall(r'`make results NAME=(\w+)', LISTED)


def make(*args):
    "Run make.sh without anything that it could start"
    return subprocess.run(['bash', RESULTS / 'scripts' / 'make.sh', *args], capture_output=True, text=True, timeout=60)


def test_every_file_is_listed():
    files = [path.relative_to(RESULTS).as_posix() for path in RESULTS.glob('*/*.json')]
    assert files and [path for path in files if f'({path})' not in LISTED] == []


def test_every_name_is_a_function_of_make():
    functions = re.findall(r'(?m)^(\w+)\(\) \{', (RESULTS / 'scripts' / 'make.sh').read_text(encoding='utf-8'))
    assert len(NAMES) == len(set(NAMES)) and set(NAMES) <= set(functions)


def test_without_a_name_the_names_are_listed():
    done = make()
    assert done.returncode == 0
    assert sorted(re.findall(r'(?m)^  (\w+)', done.stdout)) == sorted([*NAMES, 'all'])


@pytest.mark.parametrize(
    'args, message',
    [
        (['nope'], 'results: unknown name nope: give none to see the list.'),
        (
            ['wikisql_test'],
            'results: wikisql_test needs files that are not part of the project: give their folder, DATA=FOLDER.',
        ),
    ],
)
def test_what_cannot_be_made_is_refused(args, message):
    done = make(*args)
    assert done.returncode == 1 and done.stderr.strip() == message
