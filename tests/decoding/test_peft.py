"PEFT's tuners and quantised bases: the tokens are PEFT's own, or the call is refused in a sentence"

import copy
import re
import pytest
import torch
from peft import PeftType, get_peft_model
import peft_sweep
from npu_lora_decoding import CoLD, TempLoRA
from npu_lora_decoding.decoding import loop
from npu_lora_decoding.decoding.loop import Decoder
from npu_lora_decoding.foundations import lora
from npu_lora_decoding.foundations.adapters import load_adapter
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup
from quantised_toys import LIBRARIES, HalfOutput, OddKind, Packed, RoundedInput, swapped

NOT_BUILT = {'LORA, LoftQ', 'MULTITASK_PROMPT_TUNING'}  # want bitsandbytes; PEFT's `generate` cannot
PLAIN_ONLY = ('equal', 'equal', 'refused')  # plain, prompt lookup, contrast
ALL = ('equal',) * 3
NONE = ('refused',) * 3
EXPECTED = {  # Tuner -> outcomes in memory, and from its folder
    'LORA': (ALL, ALL),
    'LORA, rsLoRA': (ALL, ALL),
    'LORA, patterns': (ALL, ALL),
    'LORA, LM head': (ALL, ALL),
    'LORA, MiCA': (ALL, ALL),
    'LORA, PiSSA': (PLAIN_ONLY, NONE),
    'LORA, DoRA': (PLAIN_ONLY, NONE),
    'LORA, bias of B': (PLAIN_ONLY, NONE),
    'LORA, all biases': (PLAIN_ONLY, NONE),
    'LORA, modules to save': (PLAIN_ONLY, NONE),
    'LORA, embedding': (PLAIN_ONLY, NONE),
    'LORA, token indices': (PLAIN_ONLY, NONE),
    'LORA, aLoRA': (('equal', 'refused', 'refused'), NONE),
    'LORA, KaSA': (PLAIN_ONLY, NONE),
    'LORA, BD-LoRA': (PLAIN_ONLY, NONE),
    'LORA, two active adapters': (ALL, ()),
    'LORA, the second adapter': (ALL, ()),
    'LORA, scaled': (ALL, ()),
    'LORA, weighted adapter': (ALL, ()),
    'LORA, merged': (PLAIN_ONLY, ()),
    'LORA, merged in one layer': (PLAIN_ONLY, ()),
    'LORA, switched off': (PLAIN_ONLY, ()),
    'LORA, switched off in one layer': (PLAIN_ONLY, ()),
    'LORA around LoHa': (PLAIN_ONLY, ()),
    'XLORA': (('equal', 'refused', 'refused'), ()),
    'ADALORA': (PLAIN_ONLY, NONE),
    'LN_TUNING': (PLAIN_ONLY, NONE),
    'ADAPTION_PROMPT': (('equal', 'refused', 'refused'), NONE),
    'PROMPT_TUNING': (('equal', 'refused', 'refused'), NONE),
    'PREFIX_TUNING': (('equal', 'refused', 'refused'), NONE),
}


@pytest.mark.slow
@pytest.mark.parametrize('tuner', EXPECTED)
def test_tuner(tuner):
    rows = peft_sweep.sweep([tuner])
    in_memory = tuple(row.outcome for row in rows if row.place == 'memory')
    from_folder = tuple(row.outcome for row in rows if row.place == 'folder')
    assert (in_memory, from_folder) == EXPECTED[tuner], '\n'.join(map(str, rows))


@pytest.mark.slow
def test_every_tuner():
    rows = peft_sweep.sweep()
    faults = [row for row in rows if row.outcome in peft_sweep.FAULTS]
    assert not faults, '\n'.join(map(str, faults))
    assert {row.tuner for row in rows if row.outcome == 'not built'} <= NOT_BUILT
    assert {kind.value for kind in PeftType} <= {row.tuner for row in rows}
    assert peft_sweep.counts(rows)['equal'] >= 180


@pytest.mark.parametrize('tuner', ['LORA, bias of B', 'LORA, KaSA', 'LORA, modules to save', 'LORA, DoRA'])
def test_sweep_sees_a_guard_that_is_missing(monkeypatch, tuner):
    "A tuner that is taken for a plain LoRA gives other tokens, or a traceback"
    for module in (lora, loop):
        monkeypatch.setattr(module, 'why_not_rows', lambda model: None)
    outcomes = {row.outcome for row in peft_sweep.sweep([tuner]) if row.place == 'memory'}
    assert outcomes & set(peft_sweep.FAULTS)


def sentence(call):
    with pytest.raises(DecodingError) as e:
        call()
    return str(e.value)


@pytest.fixture
def expert():
    return peft_sweep.experts(peft_sweep.toy_model())


def test_rows_named_in_the_call_are_refused_and_forgotten(expert):
    names = dict(adapter_names=['default', '__base__'])
    message = sentence(lambda: peft_sweep.generate(expert, custom_generate=Decoder(), **names))
    assert message.startswith('adapter_names= cannot be combined with a Decoder: ')
    assert torch.equal(peft_sweep.generate(expert, custom_generate=Decoder()), peft_sweep.generate(expert))


def test_bank_beside_an_adapter_of_peft(expert, tmp_path):
    "The adapter in the model would change the base, and the layers that the bank does not have"
    inner = expert.get_base_model()
    folder = tmp_path / 'up'
    base = peft_sweep.toy_model()
    peft_sweep.train(get_peft_model(copy.deepcopy(base), peft_sweep.lora(target_modules=['up_proj']))).save_pretrained(
        folder
    )
    bank = AdapterBank(inner, [load_adapter(folder, inner)])
    for target in (loop.Plain(), CoLD()):
        message = sentence(lambda: peft_sweep.generate(inner, custom_generate=Decoder(target, bank=bank)))
        assert message.startswith('the model has an adapter of PEFT beside the bank') and 'q_proj' in message
    expert.base_model.disable_adapter_layers()
    alone = AdapterBank(base, [load_adapter(folder, base)])
    got = peft_sweep.generate(inner, custom_generate=Decoder(CoLD(), bank=bank))
    assert torch.equal(got, peft_sweep.generate(base, custom_generate=Decoder(CoLD(), bank=alone)))


def test_without_an_active_adapter_it_is_the_base(expert):
    expert.base_model.set_adapter([])
    want = peft_sweep.generate(expert)
    assert torch.equal(want, peft_sweep.generate(peft_sweep.toy_model()))
    for drafter in (None, PromptLookup()):
        assert torch.equal(peft_sweep.generate(expert, custom_generate=Decoder(drafter=drafter)), want)
    message = sentence(lambda: peft_sweep.generate(expert, custom_generate=Decoder(CoLD())))
    assert 'there is no adapter' in message


def test_memory_over_what_no_bank_holds_is_refused():
    model = peft_sweep.tuners()['LORA, DoRA'](peft_sweep.toy_model())
    decoder = Decoder(memory=TempLoRA(chunk=6, window=16, train_context=6, r=4))
    message = sentence(lambda: model.generate(peft_sweep.IDS[:1], max_new_tokens=8, custom_generate=decoder))
    assert 'DoRA' in message


def test_compiled_forward_pass_of_peft_is_refused():
    model = peft_sweep.tuners()['LORA, DoRA'](peft_sweep.toy_model())
    message = sentence(lambda: peft_sweep.generate(model, custom_generate=Decoder(compile=True)))
    assert message == "PEFT's own forward pass is not compiled: decode with compile=False."


# --- Quantised bases


def quantised_rows(base, **config):
    "Return the outcomes of a LoRA over a quantised base, by place and method, and the rows"
    rows = peft_sweep.quantised_rows('quantised', base, **config)
    return [row.outcome for row in rows], rows


@pytest.mark.parametrize('targets', [['q_proj', 'v_proj'], 'all-linear'])
def test_weights_in_bytes(targets):
    outcomes, rows = quantised_rows(swapped(Packed), target_modules=targets)
    assert outcomes == ['equal'] * 6, rows


def test_rounded_activations():
    "The last bit of a sum decides how the next layer rounds, so only PEFT's own forward pass gives its tokens"
    outcomes, rows = quantised_rows(swapped(RoundedInput))
    assert outcomes == ['equal', *['refused'] * 5], rows
    assert 'round more coarsely than torch.float32' in rows[1].message


def test_layers_that_answer_in_another_dtype():
    outcomes, rows = quantised_rows(swapped(HalfOutput))
    assert outcomes == ['equal', *['refused'] * 5], rows
    assert 'the quantised layers compute in torch.bfloat16' in rows[3].message


@pytest.mark.parametrize('make', LIBRARIES)
def test_library(make):
    try:
        base = make()
    except ImportError as e:
        pytest.skip(str(e))
    outcomes, rows = quantised_rows(base)
    assert not set(outcomes) & set(peft_sweep.FAULTS), rows
    assert outcomes[0] == 'equal', rows
    if make.__name__ in ('torchao_int8', 'torchao_int4', 'hqq'):
        assert outcomes == ['equal'] * 6, rows


def remembered(model):
    "Return a text that a temporary adapter has learned along"
    memory = TempLoRA(chunk=6, window=16, train_context=6, r=4, alpha=4.0, lr=0.1, epochs=1)
    ids = peft_sweep.IDS[:1]
    return model.generate(ids, custom_generate=Decoder(memory=memory), **peft_sweep.OPTIONS | dict(max_new_tokens=24))


@pytest.mark.parametrize('kind', [Packed, OddKind])
def test_memory_learns_above_quantised_layers(kind):
    "Gradients pass to the adapter: the text is that of the float model with the same weights"
    model = swapped(kind)
    same = peft_sweep.toy_model(hidden_size=64, intermediate_size=128, head_dim=16)
    for path, layer in model.named_modules():
        if isinstance(layer, kind):
            same.get_submodule(path).weight.data = layer.whole() if kind is Packed else layer.bits.float()
    learned = remembered(model)
    assert torch.equal(learned, remembered(same))
    plain = model.generate(peft_sweep.IDS[:1], **peft_sweep.OPTIONS | dict(max_new_tokens=24))
    assert not torch.equal(learned, plain), 'nothing was learned, so this proves nothing'


def test_memory_is_refused_where_no_gradient_passes():
    message = sentence(lambda: remembered(swapped(RoundedInput)))
    assert message == (
        "the model is quantised, and gradients do not pass through its layers of the kind ['RoundedInput']: "
        'load it in fp32 or bf16.'
    )


def test_every_message_of_the_sweep_is_one_sentence():
    rows = peft_sweep.sweep(['LORA, aLoRA', 'IA3', 'XLORA'])
    refused = [row.message for row in rows if row.outcome == 'refused']
    assert refused and all(re.fullmatch(r'[^\n]+: [^\n]+\.', message) for message in refused)
