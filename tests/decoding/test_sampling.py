"Processors act as in transformers: in their order, on scores they may write into, and never on a text that has ended"

import pytest
import torch
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor
from npu_lora_decoding.decoding.loop import Decoder
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup

IDS = torch.tensor([[5, 6, 7, 8] * 4, [0, 0, 9, 3] + [4, 9, 3] * 4])
MASK = (IDS != 0).long()
ENDS = 16  # columns of the prompts
DRAFTERS = pytest.mark.parametrize('drafter', [None, PromptLookup(adaptive=False)], ids=['plain', 'lookup'])


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(1)
    model = toy_model()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def both(model, drafter, rows=2, **asked):
    "What transformers writes, and what we write"
    options = dict(input_ids=IDS[:rows], attention_mask=MASK[:rows], max_new_tokens=24, pad_token_id=0)
    options |= dict(do_sample=False, eos_token_id=None) | asked
    return model.generate(**options), model.generate(**options, custom_generate=Decoder(drafter=drafter))


def same(model, drafter, **asked):
    theirs, ours = both(model, drafter, **asked)
    assert torch.equal(theirs, ours)
    return ours


class OfRow:
    "A processor that keeps no state"

    keeps_state = False

    def __init__(self, change):
        self.change = change

    def __call__(self, text, scores):
        return self.change(text, scores)


@DRAFTERS
def test_a_processor_may_write_into_its_scores(model, drafter):
    def write(text, scores):
        scores[:, 40:70] = -torch.inf
        return scores

    new = same(model, drafter, logits_processor=[OfRow(write)])[:, ENDS:]
    assert not ((new >= 40) & (new < 70)).any()


@DRAFTERS
def test_without_contrast_the_order_of_processors_stays(model, drafter):
    raised = OfRow(lambda text, scores: scores.index_fill(-1, torch.tensor([33]), 50.0))
    forbidden = SuppressTokensLogitsProcessor([33])
    last_forbids = same(model, drafter, logits_processor=LogitsProcessorList([raised, forbidden]))
    last_raises = same(model, drafter, logits_processor=LogitsProcessorList([forbidden, raised]))
    assert not (last_forbids == 33).any() and (last_raises[:, ENDS:] == 33).all()


def test_a_bias_comes_after_guidance(model):
    same(model, None, guidance_scale=1.7, sequence_bias={(9,): 3.0, (11,): -2.0})


@DRAFTERS
@pytest.mark.parametrize('before', [True, False])
@pytest.mark.parametrize('sample', [True, False])
def test_a_grammar_may_allow_nothing_after_its_end(model, drafter, before, sample):
    def grammar(text, scores):
        allowed = torch.full_like(scores, -torch.inf)
        for row, one in enumerate(text):
            if one[0] == 5 and len(one) == ENDS + 4:
                allowed[row, 11] = 0
            elif not (one[ENDS:] == 11).any():
                allowed[row, 12:] = 0
        return scores + allowed

    processor = OfRow(grammar)
    processor.before_contrast = before
    asked = dict(logits_processor=[processor], eos_token_id=11, do_sample=sample)
    if sample:  # transformers fails here
        ours = model.generate(
            IDS,
            attention_mask=MASK,
            max_new_tokens=24,
            pad_token_id=0,
            **asked,
            custom_generate=Decoder(drafter=drafter)
        )
    else:
        ours = same(model, drafter, **asked)
    assert ours[0, ENDS + 4] == 11 and (ours[0, ENDS + 5 :] == 0).all() and (ours[1, ENDS:] > 11).all()


@DRAFTERS
def test_a_live_text_with_nothing_left_is_refused(model, drafter):
    nothing = OfRow(lambda text, scores: torch.full_like(scores, -torch.inf))
    for before, message in (True, 'the constraints forbid every token'), (False, 'leave no token to choose'):
        nothing.before_contrast = before
        with pytest.raises(DecodingError, match=message):
            both(model, drafter, logits_processor=[nothing])


def test_an_infinite_bias_is_named_and_not_the_model(model):
    with pytest.raises(DecodingError, match='plus infinity after the constraints: give finite biases'):
        both(model, None, sequence_bias={(9,): float('inf')})


@DRAFTERS
@pytest.mark.parametrize(
    'option, message',
    [
        (dict(prefix_allowed_tokens_fn=lambda row, text: []), 'PrefixConstrainedLogitsProcessor fails .*empty list'),
        (
            dict(prefix_allowed_tokens_fn=lambda row, text: [10**6]),
            'PrefixConstrainedLogitsProcessor fails .IndexError',
        ),
        (dict(prefix_allowed_tokens_fn=5), 'PrefixConstrainedLogitsProcessor fails .TypeError'),
        (dict(logits_processor=[OfRow(lambda text, scores: None)]), 'the processor OfRow returns a NoneType: return'),
    ],
    ids=['nothing', 'outside', 'no function', 'no scores'],
)
def test_processors_that_cannot_work_are_named(model, drafter, option, message):
    options = dict(input_ids=IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False, eos_token_id=None)
    with pytest.raises(DecodingError, match=message) as e:
        model.generate(**options, pad_token_id=0, **option, custom_generate=Decoder(drafter=drafter))
    assert '\n' not in str(e.value)


def test_an_error_of_somebody_s_own_processor_is_theirs(model):
    def broken(text, scores):
        raise KeyError('mine')

    with pytest.raises(KeyError, match='mine'):
        model.generate(IDS, attention_mask=MASK, max_new_tokens=4, logits_processor=[broken], custom_generate=Decoder())
