"""Families of causal language models: equal to the model's own generate, or refused

CI runs a core and a part of the others: the version of transformers chooses it, so that it is the same until that changes. The
whole, with static caches, is `make results NAME=families`, half an hour that writes the table.
"""

import zlib
from pathlib import Path
import pytest, transformers
from helpers.families import FAMILIES, UNBUILT, cases
from helpers.family_sweep import WAYS, Everything, sweep
from npu_lora_decoding.decoding import capabilities, runner
from npu_lora_decoding.foundations.files import json_rows

TABLE = json_rows(Path(__file__).resolve().parents[2] / 'results' / 'data' / 'families.json')
MADE_WITH = TABLE[-1]['transformers']
KNOWN = {row['model']: row for row in TABLE if 'ways' in row}

# One of each mechanism: rope, windows, learned positions, ALiBi, latent attention, a recurrent state, an encoder
CORE = (
    'llama',
    'gemma2',
    'gpt2',
    'opt',
    'mpt',
    'deepseek_v3',
    'jamba',
    'mamba',
    't5 (encoder-decoder)',
    'phi3 (LongRoPE)',
)
PARTS = 24
QUICK = tuple(way for way in WAYS if not way.startswith('static'))  # A capture takes seconds
CASES = {case.name: case for case in cases()}


def is_due(name):
    "Return whether a model is in CI's part"
    return zlib.crc32(f'{transformers.__version__} {name}'.encode()) % PARTS == 0


def check(name, ways, folder):
    "Sweep one model; nothing is wrong, and nothing that once was equal is refused"
    rows = sweep(CASES[name], ways, folder / 'head')
    found = {row.way: row.outcome for row in rows}
    assert set(found.values()) <= {'equal', 'refused', 'unsupported'}, rows
    assert all(row.message.count('\n') == 0 and row.message.endswith('.') for row in rows if row.outcome == 'refused')
    if transformers.__version__ == MADE_WITH:
        assert found == {way: KNOWN.get(name, dict(ways=found))['ways'].get(way, found[way]) for way in ways}, rows


def test_every_family_is_swept_or_named_with_a_reason():
    swept = {case.family for case in cases()}
    assert swept | set(UNBUILT) >= set(FAMILIES) and not swept & set(UNBUILT)
    assert set(KNOWN) == set(CASES)


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in CASES if name in CORE or is_due(name)])
def test_part(name, tmp_path):
    check(name, QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['llama', 'gemma2'])
def test_static_cache(name, tmp_path):
    check(name, ('static', 'static_drafts'), tmp_path)


def outcomes(name, *ways):
    return [row.outcome for row in sweep(CASES[name], ways)]


@pytest.mark.parametrize('name', ['gpt_neo', 'git'])
def test_a_family_that_is_taken_for_known_is_found(name, monkeypatch):
    assert outcomes(name, 'drafts') == ['refused']
    monkeypatch.setattr(capabilities, 'TREE_FAMILIES', Everything())
    assert outcomes(name, 'drafts') == ['wrong']


def test_a_window_that_is_not_kept_is_found(monkeypatch):
    monkeypatch.setattr(runner, '_in_window', lambda valid, depths, window: True)
    assert outcomes('gemma2', 'drafts') == ['wrong']
