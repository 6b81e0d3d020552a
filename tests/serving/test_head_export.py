"Exported heads: every family and engine, each planted fault by name, faults of the writer itself, and folders that are left alone"

import importlib.util, json, os, shutil
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from npu_lora_decoding.serving import head_export as ex
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.hass.head import DraftHead, target_weights, head_config
from npu_lora_decoding.hass.checkpoint import load_head, save_head
from npu_lora_decoding.serving.head_export import (
    ENGINES,
    check_export,
    engine_tensors,
    export_head,
    read_token_map,
    serve_command,
    token_map,
)
from helpers.toys import toy_lm
from helpers.heads import random_head

Q = 'layers.0.self_attn.q_proj.weight'
FC = 'fc.weight'
ROPES = dict(
    plain=dict(rope_theta=7777.0, rope_type='default'),
    linear=dict(rope_theta=1e4, rope_type='linear', factor=2.0),
    llama3=dict(
        rope_theta=1e4,
        rope_type='llama3',
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    yarn=dict(rope_theta=1e4, rope_type='yarn', factor=4.0, original_max_position_embeddings=64),
)


def saved(tmp_path, lm, head, dtype=torch.bfloat16):
    return save_head(head, tmp_path / 'head', lm.model, dtype)


@pytest.fixture
def lm():
    return toy_lm()


@pytest.fixture(params=list(ENGINES))
def exported(request, tmp_path, lm):
    "A head, its export, and the engine that it is for"
    head = random_head(lm, vocab=20)
    export_head(saved(tmp_path, lm, head), tmp_path / 'out', lm, request.param)
    return head, tmp_path / 'out', request.param


def change(folder, tensors=(), **config):
    "Write an export again with tensors replaced (None: left out) and keys of its configuration changed"
    old = load_file(folder / 'model.safetensors') | dict(tensors)
    save_file(
        {k: x.contiguous().clone() for k, x in old.items() if x is not None},
        folder / 'model.safetensors',
        metadata=dict(format='pt'),
    )
    known = json.loads((folder / 'config.json').read_text()) | config
    (folder / 'config.json').write_text(json.dumps({k: v for k, v in known.items() if v != 'absent'}))


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('family', ['llama', 'mistral', 'qwen2'])
def test_every_family_with_a_llama_layer(tmp_path, family, engine):
    lm = toy_lm(family)
    found = export_head(saved(tmp_path, lm, random_head(lm)), tmp_path / 'out', lm, engine)
    assert found['error'] < 1e-5 and found['tolerance'] == 1e-4 and found['slots'] > 100
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    tensors = load_file(tmp_path / 'out' / 'model.safetensors')
    assert config['architectures'] == [dict(vllm='LlamaForCausalLM', sglang='LlamaForCausalLMEagle')[engine]]
    assert (
        config['model_type'] == 'llama' and config['tie_word_embeddings'] is False and config['num_hidden_layers'] == 1
    )
    assert not {'layer_types', 'sliding_window', 'qkv_bias', '_name_or_path'} & set(config)
    assert ('fc.bias' in tensors) == (engine == 'sglang') and not tensors.get('fc.bias', torch.zeros(1)).any()
    assert not any('embed' in k or 'lm_head' in k for k in tensors)
    if family == 'qwen2':
        assert (
            config['attention_bias']
            and not tensors['layers.0.self_attn.o_proj.bias'].any()
            and tensors['layers.0.self_attn.q_proj.bias'].any()
        )


@pytest.mark.parametrize('name', ROPES)
def test_rotations_old_and_new(tmp_path, name):
    lm = toy_lm(rope_parameters=ROPES[name])
    export_head(saved(tmp_path, lm, random_head(lm)), tmp_path / 'out', lm)
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['rope_theta'] == ROPES[name]['rope_theta'] and (config['rope_scaling'] is None) == (name == 'plain')
    for left in ('rope_parameters', 'rope_scaling'):  # what transformers 4 or 5 reads alone says the same
        f = shutil.copytree(tmp_path / 'out', tmp_path / left, dirs_exist_ok=True)
        change(f, **{left: 'absent'})
        check_export(f, random_head(lm), lm)


@pytest.mark.parametrize(
    'config',
    [
        dict(attention_bias=True),
        dict(attention_bias=True, mlp_bias=True),
        dict(head_dim=16),
        dict(num_key_value_heads=1),
    ],
)
def test_biases_and_shapes(tmp_path, config):
    lm = toy_lm(**config)
    folder = saved(tmp_path, lm, random_head(lm))
    assert export_head(folder, tmp_path / 'out', lm)['error'] < 1e-5
    if config.get('mlp_bias'):
        with pytest.raises(DecodingError, match='biases in its MLP, for which SGLang has no place'):
            export_head(folder, tmp_path / 'sg', lm, 'sglang')
    else:
        assert export_head(folder, tmp_path / 'sg', lm, 'sglang')['error'] < 1e-5


@pytest.mark.parametrize('engine', ENGINES)
def test_a_bias_of_fc_goes_where_there_is_a_place(tmp_path, lm, engine):
    head = random_head(lm, bias=True)
    if engine == 'sglang':
        export_head(saved(tmp_path, lm, head), tmp_path / 'out', lm, engine)
        assert torch.equal(load_file(tmp_path / 'out' / 'model.safetensors')['fc.bias'], head.fc.bias.bfloat16())
    else:
        with pytest.raises(DecodingError, match="a bias in fc, for which vLLM has no place"):
            export_head(saved(tmp_path, lm, head), tmp_path / 'out', lm, engine)
        assert not (tmp_path / 'out').exists()
    head.fc.bias.zero_()
    assert export_head(saved(tmp_path, lm, head), tmp_path / 'out', lm, engine)['error'] < 1e-5


@pytest.mark.parametrize('engine', ENGINES)
def test_what_no_engine_can_serve(tmp_path, engine):
    lm = toy_lm('qwen3')
    with pytest.raises(DecodingError, match='family qwen3, whose norms'):
        export_head(saved(tmp_path, lm, random_head(lm)), tmp_path / 'out', lm, engine)
    lm = toy_lm(rope_parameters=dict(rope_type='dynamic', factor=2.0, rope_theta=1e4))
    with pytest.raises(DecodingError, match="rule 'dynamic'"):
        export_head(saved(tmp_path, lm, random_head(lm)), tmp_path / 'out', lm, engine)


FAULTS = dict(
    no_tensor=(dict(tensors={Q: None}), f'lacks {Q}, and .* would leave random numbers there'),
    no_norm=(
        dict(tensors={'layers.0.post_attention_layernorm.weight': None}),
        'lacks layers.0.post_attention_layernorm.weight',
    ),
    spare=(
        dict(tensors={'layers.0.input_layernorm.weight': torch.ones(32)}),
        'has layers.0.input_layernorm.weight, for which',
    ),
    embeddings=(dict(tensors={'embed_tokens.weight': torch.ones(97, 32)}), 'has embed_tokens.weight, for which'),
    prefix=(dict(tensors={FC: None, 'model.fc.weight': torch.ones(32, 64)}), 'lacks fc.weight'),
    shape=(
        dict(tensors={FC: torch.ones(64, 32)}),
        r'fc.weight of the exported head is \(64, 32\) where .* has \(32, 64\)',
    ),
    value=(dict(tensors={FC: torch.ones(32, 64)}), "fc.weight of the exported head is not the head's"),
    name=(dict(config=dict(architectures=['EagleModel'])), "architectures of the exported head is .'EagleModel'."),
    family=(dict(config=dict(model_type='mistral')), "model_type of the exported head is 'mistral'"),
    no_family=(dict(config=dict(model_type='absent')), 'config.json is not a usable configuration'),
    unknown=(dict(config=dict(model_type='eagle')), 'config.json is not a usable configuration'),
    layers=(dict(config=dict(num_hidden_layers=2)), 'num_hidden_layers of the exported head is 2'),
    tied=(dict(config=dict(tie_word_embeddings=True)), 'tie_word_embeddings of the exported head is True'),
    words=(dict(config=dict(vocab_size=98)), 'vocab_size of the exported head is 98'),
    window=(dict(config=dict(sliding_window=8)), 'the exported head has sliding_window'),
    kinds=(dict(config=dict(layer_types=['full_attention'])), 'the exported head has layer_types'),
    packed=(dict(config=dict(quantization_config=dict(bits=4))), 'the exported head has quantization_config'),
    dtype=(dict(config=dict(dtype='float32')), 'is called float32 but holds'),
    old_dtype=(dict(config=dict(torch_dtype='absent')), 'is called bfloat16 but holds'),
    theta=(
        dict(config=dict(rope_theta=100.0, rope_parameters=dict(rope_theta=100.0, rope_type='default'))),
        'features that differ by',
    ),
    scaling=(
        dict(config=dict(rope_parameters=dict(rope_theta=10000.0, rope_type='linear', factor=2.0))),
        'features that differ by',
    ),
    epsilon=(dict(config=dict(rms_norm_eps=0.1)), 'features that differ by'),
    heads=(dict(config=dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)), 'features that differ by'),
    bias=(dict(config=dict(attention_bias=True)), 'lacks layers.0.self_attn.q_proj.bias'),
)


@pytest.mark.parametrize('fault', FAULTS)
def test_every_planted_fault_is_named(exported, lm, fault):
    head, folder, engine = exported
    changes, message = FAULTS[fault]
    check_export(folder, head, lm, engine)
    change(
        folder,
        {k: x if x is None else x.bfloat16() for k, x in changes.get('tensors', {}).items()},
        **changes.get('config', {}),
    )
    with pytest.raises(DecodingError, match=message):
        check_export(folder, head, lm, engine)


def test_faults_that_need_the_head(tmp_path, lm):
    head = random_head(lm)
    export_head(saved(tmp_path, lm, head), tmp_path / 'out', lm, 'sglang')
    w = load_file(tmp_path / 'out' / 'model.safetensors')
    for name, x in {
        Q: w[Q].T,
        FC: torch.cat([w[FC][:, 32:], w[FC][:, :32]], 1),
        'fc.bias': w['fc.bias'] + 0.1,
        'layers.0.mlp.gate_proj.weight': w['layers.0.mlp.up_proj.weight'],
    }.items():
        change(tmp_path / 'out', w | {name: x})
        with pytest.raises(DecodingError, match=name.replace('.', '[.]')):
            check_export(tmp_path / 'out', head, lm, 'sglang')
    change(tmp_path / 'out', w)
    check_export(tmp_path / 'out', head, lm, 'sglang')
    with pytest.raises(DecodingError, match='has fc.bias, for which vLLM'):
        check_export(tmp_path / 'out', head, lm)


@pytest.mark.parametrize(
    'plant',
    [  # bugs of the library, on both sides of the comparison of weights: only features show them
        (DraftHead, 'fuse_inputs', lambda self, e, g: self.fc(torch.cat([g, e], -1))),
        (DraftHead, 'rotations', lambda self, positions: self.rotary(self.fc.weight, 2 * positions)),
        (DraftHead, 'finish', lambda self, u, c: u + self.layers[0].self_attn.o_proj(c.transpose(1, 2).flatten(2))),
    ],
    ids=['halves', 'positions', 'no_mlp'],
)
def test_a_misunderstanding_of_our_own_shows(tmp_path, lm, monkeypatch, plant):
    folder = saved(tmp_path, lm, random_head(lm))
    monkeypatch.setattr(*plant)
    with pytest.raises(DecodingError, match='features that differ by'):
        export_head(folder, tmp_path / 'out', lm)
    assert not (tmp_path / 'out').exists()


def writer(change):
    "A writer with a bug"

    def tensors(*args):
        out = engine_tensors(*args)
        change(out)
        return out

    return tensors


@pytest.mark.parametrize(
    'bug, message',
    [
        (lambda t: t.update({FC: torch.cat([t[FC][:, 32:], t[FC][:, :32]], 1)}), 'fc.weight'),
        (lambda t: t.update({Q: t[Q].T.contiguous()}), 'q_proj'),
        (lambda t: t.pop(Q), 'lacks'),
        (lambda t: t.update({'fc.bias': torch.full((32,), 0.1).bfloat16()}), 'fc.bias'),
        (lambda t: t.update({k: x.float() for k, x in t.items() if k == FC}), 'is called bfloat16 but holds'),
    ],
)
@pytest.mark.parametrize('engine', ENGINES)
def test_a_wrong_writer_is_caught_and_the_last_export_stays(tmp_path, lm, monkeypatch, engine, bug, message):
    folder = saved(tmp_path, lm, random_head(lm))
    export_head(folder, tmp_path / 'out', lm, engine)
    before = (tmp_path / 'out' / 'model.safetensors').read_bytes()
    monkeypatch.setattr(ex, 'engine_tensors', writer(bug))
    with pytest.raises(DecodingError, match=message):
        export_head(folder, tmp_path / 'out', lm, engine)
    assert (tmp_path / 'out' / 'model.safetensors').read_bytes() == before and sorted(
        f.name for f in tmp_path.iterdir()
    ) == ['head', 'out']


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_a_fault(tmp_path, lm, dtype):
    head = random_head(lm, round=False)
    folder = saved(tmp_path, lm, head, torch.float32)
    found = export_head(folder, tmp_path / 'out', lm, dtype=dtype)
    assert found['tolerance'] == ex.TOLERANCES[dtype] and found['error'] < found['tolerance']
    assert all(x.dtype == dtype for x in load_file(tmp_path / 'out' / 'model.safetensors').values())
    assert export_head(folder, tmp_path / 'out', lm)['tolerance'] == 1e-4  # by default nothing is rounded


def test_a_weight_that_does_not_fit_is_named(tmp_path, lm):
    head = random_head(lm)
    head.fc.weight[0, 0] = 1e6
    folder = saved(tmp_path, lm, head)
    with pytest.raises(DecodingError, match='fc.weight does not fit into torch.float16'):
        export_head(folder, tmp_path / 'out', lm, dtype=torch.float16)


def test_token_map(tmp_path, lm):
    head = random_head(lm, vocab=20)
    folder = saved(tmp_path, lm, head)
    export_head(folder, tmp_path / 'out', lm, 'sglang')
    file = tmp_path / 'out' / 'hot_tokens.pt'
    assert torch.equal(read_token_map(file), head.vocab) and torch.equal(
        torch.load(file, weights_only=True), head.vocab
    )
    assert 'hot_tokens.pt' in serve_command(tmp_path / 'out', 'm', 'sglang')
    file.write_bytes(token_map(head.vocab.flip(0)))
    with pytest.raises(DecodingError, match="hot_tokens.pt is not the head's draft vocabulary"):
        check_export(tmp_path / 'out', head, lm, 'sglang')
    file.write_bytes(token_map(torch.tensor([1, 1])))
    with pytest.raises(DecodingError, match='twice'):
        check_export(tmp_path / 'out', head, lm, 'sglang')
    file.write_bytes(b'')
    with pytest.raises(DecodingError, match='is not a token map'):
        check_export(tmp_path / 'out', head, lm, 'sglang')
    export_head(folder, tmp_path / 'out', lm, 'sglang', full=True)
    assert not file.exists() and 'hot_tokens.pt' not in serve_command(tmp_path / 'out', 'm', 'sglang')
    export_head(folder, tmp_path / 'out', lm, 'vllm')
    file.write_bytes(token_map(head.vocab))
    with pytest.raises(DecodingError, match='hot_tokens.pt is there, which vLLM does not read'):
        check_export(tmp_path / 'out', head, lm)


def test_a_token_map_is_never_unpickled(tmp_path, lm):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    head = random_head(lm, vocab=20)
    export_head(saved(tmp_path, lm, head), tmp_path / 'out', lm, 'sglang')
    torch.save(dict(ids=head.vocab.clone(), evil=Evil()), tmp_path / 'out' / 'hot_tokens.pt')
    check_export(
        tmp_path / 'out', head, lm, 'sglang'
    )  # its numbers are right; what else it holds is the engine's business, which refuses it
    assert not (tmp_path / 'ran').exists()


def test_folders_are_left_alone(tmp_path, lm):
    folder = saved(tmp_path, lm, random_head(lm))
    with pytest.raises(DecodingError, match='is the folder of the head itself'):
        export_head(folder, folder, lm)
    load_head(folder, lm.model)
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'notes.txt').write_text('mine')
    with pytest.raises(DecodingError, match=r"holds \['notes.txt'\]"):
        export_head(folder, tmp_path / 'full', lm)
    for engine in ENGINES:
        export_head(folder, tmp_path / 'out', lm, engine)  # an export makes room for another
    with pytest.raises(DecodingError, match='there is no folder'):
        export_head(tmp_path / 'none', tmp_path / 'out', lm)
    with pytest.raises(DecodingError, match="unknown engine 'tgi'"):
        export_head(folder, tmp_path / 'out', lm, 'tgi')
    with pytest.raises(DecodingError, match='cannot read the exported head'):
        check_export(tmp_path / 'none', random_head(lm), lm)
    (tmp_path / 'out' / 'config.json').write_text('{')
    with pytest.raises(DecodingError, match='cannot read the exported head'):
        check_export(tmp_path / 'out', random_head(lm), lm)


def test_short_texts_and_other_targets(tmp_path, lm):
    folder = saved(tmp_path, lm, random_head(lm))
    with pytest.raises(DecodingError, match='the text has 3 tokens: give a text of at least 8'):
        export_head(folder, tmp_path / 'out', lm, text='abc')
    with pytest.raises(DecodingError, match='a head for another model'):
        export_head(folder, tmp_path / 'out', toy_lm(seed=1))
    assert not (tmp_path / 'out').exists()


def test_the_adapted_target_reads_the_text(tmp_path, lm, monkeypatch):
    folder = saved(tmp_path, lm, random_head(lm))
    _, plain = ex.text_inputs(lm, ex.TEXT)
    lm.adapter = load_adapter(toy_adapter(lm.model, tmp_path / 'adapter'), lm.model)
    _, adapted = ex.text_inputs(lm, ex.TEXT)
    assert not torch.allclose(plain, adapted)
    assert export_head(folder, tmp_path / 'out', lm)['error'] < 1e-5


def test_bf16_target(tmp_path, lm):
    folder = saved(tmp_path, lm, random_head(lm))
    lm.model.to(torch.bfloat16)
    assert export_head(folder, tmp_path / 'out', lm)['error'] < 1e-5


def test_the_line_to_type(tmp_path):
    line = serve_command('out', 'target', tokens=3)
    assert json.loads(line.partition("'")[2][:-1]) == dict(
        method='eagle', model='out', num_speculative_tokens=3
    ) and line.startswith('vllm serve target --speculative-config ')
    assert serve_command('out', 'target', 'sglang', 4) == (
        'python -m sglang.launch_server --model-path target --speculative-algorithm EAGLE '
        '--speculative-draft-model-path out --speculative-num-steps 4 --speculative-eagle-topk 8 '
        '--speculative-num-draft-tokens 32'
    )
    with pytest.raises(DecodingError, match='0 draft tokens of a forward pass'):
        serve_command('out', 'target', tokens=0)


@pytest.fixture(scope='module')
def check():
    "The script that compares with vLLM; it imports vLLM only where it serves"
    spec = importlib.util.spec_from_file_location('vllm_check', Path(__file__).parents[1] / 'vllm-cpu' / 'check.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_vllm_check_counts_like_an_engine(check):
    lengths = torch.tensor([9, 9, 2, 9, 9, 3, 9, 9, 9, 0, 1])  # slot 2 is the prompt's last
    assert check.counted(lengths, 2, 1, 3) == (0, [0, 0, 0])  # over with the prefill
    assert check.counted(lengths, 2, 2, 3) == (1, [1, 1, 0])  # draft tokens beyond the stop count
    assert (
        check.counted(lengths, 2, 8, 3) == (2, [2, 2, 1])
        and check.counted(lengths, 2, 9, 3) == (3, [2, 2, 1])
        and check.counted(lengths, 2, 10, 3) == (4, [3, 2, 1])
    )
    assert check.counted(lengths, 2, 8, 1) == (4, [4])
    assert check.until_end([5, 6, 2, 7], {2}, 4) == [5, 6, 2] and check.until_end([5, 6, 7, 2], {2}, 3) == [5, 6, 7]


def test_the_vllm_check_tells_ties_from_differences(check, lm):
    assert check.differences(lm, [[1, 5]], [[6, 7]], [[6, 7]]) == []
    (far,) = check.differences(lm, [[1, 5]], [[6, 7]], [[6, 8]])
    (short,) = check.differences(lm, [[1, 5]], [[6, 7]], [[6]])
    assert (
        (far['prompt'], far['place']) == (0, 1)
        and far['gap'] > check.TIE
        and short == dict(prompt=0, place=1, gap=None)
    )
    lm.model.lm_head.weight[8] = lm.model.lm_head.weight[7]
    assert check.differences(lm, [[1, 5]], [[6, 7]], [[6, 8]])[0]['gap'] < check.TIE


def test_the_vllm_check_replays_the_full_head(check, lm):
    head = random_head(lm, vocab=20)
    prompts = [[1, 5, 6], [1, 9]]
    answers = [[7, 8, 9, 10, 11, 12, 13], [4, 5, 6, 7, 8, 9, 10]]
    texts = check.texts_of(lm, prompts, answers)
    frozen = target_weights(lm.model)
    for t in texts:  # every token is what the head would draft: all is accepted
        e = frozen.embed[t.ids[1:]][None]
        f = t.features[:-1][None]
        t.ids[2:] = (ex.head_features(head, e, f)[0, :-1] @ frozen.lm_head.T).argmax(-1)
    drafts, reached = check.replayed(lm, head, texts, [4, 4], 2)
    assert drafts >= 2 and len(reached) == 2 and reached[0] >= reached[1]
