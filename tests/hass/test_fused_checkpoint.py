"Files of heads with fused features: nothing is lost, what others write is read, and each fault is refused by name"

import json, shutil
import pytest, torch
from safetensors.torch import load_file, save_file
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.hass.checkpoint import load_head, save_head
from npu_lora_decoding.hass.fused_checkpoint import (
    LAYOUTS,
    fused_layout,
    is_fused,
    load_any_head,
    load_fused_head,
    save_fused_head,
    vocab_of,
    vocab_tensors,
)
from npu_lora_decoding.hass.fused_head import Fusion
from npu_lora_decoding.hass.head import DraftHead, head_config, target_weights
from helpers.fused import FLAGS, random_fused

IDS = 'eagle_aux_hidden_state_layer_ids'


@pytest.fixture(scope='module')
def target():
    return toy_model(num_hidden_layers=6)


@pytest.fixture
def folder(target, tmp_path):
    "A folder of each layout"
    head = random_fused(target, fc_norm=True)
    for layout in LAYOUTS:
        save_fused_head(head, tmp_path / layout, target, layout)
    return tmp_path


def changed(folder, layout='speculators', settings={}, layer={}, verifier={}, meta=None, **tensors):
    "The folder as somebody else would write it, with keys or tensors changed (None: left out) and no fingerprint"
    named = json.loads((folder / layout / 'config.json').read_text()) | settings
    if layout == 'speculators':
        named['transformer_layer_config'] = kept(named['transformer_layer_config'] | layer)
        named['speculators_config']['verifier'] |= verifier
    else:
        named |= layer
    found = load_file(folder / layout / 'model.safetensors') | tensors
    out = folder / 'changed'
    out.mkdir()
    (out / 'config.json').write_text(json.dumps(kept(named)))
    save_file(kept(found), out / 'model.safetensors', metadata=meta or dict(format='pt'))
    return out


def kept(x):
    return {key: value for key, value in x.items() if value is not None}


def same(a, b):
    a, b = (x.state_dict() for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- nothing is lost


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    'form',
    [*({name: True} for name in FLAGS), {}, dict(w=None), dict(width=48), dict(layers=(2, 6)), dict(family='qwen3')],
    ids=str,
)
def test_round_trip(target, tmp_path, form, dtype, layout):
    head = random_fused(target, round=dtype != torch.float32, **form)
    again = load_any_head(save_fused_head(head, tmp_path / 'head', target, layout, dtype), target)
    tolerance = dict(rtol=2**-10, atol=1e-4) if dtype == torch.float16 else dict(rtol=0, atol=0)
    for name, x in head.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], x, **tolerance)
    assert (
        again.fusion == head.fusion and again.reads == head.reads and again.config.model_type == head.config.model_type
    )
    assert (again.vocab is None) == (head.vocab is None) and (
        head.vocab is None or torch.equal(again.vocab, head.vocab)
    )
    assert not again.training and again.config.rope_parameters == head.config.rope_parameters


def test_saved_again_it_is_the_same_file(target, folder):
    for layout in LAYOUTS:
        head = load_any_head(folder / layout, target)
        save_fused_head(head, folder / 'again', target, layout)
        for name in ('config.json', 'model.safetensors'):
            assert (folder / 'again' / name).read_bytes() == (folder / layout / name).read_bytes()


def test_from_one_layout_to_the_other(target, folder):
    heads = [load_any_head(folder / layout, target) for layout in LAYOUTS]
    assert same(*heads) and heads[0].fusion == heads[1].fusion


def test_the_callers_random_numbers_do_not_move(target, folder):
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    load_any_head(folder / 'eagle3', target)
    assert torch.equal(torch.rand(1), want)


def test_a_folder_of_its_own(target, folder):
    (folder / 'mine').mkdir()
    (folder / 'mine' / 'thesis.txt').write_text('years of work')
    with pytest.raises(DecodingError, match='thesis.txt.*save the head into a folder of its own'):
        save_fused_head(random_fused(target), folder / 'mine', target)
    assert [f.name for f in (folder / 'mine').iterdir()] == ['thesis.txt']


def test_an_earlier_head_stays_where_the_new_one_is_not_finite(target, folder):
    before = (folder / 'eagle3' / 'model.safetensors').read_bytes()
    head = random_fused(target)
    head.norm.weight[3] = torch.inf
    with pytest.raises(DecodingError, match='norm.weight is not finite'):
        save_fused_head(head, folder / 'eagle3', target, 'eagle3')
    assert (folder / 'eagle3' / 'model.safetensors').read_bytes() == before
    with pytest.raises(DecodingError, match="unknown layout 'medusa': use one of speculators, eagle3"):
        save_fused_head(random_fused(target), folder / 'x', target, 'medusa')
    assert not (folder / 'x').exists()


# --- what others write


@pytest.mark.parametrize('layout', LAYOUTS)
def test_embeddings_of_the_target(target, folder, layout):
    embed = target_weights(target).embed.bfloat16()
    out = changed(folder, layout, **{'embed_tokens.weight': embed})
    assert same(load_any_head(out, target), load_any_head(folder / layout, target))
    save_fused_head(load_any_head(out, target), folder / 'again', target, layout, embed=True)
    assert torch.equal(load_file(folder / 'again' / 'model.safetensors')['embed_tokens.weight'], embed)


def test_embeddings_of_its_own(target, folder):
    x = torch.randn(97, 32)
    head = load_any_head(changed(folder, settings=dict(embed_requires_grad=True), **{'embed_tokens.weight': x}), target)
    assert head.fusion.own_embedding and torch.equal(head.embed_tokens.weight, x)


def test_layer_numbers_of_sglang(target, folder):
    out = changed(folder, 'eagle3', {IDS: None, 'eagle_config': {IDS: [0, 2, 4]}})
    assert load_any_head(out, target).reads == (1, 3, 5)


def test_default_layers(tmp_path):
    model = toy_model(num_hidden_layers=8)
    save_fused_head(random_fused(model, layers=(2, 4, 5)), tmp_path / 'eagle3', model, 'eagle3')
    out = changed(tmp_path, 'eagle3', {IDS: None, 'eagle_config': None})
    assert load_any_head(out, model).reads == (2, 4, 5)


def test_old_names_of_the_norms(target, folder):
    tensors = load_file(folder / 'eagle3' / 'model.safetensors')
    moved = {f'fc_norm.{i}.weight': None for i in range(3)}
    for i, name in enumerate(('low', 'mid', 'high')):
        moved[f'aux_norm_{name}.weight'] = tensors[f'fc_norm.{i}.weight']
    out = changed(folder, 'eagle3', dict(fc_norm=None, use_aux_norm=True), **moved)
    assert same(load_any_head(out, target), load_any_head(folder / 'eagle3', target))


def test_several_files(target, folder):
    tensors = load_file(folder / 'speculators' / 'model.safetensors')
    names = sorted(tensors)
    (folder / 'speculators' / 'model.safetensors').unlink()
    where = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f'model-{i}.safetensors'
        save_file({name: tensors[name] for name in part}, folder / 'speculators' / file, metadata=dict(format='pt'))
        where |= dict.fromkeys(part, file)
    (folder / 'speculators' / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=where)))
    assert same(load_any_head(folder / 'speculators', target), load_any_head(folder / 'eagle3', target))


def test_few_keys_as_published(target, folder):
    "`rope_theta` at the top, no `head_dim`, the vocabulary's size under its old name"
    layer = dict(rope_parameters=None, rope_scaling=None, head_dim=None, bos_token_id=None)
    plain = dict(norm_before_residual=None, norm_before_fc=None, norm_output=None, dtype=None, embed_requires_grad=None)
    out = changed(folder, 'eagle3', plain, layer)
    assert same(load_any_head(out, target), load_any_head(folder / 'eagle3', target))


@pytest.mark.parametrize('name', ['org/toy', '/somewhere/else/toy/', '/hub/models--org--Toy/snapshots/0123', None])
def test_the_same_verifier_under_another_name(folder, name):
    model = toy_model(num_hidden_layers=6)
    model.config._name_or_path = '/data/toy'
    load_any_head(changed(folder, verifier=dict(name_or_path=name)), model)


def test_heads_of_the_last_state_are_read_as_before(target, tmp_path):
    head = DraftHead(head_config(target.config)).requires_grad_(False)
    save_head(head, tmp_path / 'head', target, torch.float32)
    assert not is_fused(tmp_path / 'head') and same(load_any_head(tmp_path / 'head', target), head)
    with pytest.raises(DecodingError, match='does not fuse several layers'):
        load_fused_head(tmp_path / 'head', target)
    shutil.rmtree(tmp_path / 'head')
    with pytest.raises(DecodingError, match='there is no folder'):
        load_any_head(tmp_path / 'head', target)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_other_reader_names_the_layout(target, folder, layout):
    with pytest.raises(DecodingError, match='is an EAGLE-3 head'):
        load_head(folder / layout, target)


def test_layouts():
    assert fused_layout(dict(speculators_model_type='eagle3'), ()) == 'speculators'
    assert fused_layout(dict(architectures=['Eagle3LlamaForCausalLM']), ()) == 'eagle3'
    assert fused_layout(dict(architectures=['LlamaForCausalLM']), ('midlayer.mlp.up_proj.weight',)) == 'eagle3'
    assert fused_layout(dict(architectures=['LlamaForCausalLM']), ('d2t',)) == 'eagle3'
    for architectures in (['LlamaForCausalLMEagle'], None, 'eagle3'):
        assert fused_layout(dict(architectures=architectures), ('fc.weight', 'layers.0.mlp.up_proj.weight')) is None


# --- what is refused

ONES = torch.ones(32)
FAULTS = {
    'no d2t': (dict(d2t=None), 'lacks the tensor d2t'),
    'no t2d': (dict(t2d=None), 'lacks the tensor t2d'),
    'neither': (dict(d2t=None, t2d=None), 'lacks the tensor d2t and t2d'),
    'd2t of floats': (dict(d2t=torch.zeros(20)), 'd2t of the head in .* is torch.float32'),
    'short d2t': (dict(d2t=torch.zeros(19, dtype=torch.long)), r'd2t of the head in .* shape \(19,\), not 20'),
    't2d of numbers': (dict(t2d=torch.ones(97, dtype=torch.long)), 't2d of the head in .* is torch.int64'),
    'short t2d': (dict(t2d=torch.ones(20, dtype=torch.bool)), r't2d of the head in .* shape \(20,\), not 97'),
    'd2t of tokens': (dict(d2t=torch.arange(20) + 30), 'name different tokens.*d2t holds distances'),
    'one token twice': (dict(d2t=-torch.arange(20)), 'name different tokens'),
    'tokens beyond the end': (dict(d2t=torch.full((20,), 90)), 'name different tokens'),
    'every token marked': (dict(t2d=torch.ones(97, dtype=torch.bool)), 'name different tokens'),
    'a vocabulary of another size': (
        dict(settings=dict(draft_vocab_size=19)),
        r'is \(20,\)|not 19 integers|\(19, 32\)',
    ),
    'a vocabulary of nothing': (
        dict(settings=dict(draft_vocab_size=0)),
        'lacks the tensor|drafts among|d2t of the head',
    ),
    'a vocabulary of text': (dict(settings=dict(draft_vocab_size='20')), "drafts among '20' tokens of 97"),
    'layers beyond the target': (
        dict(settings={IDS: [1, 3, 7]}),
        r'reads the layers \[1, 3, 7\] of a target of 6 layers',
    ),
    'layers out of order': (dict(settings={IDS: [3, 1, 5]}), r'reads the layers \[3, 1, 5\]'),
    'a layer twice': (dict(settings={IDS: [3, 3, 5]}), r'reads the layers \[3, 3, 5\]'),
    'two layers': (dict(settings={IDS: [1, 3]}), 'reads the layers .1, 3., 64 numbers, but its fc 96'),
    'layers of text': (dict(settings={IDS: 'low, middle, high'}), f'says {IDS}'),
    'layers of true': (dict(settings={IDS: [True, 3, 5]}), f'says {IDS}'),
    'default layers of a shallow target': (dict(settings={IDS: None}), 'a target of 6 layers has no low'),
    'two layers in the head': (dict(layer=dict(num_hidden_layers=2)), 'has 2 layers: give a head of one layer'),
    'no width': (dict(layer=dict(hidden_size=None)), 'does not give hidden_size'),
    'another width': (dict(layer=dict(hidden_size=64)), 'is 64 wide, the target 32'),
    'states of another width': (dict(settings=dict(target_hidden_size=64)), 'states that are 64 wide but the target'),
    'another vocabulary': (dict(layer=dict(vocab_size=96)), 'knows 96 tokens but the target 97'),
    'another family': (dict(layer=dict(model_type='gemma2')), "is of the family 'gemma2'"),
    'a window': (
        dict(layer=dict(layer_types=['sliding_attention'])),
        "has .'sliding_attention'.: give a head whose layer",
    ),
    'quantised': (dict(settings=dict(quantization_config=dict(bits=4))), 'is quantised'),
    'a quantised layer': (dict(layer=dict(quantization_config=dict(bits=4))), 'is quantised'),
    'the last state only': (
        dict(settings=dict(eagle_config=dict(use_aux_hidden_state=False))),
        'reads the last state only',
    ),
    'both norms': (dict(settings=dict(norm_before_fc=True)), 'norm_before_fc and fc_norm'),
    'a switch of text': (dict(settings=dict(norm_output='false')), "says norm_output: 'false': write true or false"),
    'a norm that is left out': (dict(settings=dict(fc_norm=False)), 'has the tensor fc_norm.0.weight'),
    'a norm that is not there': (
        dict(settings=dict(fc_norm=False, norm_before_fc=True)),
        'lacks the tensor input_norm.weight',
    ),
    'a tensor more': (dict(**{'verifier_norm.weight': ONES}), 'has the tensor verifier_norm.weight'),
    'a bias of fc': (dict(**{'fc.bias': ONES}), 'has the tensor fc.bias'),
    'no norm': (dict(**{'norm.weight': None}), 'lacks the tensor norm.weight'),
    'no LM head': (dict(**{'lm_head.weight': None}), 'lacks the tensor lm_head.weight'),
    'not finite': (dict(**{'norm.weight': torch.full((32,), torch.nan)}), 'norm.weight .* is not finite'),
    'packed numbers': (dict(**{'norm.weight': torch.ones(32, dtype=torch.int8)}), 'norm.weight .* is not finite'),
    'another shape': (dict(**{'norm.weight': torch.ones(31)}), r'norm.weight .* is \(31,\), not \(32,\)'),
    'other embeddings': (dict(**{'embed_tokens.weight': torch.ones(97, 32)}), 'its embeddings are not the target'),
    'embeddings of another shape': (
        dict(**{'embed_tokens.weight': torch.ones(96, 32)}),
        'its embeddings are not the target',
    ),
}
ONLY_SPECULATORS = {
    'another kind': (dict(settings=dict(speculators_model_type='dflash')), "speculator of the kind 'dflash'"),
    'no layer': (dict(settings=dict(transformer_layer_config=[])), 'transformer_layer_config'),
    'norm_before_residual left out': (
        dict(settings=dict(norm_before_residual=None)),
        'does not say norm_before_residual',
    ),
    'another verifier': (
        dict(verifier=dict(name_or_path='meta-llama/Llama-3.1-8B-Instruct')),
        'its verifier is .meta-llama/Llama-3.1',
    ),
    'a verifier of another family': (
        dict(verifier=dict(architectures=['Qwen3ForCausalLM'])),
        'its verifier is a .*Qwen3ForCausalLM',
    ),
    'no verifier': (dict(settings=dict(speculators_config=dict(verifier=None))), 'names no verifier'),
}


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_faults(target, folder, layout, fault):
    how, why = FAULTS[fault]
    nested = how.get('settings', {})
    if layout == 'eagle3' and nested and IDS in nested:
        how = how | dict(settings=nested | dict(eagle_config=None))
    refused(changed(folder, layout, **how), target, why)


@pytest.mark.parametrize('fault', ONLY_SPECULATORS)
def test_faults_of_speculators(folder, fault):
    model = toy_model(num_hidden_layers=6)
    model.config._name_or_path = '/data/toy'
    how, why = ONLY_SPECULATORS[fault]
    named = json.loads((folder / 'speculators' / 'config.json').read_text())
    if fault in ('no layer', 'no verifier'):
        (folder / 'speculators' / 'config.json').write_text(json.dumps(named | how['settings']))
        shutil.copytree(folder / 'speculators', folder / 'changed')
        tensors = load_file(folder / 'speculators' / 'model.safetensors')
        save_file(tensors, folder / 'changed' / 'model.safetensors', metadata=dict(format='pt'))
        return refused(folder / 'changed', model, why)
    refused(changed(folder, **how), model, why)


def test_layer_numbers_that_disagree(target, folder):
    out = changed(folder, 'eagle3', {'eagle_config': {IDS: [1, 3, 5]}})
    refused(out, target, r'says eagle_aux_hidden_state_layer_ids: \[1, 3, 5\], and in eagle_config \[1, 3, 5\]')


@pytest.mark.parametrize('layout', LAYOUTS)
def test_another_target(folder, layout):
    refused(folder / layout, toy_model(num_hidden_layers=6, seed=1), 'its fingerprint differs')
    refused(folder / layout, toy_model(num_hidden_layers=4), 'of a target of 4 layers|its fingerprint differs')


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'weights.pt'])
def test_pickles(target, folder, name):
    (folder / 'speculators' / 'model.safetensors').unlink()
    (folder / 'speculators' / name).write_bytes(b'')
    refused(folder / 'speculators', target, 'holds pickled weights, which can run code: convert it')


@pytest.mark.parametrize('layout', LAYOUTS)
def test_cut_short(target, folder, layout):
    file = folder / layout / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder / layout, target, 'copy the whole folder of the head again')


@pytest.mark.parametrize('text', ['', '[]', '{', 'null'])
def test_a_damaged_configuration(target, folder, text):
    (folder / 'eagle3' / 'config.json').write_text(text)
    refused(folder / 'eagle3', target, 'config.json')


def refused(folder, target, why):
    with pytest.raises(DecodingError, match=why) as e:
        load_any_head(folder, target)
    message = str(e.value)
    assert '\n' not in message and ': ' in message and message.endswith('.')


@pytest.mark.parametrize('w', [1, 5, 97])
def test_vocabularies(w):
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(w))[:w]
    tensors = vocab_tensors(ids, 97)
    assert tensors['t2d'].nonzero()[:, 0].tolist() == sorted(ids.tolist())
    assert [j + d for j, d in enumerate(tensors['d2t'].tolist())] == ids.tolist()
    assert torch.equal(vocab_of(dict(tensors), 'here', w, 97), ids)
    every = vocab_tensors(torch.arange(97), 97)
    assert vocab_of(dict(every), 'here', 97, 97) is None and vocab_of({}, 'here', 97, 97) is None


def test_switches_are_part_of_what_is_compiled():
    one, other = (Fusion((1,), 8, 9, norm_output=on).to_dict() for on in (False, True))
    assert one != other
