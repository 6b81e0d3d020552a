"What a model and a way of decoding can do together: read from the model, or refused by name"

import copy
import pytest
import torch
import peft
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
from transformers import T5Config, T5ForConditionalGeneration
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding import capabilities
from npu_lora_decoding.decoding.capabilities import Request, changing_rope, other_inputs, prepares_itself, soft_prompt
from npu_lora_decoding.decoding.loop import Decoder
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup
from npu_lora_decoding.temp_lora.generation import TempLoRA

IDS = torch.tensor([[0, 0, 5, 6, 7, 5, 6], [9, 3, 4, 5, 9, 3, 4]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
OPTIONS = dict(
    input_ids=IDS, attention_mask=MASK, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
)


def lively(model, seed=1):
    "The model with random weights so large that its text does not repeat one token"
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def family(name, **sizes):
    small = dict(hidden_size=32, num_hidden_layers=2, vocab_size=97) | sizes
    return lively(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **small)))


def same_as_generate(model, decoder=None, **options):
    options = OPTIONS | options
    want = model.generate(**options)
    got = model.generate(**options, custom_generate=decoder or Decoder())
    assert torch.equal(got, want)
    assert len(set(want[:, -12:].flatten().tolist())) > 3, 'the text says too little'


def refused(model, decoder, message, **options):
    with pytest.raises(DecodingError, match=message) as e:
        model.generate(**OPTIONS | options, custom_generate=decoder)
    assert str(e.value).count('\n') == 0 and ': ' in str(e.value)


# --- Soft prompts

SOFT = dict(
    prompt_tuning=peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4),
    prefix_tuning=peft.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4),
    p_tuning=peft.PromptEncoderConfig(task_type='CAUSAL_LM', num_virtual_tokens=4, encoder_hidden_size=16),
)


@pytest.fixture(params=SOFT)
def soft(request):
    model = peft.get_peft_model(toy_model(), SOFT[request.param])
    torch.manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    return model.eval()


def test_a_soft_prompt_is_read(soft):
    bare = toy_model().generate(**OPTIONS)
    assert not torch.equal(soft.generate(**OPTIONS), bare)
    same_as_generate(soft)


def test_a_soft_prompt_takes_no_drafts_and_no_contrast(soft):
    refused(soft, Decoder(drafter=PromptLookup()), 'has a soft prompt .*: leave the drafter out')
    refused(soft, Decoder(CoLD()), r'has a soft prompt .*: decode with Plain\(\)')
    refused(soft, Decoder(compile=True), 'has a soft prompt .*: give compile=False')


def test_lora_of_peft_is_not_a_soft_prompt():
    model = peft.get_peft_model(toy_model(), peft.LoraConfig(task_type='CAUSAL_LM', target_modules=['q_proj']))
    found = []

    def look(inner, input_ids, **_):
        found.append(soft_prompt(inner))
        return input_ids

    model.generate(**OPTIONS, custom_generate=look)
    assert found == [None]


# --- Models without a KV cache, and encoder-decoders


def test_a_recurrent_model_decodes_plainly():
    model = family('mamba', state_size=8)
    same_as_generate(model, input_ids=IDS[1:], attention_mask=MASK[1:])
    refused(model, Decoder(drafter=PromptLookup()), 'mamba has no KV cache: leave the drafter out')
    refused(model, Decoder(bank=AdapterBank(model, [])), 'no KV cache: call generate on a PeftModel')


def test_an_encoder_decoder_decodes_plainly():
    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = lively(T5ForConditionalGeneration(T5Config(vocab_size=97, decoder_start_token_id=0, **sizes)))
    same_as_generate(model)
    same_as_generate(model, do_sample=False, repetition_penalty=1.5)
    refused(model, Decoder(drafter=PromptLookup()), 't5 is an encoder-decoder')


def test_sampling_of_such_a_model_is_that_of_transformers():
    model = family('mamba', state_size=8)
    options = OPTIONS | dict(do_sample=True, temperature=1.2, top_p=0.9)
    torch.manual_seed(3)
    want = model.generate(**options)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**options, custom_generate=Decoder()), want)


# --- What generate hands over


def test_positions_of_ones_own_are_kept():
    model = toy_model()
    positions = torch.arange(7).expand(2, 7) * 3 % 11
    same_as_generate(model, position_ids=positions)
    assert not torch.equal(model.generate(**OPTIONS, position_ids=positions), model.generate(**OPTIONS))
    refused(
        model,
        Decoder(drafter=PromptLookup()),
        'more than token ids and their mask: position_ids',
        position_ids=positions,
    )


def test_prompts_that_end_in_padding_have_the_model_s_own_positions():
    right = dict(input_ids=IDS.flip(-1), attention_mask=MASK.flip(-1))
    same_as_generate(toy_model(), **right)
    refused(toy_model(), Decoder(drafter=PromptLookup()), 'a prompt ends in padding.*: leave the drafter out', **right)


def test_caches_of_another_kind_are_kept():
    model = toy_model()
    same_as_generate(model, cache_implementation='static')
    refused(model, Decoder(drafter=PromptLookup()), 'a StaticCache', cache_implementation='static')


def test_what_counts_as_another_input():
    ones = torch.ones(2, 3, dtype=torch.long)
    assert other_inputs(dict(attention_mask=ones, position_ids=torch.arange(3).expand(2, 3), use_cache=True)) == []
    assert other_inputs(dict(mm_encoder_outputs={}, pixel_values=None, output_router_logits=False)) == []
    assert other_inputs(dict(pixel_values=ones, token_type_ids=ones)) == ['pixel_values', 'token_type_ids']
    assert other_inputs(dict(attention_mask=ones[:, None, None])) == ['an attention mask of 4 dimensions']
    assert other_inputs(dict(position_ids=ones)) == ['position_ids']
    assert other_inputs(dict(position_ids=ones[None].expand(3, 2, 3))) == ['position_ids']
    cache = StaticCache(config=toy_model().config, max_cache_len=8)
    assert other_inputs(dict(past_key_values=cache)) == ['a StaticCache']


# --- Rotary embeddings

LONG = dict(rope_type='longrope', rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)


def phi3():
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, pad_token_id=0)
    return family('phi3', original_max_position_embeddings=32, rope_parameters=LONG, **sizes)


def test_longrope_is_ordinary_up_to_its_first_context():
    model = phi3()
    same_as_generate(model, max_new_tokens=40)
    same_as_generate(model, Decoder(drafter=PromptLookup()), max_new_tokens=12)
    refused(model, Decoder(drafter=PromptLookup()), 'longrope beyond 32 tokens', max_new_tokens=40)


def test_dynamic_rope_beyond_its_context_takes_no_drafts():
    rope = dict(rope_type='dynamic', rope_theta=1e4, factor=4.0)
    model = lively(toy_model(rope_parameters=rope, max_position_embeddings=16))
    same_as_generate(model, max_new_tokens=20)
    refused(model, Decoder(drafter=PromptLookup()), 'dynamic beyond 16 tokens', max_new_tokens=20)


def test_fixed_ropes_never_change():
    for kind in ('default', 'linear', 'llama3', 'yarn'):
        config = copy.deepcopy(toy_model().config)
        config.rope_parameters = dict(rope_type=kind, factor=2.0, original_max_position_embeddings=16)
        assert changing_rope(config, 10**6) is None
    config.rope_parameters = dict(full_attention=dict(rope_type='default'), sliding_attention=dict(rope_type='new'))
    assert changing_rope(config, 10**6).startswith('new beyond')


# --- Families


def test_a_class_with_its_own_forward_is_unknown():
    class Own(type(toy_model())):
        def forward(self, input_ids=None, past_key_values=None, **kwargs):
            return super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)

    model = Own(toy_model().config).eval()
    same_as_generate(lively(model))
    refused(
        model,
        Decoder(drafter=PromptLookup()),
        "Own has a forward of its own, unlike its family llama: leave the drafter out",
    )


def test_a_class_without_one_is_known():
    class Same(type(toy_model())):
        "Other methods, the same forward"

    same_as_generate(lively(Same(toy_model().config).eval()), Decoder(drafter=PromptLookup()))


def test_a_family_that_was_not_tried_is_refused_for_drafts(monkeypatch):
    monkeypatch.setattr(capabilities, 'FORWARD_FAMILIES', ())
    model = toy_model()
    same_as_generate(model)
    refused(model, Decoder(drafter=PromptLookup()), 'the family llama is not among those')
    refused(model, Decoder(CoLD(), PromptLookup()), r'decode with Plain\(\) and leave the drafter out')
    refused(model, Decoder(memory=TempLoRA()), 'leave the memory out', input_ids=IDS[1:], attention_mask=MASK[1:])


def test_each_part_has_its_own_list(monkeypatch):
    model = toy_model()
    for name, asked in ('TREE_FAMILIES', Request(drafts=True)), ('STATIC_FAMILIES', Request(compiled=True)):
        assert not prepares_itself(model, {}, 100, asked)
        with monkeypatch.context() as m:
            m.setattr(capabilities, name, ())
            with pytest.raises(DecodingError, match='for the family llama'):
                prepares_itself(model, {}, 100, asked)
            assert not prepares_itself(model, {}, 100, Request(contrast=True))


def test_lists_lie_within_each_other():
    families = set(capabilities.FORWARD_FAMILIES)
    assert families >= set(capabilities.TREE_FAMILIES) and families >= set(capabilities.STATIC_FAMILIES)
    assert {'llama', 'qwen2', 'qwen3', 'mistral', 'gemma2', 'gemma3_text', 'phi3'} <= set(capabilities.TREE_FAMILIES)


def test_kinds_of_layers_that_a_family_does_not_read_take_no_drafts():
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, sliding_window=6)
    model = family('mistral', layer_types=['full_attention'] * 2, **sizes)
    same_as_generate(model)
    refused(model, Decoder(drafter=PromptLookup()), 'mistral does not read the layer_types of its configuration')
    same_as_generate(family('mistral', **sizes), Decoder(drafter=PromptLookup()))


# --- Code of other people


def test_inputs_prepared_by_a_class_of_ones_own():
    class Shifted(type(toy_model())):
        def _update_model_kwargs_for_generation(self, outputs, inputs, **options):
            inputs = super()._update_model_kwargs_for_generation(outputs, inputs, **options)
            return inputs | dict(position_ids=inputs['position_ids'] + 1)

    model = lively(Shifted(toy_model().config).eval())
    bare = lively(toy_model())
    assert not torch.equal(model.generate(**OPTIONS), bare.generate(**OPTIONS))
    same_as_generate(model)
    refused(model, Decoder(drafter=PromptLookup()), 'Shifted prepares its inputs in a way of its own')
    prepare = bare.prepare_inputs_for_generation

    def counted(input_ids, **kwargs):
        return prepare(input_ids, **kwargs)

    bare.prepare_inputs_for_generation = counted
    refused(bare, Decoder(drafter=PromptLookup()), 'prepares its inputs in a way of its own')


def last_only(module, inputs, output):
    "A steering vector for the last token"
    state = (output[0] if isinstance(output, tuple) else output).clone()
    state[:, -1] += 0.8
    return (state, *output[1:]) if isinstance(output, tuple) else state


def hooked(model):
    model.model.layers[0].register_forward_hook(last_only)


def replaced(model):
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda state, *given, **named: last_only(layer, None, forward(state, *given, **named))


class Mixing(torch.nn.Module):
    def __init__(self, below):
        super().__init__()
        self.below = below

    def forward(self, x):
        return last_only(self, None, self.below(x))


def exchanged(model):
    model.model.layers[0].mlp = Mixing(model.model.layers[0].mlp)


@pytest.mark.parametrize('change', [hooked, replaced, exchanged])
def test_layers_that_may_read_other_tokens_take_no_drafts(change):
    model = lively(toy_model())
    before = model.generate(**OPTIONS)
    change(model)
    assert not torch.equal(model.generate(**OPTIONS), before)
    same_as_generate(model)
    refused(
        model, Decoder(drafter=PromptLookup()), 'model.layers.0.* has a forward or a hook .*: leave the drafter out'
    )


def test_a_hook_that_vouches_for_itself_takes_drafts():
    model = lively(toy_model())

    def everywhere(module, inputs, output):
        return output + 0.8

    model.model.layers[0].mlp.register_forward_hook(everywhere)
    refused(model, Decoder(drafter=PromptLookup()), 'its attribute token_wise can deny it')
    everywhere.token_wise = True
    same_as_generate(model, Decoder(drafter=PromptLookup(adaptive=False)))


def test_a_replaced_forward_is_the_model_s_own():
    model = lively(toy_model())
    forward = model.forward

    def first_only(*given, **named):
        out = forward(*given, **named)
        if out.logits.shape[1] == 1:
            out.logits = out.logits.roll(1, -1)
        return out

    model.forward = first_only
    same_as_generate(model)
    refused(model, Decoder(drafter=PromptLookup()), 'has a forward of its own')


def test_attention_of_ones_own_is_not_compiled():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def cool(module, query, *given, **named):
        return sdpa_attention_forward(module, query * 2, *given, **named)

    AttentionInterface.register('cool', cool)
    AttentionMaskInterface.register('cool', ALL_MASK_ATTENTION_FUNCTIONS['sdpa'])
    model = lively(toy_model())
    model.set_attn_implementation('cool')
    same_as_generate(model)
    refused(model, Decoder(compile=True), "attention of the kind 'cool': give compile=False")
