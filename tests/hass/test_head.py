"Draft heads: files of every published layout, each fault by name, devices and dtypes"

import copy, json
import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.hass.head import DraftHead, HEAD_FAMILIES, draft_rows, target_weights, head_config
from npu_lora_decoding.hass.checkpoint import load_head, save_head


@pytest.fixture
def target():
    return toy_model()


def toy_head(target, bias=False, seed=0):
    "A head with random weights everywhere, norms and biases too"
    head = DraftHead(head_config(target.config), fc_bias=bias).requires_grad_(False)
    g = generator(seed)
    for p in head.parameters():
        p.copy_(torch.randn(p.shape, generator=g).bfloat16())  # what the file can hold
    return head


def write(folder, tensors, config, meta=None):
    "A folder as somebody else writes it"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    save_file(
        {k: x.contiguous() for k, x in tensors.items()}, folder / 'model.safetensors', metadata=meta or {'format': 'pt'}
    )
    return folder


def same(a, b):
    "Whether two heads have the same weights"
    a = a.state_dict()
    b = b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k].float(), b[k].float()) for k in a)


# What published configurations look like: few keys, `rope_theta` at the top, no `head_dim`
OLD = dict(
    architectures=['LlamaForCausalLM'],
    model_type='llama',
    hidden_act='silu',
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=1,
    vocab_size=97,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=500000.0,
    tie_word_embeddings=False,
    torch_dtype='float16',
    use_cache=True,
)
LAYOUTS = dict(
    eagle1=dict(bias=True, embed=True, more={}),
    eagle2=dict(bias=True, embed=True, more=dict(bias=True)),
    hass=dict(bias=False, embed=True, more=dict(bias=False)),
    ours=dict(bias=False, embed=False, more={}),
)


@pytest.mark.parametrize('name', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_published_layouts_load(tmp_path, target, name, dtype):
    layout = LAYOUTS[name]
    head = toy_head(target, layout['bias'])
    tensors = {k: x.to(dtype) for k, x in head.state_dict().items()} | (
        {'embed_tokens.weight': target_weights(target).embed.to(dtype)} if layout['embed'] else {}
    )
    got = load_head(write(tmp_path / 'head', tensors, OLD | layout['more']), target)
    assert same(got, head if dtype != torch.float16 else got) and (got.fc.bias is not None) == layout['bias']
    assert got.config.rope_parameters['rope_theta'] == 500000.0  # from its old place
    for k, x in got.state_dict().items():
        torch.testing.assert_close(x, head.state_dict()[k], rtol=2**-10, atol=1e-6)


def test_old_and_new_rope_theta_turn_alike(tmp_path, target):
    head = toy_head(target)
    new = {k: v for k, v in OLD.items() if k not in ('rope_theta', 'rope_scaling')} | dict(
        rope_parameters=dict(rope_theta=500000.0, rope_type='default')
    )
    heads = [
        load_head(write(tmp_path / str(i), head.state_dict(), c), target)
        for i, c in enumerate((OLD, new, OLD | dict(head_dim=8)))
    ]
    for h in heads[1:]:
        assert torch.equal(h.rotary.inv_freq, heads[0].rotary.inv_freq)
    assert not torch.equal(heads[0].rotary.inv_freq, head.rotary.inv_freq)


@pytest.mark.parametrize('family', HEAD_FAMILIES)
def test_save_and_load_every_family(tmp_path, family):
    target = toy_model(family, rope_parameters=dict(rope_theta=7777.0, rope_type='default'))
    head = toy_head(target)
    got = load_head(save_head(head, tmp_path / 'head', target, extra=dict(trained_for=3)), target)
    assert same(got, head) and torch.equal(got.rotary.inv_freq, head.rotary.inv_freq) and not got.training
    config = json.loads((tmp_path / 'head' / 'config.json').read_text())
    assert (
        config['architectures'] == ['LlamaForCausalLM']
        and config['num_hidden_layers'] == 1
        and config['trained_for'] == 3
        and config['rope_theta'] == 7777.0
    )
    assert '_name_or_path' not in config and config['dtype'] == 'bfloat16'
    e = torch.randn(1, 4, 32)
    g = torch.randn(1, 4, 32)
    args = e, g, torch.arange(4)[None], torch.ones(4, 4, dtype=torch.bool).tril()[None]
    assert torch.equal(got(*args)[0], head(*args)[0])


@pytest.mark.parametrize('named', [True, False, None])
def test_qkv_bias_by_its_published_name(tmp_path, target, named):
    config = head_config(target.config)
    config.qkv_bias = named
    head = DraftHead(config)
    assert ('layers.0.self_attn.q_proj.bias' in head.state_dict()) == bool(named) and head.layers[
        0
    ].self_attn.o_proj.bias is None
    assert same(
        load_head(
            write(tmp_path / 'head', head.state_dict(), OLD | ({} if named is None else dict(qkv_bias=named))), target
        ),
        head,
    )


def test_file_is_small_and_says_whose_it_is(tmp_path, target):
    with safe_open(save_head(toy_head(target), tmp_path / 'head', target) / 'model.safetensors', 'pt') as f:
        assert f.metadata()['format'] == 'pt' and len(json.loads(f.metadata()['base_fingerprint'])) == 64
        assert not any('embed' in k for k in f.keys()) and all(
            f.get_tensor(k).dtype == torch.bfloat16 for k in f.keys()
        )
    full = load_file(
        save_head(toy_head(target), tmp_path / 'head', target, embed=True, fc_bias=True) / 'model.safetensors'
    )
    assert (
        torch.equal(full['embed_tokens.weight'], target_weights(target).embed.bfloat16()) and not full['fc.bias'].any()
    )
    load_head(tmp_path / 'head', target)


def test_shards(tmp_path, target):
    head = toy_head(target)
    folder = tmp_path / 'head'
    state = head.state_dict()
    names = sorted(state)
    write(folder, {}, OLD)
    (folder / 'model.safetensors').unlink()
    where = {k: f'model-0000{1 + i % 2}-of-00002.safetensors' for i, k in enumerate(names)}
    for f in set(where.values()):
        save_file({k: state[k] for k in names if where[k] == f}, folder / f)
    index = folder / 'model.safetensors.index.json'
    index.write_text(json.dumps(dict(weight_map=where)))
    assert same(load_head(folder, target), head)
    index.write_text(json.dumps(dict(weight_map=where | {'fc.bias': where[names[0]]})))
    with pytest.raises(DecodingError, match=r"lacks \['fc.bias'\], which its index promises"):
        load_head(folder, target)
    index.write_text(json.dumps(dict(weight_map={k: f'../head/{f}' for k, f in where.items()})))
    with pytest.raises(DecodingError, match='names no files beside it'):
        load_head(folder, target)
    index.write_text(json.dumps(dict(weight_map=where)))
    (folder / where[names[0]]).unlink()
    with pytest.raises(DecodingError, match='cannot read'):
        load_head(folder, target)


FAULTS = dict(
    missing=(dict(tensors={'layers.0.mlp.up_proj.weight': None}), 'lacks the tensor layers.0.mlp.up_proj.weight'),
    extra=(
        dict(tensors={'layers.0.input_layernorm.weight': torch.ones(32)}),
        'has the tensor layers.0.input_layernorm.weight',
    ),
    bias=(
        dict(tensors={'layers.0.self_attn.q_proj.bias': torch.ones(32)}),
        'q_proj.bias, for which its layer has no place: set qkv_bias',
    ),
    shape=(dict(tensors={'fc.weight': torch.ones(32, 32)}), r'fc.weight .* is \(32, 32\), not \(32, 64\)'),
    nan=(
        dict(tensors={'layers.0.self_attn.k_proj.weight': torch.full((16, 32), float('nan'))}),
        'k_proj.weight .* is not finite',
    ),
    inf=(
        dict(tensors={'layers.0.self_attn.k_proj.weight': torch.full((16, 32), float('inf'))}),
        'k_proj.weight .* is not finite',
    ),
    whole=(dict(tensors={'fc.weight': torch.ones(32, 64, dtype=torch.int8)}), 'fc.weight .* is not finite'),
    vocab=(dict(config=dict(vocab_size=98)), 'knows 98 tokens but the target 97'),
    width=(dict(config=dict(hidden_size=64)), 'is 64 wide but the target 32'),
    layers=(dict(config=dict(num_hidden_layers=2)), 'has 2 layers'),
    family=(dict(config=dict(model_type='gemma2')), "of the family 'gemma2'"),
    unknown=(dict(config=dict(model_type='eagle')), "of the family 'eagle'"),
    activation=(dict(config=dict(hidden_act='gelu')), "activation 'gelu'"),
    heads=(dict(config=dict(num_attention_heads=8, head_dim=8)), r'_proj.weight .* is \(32, 32\), not \(32, 64\)'),
    eagle3=(dict(tensors={'midlayer.mlp.up_proj.weight': torch.ones(64, 32)}), 'EAGLE-3'),
    eagle3_map=(dict(tensors={'t2d': torch.ones(97, dtype=torch.bool)}), 'EAGLE-3'),
    turns=(dict(tensors={'layers.0.self_attn.rotary_emb.inv_freq': torch.ones(4)}), r'inv_freq'),
    embed=(dict(tensors={'embed_tokens.weight': torch.ones(97, 32)}), 'another model .its embeddings are not'),
    embed_shape=(
        dict(tensors={'embed_tokens.weight': torch.ones(96, 32)}),
        r'another model .its embeddings are \(96, 32\)',
    ),
    print=(dict(meta=dict(base_fingerprint=json.dumps([1.0] * 64))), 'another model .its fingerprint'),
)


@pytest.mark.parametrize('name', FAULTS)
def test_every_fault_is_named(tmp_path, target, name):
    changes, message = FAULTS[name]
    tensors = {k: x for k, x in (toy_head(target).state_dict() | changes.get('tensors', {})).items() if x is not None}
    with pytest.raises(DecodingError, match=message):
        load_head(write(tmp_path / 'head', tensors, OLD | changes.get('config', {}), changes.get('meta')), target)


def test_one_wrong_row_of_embeddings_is_enough(tmp_path, target):
    embed = target_weights(target).embed.bfloat16()
    write(tmp_path / 'head', toy_head(target).state_dict() | {'embed_tokens.weight': embed}, OLD)
    load_head(tmp_path / 'head', target)
    embed[96] = -embed[96]
    with pytest.raises(DecodingError, match='another model'):
        load_head(write(tmp_path / 'head', toy_head(target).state_dict() | {'embed_tokens.weight': embed}, OLD), target)


def test_old_rotary_buffer_equal_to_our_own(tmp_path, target):
    head = toy_head(target)
    freq = 1 / 500000.0 ** (torch.arange(0, 8, 2) / 8)
    for dtype in (torch.float32, torch.float16):
        assert same(
            load_head(
                write(
                    tmp_path / 'head',
                    head.state_dict() | {'layers.0.self_attn.rotary_emb.inv_freq': freq.to(dtype)},
                    OLD,
                ),
                target,
            ),
            head,
        )


def test_folders_without_a_head(tmp_path, target):
    with pytest.raises(DecodingError, match='there is no folder'):
        load_head(tmp_path / 'none', target)
    with pytest.raises(DecodingError, match='no model.safetensors'):
        load_head(tmp_path, target)
    torch.save(toy_head(target).state_dict(), tmp_path / 'pytorch_model.bin')
    with pytest.raises(DecodingError, match='pickled.*weights_only=True'):
        load_head(tmp_path, target)
    (tmp_path / 'model.safetensors').write_bytes(b'no tensors')
    with pytest.raises(DecodingError, match='cannot read'):
        load_head(tmp_path, target)
    save_file(toy_head(target).state_dict(), tmp_path / 'model.safetensors')
    for text, message in (
        (None, 'config.json'),
        ('{', 'config.json'),
        ('[]', 'not a JSON object of settings'),
        ('{"num_attention_heads": "x"}', 'not a configuration of a llama'),
    ):
        if text is not None:
            (tmp_path / 'config.json').write_text(text)
        with pytest.raises(DecodingError, match=message):
            load_head(tmp_path, target)


@pytest.mark.parametrize('named', [True, False])
def test_other_layouts_are_named(tmp_path, target, named):
    "speculators puts the sizes inside; a size that is left out would be Llama's: 32 layers, 4096 wide"
    folder = save_head(toy_head(target), tmp_path / 'head', target)
    file = folder / 'config.json'
    config = json.loads(file.read_text())
    layout = dict(speculators_model_type='eagle') if named else {}
    file.write_text(json.dumps(layout | dict(transformer_layer_config=config)))
    with pytest.raises(DecodingError, match='layout.*inside .*transformer_layer_config') as e:
        load_head(folder, target)
    assert '32 layers' not in str(e.value) and ('speculators' in str(e.value)) == named
    for size in ('num_hidden_layers', 'hidden_size', 'vocab_size'):
        file.write_text(json.dumps({k: v for k, v in config.items() if k != size}))
        with pytest.raises(DecodingError, match=f'does not give {size}'):
            load_head(folder, target)


@pytest.mark.slow
def test_the_remedy_for_pickled_weights_works(tmp_path, target):
    import os, subprocess, sys

    head = toy_head(target)
    folder = write(tmp_path / 'head', {}, OLD)
    (folder / 'model.safetensors').unlink()
    torch.save(head.state_dict(), folder / 'pytorch_model.bin')
    with pytest.raises(DecodingError) as e:
        load_head(folder, target)
    line = str(e.value).partition('python -c "')[2].rpartition('"')[0]
    subprocess.run([sys.executable, '-c', line], cwd=folder, check=True, env=os.environ)
    assert same(load_head(folder, target), head)


def test_saving_replaces_a_head_and_nothing_else(tmp_path, target):
    folder = save_head(toy_head(target, seed=1), tmp_path / 'head', target)
    save_head(toy_head(target, seed=2), folder, target)
    assert same(load_head(folder, target), toy_head(target, seed=2)) and sorted(f.name for f in tmp_path.iterdir()) == [
        'head'
    ]
    (folder / 'tokenizer.json').write_text('{}')
    with pytest.raises(DecodingError, match='tokenizer.json.*does not belong to a head'):
        save_head(toy_head(target), folder, target)
    bad = toy_head(target)
    bad.fc.weight[0, 0] = float('nan')
    with pytest.raises(DecodingError, match='fc.weight is not finite'):
        save_head(bad, tmp_path / 'bad', target)
    assert not (tmp_path / 'bad').exists()
    big = toy_head(target)
    big.fc.weight[0, 0] = 1e5
    with pytest.raises(DecodingError, match='not finite in torch.float16'):
        save_head(big, tmp_path / 'bad', target, dtype=torch.float16)


def test_a_failed_save_leaves_the_old_head(tmp_path, target, monkeypatch):
    folder = save_head(toy_head(target, seed=1), tmp_path / 'head', target)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr('npu_lora_decoding.foundations.files._ordered_header', stop)
    with pytest.raises(KeyboardInterrupt):
        save_head(toy_head(target, seed=2), folder, target)
    assert same(load_head(folder, target), toy_head(target, seed=1)) and sorted(f.name for f in tmp_path.iterdir()) == [
        'head'
    ]


def test_draft_vocabulary_travels(tmp_path, target):
    head = toy_head(target)
    assert draft_rows(head, target_weights(target)) is not None and draft_rows(head, target_weights(target)).shape == (
        97,
        32,
    )
    for counts in (torch.tensor([9, 4, 4, 0]), None):
        head.vocab = torch.tensor([5, 96, 0, 7])
        head.counts = counts
        got = load_head(save_head(head, tmp_path / 'head', target), target)
        assert torch.equal(got.vocab, head.vocab) and (
            counts is None and got.counts is None or torch.equal(got.counts, counts)
        )
        assert 'vocab' not in got.state_dict() and torch.equal(
            draft_rows(got, target_weights(target)), target_weights(target).lm_head[[5, 96, 0, 7]]
        )
    assert torch.equal(copy.deepcopy(head).vocab, head.vocab) and head.to(torch.bfloat16).vocab.dtype == torch.int64
    head.vocab = None
    assert load_head(save_head(head, tmp_path / 'head', target), target).vocab is None  # the old file is gone


@pytest.mark.parametrize(
    'tensors,message',
    [
        (dict(ids=torch.tensor([1, 1])), 'twice'),
        (dict(ids=torch.tensor([1, 97])), 'outside'),
        (dict(ids=torch.tensor([-1, 2])), 'outside'),
        (dict(ids=torch.tensor([1, 2], dtype=torch.int32)), 'int64'),
        (dict(ids=torch.ones(2, 2, dtype=torch.int64)), 'list of'),
        (dict(ids=torch.zeros(0, dtype=torch.int64)), 'list of'),
        (dict(ids=torch.tensor([1, 2]), counts=torch.tensor([1, 2])), 'do not fall'),
        (dict(ids=torch.tensor([1, 2]), counts=torch.tensor([2])), 'counts of shape'),
        (dict(ids=torch.tensor([1, 2]), counts=torch.tensor([2, -1])), 'do not fall'),
        (dict(tokens=torch.tensor([1, 2])), 'instead of ids'),
    ],
)
def test_broken_draft_vocabularies(tmp_path, target, tensors, message):
    folder = save_head(toy_head(target), tmp_path / 'head', target)
    save_file(tensors, folder / 'draft_vocab.safetensors')
    with pytest.raises(DecodingError, match=message):
        load_head(folder, target)


def test_dtype_follows_the_target_by_default(tmp_path, target):
    folder = save_head(toy_head(target), tmp_path / 'head', target)
    assert (
        load_head(folder, target.to(torch.bfloat16)).fc.weight.dtype == torch.bfloat16
    )  # the fingerprint holds in bf16 too
    assert load_head(folder, target, dtype=torch.float32).fc.weight.dtype == torch.float32
    big = toy_head(target)
    big.fc.weight[0, 0] = 1e5
    with pytest.raises(DecodingError, match='does not fit into torch.float16'):
        load_head(save_head(big, folder, target), target, dtype=torch.float16)


def test_targets_that_are_more_than_two_matrices(target):
    with pytest.raises(DecodingError, match='gemma'):
        target_weights(toy_model('gemma'))
    target.lm_head = torch.nn.Linear(32, 97)
    with pytest.raises(DecodingError, match='LM head'):
        target_weights(target)

    class Scaled(torch.nn.Embedding):
        pass

    target = toy_model()
    target.model.embed_tokens = Scaled(97, 32)
    with pytest.raises(DecodingError, match='Scaled'):
        target_weights(target)


def test_config_is_a_copy(target):
    before = target.config.to_dict()
    head_config(target.config).vocab_size = 3
    assert target.config.to_dict() == before and target.config.num_hidden_layers == 2
    assert head_config(toy_model('mistral').config).sliding_window is None


def test_gradients_reach_every_weight(target):
    head = toy_head(target, bias=True).requires_grad_(True)
    with torch.no_grad():
        for p in head.parameters():
            p.mul_(p.shape[-1] ** -0.5)  # large logits would make attention a choice, without a gradient
    out, _ = head(
        torch.randn(2, 4, 32),
        torch.randn(2, 4, 32),
        torch.arange(4).expand(2, 4),
        torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 4, 4),
    )
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in head.parameters())
