"What a caller asks of generation counts, or is refused in one sentence: options, configurations, and names in the place of parts"

import pathlib
import numpy as np
import pytest, torch
from transformers import GenerationConfig
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding.loop import Decoder
from npu_lora_decoding.evaluation.lm_eval import _check_arguments, drafter_of
from npu_lora_decoding.evaluation.methods import load_target
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.models import names_nothing
from npu_lora_decoding.speculation.head_drafter import HASS
from npu_lora_decoding.speculation.joint import JointDrafter
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup
from npu_lora_decoding.temp_lora.generation import TempLoRA
from helpers.toys import toy_lm

LM = toy_lm()
NAN = float('nan')
PROMPT = torch.tensor([5, 6, 7, 5, 6])


def refused(call):
    "The sentence with which `call` is refused"
    with pytest.raises(DecodingError) as e:
        call()
    sentence = str(e.value)
    assert '\n' not in sentence and sentence.endswith('.') and ': ' in sentence
    return sentence


BAD = {
    'max_new_tokens': [0, -3, 2.5, 'a', True, NAN],
    'min_new_tokens': [-1, 0.5],
    'temperature': [-1.0, NAN, 'hot', float('inf'), 10**400],
    'top_p': [-0.1, 1.1, NAN, 'x'],
    'top_k': [-1, 2.5, NAN],
    'min_p': [-0.1, 1.1, NAN],
    'typical_p': [2, NAN],
    'repetition_penalty': [0, -1, NAN],
    'no_repeat_ngram_size': [-1, 1.5],
    'num_return_sequences': [0, 2.5],
    'seed': [
        'a',
        1.5,
        True,
        -1,
        2**63,
        -(2**70),
        [],
        [1, -1],
        [1, 2],
        [True],
        ('a',),
        torch.tensor([3, 4]),
        np.zeros(1),
    ],
    'stop_strings': [5, '', [''], []],
    'logits_processor': ['x', [3]],
    'stopping_criteria': ['x', [3]],
    'generation_config': ['x', dict(top_p=0.5)],
    'target': ['cold', None, CoLD],
    'drafter': ['lookup', PromptLookup, 5],
    'memory': ['temp_lora', TempLoRA],
    'suppress_tokens': ['a', [None]],
    'pad_token_id': [torch.tensor([2, 3])],
    'forced_eos_token_id': [{}, [None]],
    'eos_token_id': ['a'],
    'attention_mask': [1],
    'custom_generate': ['x'],
    'do_sample': ['yes'],
}


NAMED_BY_ITS_VALUE = ('suppress_tokens', 'eos_token_id', 'pad_token_id', 'forced_eos_token_id')


@pytest.mark.parametrize('name', BAD)
@pytest.mark.parametrize('sample', [False, True])
def test_values_that_mean_nothing(name, sample):
    for value in BAD[name]:
        options = dict(do_sample=sample, max_new_tokens=3) | {name: value}
        assert name in refused(lambda: LM.generate(PROMPT, **options)) or name in NAMED_BY_ITS_VALUE
        if isinstance(value, float) and name in GenerationConfig().to_dict() and name != 'max_new_tokens':
            config = GenerationConfig(do_sample=sample, max_new_tokens=3)
            setattr(config, name, value)
            assert name in refused(lambda: LM.generate(PROMPT, generation_config=config))


def test_temperature_zero_is_greedy_unless_tokens_are_drawn():
    assert LM.generate(PROMPT, max_new_tokens=3, temperature=0).texts == LM.generate(PROMPT, max_new_tokens=3).texts
    assert 'do_sample=False' in refused(lambda: LM.generate(PROMPT, do_sample=True, temperature=0))


@pytest.mark.parametrize(
    'kind', [torch.tensor, np.float64, np.float32, np.asarray], ids=['tensor', 'float64', 'float32', 'array']
)
def test_numbers_of_other_libraries_are_numbers(kind):
    asked = dict(do_sample=True, max_new_tokens=6, top_k=3, temperature=0.5, no_repeat_ngram_size=2, seed=7)
    whole = kind if kind in (torch.tensor, np.asarray) else np.int64
    given = {name: (whole if isinstance(x, int) else kind)(x) for name, x in asked.items() if name != 'do_sample'}
    assert LM.generate(PROMPT, do_sample=True, **given).texts == LM.generate(PROMPT, **asked).texts


def test_unknown_options_are_named_with_the_nearest():
    assert 'did you mean temperature' in refused(lambda: LM.generate(PROMPT, temprature=1))
    assert "no option 'foo'" in refused(lambda: LM.generate(PROMPT, foo=1))
    assert LM.generate(PROMPT, max_new_tokens=2, num_beams=1).tokens  # the remedy of another refusal


@pytest.mark.parametrize(
    'make',
    [
        lambda: Decoder('cold'),
        lambda: Decoder(drafter='lookup'),
        lambda: Decoder(memory='x'),
        lambda: Decoder(bank='x'),
        lambda: JointDrafter('lookup'),
        lambda: JointDrafter(()),
        lambda: JointDrafter((PromptLookup,)),
        lambda: PromptLookup('a'),
        lambda: TempLoRA(chunk='a'),
        lambda: TempLoRA(lr='x'),
        lambda: CoLD('x'),
        lambda: CoLD(beta=None),
        lambda: LM.generate(PROMPT, drafter=HASS(5)),
        lambda: LM.generate(PROMPT, drafter=HASS('x' * 5000)),
        lambda: LM.generate(pathlib.Path('story.txt')),
        lambda: LM.generate([['a', 'b']]),
        lambda: LM.generate([10**30]),
        lambda: LM.generate({'prompt': 'x'}),
    ],
)
def test_other_things_in_the_place_of_parts(make):
    refused(make)


def test_processors_of_generate_are_checked_too():
    for name in ('logits_processor', 'stopping_criteria'):
        how = {name: [3], 'custom_generate': Decoder(), 'max_new_tokens': 2}
        assert name in refused(lambda: LM.model.generate(PROMPT[None], **how))


# --- configurations


CONFIGS = [
    dict(do_sample=True, temperature=1.5, max_new_tokens=6),
    dict(do_sample=True, top_k=3, max_new_tokens=6),
    dict(do_sample=False, repetition_penalty=1.7, max_new_tokens=8),
    dict(do_sample=False, max_new_tokens=8, suppress_tokens=list(range(4, 40))),
    dict(do_sample=False, max_length=9),
    dict(do_sample=False, max_new_tokens=9, min_new_tokens=9, eos_token_id=list(range(3, 60))),
    dict(do_sample=False, max_new_tokens=9, eos_token_id=list(range(3, 60))),
    dict(do_sample=False, max_new_tokens=6, no_repeat_ngram_size=1),
]


@pytest.mark.parametrize('fields', CONFIGS, ids=str)
@pytest.mark.parametrize('drafter', [None, PromptLookup()], ids=['plain', 'lookup'])
def test_a_configuration_counts_as_in_transformers(fields, drafter):
    config = GenerationConfig(pad_token_id=0, **fields)
    seed = None
    if fields.get('do_sample') and drafter is not None:  # drawn with noise, of which transformers knows nothing
        seed = 2
        want = ids_of(LM.generate(PROMPT, generation_config=config, seed=seed))
    else:
        want = run_transformers(LM, generation_config=config)
    torch.manual_seed(2)
    assert ids_of(LM.generate(PROMPT, drafter=drafter, generation_config=config, seed=seed)) == want
    assert config.max_new_tokens == fields.get('max_new_tokens')  # it is the caller's


def ids_of(out):
    return [t.id for t in out.tokens[0]]


def run_transformers(lm, **options):
    torch.manual_seed(2)
    ids = PROMPT[None]
    return lm.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize('fields', CONFIGS, ids=str)
def test_the_model_s_own_configuration_counts(fields):
    "At lm.generate, with the length and the way of drawing given, and at generate alone"
    lm = toy_lm()
    for name, value in fields.items():
        setattr(lm.model.generation_config, name, value)
    how = dict(max_new_tokens=7, do_sample=fields['do_sample'])
    torch.manual_seed(2)
    assert [t.id for t in lm.generate(PROMPT, **how).tokens[0]] == run_transformers(lm, **how)
    decoded = run_transformers(lm, custom_generate=Decoder())
    assert decoded == run_transformers(lm)


def test_what_is_given_counts_more_than_a_configuration():
    config = GenerationConfig(do_sample=True, max_new_tokens=3, repetition_penalty=1.5)
    out = LM.generate(PROMPT, max_new_tokens=5, do_sample=False, repetition_penalty=1.0, generation_config=config)
    assert out.texts == LM.generate(PROMPT, max_new_tokens=5).texts


@pytest.mark.parametrize('drafter', [None, PromptLookup()], ids=['plain', 'lookup'])
def test_without_a_padding_token_the_end_token_fills(drafter):
    model = toy_model(pad_token_id=None)
    model.generation_config.pad_token_id = None
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    free = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, eos_token_id=None, pad_token_id=0)
    ends = [int(free[0, 12]), 96]
    for eos in (ends, ends[0]):
        how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=eos)
        want = model.generate(ids, **how)
        got = model.generate(ids, **how, custom_generate=Decoder(drafter=drafter))
        assert torch.equal(got, want) and int(want[0, -1]) == ends[0]


def test_without_any_token_to_fill_with_a_batch_is_refused():
    model = toy_model(pad_token_id=None, eos_token_id=None)
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    ids = torch.ones(2, 3, dtype=torch.long)
    how = dict(max_new_tokens=3, do_sample=False, custom_generate=Decoder())
    assert model.generate(ids, **how).shape == (2, 6)  # they end together
    criteria = [lambda ids, scores: torch.tensor([True, False])]
    assert 'pad_token_id' in refused(lambda: model.generate(ids, **how, stopping_criteria=criteria))


@pytest.mark.parametrize('pad', [None, -1, 500])
def test_padding_tokens_outside_the_vocabulary(pad):
    lm = toy_lm()
    lm.tokenizer._pad_token = lm.tokenizer.pad_token

    class Odd(type(lm.tokenizer)):
        pad_token_id = pad

    lm.tokenizer.__class__ = Odd
    assert lm.pad_id == 2
    want = [lm.generate(row, max_new_tokens=4).texts[0] for row in (PROMPT, PROMPT[:2])]
    assert lm.generate([PROMPT, PROMPT[:2]], max_new_tokens=4).texts == want


# --- names


@pytest.mark.parametrize('word', [None, '', 'none', 'None', 'NONE', ' null '])
def test_words_for_nothing(word, monkeypatch):
    from npu_lora_decoding.evaluation import lm_eval, methods

    assert names_nothing(word) and drafter_of(word, word) is None
    loaded = []
    monkeypatch.setattr(methods, 'load', lambda *a: loaded.append(a[1]) or LM)
    monkeypatch.setattr(methods, 'shipped_adapter', lambda: 'shipped one')
    load_target(None, word, 'fp32')
    assert loaded == ['shipped one' if word is None else None]
    made = type('Harness', (lm_eval.Decoding, type('HFLM', (), dict(__init__=lambda self, **k: None))), {})
    assert made(adapter=word, method='greedy').lm is LM and loaded[-1] is None
    with pytest.raises(DecodingError):  # the toy has no adapter, but the shipped one was asked for
        made()
    assert loaded[-1] == 'shipped one'


@pytest.mark.parametrize(
    'name,near',
    [('adaptor', 'adapter'), ('bata', 'beta'), ('peft', None), ('load_in_4bit', None), ('batchsize', 'batch_size')],
)
def test_model_arguments_of_the_harness(name, near):
    sentence = refused(lambda: _check_arguments({name: 1}))
    assert repr(name) in sentence and (near is None or f'did you mean {near}' in sentence)
    _check_arguments(dict(batch_size=1, max_length=64, max_batch_size=None))


def test_huge_and_foreign_numbers_of_parts():
    assert 'alpha is' in refused(lambda: CoLD(alpha=10**400)) and 'beta is' in refused(lambda: CoLD(beta=10**400))
    assert PromptLookup(draft_tokens=np.int64(3)).draft_tokens == 3
    assert 'at most 1024' in refused(lambda: PromptLookup(draft_tokens=10**9))
    assert 'True draft tokens' in refused(lambda: PromptLookup(draft_tokens=True))
    assert 'is_assistant' in refused(lambda: LM.generate(PROMPT, max_new_tokens=3, is_assistant=True))
