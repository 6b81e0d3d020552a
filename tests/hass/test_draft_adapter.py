"""Draft adapters as files and in training: what belongs together, what is refused, and a head that stays bit for bit"""

import json
from dataclasses import replace
import pytest, torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from npu_lora_decoding.foundations.adapters import Adapter, LoraWeights, load_adapter, same_base, toy_adapter
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.lora import adapter_from_peft
from npu_lora_decoding.decoding.loop import LM as Model
from npu_lora_decoding.hass.alignment import aligned_step
from npu_lora_decoding.hass.checkpoint import load_head, save_head
from npu_lora_decoding.hass.draft_adapter import DraftAdapter, DraftAdapterTraining, LowRankHead, add_low_rank
from npu_lora_decoding.hass.draft_adapter import adapter_fingerprint, draft_layers, learned_adapter, load_draft_adapter
from npu_lora_decoding.hass.draft_adapter import make_draft_adapter, merge_draft_adapter, save_draft_adapter
from npu_lora_decoding.hass.draft_adapter import write_merged_head
from npu_lora_decoding.hass.initialization import Scales, plain_copy
from npu_lora_decoding.hass.train import train
from helpers.heads import CONFIG, LM, STORE, TEXTS, begin, draft_adapter, random_head
from helpers.toys import toy_lm

SETTINGS = {name: value for name, value in vars(CONFIG).items()} | dict(rank=3, optimizer='adamw')
LORA = DraftAdapterTraining(**SETTINGS)


@pytest.fixture(autouse=True)
def fresh():
    AcceleratorState._reset_state()


@pytest.fixture(scope='module')
def task(tmp_path_factory):
    return load_adapter(toy_adapter(LM.model, tmp_path_factory.mktemp('task')), LM.model)


@pytest.fixture(scope='module')
def onto():
    return random_head(LM)


def learning(folder, head, task, config=LORA, stop_after=None):
    learns = LowRankHead(plain_copy(head), adapter_fingerprint(task))
    return train(begin(folder, config, init=head, learns=learns), TEXTS, stop_after=stop_after)


def same_adapters(a, b):
    assert a.layers.keys() == b.layers.keys()
    for path, x in a.layers.items():
        y = b.layers[path]
        assert x.scale == y.scale and torch.equal(x.A, y.A) and torch.equal(x.B, y.B)


# --- fingerprints


def test_a_fingerprint_is_of_the_adapter_alone(task, tmp_path):
    from peft import PeftModel

    model = toy_lm().model
    folder = toy_adapter(model, tmp_path / 'a')
    own = adapter_fingerprint(load_adapter(folder, model))
    for dtype in (torch.bfloat16, torch.float16):
        assert same_base(own, adapter_fingerprint(load_adapter(folder, model).to('cpu', dtype)))
    assert same_base(
        own, adapter_fingerprint(adapter_from_peft(PeftModel.from_pretrained(model, folder).get_base_model()))
    )


@pytest.mark.parametrize('change', ['A', 'B', 'scale', 'seed'])
def test_another_adapter_has_another(task, tmp_path, change):
    w = dict(task.layers)
    if change == 'seed':
        other = load_adapter(toy_adapter(LM.model, tmp_path, seed=9), LM.model)
    else:
        by = dict(A=(1, 0, 1), B=(0, 1, 1), scale=(0, 0, 2))[change]

        def changed(x):
            noise = [torch.randn_like(m) * m.std() * 0.1 * k for m, k in zip((x.A, x.B), by)]
            return LoraWeights(x.A + noise[0], x.B + noise[1], x.scale * by[2])

        other = Adapter('other', {path: changed(x) for path, x in w.items()})
    assert not same_base(adapter_fingerprint(task), adapter_fingerprint(other))


# --- files


@pytest.mark.parametrize('family', ['llama', 'qwen2', 'qwen3', 'mistral'])
def test_a_file_holds_the_adapter(tmp_path, task, family):
    lm = toy_lm(family)
    head = random_head(lm, bias=family == 'llama')
    adapter = draft_adapter(head)
    draft = DraftAdapter(adapter, adapter_fingerprint(task))
    save_draft_adapter(draft, tmp_path / 'draft', head, torch.float32)
    loaded = load_draft_adapter(tmp_path / 'draft', head)
    same_adapters(loaded.adapter, adapter)
    assert loaded.task == draft.task and len(adapter.layers) == 8
    in_bf16 = load_draft_adapter(tmp_path / 'draft', plain_copy(head).bfloat16())
    assert {w.A.dtype for w in in_bf16.adapter.layers.values()} == {torch.bfloat16}


def test_peft_reads_it(tmp_path, task, onto):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    adapter = draft_adapter(onto)
    draft = DraftAdapter(adapter, adapter_fingerprint(task))
    save_draft_adapter(draft, tmp_path / 'draft', onto, torch.float32)
    config = LoraConfig.from_pretrained(str(tmp_path / 'draft'))
    theirs = inject_adapter_in_model(config, plain_copy(onto))
    set_peft_model_state_dict(theirs, load_file(tmp_path / 'draft' / 'adapter_model.safetensors'))
    merged = merge_draft_adapter(onto, adapter)
    x = torch.randn(1, 4, 64)
    torch.testing.assert_close(theirs.fc(x), merged.fc(x))
    mlp = (h.layers[0].mlp(x[..., :32]) for h in (theirs, merged))
    torch.testing.assert_close(*mlp)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(head_fingerprint=None), 'does not say which head and which task adapter it belongs to: '),
        (dict(task_fingerprint=None), 'does not say which head and which task adapter it belongs to: '),
        (dict(head_fingerprint='[]'), 'does not say which head and which task adapter it belongs to: '),
        (dict(task_fingerprint='[]'), 'does not say which head and which task adapter it belongs to: '),
        (dict(head_fingerprint='x'), 'records its base in a damaged way'),
        (dict(head_fingerprint='[1.0, 2.0]'), 'was trained on another head: give the head that it was trained on'),
    ],
)
def test_notes_that_are_not_whole(tmp_path, task, onto, change, message):
    save_draft_adapter(DraftAdapter(draft_adapter(onto), adapter_fingerprint(task)), tmp_path / 'draft', onto)
    file = tmp_path / 'draft' / 'adapter_model.safetensors'
    with safe_open(file, 'pt') as f:
        notes = f.metadata() | change
    save_file(load_file(file), file, {name: x for name, x in notes.items() if x is not None})
    with pytest.raises(DecodingError, match=message):
        load_draft_adapter(tmp_path / 'draft', onto)


def test_what_is_missing_is_named(tmp_path, task, onto):
    draft = DraftAdapter(draft_adapter(onto), adapter_fingerprint(task))
    folder = save_draft_adapter(draft, tmp_path / 'draft', onto)
    file = folder / 'adapter_model.safetensors'
    with safe_open(file, 'pt') as f:
        notes = f.metadata()
    tensors = load_file(file)
    half = next(name for name in tensors if 'o_proj' in name)
    save_file({name: x for name, x in tensors.items() if name != half}, file, notes)
    with pytest.raises(DecodingError, match="holds only one of the two matrices of .'layers.0.self_attn.o_proj'"):
        load_draft_adapter(folder, onto)
    save_file({name: x for name, x in tensors.items() if 'o_proj' not in name}, file, notes)
    with pytest.raises(DecodingError, match='the adapter promises 8 layers but lacks 1 of them'):
        load_draft_adapter(folder, onto)
    with pytest.raises(DecodingError, match='the adapter promises 7 layers but lacks 7 of them'):
        load_adapter(save_draft_adapter(draft, tmp_path / 'again', onto), LM.model)


def test_only_a_draft_adapter_is_replaced(tmp_path, task, onto):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(DecodingError, match="holds .'notes.txt'., which does not belong to a draft adapter: "):
        save_draft_adapter(DraftAdapter(draft_adapter(onto), adapter_fingerprint(task)), tmp_path, onto)
    broken = draft_adapter(onto)
    broken.layers['fc'].A[0, 0] = torch.inf
    with pytest.raises(DecodingError, match='of the draft adapter is not finite in torch.bfloat16: '):
        save_draft_adapter(DraftAdapter(broken, [1.0]), tmp_path / 'x', onto)
    assert not (tmp_path / 'x').exists()


# --- training


def test_low_rank_is_the_merged_head(onto):
    scales = Scales(torch.rand(32) + 0.1, torch.rand(32) * 9 + 1)
    head = add_low_rank(plain_copy(onto), 3, scales)
    e, f = torch.randn(2, 1, 6, 32)
    args = head.rotations(torch.arange(6)[None]), torch.zeros(1, 6, dtype=torch.long)
    before = aligned_step(onto, e, [f], *args)
    torch.testing.assert_close(aligned_step(head, e, [f], *args), before)
    with torch.no_grad():
        for layer in draft_layers(head).values():
            layer.parametrizations.weight[0].B.normal_().mul_(0.1)
    merged = merge_draft_adapter(onto, learned_adapter(head))
    for (name, x), y in zip(plain_copy(head).state_dict().items(), merged.state_dict().values()):
        torch.testing.assert_close(x, y, msg=name)
    after = aligned_step(head, e, [f], *args)
    torch.testing.assert_close(after, aligned_step(merged, e, [f], *args))
    assert (after - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize('change', [dict(), dict(optimizer='muon'), dict(scaled=False, precision='bf16')], ids=str)
def test_only_the_difference_learns_and_resumes_to_the_bit(tmp_path, task, onto, change):
    config = replace(LORA, **change)
    whole = learning(tmp_path / 'whole', onto, task, config)
    assert len(whole.losses) == 9 and whole.losses[0] != whole.losses[-1]
    for name, p in whole.head.named_parameters():
        own = name.replace('parametrizations.weight.original', 'weight')
        if 'weight.0.' not in name:
            assert not p.requires_grad and torch.equal(p, dict(onto.named_parameters())[own]), name
    for n in (1, 2, 3, 3):
        parts = learning(tmp_path / 'parts', onto, task, config, stop_after=n)
    assert parts.losses == whole.losses and parts.history == whole.history
    for name in ('last', 'best'):
        found = [load_draft_adapter(tmp_path / run / name, onto).adapter for run in ('whole', 'parts')]
        same_adapters(*found)
        assert all(w.B.any() for w in found[0].layers.values())
    state = load_file(tmp_path / 'whole' / 'state.safetensors')
    assert {name.split('.')[-1] for name in state if name.startswith('weight/')} == {'A', 'B'}
    card = (tmp_path / 'whole' / 'last' / 'README.md').read_text()
    assert card.startswith('---\n') and '# Draft adapter for toy' in card and '| rank | 3 |' in card


def test_it_learns(tmp_path, task, onto):
    run = learning(tmp_path, onto, task, replace(LORA, steps=60, lr=1e-2, noise=0.0, eval_every=60, save_every=60))
    first, last = (sum(map(sum, losses)) for losses in (run.losses[:6], run.losses[-6:]))
    assert last < 0.9 * first


def test_a_run_on_another_head_or_for_another_adapter_is_refused(tmp_path, task, onto):
    learning(tmp_path / 'run', onto, task, stop_after=1)
    other = load_adapter(toy_adapter(LM.model, tmp_path / 'other', seed=9), LM.model)
    for head, adapter in ((random_head(LM, seed=4), task), (onto, other)):
        with pytest.raises(DecodingError, match='for another target or other conversations'):
            learning(tmp_path / 'run', head, adapter)
    with pytest.raises(DecodingError, match='holds a run with other settings'):
        learning(tmp_path / 'run', onto, task, replace(LORA, rank=4))


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(rank=0), 'rank is 0: give at least 1'),
        (dict(vocab=9), 'vocab is 9, but the head stays as it is: leave vocab out'),
    ],
)
def test_settings_that_do_not_fit(change, message):
    with pytest.raises(DecodingError, match=message):
        replace(LORA, **change)


def test_there_must_be_an_adapter(tmp_path):
    with pytest.raises(DecodingError, match='there is no adapter to draft for: give the adapter'):
        make_draft_adapter(LM, tmp_path, tmp_path)


# --- merged


def test_a_merged_head_is_a_head(tmp_path, task, onto):
    lm = Model(LM.model, LM.tokenizer, task, 'toy')
    head = save_head(onto, tmp_path / 'head', LM.model, torch.float32)
    draft = DraftAdapter(draft_adapter(onto), adapter_fingerprint(task))
    save_draft_adapter(draft, tmp_path / 'draft', onto, torch.float32)
    write_merged_head(lm, head, tmp_path / 'draft', tmp_path / 'merged')
    found = load_head(tmp_path / 'merged', LM.model).state_dict()
    for name, x in merge_draft_adapter(onto, draft.adapter).state_dict().items():
        torch.testing.assert_close(found[name], x.bfloat16().float())
    lm = Model(LM.model, LM.tokenizer, None, 'toy')
    with pytest.raises(
        DecodingError, match='draft is for a task adapter, but the target has none: give the adapter that it was trained for'
    ):
        write_merged_head(lm, head, tmp_path / 'draft', tmp_path / 'again')
    assert not (tmp_path / 'again').exists()
