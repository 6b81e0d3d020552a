"Training that is stopped, killed or refused: nothing is lost, and the base is never touched"

import copy, json, os, random, signal, subprocess, sys, time, warnings
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from npu_lora_decoding.cold import expert as ft
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.cold.expert import (
    FinetuneConfig,
    answer_loss,
    batch_of_step,
    collate,
    finetune,
    learning_rate,
    tokenize,
)
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.foundations.adapters import fingerprint, load_adapter, toy_model
from npu_lora_decoding.foundations.models import FAMILIES
from npu_lora_decoding.decoding.loop import load
from helpers.processes import environment
from helpers.toys import toy_folder, toy_items, toy_lm

CONFIG = FinetuneConfig(steps=12, batch=4, r=2, alpha=4, dropout=0.1, save_every=3, snapshots=(4, 8))
ITEMS = toy_items()


def weights_of(file):
    "A safetensors file: its weights as bytes, and its metadata, whose order is random"
    with open(file, 'rb') as f:
        n = int.from_bytes(f.read(8), 'little')
        head = json.loads(f.read(n))
        return head, f.read()


def same_run(a, b):
    "Every adapter of both runs is equal, to the bit"
    names = sorted(str(f.relative_to(a)) for f in a.rglob('adapter_model.safetensors'))
    assert names == [
        'adapter-4/adapter_model.safetensors',
        'adapter-8/adapter_model.safetensors',
        'adapter/adapter_model.safetensors',
    ]
    for n in names:
        assert weights_of(a / n) == weights_of(b / n), n


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run that nobody disturbed: folder, losses"
    folder = tmp_path_factory.mktemp('whole') / 'run'
    return folder, finetune(toy_lm(), ITEMS, folder, CONFIG)


def test_dropout_is_at_work(whole, tmp_path):
    "Else the tests of resuming would not notice a generator that starts afresh"
    assert finetune(toy_lm(), ITEMS, tmp_path, replace(CONFIG, dropout=0.0)) != whole[1]


@pytest.mark.parametrize('stops', [(5,), (1, 1, 9), (3, 3, 3)])
def test_resume_is_bit_equal(whole, tmp_path, stops):
    done = 0
    for n in stops:
        done += n
        assert finetune(toy_lm(), ITEMS, tmp_path, CONFIG, stop_after=n) == whole[1][:done]
        assert not (tmp_path / 'adapter').exists()
    torch.manual_seed(99)  # the caller's generator has no say
    assert finetune(toy_lm(), ITEMS, tmp_path, CONFIG) == whole[1]
    same_run(whole[0], tmp_path)


def test_finished_run_is_left_as_it_is(whole, tmp_path):
    for _ in range(2):
        assert finetune(toy_lm(), ITEMS, tmp_path, CONFIG) == whole[1]
    same_run(whole[0], tmp_path)


def test_adapter_files_are_equal_bytes(whole, tmp_path):
    for i in range(6):
        finetune(toy_lm(), ITEMS, tmp_path / str(i), replace(CONFIG, steps=1, snapshots=()))
    assert len({(tmp_path / str(i) / 'adapter/adapter_model.safetensors').read_bytes() for i in range(6)}) == 1


@pytest.mark.slow
def test_kill(whole, tmp_path):
    "kill -9 in the middle of training; the next call picks up the last save"
    code = (
        'import time, torch; torch.set_num_threads(1)\n'
        'from npu_lora_decoding.cold import expert as ft\nfrom helpers.toys import *\n'
        'rate = ft.learning_rate\n'
        'def slow(*args): time.sleep(0.2); return rate(*args)\n'  # so that we are in time
        'ft.learning_rate = slow\n'
        f'ft.finetune(toy_lm(), toy_items(), {str(tmp_path)!r}, ft.{CONFIG!r})'
    )
    child = subprocess.Popen(
        [sys.executable, '-c', code], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        until = time.monotonic() + 120
        while not (tmp_path / 'state.safetensors').exists() and child.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        child.kill()
        _, err = child.communicate()
    assert child.returncode == -signal.SIGKILL, err.decode()[-2000:]
    assert not (tmp_path / 'adapter').exists()
    with safe_open(tmp_path / 'state.safetensors', 'pt') as f:
        assert 3 <= int(f.metadata()['step']) < 12
    assert finetune(toy_lm(), ITEMS, tmp_path, CONFIG) == whole[1]
    same_run(whole[0], tmp_path)


@pytest.fixture(autouse=True)
def sigint():
    "Python's own handler: a shell that starts pytest in the background has SIGINT ignored"
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def ctrl_c_at(monkeypatch, place, n):
    "Send ourselves SIGINT in the nth call of `place`: before the step, after its forward pass, or while its weights change"
    calls = []

    def interrupt():
        calls.append(place)
        if len(calls) == n:
            signal.raise_signal(signal.SIGINT)

    rate = ft.learning_rate
    loss = ft.answer_loss
    adam = torch.optim.AdamW.step

    def before(*args):
        interrupt()
        return rate(*args)

    def after(*args):
        out = loss(*args)
        interrupt()
        return out

    def update(self, *args):
        out = adam(self, *args)
        interrupt()
        return out

    if place == 'before':
        monkeypatch.setattr(ft, 'learning_rate', before)
    if place == 'forward':
        monkeypatch.setattr(ft, 'answer_loss', after)
    if place == 'update':
        monkeypatch.setattr(torch.optim.AdamW, 'step', update)


def run(*args, **kwargs):
    "finetune, with a Ctrl-C that it lets through turned into a failure: pytest itself would stop"
    try:
        return finetune(*args, **kwargs)
    except KeyboardInterrupt:
        pytest.fail('Ctrl-C was not caught')


@pytest.mark.parametrize('place', ['before', 'forward', 'update'])
def test_ctrl_c(whole, tmp_path, monkeypatch, capsys, place):
    lm = toy_lm()
    with monkeypatch.context() as m:
        ctrl_c_at(m, place, 6)
        losses = run(lm, ITEMS, tmp_path, CONFIG)
    assert (
        5 <= len(losses) <= 6 and losses == whole[1][: len(losses)]
    )  # the step under way may be finished, or not count
    assert capsys.readouterr().out.endswith(
        f'\nstopped after {len(losses)} of 12 steps; the run is saved: give the same command to continue\n'
    )
    with safe_open(tmp_path / 'state.safetensors', 'pt') as f:
        assert int(f.metadata()['step']) == len(losses)
    assert not (tmp_path / 'adapter').exists()
    assert finetune(lm, ITEMS, tmp_path, CONFIG) == whole[1]
    same_run(whole[0], tmp_path)


def test_ctrl_c_before_the_first_step(tmp_path, monkeypatch, capsys):
    ctrl_c_at(monkeypatch, 'before', 1)
    run(toy_lm(), ITEMS, tmp_path / 'run', CONFIG)
    assert ('the run is saved' in capsys.readouterr().out) == (tmp_path / 'run/state.safetensors').exists()


# --- what is refused


def sentence(call, folder):
    with pytest.raises(DecodingError) as e:
        call()
    return str(e.value).replace(str(folder), 'FOLDER')


@pytest.fixture
def begun(tmp_path):
    finetune(toy_lm(), ITEMS, tmp_path / 'begun', CONFIG, stop_after=3)
    return tmp_path / 'begun'


@pytest.mark.parametrize(
    'other',
    [
        dict(lr=1e-2),
        dict(steps=13),
        dict(batch=5),
        dict(r=3),
        dict(alpha=8),
        dict(dropout=0.0),
        dict(targets='.*q_proj'),
        dict(warmup=0.5),
        dict(max_tokens=99),
        dict(seed=1),
        dict(snapshots=()),
    ],
    ids=str,
)
def test_other_settings_are_refused(begun, other):
    before = (begun / 'state.safetensors').read_bytes()
    message = sentence(lambda: finetune(toy_lm(), ITEMS, begun, replace(CONFIG, **other)), begun)
    assert (
        message
        == 'FOLDER holds a run with other settings: continue it with the same ones, or train into another folder.'
    )
    assert (begun / 'state.safetensors').read_bytes() == before


def cut(begun):
    (begun / 'state.safetensors').write_bytes((begun / 'state.safetensors').read_bytes()[:500])


@pytest.mark.parametrize(
    'go',
    [
        pytest.param(lambda f: finetune(toy_lm(seed=5), ITEMS, f, CONFIG), id='another base'),
        pytest.param(lambda f: finetune(toy_lm(hidden_size=64), ITEMS, f, CONFIG), id='another shape'),
        pytest.param(lambda f: finetune(toy_lm(), toy_items(40)[16:], f, CONFIG), id='other items'),
        pytest.param(lambda f: (cut(f), finetune(toy_lm(), ITEMS, f, CONFIG)), id='damaged state'),
        pytest.param(
            lambda f: finetune(toy_lm(), ITEMS, f / 'new', replace(CONFIG, targets='nonesuch')), id='unknown targets'
        ),
        pytest.param(lambda f: finetune(toy_lm(), ITEMS, f / 'new', replace(CONFIG, batch=0)), id='no batch'),
        pytest.param(lambda f: finetune(toy_lm(), ITEMS, f / 'new', replace(CONFIG, r=0)), id='no rank'),
    ],
)
def test_more_is_refused(begun, go):
    sentence(lambda: go(begun), begun)


def test_stop_after_nothing(tmp_path):
    assert finetune(toy_lm(), ITEMS, tmp_path, CONFIG, stop_after=0) == []


def test_too_few_items(tmp_path):
    assert (
        sentence(lambda: finetune(toy_lm(), ITEMS[:3], tmp_path / 'run', CONFIG), tmp_path)
        == 'only 3 items fit into 320 tokens: give at least 4, or raise max_tokens.'
    )
    assert (
        sentence(lambda: finetune(toy_lm(), ITEMS, tmp_path / 'run', replace(CONFIG, max_tokens=5)), tmp_path)
        == 'only 0 items fit into 5 tokens: give at least 4, or raise max_tokens.'
    )
    assert not (tmp_path / 'run').exists()


def poison_at(lm, monkeypatch, n):
    def rate(step, config):
        if step == n:
            lm.model.model.norm.weight.data[0] = float('nan')
        return learning_rate(step, config)

    monkeypatch.setattr(ft, 'learning_rate', rate)


@pytest.mark.parametrize('step', [0, 7])
def test_nan_loss_stops_at_its_step(tmp_path, monkeypatch, step):
    lm = toy_lm()
    poison_at(lm, monkeypatch, step)
    assert (
        sentence(lambda: finetune(lm, ITEMS, tmp_path, CONFIG), tmp_path)
        == f'the loss is nan at step {step}: train again with a lower learning rate.'
    )
    assert (tmp_path / 'state.safetensors').exists() == (step > 0) and not (tmp_path / 'adapter').exists()
    if step:
        assert all(x.isfinite().all() for x in load_file(tmp_path / 'state.safetensors').values())


# --- what is left alone


def trace(lm):
    "Everything training might leave behind in a model"
    m = lm.model
    return (
        [
            (n, type(x), x.training, len(x._forward_hooks), len(x._forward_pre_hooks), 'forward' in vars(x))
            for n, x in m.named_modules()
        ],
        [(n, p.requires_grad, p.dtype, p.grad) for n, p in m.named_parameters()],
        sorted(vars(m)),
    )


def error(*args):
    raise RuntimeError('out of memory')


@pytest.mark.parametrize('how', ['success', 'exception', 'ctrl-c', 'inside the loss'])
@pytest.mark.parametrize('family', ['llama', 'gemma2'])
def test_base_is_untouched(tmp_path, monkeypatch, how, family):
    lm = toy_lm(family)
    before = trace(lm)
    bits = copy.deepcopy(lm.model.state_dict())
    with monkeypatch.context() as m:
        if how == 'exception':
            m.setattr(ft, 'learning_rate', error)
        if how == 'ctrl-c':
            ctrl_c_at(m, 'before', 3)
        if how == 'inside the loss':
            m.setattr(F, 'cross_entropy', error)
        if how in ('success', 'ctrl-c'):
            run(lm, ITEMS, tmp_path, replace(CONFIG, targets='all-linear'))
        else:
            with pytest.raises(RuntimeError, match='out of memory'):
                finetune(lm, ITEMS, tmp_path, CONFIG)
    assert not [n for n, x in lm.model.named_modules() if 'peft' in type(x).__module__ or 'lora' in n]
    assert trace(lm) == before
    for (n, x), (k, y) in zip(lm.model.state_dict().items(), bits.items()):
        assert n == k and torch.equal(x, y), n


def test_generators_of_the_caller_are_untouched(tmp_path):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    finetune(toy_lm(), ITEMS, tmp_path, replace(CONFIG, steps=2))
    assert (
        torch.equal(torch.get_rng_state(), before[0])
        and random.getstate() == before[1]
        and np.random.get_state()[1].tolist() == before[2]
    )


# --- what is saved


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A model that came from a folder, hence knows an absolute path, and the adapter trained on it"
    root = tmp_path_factory.mktemp('trained')
    lm = load(toy_folder(root / 'model'), device='cpu')
    assert str(root) in lm.model.name_or_path
    finetune(lm, ITEMS, root / 'run', replace(CONFIG, lr=0.05), card='# A card')
    return lm, root


def test_saved_adapter_is_peft_s_and_ours(trained):
    lm, root = trained
    ids = torch.randint(3, 76, (1, 12))
    with torch.no_grad():
        base = lm.model(ids).logits
        want = PeftModel.from_pretrained(copy.deepcopy(lm.model), root / 'run/adapter').eval()(ids).logits
        with AdapterBank(lm.model, [load_adapter(root / 'run/adapter', lm.model)]).attached([0]):
            got = lm.model(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # fp32
    assert not torch.allclose(got, base, atol=1e-2), 'the adapter learned nothing, so this test proved nothing'


def test_saved_adapter_knows_its_base(trained):
    lm, root = trained
    with safe_open(root / 'run/adapter/adapter_model.safetensors', 'pt') as f:
        meta = f.metadata()
    assert meta['format'] == 'pt' and json.loads(meta['base_fingerprint']) == fingerprint(lm.model)
    with pytest.raises(DecodingError, match='was trained on another base model'):
        load_adapter(root / 'run/adapter', toy_model(seed=1))
    assert json.loads((root / 'run/adapter/adapter_config.json').read_text())['base_model_name_or_path'] == 'model'
    assert (root / 'run/adapter/README.md').read_text() == '# A card'


def test_no_path_is_saved(trained):
    lm, root = trained
    files = [f for f in (root / 'run').rglob('*') if f.is_file()]
    assert len(files) == 10  # the state, and three files an adapter
    for f in files:
        for path in (root, Path.cwd(), Path.home(), sys.prefix):
            assert str(path).encode() not in f.read_bytes(), f'{f} holds {path}'


def test_saving_asks_nobody(tmp_path):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        finetune(toy_lm(), ITEMS, tmp_path, replace(CONFIG, steps=1))
    assert not [str(x.message) for x in w if 'peft' in x.filename]


# --- batches and their loss

sizes = st.integers(1, 16).flatmap(
    lambda b: st.tuples(st.just(b), st.lists(st.integers(1, 300), min_size=b, max_size=200))
)


@settings(max_examples=200)
@given(sizes, st.integers(0, 3), st.integers(0, 10**6), st.integers(1, 25))
def test_batches(size, epoch, seed, window):
    batch, lengths = size
    n = len(lengths) // batch
    given_ = list(lengths)
    state = random.getstate()
    steps = [batch_of_step(lengths, epoch * n + k, batch, seed, window) for k in range(n)]
    assert all(len(s) == batch for s in steps)
    flat = sum(steps, [])
    assert len(set(flat)) == len(flat) and set(flat) <= set(range(len(lengths)))  # no item twice
    assert (
        steps[::-1] == [batch_of_step(list(given_), epoch * n + k, batch, seed, window) for k in reversed(range(n))]
        and lengths == given_
        and random.getstate() == state
    )


def test_epochs_and_seeds_differ():
    lengths = [1 + i % 7 for i in range(64)]
    orders = [
        tuple(map(tuple, (batch_of_step(lengths, 16 * e + k, 4, s) for k in range(16))))
        for e in range(3)
        for s in range(3)
    ]
    assert len(set(orders)) == 9


def test_every_epoch_and_window_shuffles_its_batches_again():
    "With one window over all items and no two of one length, the batches are the same sets in every epoch: only their order can differ"
    lengths = list(range(64))
    epochs = [[tuple(batch_of_step(lengths, 16 * e + k, 4)) for k in range(16)] for e in range(4)]
    assert len({frozenset(e) for e in epochs}) == 1 and len({tuple(e) for e in epochs}) == 4
    ranks = lambda w: tuple(sorted(range(4), key=lambda k: batch_of_step(lengths, 4 * w + k, 4, window=4)[0]))
    assert len({ranks(w) for w in range(4)}) > 1  # nor the same order in every window


def test_batches_hold_items_of_like_length():
    lengths = random.Random(0).choices(range(10, 300), k=640)
    spread = lambda steps: sum(max(lengths[i] for i in s) - min(lengths[i] for i in s) for s in steps)
    means = [sum(lengths[i] for i in batch_of_step(lengths, k, 16)) for k in range(20)]
    assert means != sorted(means)  # but not from short to long
    rng = random.Random(1)
    assert spread([batch_of_step(lengths, k, 16) for k in range(40)]) < 0.2 * spread(
        [rng.sample(range(640), 16) for _ in range(40)]
    )


def test_every_item_has_its_turn():
    seen = {i for step in range(400) for i in batch_of_step(list(range(47)), step, 16)}
    assert seen == set(range(47))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=5))
def test_collate(lengths):
    "Answers share a column, positions count real tokens (rotary models would not notice a shift), nothing is lost"
    pairs = [(torch.arange(1, p + 1), torch.arange(21, a + 21)) for p, a in lengths]
    b = collate(pairs, 99)
    column = max(p for p, _ in lengths)
    width = max(a for _, a in lengths)
    for (p, a), ids, mask, pos, labels in zip(lengths, b['ids'], b['mask'].bool(), b['positions'], b['labels']):
        assert (
            ids[mask].tolist() == [*range(1, p + 1), *range(21, a + 21)]
            and ids[column] == 21
            and (ids[~mask] == 99).all()
        )
        assert pos[mask].tolist() == list(range(p + a)) and pos.min() == 0
        assert labels.tolist() == [*range(21, a + 21)] + [-100] * (width - a)


SOFT = dict(
    gemma2=dict(final_logit_softcapping=2.0, attn_logit_softcapping=2.0, sliding_window=6),
    gemma3_text=dict(sliding_window=6),
    mistral=dict(sliding_window=6),
)


@pytest.mark.parametrize('family', FAMILIES)
def test_batch_loss_equals_loop(family):
    "Padding, and a head that sees the answers only, change nothing; the reference knows neither"
    lm = toy_lm(family, **SOFT.get(family, {}))
    pairs = [tokenize(lm, i) for i in ITEMS[:6]] + [(torch.tensor([5]), torch.tensor([6]))]
    assert len({len(p) for p, _ in pairs}) > 1 and len({len(a) for _, a in pairs}) > 1
    total = n = 0
    for p, a in pairs:
        logits = lm.model(torch.cat([p, a])[None]).logits[0, len(p) - 1 : -1]
        total = total + F.cross_entropy(logits, a, reduction='sum')
        n = n + len(a)
        if family == 'gemma2':
            assert 1.9 < logits.abs().max() <= 2  # the cap bites
    torch.testing.assert_close(
        answer_loss(lm.model, collate(pairs, lm.pad_id)), total / n, rtol=1e-5, atol=1e-5
    )  # fp32
    torch.testing.assert_close(
        answer_loss(lm.model, collate(pairs, 50)), total / n, rtol=1e-5, atol=1e-5
    )  # whatever fills the gaps


def test_answers_end_their_turn():
    lm = toy_lm()
    for prompt, answer in (tokenize(lm, i) for i in ITEMS):
        assert answer[-1] == 2 and (answer == 2).sum() == 1 and len(prompt) > 5


def test_rate_rises_and_falls():
    config = FinetuneConfig(steps=100, lr=1.0, warmup=0.1)
    rates = [learning_rate(s, config) for s in range(100)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and rates[9] == 1.0 and 0 < rates[-1] < 0.02
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert all(0 < learning_rate(s, FinetuneConfig(steps=n)) for n in (1, 2, 3) for s in range(n))


@pytest.mark.parametrize('scale', [1e-3, 1.0, 50.0])
def test_large_gradients_are_clipped_and_small_ones_are_left(monkeypatch, scale):
    "All weights together, to a norm of 1, before the optimizer sees them"
    lm = toy_lm()
    model = ft._peft_model(lm, replace(CONFIG, dropout=0.0))
    loss_of = ft.answer_loss
    monkeypatch.setattr(ft, 'answer_loss', lambda *args: scale * loss_of(*args))
    batch = collate([tokenize(lm, item) for item in ITEMS[:4]], lm.pad_id)
    weights = [p for p in model.parameters() if p.requires_grad]
    free = torch.stack([g.norm() for g in torch.autograd.grad(ft.answer_loss(model, batch), weights)]).norm()
    norms = []
    optimizer = torch.optim.SGD(weights)
    optimizer.step = lambda: norms.append(torch.stack([p.grad.norm() for p in weights]).norm())
    ft.train_step(model, optimizer, batch, 1e-3)
    torch.testing.assert_close(norms[0], free.clamp(max=1.0), rtol=1e-4, atol=0.0)
    assert scale < 50 or free > 1
