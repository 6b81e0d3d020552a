"What an adapter's configuration and the keys of its file may hold: a list of what is known, and all else refused by name"

import copy
import json
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config
from npu_lora_decoding.foundations.adapters import check_config, load_adapter, plain_key, toy_adapter, toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.lora import AdapterBank

PLAIN = dict(peft_type='LORA', r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj'])


def sentence(call):
    with pytest.raises(DecodingError) as e:
        call()
    assert '\n' not in str(e.value) and ': ' in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    'field,value,remedy',
    [
        ('lora_bias', True, 'lora_bias=False'),
        ('use_dora', True, 'use_dora=False'),
        ('alora_invocation_tokens', [5], 'alora_invocation_tokens=None'),
        ('target_parameters', ['mlp.experts.gate_up_proj'], 'target_parameters=None'),
        ('layer_replication', [[0, 2]], 'layer_replication=None'),
        ('use_qalora', True, 'use_qalora=False'),
        ('use_bdlora', dict(nblocks=2), 'use_bdlora=None'),
        ('arrow_config', dict(top_k=2), 'arrow_config=None'),
        ('kasa_config', dict(beta=1), 'kasa_config=None'),
        ('monteclora_config', dict(n=2), 'monteclora_config=None'),
        ('megatron_config', dict(tensor_model_parallel_size=2), 'megatron_config=None'),
        ('ensure_weight_tying', True, 'ensure_weight_tying=False'),
        ('modules_to_save', ['lm_head'], 'modules_to_save=None'),
        ('trainable_token_indices', [3], 'trainable_token_indices=None'),
        ('bias', 'all', "bias='none'"),
        ('a_field_of_tomorrow', 2, 'a_field_of_tomorrow'),
        ('a_field_of_tomorrow', 0, 'a_field_of_tomorrow'),
        ('a_field_of_tomorrow', True, 'a_field_of_tomorrow'),
        ('a_field_of_tomorrow', dict(gate=True), 'a_field_of_tomorrow'),
        ('init_lora_weights', 'an_init_of_tomorrow', 'path_initial_model_for_weight_conversion'),
        ('init_lora_weights', 'pissa_niter_16', 'path_initial_model_for_weight_conversion'),
    ],
)
def test_field_that_changes_what_is_computed(field, value, remedy):
    assert remedy in sentence(lambda: check_config(PLAIN | {field: value}))


@pytest.mark.parametrize('value', [None, False, '', [], {}])
def test_field_that_is_not_known_and_asks_for_nothing(value):
    check_config(PLAIN | dict(a_field_of_tomorrow=value))


@pytest.mark.parametrize(
    'fields',
    [
        dict(qalora_group_size=16, megatron_core='megatron.core', peft_version='9.9', runtime_config=None),
        dict(lora_dropout=0.1, fan_in_fan_out=True, layers_to_transform=[0], layers_pattern='layers', revision='main'),
        dict(init_lora_weights='gaussian', velora_config=dict(num_groups=4), eva_config=dict(rho=2.0)),
        dict(loftq_config=dict(loftq_bits=4), enable_lora=None, merge_weights=False),
    ],
)
def test_field_that_changes_nothing_of_what_is_computed(fields):
    check_config(PLAIN | fields)


def test_every_field_of_the_installed_peft_is_known_at_its_default():
    check_config(LoraConfig(r=4, target_modules=['q_proj']).to_dict() | dict(peft_type='LORA'))


def test_default_of_a_newer_peft_asks_for_nothing(monkeypatch):
    "A field that is not in our list, with the default that the installed PEFT names"
    from dataclasses import field

    newer = field(default='soft')
    monkeypatch.setitem(LoraConfig.__dataclass_fields__, 'gating', newer)
    check_config(PLAIN | dict(gating='soft'))
    assert 'gating' in sentence(lambda: check_config(PLAIN | dict(gating='hard')))


# --- Keys


@pytest.fixture(scope='module')
def base():
    return toy_model()


@pytest.fixture
def folder(base, tmp_path):
    return toy_adapter(base, tmp_path / 'a', target_modules=['q_proj', 'v_proj'])


def rename(folder, name, extra=None):
    file = folder / 'adapter_model.safetensors'
    tensors = {name(key): x for key, x in load_file(file).items()} | (extra or {})
    save_file(tensors, file, {'format': 'pt'})


@pytest.mark.parametrize(
    'name',
    [
        lambda k: k.replace('.weight', '.default.weight'),
        lambda k: k.replace('.weight', '.my_adapter.weight'),
        lambda k: k.replace('base_model.model.', 'base_model.model._orig_mod.'),
        lambda k: f'_orig_mod.{k}',
        lambda k: k.replace('self_attn.', '_orig_mod.self_attn.'),
        lambda k: f'module.{k}',
        lambda k: f'module._orig_mod.{k}'.replace('.weight', '.default.weight'),
        lambda k: f'_fsdp_wrapped_module.{k}'.replace('layers.0.', 'layers.0._fsdp_wrapped_module.'),
        lambda k: k.removeprefix('base_model.model.'),
    ],
    ids=['default', 'named', 'compiled base', 'compiled', 'compiled block', 'DDP', 'all', 'FSDP', 'no prefix'],
)
def test_names_of_wrappers(base, folder, name):
    before = load_adapter(folder, base)
    rename(folder, name)
    after = load_adapter(folder, base)
    assert before.layers.keys() == after.layers.keys()
    for path, w in before.layers.items():
        assert torch.equal(w.A, after.layers[path].A) and torch.equal(w.B, after.layers[path].B)
        assert w.scale == after.layers[path].scale


def test_peft_reads_the_key_that_has_its_adapters_name(base, folder):
    "So we have to"
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(ids).logits
        rename(folder, lambda k: k.replace('.weight', '.default.weight'))
        after = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(ids).logits
        with AdapterBank(base, [load_adapter(folder, base)]).attached([0]):
            ours = base(ids).logits
    assert torch.equal(before, after)
    torch.testing.assert_close(ours, before, rtol=1e-4, atol=1e-4)


def test_two_adapters_in_one_file(base, folder):
    other = {
        k.replace('.weight', '.second.weight'): x for k, x in load_file(folder / 'adapter_model.safetensors').items()
    }
    rename(folder, lambda k: k.replace('.weight', '.default.weight'), other)
    message = sentence(lambda: load_adapter(folder, base))
    assert message.startswith("the file holds several adapters, called 'default', 'second': ")


def test_two_keys_for_one_matrix(base, folder):
    rename(
        folder, lambda k: k, {f'_orig_mod.{k}': x for k, x in load_file(folder / 'adapter_model.safetensors').items()}
    )
    assert 'which mean one matrix' in sentence(lambda: load_adapter(folder, base))


@pytest.mark.parametrize('key', ['lora_A.default', 'lora_magnitude_vector.weight', 'modules_to_save.weight', 'x'])
def test_key_that_is_not_a_matrix_is_named(base, folder, key):
    rename(folder, lambda k: k, {f'base_model.model.model.layers.0.self_attn.q_proj.{key}': torch.ones(2)})
    assert key in sentence(lambda: load_adapter(folder, base))


def test_plain_key_leaves_names_of_the_model_alone():
    key = 'base_model.model.model.layers.0.module.lora_A.weight'
    assert plain_key(key) == key


def test_layer_that_stores_its_weight_turned(tmp_path):
    "GPT-2's linear layers are Conv1D: inputs first"
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    folder = toy_adapter(model, tmp_path / 'a', target_modules=['c_attn', 'c_proj'], fan_in_fan_out=True)
    assert json.loads((folder / 'adapter_config.json').read_text())['fan_in_fan_out']
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        want = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()(ids).logits
        with AdapterBank(model, [load_adapter(folder, model)]).attached([0]):
            ours = model(ids).logits
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)
