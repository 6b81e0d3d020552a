"An adapter on some layers only, however PEFT was asked to choose them: loaded and equal to PEFT, or refused where layers are lost"

import copy, json
import pytest, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.serving.vllm_plugin import null_adapter

BASE = toy_model()
IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
CHOICES = {
    'a suffix': dict(target_modules=['q_proj']),
    'whole names': dict(target_modules=['model.layers.1.self_attn.q_proj', 'model.layers.0.mlp.up_proj']),
    'names from the middle': dict(target_modules=['layers.1.self_attn.q_proj', 'v_proj']),
    'a number and a name': dict(target_modules=['1.mlp.down_proj']),
    'a pattern': dict(target_modules=r'.*layers\.1\.self_attn\.(q|v)_proj'),
    'a pattern of whole names': dict(target_modules=r'model\.layers\.[01]\.mlp\.(gate|up)_proj'),
    'all linear layers': dict(target_modules='all-linear'),
    'layers by number': dict(target_modules=['q_proj', 'up_proj'], layers_to_transform=[1]),
    'one layer by number': dict(target_modules=['q_proj'], layers_to_transform=0, layers_pattern='layers'),
    'but some': dict(target_modules='all-linear', exclude_modules=['down_proj', 'layers.0.self_attn.q_proj']),
    'but a pattern': dict(target_modules=['q_proj', 'k_proj'], exclude_modules=r'.*layers\.0.*'),
    'the LM head': dict(target_modules=['q_proj', 'lm_head']),
    'a rank of its own': dict(target_modules=['q_proj', 'v_proj'], rank_pattern={'layers.1.self_attn.q_proj': 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize('choice', CHOICES)
def test_equal_to_peft(choice, tmp_path):
    folder = toy_adapter(BASE, tmp_path / 'a', **CHOICES[choice])
    adapter = load_adapter(folder, BASE)
    with torch.no_grad():
        want = PeftModel.from_pretrained(copy.deepcopy(BASE), str(folder)).eval()(IDS).logits
        with AdapterBank(BASE, [adapter]).attached([0, 0]):
            got = BASE(IDS).logits
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize('choice', CHOICES)
def test_lost_layers_are_named(choice, tmp_path):
    folder = toy_adapter(BASE, tmp_path / 'a', **CHOICES[choice])
    file = folder / 'adapter_model.safetensors'
    tensors = load_file(file)
    lost = next(key for key in tensors if '.lora_A' in key and 'lm_head' not in key).partition('.lora_A')[0]
    save_file({key: x for key, x in tensors.items() if not key.startswith(lost)}, file)
    with pytest.raises(DecodingError, match=lost.removeprefix('base_model.model.') if lost else None):
        load_adapter(folder, BASE)


@pytest.mark.parametrize('targets', [3, [1], ['('], '(', {'a': 1}])
def test_targets_that_cannot_be_read(targets, tmp_path):
    folder = toy_adapter(BASE, tmp_path / 'a', target_modules=['q_proj'])
    file = folder / 'adapter_config.json'
    config = json.loads(file.read_text()) | dict(target_modules=targets)
    file.write_text(json.dumps(config), encoding='utf-8-sig')
    if targets == ['(']:  # a name that no layer has
        load_adapter(folder, BASE)
        return
    with pytest.raises(DecodingError, match='target_modules'):
        load_adapter(folder, BASE)


@pytest.mark.parametrize('choice', CHOICES)
def test_every_adapter_has_one_of_zeros(choice, tmp_path):
    folder = toy_adapter(BASE, tmp_path / 'a', **CHOICES[choice])
    zeros = null_adapter(folder, tmp_path / 'null')
    tensors = load_file(zeros / 'adapter_model.safetensors')
    assert tensors and all('.lora_' in key for key in tensors)
    assert not any(x.any() for key, x in tensors.items() if '.lora_B.' in key)
    with torch.no_grad():
        null = PeftModel.from_pretrained(copy.deepcopy(BASE), str(zeros)).eval()
        torch.testing.assert_close(null(IDS).logits, BASE(IDS).logits)


@pytest.mark.parametrize('given', [5, None, 'x' * 5000, 'a\0b', {}])
def test_what_cannot_be_a_folder(given):
    with pytest.raises(DecodingError, match='the adapter is'):
        load_adapter(given, BASE)
