"Notebooks as tests: a failing cell fails by name, a slow one does not run"

import json
import subprocess
import sys
import pytest
from book import ROOT


def write(path, *sources):
    "Write a notebook of code cells"
    cells = [
        dict(cell_type='code', id=str(i), source=o, outputs=[], metadata={}, execution_count=None)
        for i, o in enumerate(sources)
    ]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))


@pytest.mark.slow
def test_one_fails_and_one_does_not(tmp_path):
    write(tmp_path / 'good.ipynb', 'x = 1', '#| slow\n1 / 0')
    write(tmp_path / 'bad.ipynb', 'x = 1', '1 / 0')
    command = [sys.executable, ROOT / 'tools' / 'check_notebooks.py', tmp_path, '--workers', '1']
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert 'ok good' in done.stdout and 'FAILED bad' in done.stdout
    assert done.stderr.strip().endswith('failed: bad')
