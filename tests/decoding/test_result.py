"What `lm.generate` returns: a list of texts that a notebook shows as coloured tokens; and settings of the wrong type"

import subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from npu_lora_decoding import HASS, CoLD, Decoder, DecodingError, Plain, PromptLookup, TempLoRA
from npu_lora_decoding.temp_lora.perplexity import document_ids, read_document
from npu_lora_decoding.temp_lora.adapter import TempLoRAConfig
from helpers.toys import toy_lm


@pytest.fixture(scope='module')
def lm():
    return toy_lm()


@pytest.fixture(scope='module')
def out(lm):
    return lm.generate(['a b', 'b a', 'a a'], max_new_tokens=4, chat=False)


def test_a_result_is_a_list_of_its_texts(out):
    assert len(out) == 3 and list(out) == out.texts
    assert out[0] == out.text and out[-1] == out.texts[-1] and out[1:] == out.texts[1:]
    with pytest.raises(IndexError):
        out[3]


def test_its_repr_is_short_and_names_the_texts(out):
    assert len(repr(out)) < 60 + sum(len(repr(text)) for text in out)
    assert all(repr(text) in repr(out) for text in out) and 'Token(' not in repr(out)


SHOWN = '''
import sys
from IPython.core.formatters import DisplayFormatter
from helpers.toys import toy_lm
out = toy_lm().generate('a b', max_new_tokens=3, chat=False)
assert 'npu_lora_decoding.evaluation.plots' not in sys.modules
shown, _ = DisplayFormatter().format(out)
print(shown['text/html'])
'''


def test_a_notebook_shows_coloured_tokens_without_a_further_import():
    tests = Path(__file__).parents[1]
    shown = subprocess.run([sys.executable, '-c', SHOWN], cwd=tests, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count('background:rgb') == 3 and 'tokens/s' in shown.stdout


PARTS = [
    *(('drafter', x) for x in ('lookup', 3, PromptLookup, HASS, Plain(), TempLoRA())),
    *(('target', x) for x in ('cold', 3, CoLD, PromptLookup(), TempLoRA())),
    *(('memory', x) for x in ('temp', 3, TempLoRA, Plain(), PromptLookup(), HASS('head'))),
]


@pytest.mark.parametrize('part, given', PARTS)
def test_a_part_of_the_wrong_kind_is_refused(part, given, lm):
    for ask in (lambda: lm.generate('a b', **{part: given}), lambda: Decoder(**{part: given})):
        with pytest.raises(DecodingError, match=f'the {part} is .*: give '):
            ask()


@pytest.mark.parametrize('name', ['compile', 'record', 'chat', 'stream'])
def test_a_switch_is_on_or_off(name, lm):
    for given in ('no', 'yes', 2.5, [True]):
        with pytest.raises(DecodingError, match=f'{name} is .*: give True or False'):
            lm.generate('a b', **{name: given})
    off = lm.generate('a b', max_new_tokens=2, **{'chat': False, name: np.bool_(False)})
    assert len(off) == 1


@pytest.mark.parametrize('options', [
    dict(nodes='16'), dict(depth=2.5), dict(top_k=None), dict(nodes=True), dict(draft_vocab='all'), dict(folder=3), dict(folder=None)])
def test_settings_of_a_head_drafter_are_whole_numbers_and_a_path(options):
    with pytest.raises(DecodingError, match=': give '):
        HASS(**{'folder': 'head', **options})


def test_a_document_is_a_text_a_path_or_tokens(lm, tmp_path):
    file = tmp_path / 'book.txt'
    file.write_text('a b a b a')
    assert document_ids(lm, file).tolist() == document_ids(lm, 'a b a b a').tolist()
    with pytest.raises(DecodingError, match='is the name of a file.*: give Path'):
        document_ids(lm, str(file))
    with pytest.raises(DecodingError, match='no file .*missing.txt'):
        read_document(lm, tmp_path / 'missing.txt', TempLoRAConfig(epochs=0))
    with pytest.raises(DecodingError, match='the text is of type bytes'):
        document_ids(lm, b'a b')
