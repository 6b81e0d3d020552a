"Heads with fused features for serving engines: the files are read as the engine does, and what it cannot serve is refused"

import json
import pytest, torch
from safetensors.torch import load_file, save_file
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.hass.fused_checkpoint import load_any_head, save_fused_head
from npu_lora_decoding.serving import head_export
from npu_lora_decoding.serving.head_export import ENGINES, check_fused_export, export_head, serve_command
from helpers.fused import FLAGS, Reference, random_fused
from helpers.toys import toy_lm


@pytest.fixture(scope='module')
def lm():
    return toy_lm(num_hidden_layers=6)


def saved(tmp_path, lm, **form):
    head = random_fused(lm.model, **form)
    return head, save_fused_head(head, tmp_path / 'head', lm.model)


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize(
    'form', [{}, *({name: True} for name in FLAGS), dict(w=None), dict(width=48), dict(layers=(2, 4))], ids=str
)
def test_every_form(tmp_path, lm, form, engine):
    head, folder = saved(tmp_path, lm, **form)
    unknown = [name for name in ('norm_before_residual', 'norm_before_fc') if name in form and engine == 'sglang']
    if unknown:
        with pytest.raises(
            DecodingError, match=f"has {unknown[0]}, which SGLang does not know: export for the engine 'vllm'"
        ):
            export_head(folder, tmp_path / 'out', lm, engine)
        assert not (tmp_path / 'out').exists()
        return
    found = export_head(folder, tmp_path / 'out', lm, engine)
    assert found['error'] < 1e-5 and found['tolerance'] == 1e-4  # nothing was rounded
    again = load_any_head(tmp_path / 'out', lm.model)
    assert again.fusion == head.fusion
    for name, x in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)
    ids = torch.tensor([5, 17, 40, 8, 11])
    here, there = (Reference(path, lm.model).chain(ids, 4) for path in (folder, tmp_path / 'out'))
    assert here[0] == there[0]


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize(
    'form, why',
    [
        (dict(family='qwen3'), 'no place in the Llama layer'),
        (dict(layers=(0, 3)), 'captures what 1 to 5 read'),
        (dict(layers=(3, 6)), 'captures what 1 to 5 read'),
    ],
    ids=str,
)
def test_what_no_engine_serves(tmp_path, lm, form, why, engine):
    _, folder = saved(tmp_path, lm, **form)
    with pytest.raises(DecodingError, match=why):
        export_head(folder, tmp_path / 'out', lm, engine)


def test_embeddings_that_sglang_would_replace(tmp_path, lm):
    head, folder = saved(tmp_path, lm)
    tensors = load_file(folder / 'model.safetensors') | {'embed_tokens.weight': torch.randn(97, 32)}
    named = json.loads((folder / 'config.json').read_text()) | dict(embed_requires_grad=True)
    (folder / 'config.json').write_text(json.dumps(named))
    save_file(tensors, folder / 'model.safetensors')
    assert export_head(folder, tmp_path / 'out', lm, 'vllm')['error'] < 1e-5
    with pytest.raises(DecodingError, match='embeddings of its own, which SGLang replaces'):
        export_head(folder, tmp_path / 'sg', lm, 'sglang')


def test_with_an_adapter(tmp_path):
    lm = toy_lm(num_hidden_layers=6)
    lm.adapter = load_adapter(toy_adapter(lm.model, tmp_path / 'adapter'), lm.model)
    _, folder = saved(tmp_path, lm)
    assert export_head(folder, tmp_path / 'out', lm, verifier='')['error'] < 1e-5
    named = json.loads((tmp_path / 'out' / 'config.json').read_text())['speculators_config']['verifier']
    assert named['name_or_path'] is None
    line = serve_command(tmp_path / 'out', 'TARGET')
    assert line.startswith('vllm serve TARGET --speculative-config') and '"method": "eagle3"' in line


def change(folder, tensors=(), **settings):
    found = load_file(folder / 'model.safetensors') | dict(tensors)
    named = json.loads((folder / 'config.json').read_text()) | settings
    save_file(
        {k: x for k, x in found.items() if x is not None}, folder / 'model.safetensors', metadata={'format': 'pt'}
    )
    (folder / 'config.json').write_text(json.dumps({k: x for k, x in named.items() if x is not None}))


FAULTS = {
    'a tensor less': (dict(tensors={'norm.weight': None}), "lacks or adds .'norm.weight'"),
    'a tensor more': (dict(tensors={'fc.bias': torch.ones(32)}), "lacks or adds .'fc.bias'"),
    'another number': (
        dict(tensors={'norm.weight': torch.ones(32, dtype=torch.bfloat16)}),
        "norm.weight of the exported head is not",
    ),
    'other tokens': (dict(tensors=dict(d2t=torch.arange(20))), "d2t of the exported head is not"),
    'other layers': (dict(eagle_aux_hidden_state_layer_ids=[1, 2, 5]), 'fuses its target in another way'),
    'another switch': (dict(norm_output=True), 'fuses its target in another way'),
    'another layout': (
        dict(speculators_model_type=None, architectures=['LlamaForCausalLMEagle3']),
        'not in the layout speculators',
    ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_the_check_sees(tmp_path, lm, fault):
    head, folder = saved(tmp_path, lm)
    how, why = FAULTS[fault]
    export_head(folder, tmp_path / 'out', lm)
    check_fused_export(tmp_path / 'out', head, lm)
    change(tmp_path / 'out', **how)
    with pytest.raises(DecodingError, match=why):
        check_fused_export(tmp_path / 'out', head, lm)


@pytest.mark.parametrize('key, value', [('rope_theta', 77.0), ('rms_norm_eps', 0.3)])
def test_the_second_way_sees_what_no_name_shows(tmp_path, lm, key, value):
    head, folder = saved(tmp_path, lm)
    export_head(folder, tmp_path / 'out', lm)
    layer = json.loads((tmp_path / 'out' / 'config.json').read_text())['transformer_layer_config'] | {key: value}
    if key == 'rope_theta':
        layer['rope_parameters'] = dict(rope_theta=value, rope_type='default')
    change(tmp_path / 'out', transformer_layer_config=layer)
    with pytest.raises(DecodingError, match='computes states that differ by'):
        check_fused_export(tmp_path / 'out', head, lm)


def test_a_failed_check_leaves_the_earlier_export(tmp_path, lm, monkeypatch):
    head, folder = saved(tmp_path, lm)
    export_head(folder, tmp_path / 'out', lm)
    before = (tmp_path / 'out' / 'model.safetensors').read_bytes()
    monkeypatch.setattr(
        head_export, 'fused_settings', lambda *args, **kw: {**honest_settings(*args, **kw), 'norm_output': True}
    )
    with pytest.raises(DecodingError, match='fuses its target in another way'):
        export_head(folder, tmp_path / 'out', lm)
    assert (tmp_path / 'out' / 'model.safetensors').read_bytes() == before


honest_settings = head_export.fused_settings


def test_rounded_weights_have_their_tolerance(tmp_path, lm):
    head = random_fused(lm.model, round=False)
    folder = save_fused_head(head, tmp_path / 'head', lm.model, dtype=torch.float32)
    found = export_head(folder, tmp_path / 'out', lm, dtype=torch.bfloat16)
    assert 1e-5 < found['error'] < found['tolerance'] == 2**-6


def test_what_the_older_exports_have(tmp_path, lm):
    _, folder = saved(tmp_path, lm)
    with pytest.raises(DecodingError, match='scores its draft vocabulary only: leave full out'):
        export_head(folder, tmp_path / 'out', lm, full=True)
    with pytest.raises(DecodingError, match='is the folder of the head itself'):
        export_head(folder, folder, lm)
