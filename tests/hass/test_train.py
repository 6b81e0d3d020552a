"A head's training that is stopped, killed, shared out or refused; and gradients, rates and measurements against their definitions"

import json, math, multiprocessing, os, random, signal, socket, subprocess, sys, time
from dataclasses import asdict, fields, replace
from multiprocessing import forkserver
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from npu_lora_decoding.foundations import files as core
from npu_lora_decoding.hass import config as recipe, train as th, training_step as ts
from npu_lora_decoding.hass.acceptance import Text, measure_acceptance, target_texts
from npu_lora_decoding.hass.alignment import aligned_step
from npu_lora_decoding.hass.chat_data import Example
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.hass.head import DraftHead, draft_rows, target_weights, head_config
from npu_lora_decoding.hass.checkpoint import load_head
from npu_lora_decoding.hass.features import Batch, OnlineFeatures, draft_vocabulary, plan_epoch
from npu_lora_decoding.hass.initialization import plain_copy, random_start
from npu_lora_decoding.hass.config import RECIPES, ADDED, RENAMED, HeadTraining
from npu_lora_decoding.foundations.training import learning_rate
from npu_lora_decoding.hass.train import start_run, train
from npu_lora_decoding.hass.training_step import add_noise, train_step, trained_steps
from helpers.toys import toy_lm
from helpers.heads import CASES, CONFIG, Kept, LM, STORE, TEXTS, begin, child, noting, toy_examples
from helpers.processes import TESTS, environment, import_path

THREADS = torch.get_num_threads()
torch.set_num_threads(
    1
)  # with other threads sums may be cut in other places; what is compared bit for bit runs on one, here and in child processes
torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def fresh():
    "Python's own Ctrl-C, which a shell in the background takes away; no precision left over from another test; one thread"
    AcceleratorState._reset_state()
    torch.set_num_threads(1)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)
    torch.set_num_threads(THREADS)


def weights(run):
    return {n: p.detach().clone() for n, p in run.head.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def contents(file):
    "What a file says: of safetensors the metadata, whose order is random, and the tensors' bytes"
    if file.suffix != '.safetensors':
        return file.read_bytes()
    with open(file, 'rb') as f:
        n = int.from_bytes(f.read(8), 'little')
        return json.loads(f.read(n)), f.read()


def whole_files(folder):
    "All files of a run by name, without what a killed process had begun to write"
    return {
        str(f.relative_to(folder)): contents(f)
        for f in sorted(folder.rglob('*'))
        if f.is_file() and '.part' not in str(f)
    }


def same_files(a, b):
    x = whole_files(a)
    y = whole_files(b)
    assert list(x) == list(y)
    for name in x:
        assert x[name] == y[name], name


# ---- stopped, interrupted, killed


@pytest.mark.parametrize(
    'change',
    [
        dict(),
        dict(optimizer='adamw', row=48, noise=0.0),
        dict(precision='bf16', row=48, scaled=False),
        dict(precision='bf16', optimizer='adamw', start='random'),
    ],
    ids=['muon', 'adamw packed', 'muon bf16 packed', 'adamw bf16'],
)
def test_resume_is_bit_equal(tmp_path, change):
    config = replace(CONFIG, **change)
    whole = train(begin(tmp_path / 'whole', config), TEXTS)
    assert (
        len(whole.losses) == 9
        and whole.losses[0] != whole.losses[-1]
        and [h['step'] for h in whole.history] == [4, 8, 9]
    )
    done = 0
    for n in (1, 1, 2, 3, 1):  # left between two saves, at a save, at a measurement, and before the last step
        done += n
        torch.manual_seed(done)
        random.seed(done)  # the caller's generators have no say
        run = train(begin(tmp_path / 'parts', config), TEXTS, stop_after=n)
        assert run.done == done and run.losses == whole.losses[:done]
    run = train(begin(tmp_path / 'parts', config), TEXTS)
    assert (
        run.losses == whole.losses
        and run.history == whole.history
        and run.best == whole.best
        and same(weights(run), weights(whole))
    )
    assert [len(o.state) for o in run.opts] == [len(o.state) for o in whole.opts]
    tensors = lambda s: {k: torch.as_tensor(v) for k, v in s.items()}
    for a, b in zip(run.opts, whole.opts):
        assert all(same(tensors(x), tensors(y)) for x, y in zip(a.state.values(), b.state.values()))
    same_files(tmp_path / 'whole', tmp_path / 'parts')
    assert sorted(os.listdir(tmp_path / 'parts')) == ['best', 'last', 'log.jsonl', 'state.safetensors']
    again = whole_files(tmp_path / 'parts')
    assert (
        train(begin(tmp_path / 'parts', config), TEXTS).done == 9 and whole_files(tmp_path / 'parts') == again
    )  # a finished run is left as it is


def test_each_setting_has_a_say(tmp_path):
    "Else the tests of resuming would not notice noise, order or optimiser that start afresh"
    first = [
        tuple(map(tuple, train(begin(tmp_path / str(i), replace(CONFIG, steps=3, **change))).losses))
        for i, change in enumerate(
            (
                dict(),
                dict(noise=0.0),
                dict(seed=1),
                dict(row=48),
                dict(optimizer='adamw'),
                dict(scaled=False),
                dict(start='random'),
                dict(own_tokens=True),
                dict(losses=(('nla', 1.0),)),
                dict(losses=(('lk_hybrid', 1.0),)),
            )
        )
    ]
    assert len(set(first)) == len(first)


def ctrl_c_at(monkeypatch, place, n):
    "Send ourselves SIGINT at the nth step: before it, in its forward pass, while weights change, or while the run is saved"
    count = []

    def then(f, before):
        def g(*args, **kwargs):
            if before:
                hit()
            out = f(*args, **kwargs)
            if not before:
                hit()
            return out

        return g

    def hit():
        count.append(place)
        if len(count) == n:
            signal.raise_signal(signal.SIGINT)

    where, name, before = dict(
        before=(ts, 'learning_rate', True),
        forward=(ts, 'distill', False),
        update=(torch.optim.Muon, 'step', False),
        save=(th, 'save_state', True),
    )[place]
    monkeypatch.setattr(where, name, then(getattr(where, name), before))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run that nobody disturbed"
    AcceleratorState._reset_state()
    folder = tmp_path_factory.mktemp('whole') / 'run'
    return folder, train(begin(folder), TEXTS)


@pytest.mark.parametrize('place, n', [('before', 3), ('forward', 5), ('update', 3), ('save', 1)])
def test_ctrl_c(whole, tmp_path, monkeypatch, capsys, place, n):
    with monkeypatch.context() as m:
        ctrl_c_at(m, place, n)
        try:
            run = train(begin(tmp_path), TEXTS)
        except KeyboardInterrupt:
            pytest.fail('Ctrl-C was not caught')
    assert 0 < run.done < 9 and run.losses == whole[1].losses[: run.done]
    printed = capsys.readouterr().out
    assert f'stopped after {run.done} of 9 steps' in printed and 'saved' in printed and 'same command' in printed
    back = begin(tmp_path)
    assert back.done == run.done and same(weights(back), weights(run))  # the finished step is not lost
    train(back, TEXTS)
    assert 'stopped' not in capsys.readouterr().out
    same_files(whole[0], tmp_path)


def test_second_ctrl_c_leaves_at_once(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        rate = ts.learning_rate

        def twice(step, c):
            if step == 5:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return rate(step, c)

        m.setattr(ts, 'learning_rate', twice)
        with pytest.raises(KeyboardInterrupt):
            train(begin(tmp_path), TEXTS)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    back = begin(tmp_path)
    assert back.done == 4
    train(back, TEXTS)
    same_files(whole[0], tmp_path)


@pytest.fixture(scope='module')
def server():
    "Starts processes that are forked from one that has everything imported, and no threads"
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['helpers.heads'])
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PYTHONPATH', import_path())  # it imports by this path, not by ours
        forkserver.ensure_running()
    return context.Process


@pytest.mark.slow
def test_death_at_every_write(tmp_path, server):
    "Before and after each write of a short run: the next call begins, finishes, and leaves what an undisturbed run leaves"
    config = replace(CONFIG, steps=2, save_every=1, eval_every=1)
    train(begin(tmp_path / 'whole', config), TEXTS)
    for die in range(1, 20):
        codes = []
        for before in (True, False):
            folder = tmp_path / f'{die}{before}'
            p = server(target=child, args=(folder, config, die, before))
            p.start()
            p.join(120)
            codes.append(p.exitcode)
            train(begin(folder, config), TEXTS)
            same_files(tmp_path / 'whole', folder)
        if codes == [0, 0]:
            break
        assert codes == [77, 77]
    assert die > 8  # there were two saves of at least four files


def step_in(folder):
    "How far the saved state is"
    try:
        with safe_open(folder / 'state.safetensors', 'pt') as f:
            return int(f.metadata()['step'])
    except OSError:
        return 0


@pytest.mark.slow
def test_kill_9_again_and_again(tmp_path, server):
    config = replace(CONFIG, steps=60, save_every=1, eval_every=20)
    rng = random.Random(0)
    train(begin(tmp_path / 'whole', config), TEXTS)
    seen = []
    for _ in range(4):
        p = server(target=child, args=(tmp_path / 'killed', config))
        was = step_in(tmp_path / 'killed') if seen else 0
        until = time.monotonic() + 60
        p.start()
        while step_in(tmp_path / 'killed') == was and p.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        p.kill()
        p.join()
        assert p.exitcode == -signal.SIGKILL
        seen.append(step_in(tmp_path / 'killed'))
    assert 0 < seen[0] < seen[1] < seen[2] < seen[3] < 60
    train(begin(tmp_path / 'killed', config), TEXTS)
    same_files(tmp_path / 'whole', tmp_path / 'killed')


# ---- several processes


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    launcher = [sys.executable, *'-m torch.distributed.run --nproc-per-node 2 --master-port'.split(), str(port)]
    done = subprocess.run(
        [*launcher, str(TESTS / 'helpers' / 'two_processes.py'), str(tmp_path)],
        env=environment(OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'stopped after 5 of 9' in done.stdout and done.stdout.count('stopped after') == 1  # one process speaks
    for name, config in CASES.items():
        many = [json.loads((tmp_path / f'{name}-{rank}.json').read_text()) for rank in (0, 1)]
        assert (
            many[0]['losses'] == many[1]['losses']
            and many[0]['weights'] == many[1]['weights']
            and many[0]['batches'] != many[1]['batches']
        )
        one = begin(tmp_path / 'one' / name, config)
        norms = noting(one)
        one = train(one, TEXTS)
        # sums of halves round differently in fp32, 1e-7 of a loss; updates of nearly zero gradients (their sign in
        # AdamW, bf16 in Muon) amplify that to some 1e-2 of the rate, 3e-3, each step
        torch.testing.assert_close(torch.tensor(many[0]['losses']), torch.tensor(one.losses), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(many[0]['norms']), torch.stack(norms), rtol=1e-3, atol=0.0)
        assert [h['step'] for h in many[0]['history']] == [h['step'] for h in one.history] and not many[1]['history']
        assert not (tmp_path / f'{name}-1').exists() and list(whole_files(tmp_path / f'{name}-0')) == list(
            whole_files(tmp_path / 'one' / name)
        )
    apart, stopped = (json.loads((tmp_path / f'{name}-0.json').read_text()) for name in ('texts', 'stopped'))
    assert (
        apart['losses'] == stopped['losses'] and apart['weights'] == stopped['weights']
    )  # left after the same step, and bit for bit continued


# ---- one step against its definition


def token_loss(config, q, y, lm_head, vocab):
    "The losses on tokens at every place, from the draft's log-probabilities and all of the target's logits"
    p = y.softmax(-1)
    if config.losses == (('nla', 1.0),):
        p = p if vocab is None else p[:, vocab]  # what lies outside is not accepted
        return -torch.minimum(p, q.exp()).sum(-1).log()
    y = y if vocab is None else y[:, vocab]
    p = y.softmax(-1)
    top = torch.zeros_like(p).scatter(1, p.topk(config.k).indices, 1.0)
    return -(p * q).sum(-1) - (p * q * top).sum(-1)


def literal(head, config, rows, numbers, spread, vocab=None):
    "Mean over all kept places of the loss of each alignment step, text by text, nothing in pieces, and the sum that is differentiated"
    frozen = target_weights(LM.model)
    sums = [0.0] * config.alignment_steps
    count = 0
    lm_head = frozen.lm_head if vocab is None else frozen.lm_head[vocab]
    for i in numbers:
        ids, response, f = rows[i]
        t = len(ids) - 1
        keep = torch.tensor([bool(j + 2 <= t and response[j + 1] and response[j + 2]) for j in range(t)])
        read = [ids[None, 1:]]
        segments = torch.zeros(1, t, dtype=torch.long)
        inputs = [f[None, :t]]
        rotations = head.rotations(torch.arange(t)[None])
        count = count + int(keep.sum())
        for j in range(config.alignment_steps):
            predicted = aligned_step(head, [frozen.embed[x] for x in read], inputs, rotations, segments)
            inputs.append(torch.cat([f[None, :1], predicted.detach()[:, :-1]], 1))
            q = (predicted[0] @ lm_head.T).log_softmax(-1)
            likeliest = q.argmax(-1) if vocab is None else vocab[q.argmax(-1)]
            own = torch.cat([ids[None, 1:2], likeliest[None, :-1]], 1)
            read.append(own if config.own_tokens else ids[None, 1:])
            each = token_loss(config, q, f[1:] @ frozen.lm_head.T, lm_head, vocab) + config.feature * F.smooth_l1_loss(
                predicted[0] / spread, f[1:] / spread, reduction='none'
            ).mean(-1)
            sums[j] = sums[j] + each[keep].sum()
    return [s / count for s in sums], sum(
        w * s / count for w, s in zip(config.step_weights or [1.0] * config.alignment_steps, sums)
    )


def gradients_of(run, step=0):
    "Losses and gradients of one step before they are clipped; no update"
    found = {}
    run.accelerator.clip_grad_norm_ = lambda params, size: found.update(
        {n: p.grad.clone() for n, p in run.head.named_parameters()}
    ) or torch.tensor(1.0)
    for o in run.opts:
        o.step = lambda: None
    return train_step(run, step), found


@pytest.mark.parametrize(
    'change',
    [
        dict(),
        dict(row=48, step_weights=(1.0, 0.5, 0.25)),
        dict(scaled=False, vocab=20),
        dict(own_tokens=True),
        dict(own_tokens=True, vocab=20, row=48),
        dict(losses=(('nla', 1.0),)),
        dict(losses=(('nla', 1.0),), vocab=20),
    ],
    ids=[
        'texts',
        'packed weighted',
        'plain draft vocabulary',
        'own tokens',
        'own tokens packed',
        'nla',
        'nla, vocabulary',
    ],
)
def test_gradients_are_those_of_the_literal_objective(tmp_path, change):
    config = replace(CONFIG, alignment_steps=3, noise=0.0, chunk=7, **change)
    vocab = draft_vocabulary(STORE.examples, 20, 97)[:2] if config.vocab else None
    run = begin(tmp_path, config, vocab=vocab)
    numbers = [i for r in plan_epoch(STORE.lengths, config.tokens, 0, 0, config.row or None)[0] for i in r]
    assert len(numbers) > 2
    plain = plain_copy(run.head).requires_grad_(True)
    losses, total = literal(plain, config, STORE.rows, numbers, run.scales.feature, vocab and vocab[0])
    total.backward()
    got, grads = gradients_of(run)
    torch.testing.assert_close(
        torch.tensor(got), torch.stack(losses).detach(), rtol=1e-5, atol=1e-5
    )  # fp32, other order of sums
    assert len(grads) == len(list(plain.parameters())) == 9
    for name, p in plain.named_parameters():
        inner = f'{name.removesuffix("weight")}parametrizations.weight'
        want = p.grad * run.head.get_submodule(inner)[0].scale if f'{inner}.original' in grads else p.grad
        have = grads.get(f'{inner}.original', grads.get(name))
        assert want.norm() > 0
        torch.testing.assert_close(
            have, want, rtol=1e-3, atol=1e-5 * want.abs().max().item(), msg=lambda m: f'{name}: {m}'
        )  # fp32 sums over some hundred places


def eagle_loss(predicted, feature, lm_head, spread):
    "The loss of every place: cross-entropy of the target's distribution, and the distance of the features"
    entropy = F.cross_entropy(predicted @ lm_head.T, (feature @ lm_head.T).softmax(-1), reduction='none')
    distance = F.smooth_l1_loss(predicted / spread, feature / spread, reduction='none').mean(-1)
    return entropy + 0.05 * distance


def test_next_feature_training_is_eagle_2(tmp_path):
    "n = 1, nothing of ours but the head: causal attention, two losses, torch's AdamW, clipping and the rate written out"
    options = dict(alignment_steps=1, noise=0.0, scaled=False, start='random', optimizer='adamw', steps=6)
    config = replace(CONFIG, losses=(('soft_ce', 1.0),), **options)
    run = train(begin(tmp_path, config))
    head = random_start(DraftHead(head_config(LM.model.config)), 0)
    frozen = target_weights(LM.model)
    losses = []
    opt = torch.optim.AdamW(head.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    steps = [
        [i for r in b for i in r] for epoch in range(6) for b in plan_epoch(STORE.lengths, config.tokens, 0, epoch)
    ]
    for step, numbers in enumerate(steps[:6]):
        total = 0.0
        count = 0
        for ids, response, f in STORE.read(numbers):
            t = len(ids) - 2  # the last slot has nothing to predict
            predicted = head(
                frozen.embed[ids[None, 1:-1]],
                f[None, :t],
                torch.arange(t)[None],
                torch.ones(1, t, t, dtype=torch.bool).tril(),
            )[0][0]
            keep = response[1:-1] & response[2:]
            each = eagle_loss(predicted, f[1:-1], frozen.lm_head, run.scales.feature)
            total = total + each[keep].sum()
            count = count + int(keep.sum())
        losses.append([total.item() / count])
        opt.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        for g in opt.param_groups:
            g['lr'] = 3e-3 * (1.0, 1.0, 0.8, 0.6, 0.4, 0.2)[step]  # one step of warming up
        opt.step()
    torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(losses), rtol=1e-4, atol=1e-4)
    for (n, p), q in zip(head.named_parameters(), run.head.parameters()):
        torch.testing.assert_close(
            p, q, rtol=0, atol=2e-4, msg=lambda m: f'{n}: {m}'
        )  # AdamW moves each weight by up to 3e-3 a step


@pytest.mark.parametrize('steps, warmup', [(1, 0.0), (1, 0.5), (2, 0.9), (10, 0.0), (10, 0.3), (1000, 0.04), (7, 0.99)])
def test_rate_rises_and_falls_and_is_never_zero(steps, warmup):
    c = replace(CONFIG, steps=steps, warmup=warmup, lr=2.0)
    rates = [learning_rate(i, c) for i in range(steps)]
    rise = max(1, int(warmup * steps))
    assert all(0 < r <= 2 for r in rates) and max(rates) == rates[rise - 1] == 2.0
    ups, downs = ([b - a for a, b in zip(x, x[1:])] for x in (rates[:rise], rates[rise:]))
    assert all(math.isclose(u, 2 / rise) for u in ups) and all(math.isclose(d, -2 / (steps - rise)) for d in downs)
    if steps > rise:
        assert math.isclose(rates[-1], 2 / (steps - rise))


@pytest.mark.parametrize('clip', [0.05, 1e3])
def test_clip_and_rate_reach_the_optimiser(tmp_path, clip):
    "All weights together, not each optimiser's alone; a gradient that is small enough stays as it is"
    run = begin(tmp_path, replace(CONFIG, clip=clip))
    norms = []
    for step in range(3):
        free = torch.stack([g.norm() for g in gradients_of(copy_of(run), step)[1].values()]).norm()
        for o in run.opts:
            o.step = lambda: None
        keep = {}
        run.opts[0].step = lambda: keep.update({n: p.grad.norm() for n, p in run.head.named_parameters()})
        train_step(run, step)
        norm = torch.stack(list(keep.values())).norm()
        torch.testing.assert_close(norm, torch.tensor(min(clip, free.item())), rtol=1e-4, atol=0.0)
        assert all(g['lr'] == learning_rate(step, run.config) for o in run.opts for g in o.param_groups) and all(
            p.grad is None for p in run.head.parameters()
        )


def copy_of(run):
    return begin(run.folder / 'none', run.config)


def test_noise_is_uniform_in_units_of_the_spread_and_of_each_text_its_own():
    f = torch.zeros(2, 300, 32)
    spread = torch.linspace(0.5, 8, 32)
    batch = lambda numbers, t=300: Batch(None, f[: len(numbers), :t], None, None, None, numbers)
    u = add_noise(batch(((3,), (4, 5))), 0.2, spread, 'x') / spread
    assert (
        u.abs().max() <= 0.2
        and (u.abs().amax((0, 1)) > 0.19).all()
        and abs(u.mean()) < 0.01
        and not torch.equal(u[0], u[1])
    )
    # as another process sees it: alone, and with less padding
    assert torch.equal(add_noise(batch(((4, 5),), 200), 0.2, spread, 'x') / spread, u[1:, :200])
    assert not torch.equal(add_noise(batch(((4, 5),), 200), 0.2, spread, 'y') / spread, u[1:, :200])


def test_every_text_once_an_epoch(tmp_path):
    run = begin(tmp_path, replace(CONFIG, row=48))
    seen = []
    plans = [plan_epoch(STORE.lengths, 120, 0, e, 48) for e in range(3)]
    for step in range(sum(map(len, plans))):
        seen.append(tuple(map(tuple, run.batch(step).numbers)))
    assert seen == [tuple(map(tuple, b)) for p in plans for b in p] and sorted(
        i for b in seen for r in b for i in r
    ) == sorted(3 * list(range(14)))
    assert tuple(map(tuple, run.batch(1).numbers)) == seen[1]  # also when asked out of order


# ---- what is refused


class Poisoned(Kept):
    "One text whose features are not numbers"

    def __init__(self, store, bad, hidden=False):
        self.__dict__ = dict(store.__dict__, rows=list(store.rows))
        ids, response, f = store.rows[bad]
        f = f.clone()
        f[5] = math.nan
        self.rows[bad] = ids, response & False if hidden else response, f


@pytest.mark.parametrize('hidden', [False, True], ids=['in the loss', 'in the gradient only'])
@pytest.mark.parametrize('row', [0, 48])
def test_nan_is_named_and_nothing_is_spoilt(tmp_path, monkeypatch, row, hidden):
    "A text without places that count adds nothing to the loss, but a gradient that is not a number"
    config = replace(CONFIG, row=row, tokens=240, save_every=1, optimizer='adamw')
    plan = plan_epoch(STORE.lengths, 240, 0, 0, row or None)
    bad = plan[1][-1][-1]
    monkeypatch.setattr(th, 'sample_numbers', lambda store, *_: [i for i in range(14) if i != bad])
    run = begin(tmp_path, config, Poisoned(STORE, bad, hidden))
    with pytest.raises(DecodingError, match=rf'at step 1,.*\b{bad}\b.*: .*(leave|lower)'):
        train(run, TEXTS)
    assert all(p.isfinite().all() for p in run.head.parameters())
    back = begin(tmp_path, config)
    assert back.done == 1 and all(p.isfinite().all() for p in back.head.parameters())
    train(back, TEXTS)  # with the text mended, the run goes on
    clean = train(begin(tmp_path / 'clean', config), TEXTS)
    assert back.losses == clean.losses


def test_targets_may_be_cached(tmp_path):
    """fp32: the same losses and weights as when they are computed again for every batch;
    over epochs, packed, and after a stop with an empty cache
    """
    for name, change in dict(rows=dict(), packed=dict(row=48, tokens=96)).items():
        config = replace(CONFIG, steps=12, **change)
        plain = train(begin(tmp_path / f'{name}1', config), TEXTS)
        kept = train(begin(tmp_path / f'{name}2', replace(config, cache_targets=True)), TEXTS)
        assert (
            len(plain.sizes) > 1
            and set(kept.cached_targets) == set(range(14))
            and plain.losses == kept.losses
            and same(weights(plain), weights(kept))
        )
        train(begin(tmp_path / f'{name}3', replace(config, cache_targets=True)), TEXTS, stop_after=7)
        back = train(begin(tmp_path / f'{name}3', replace(config, cache_targets=True)), TEXTS)
        assert back.losses == kept.losses and same(weights(back), weights(kept))


def test_targets_cached_in_half_precision_do_not_depend_on_when(tmp_path):
    config = replace(CONFIG, steps=12, precision='bf16', cache_targets=True)
    whole = train(begin(tmp_path / 'whole', config), TEXTS)
    train(begin(tmp_path / 'two', config), TEXTS, stop_after=7)
    assert same(weights(train(begin(tmp_path / 'two', config), TEXTS)), weights(whole))


def test_cached_targets_do_not_depend_on_the_batch(tmp_path):
    "Bit for bit, though products of other shapes round in other ways: the same example met alone, in company, and packed"
    found = []
    for tokens, row in ((30, 0), (200, 0), (400, 96)):
        run = begin(
            tmp_path / f'{tokens}{row}', replace(CONFIG, precision='bf16', cache_targets=True, tokens=tokens, row=row)
        )
        for step in range(run._batches(0)):
            batch = run.batch(step)
            batch.features = batch.features.bfloat16()
            run.targets(batch)
        found.append(run.cached_targets)
    assert {x.m.dtype for example in found[0].values() for x in example} == {
        torch.bfloat16
    }  # in fp32 it would take twice the memory
    assert all(
        torch.equal(getattr(a, k), getattr(b, k))
        for other in found[1:]
        for i in range(14)
        for a, b in zip(found[0][i], other[i])
        for k in ('c', 'm', 'rest')
    )


def test_a_loss_that_is_not_linear_has_no_cached_targets(tmp_path):
    run = train(begin(tmp_path, replace(CONFIG, steps=2, cache_targets=True, losses=(('reverse_kl', 1.0),))))
    assert not run.cached_targets


class Noted(GeneralTracker):
    name = 'noted'
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.settings = []
        self.rows = []
        self.ended = False

    @property
    def tracker(self):
        return self.rows

    def store_init_configuration(self, values):
        self.settings.append(values)

    def log(self, values, step, **kwargs):
        self.rows.append((step, values))


def test_a_tracker_hears_every_loss_and_measurement(tmp_path):
    noted = Noted()
    run = train(begin(tmp_path, accelerator=th.new_accelerator(LM, CONFIG, noted)), TEXTS)
    assert noted.settings[0]['steps'] == 9 and noted.settings[0]['losses'] == str(CONFIG.losses)
    heard = [(step, v['loss'], v['lr']) for step, v in noted.rows if 'loss' in v]
    assert heard == [(i + 1, sum(x) / len(x), learning_rate(i, CONFIG)) for i, x in enumerate(run.losses)]
    assert [(step, v['chain_5']) for step, v in noted.rows if 'chain_5' in v] == [
        (h['step'], h['chain_5']) for h in run.history
    ]


@pytest.mark.parametrize(
    'track,message',
    [
        ('tensorbord', "unknown tracker 'tensorbord': use one of .*tensorboard"),
        ('comet_ml', 'comet_ml is not installed: pip install comet_ml'),
    ],
)
def test_a_tracker_that_cannot_track_is_refused(track, message):
    with pytest.raises(DecodingError, match=message):
        th.new_accelerator(LM, CONFIG, track)


def test_sampled_steps():
    "A pure function of the step, in the shares of the weights; all steps where none is drawn"
    assert trained_steps(replace(CONFIG, alignment_steps=3), 5) == [0, 1, 2]
    config = replace(CONFIG, alignment_steps=3, sample_one_step=True, step_weights=(1.0, 0.0, 3.0))
    drawn = [trained_steps(config, i) for i in range(2000)]
    assert drawn == [trained_steps(config, i) for i in range(2000)] != [
        trained_steps(replace(config, seed=1), i) for i in range(2000)
    ] and all(len(d) == 1 for d in drawn)
    assert abs(drawn.count([0]) / 2000 - 0.25) < 0.04 and [1] not in drawn


def test_a_sampled_step_has_the_loss_and_the_gradient_of_that_step(tmp_path, monkeypatch):
    """Against a run of all steps in which only that one has a weight;
    a weight says how often a step is drawn, and not how much it counts then
    """
    taken = {}
    monkeypatch.setattr(
        Accelerator,
        'clip_grad_norm_',
        lambda self, params, clip: taken.update(grad=[p.grad.clone() for p in params]) or torch.tensor(0.0),
    )
    for j in range(3):
        one, every = (
            begin(
                tmp_path / f'{j}{drawn}',
                replace(
                    CONFIG,
                    alignment_steps=3,
                    sample_one_step=drawn,
                    step_weights=tuple((3.0 if drawn else 1.0) * (i == j) for i in range(3)),
                ),
            )
            for drawn in (True, False)
        )
        [loss], grad = train_step(one, 0), taken['grad']
        losses = train_step(every, 0)
        full = taken['grad']
        torch.testing.assert_close((loss, grad), (losses[j], full), rtol=1e-5, atol=1e-7)


def test_a_run_with_sampled_steps_resumes_to_the_bit(tmp_path):
    config = replace(CONFIG, sample_one_step=True, alignment_steps=3)
    whole = train(begin(tmp_path / 'whole', config), TEXTS)
    for stop in (3, 4):
        back = train(begin(tmp_path / 'two', config), TEXTS, stop_after=stop)
    back = train(begin(tmp_path / 'two', config), TEXTS)
    assert back.losses == whole.losses and same(weights(back), weights(whole))


def test_memory_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, 'free_memory', lambda device: 1000)
    with pytest.raises(
        DecodingError,
        match=r'training needs about .* GiB but cpu has 0\.0 GiB free: choose fewer tokens a batch, a smaller chunk or a draft vocabulary',
    ):
        begin(tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_estimate_grows_with_what_costs_memory():
    head = DraftHead(head_config(LM.model.config))
    need = lambda rows=97, longest=64, processes=1, **change: recipe.training_bytes(
        head, replace(HeadTraining(tokens=4096, chunk=512), **change), rows, longest, processes
    )
    base = need()
    for more in (
        dict(tokens=8192),
        dict(chunk=1024),
        dict(rows=970),
        dict(longest=256),
        dict(alignment_steps=5),
        dict(precision='no'),
        dict(optimizer='adamw'),
    ):
        assert need(**more) > base, more
    assert need(processes=2) < base == need(chunk=512, seed=3) and need(tokens=1, longest=64, chunk=10**9) < base
    assert recipe.free_memory(torch.device('cpu')) > 2**20


def test_longest_row_counts_for_memory(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        th,
        'training_bytes',
        lambda head, config, rows, longest, processes=1, cached=0: asked.append((rows, longest)) or 1,
    )
    begin(tmp_path)
    begin(tmp_path, replace(CONFIG, row=200))
    begin(tmp_path, replace(CONFIG, vocab=20), vocab=draft_vocabulary(STORE.examples, 20, 97)[:2])
    assert asked == [(97, max(STORE.lengths)), (97, 200), (20, max(STORE.lengths))]


OTHER = dict(
    steps=10,
    tokens=121,
    alignment_steps=3,
    own_tokens=True,
    sample_one_step=True,
    cache_targets=True,
    feature=0.1,
    losses=(('soft_ce', 1.0),),
    k=6,
    step_weights=(1.0, 0.5),
    vocab=20,
    optimizer='adamw',
    lr=1e-3,
    betas=(0.9, 0.9),
    clip=1.0,
    warmup=0.2,
    noise=0.2,
    start='random',
    scaled=False,
    row=48,
    chunk=100,
    precision='bf16',
    seed=1,
    save_every=3,
    eval_every=5,
)


def test_other_settings_and_other_data_are_refused(tmp_path):
    train(begin(tmp_path), stop_after=1)
    assert set(OTHER) == {f.name for f in fields(HeadTraining)}
    for name, value in OTHER.items():
        AcceleratorState._reset_state()
        with pytest.raises(
            DecodingError,
            match='holds a run with other settings: continue it with the same ones, or train into another folder',
        ):
            begin(tmp_path, replace(CONFIG, **{name: value}))
    AcceleratorState._reset_state()
    with pytest.raises(DecodingError, match='for another target or other conversations: .*another folder'):
        start_run(LM, STORE, tmp_path, CONFIG, data='other')
    assert begin(tmp_path).done == 1


def with_earlier_names(settings):
    "Settings as a version before the renaming saved them"
    earlier = {current: name for name, current in RENAMED.items()}
    return {earlier.get(name, name): value for name, value in settings.items() if name not in ADDED}


def test_a_run_of_an_earlier_version_is_continued_to_the_bit(whole, tmp_path):
    train(begin(tmp_path), TEXTS, stop_after=3)
    file = tmp_path / 'state.safetensors'
    tensors = {name: x.clone() for name, x in load_file(file).items()}
    with safe_open(file, 'pt') as f:
        meta = f.metadata()
    old = with_earlier_names(json.loads(meta['config']))
    assert {'n', 'drawn', 'remember'} <= set(old) and 'alignment_steps' not in old
    save_file(tensors, file, {**meta, 'config': json.dumps(old)})
    with pytest.raises(DecodingError, match='holds a run with other settings'):
        begin(tmp_path, replace(CONFIG, alignment_steps=3))
    AcceleratorState._reset_state()
    back = begin(tmp_path)
    assert back.done == 3
    train(back, TEXTS)
    same_files(whole[0], tmp_path)


def test_damaged_state_is_refused(tmp_path):
    train(begin(tmp_path), stop_after=1)
    file = tmp_path / 'state.safetensors'
    good = file.read_bytes()
    tensors = {k: v.clone() for k, v in load_file(file).items()}  # clones: what is loaded stays mapped to the file
    with safe_open(file, 'pt') as f:
        meta = f.metadata()
    lost = {k: v for k, v in tensors.items() if k != 'weight/layers.0.post_attention_layernorm.weight'}
    half = {k: v[:1] if k.startswith('weight/') else v for k, v in tensors.items()}
    for damage in (
        lambda: file.write_bytes(good[:-7]),
        lambda: file.write_bytes(b''),
        lambda: file.write_bytes(b'x' * 500),
        lambda: save_file(tensors, file),
        lambda: save_file(lost, file, meta),
        lambda: save_file(half, file, meta),
        lambda: save_file(tensors, file, {**meta, 'config': '{'}),
        lambda: save_file(tensors, file, {**meta, 'config': '[]'}),
        lambda: save_file(tensors, file, {k: v for k, v in meta.items() if k != 'step'}),
    ):
        damage()
        with pytest.raises(DecodingError, match=r'state\.safetensors is damaged .*: remove it to begin again'):
            begin(tmp_path)
    file.write_bytes(good)
    assert begin(tmp_path).done == 1


@pytest.mark.parametrize(
    'wrong',
    [
        dict(steps=0),
        dict(tokens=0),
        dict(alignment_steps=0),
        dict(save_every=0),
        dict(eval_every=-1),
        dict(lr=0.0),
        dict(lr=-1.0),
        dict(lr=math.nan),
        dict(lr=math.inf),
        dict(clip=0.0),
        dict(noise=-0.1),
        dict(noise=math.inf),
        dict(warmup=-0.1),
        dict(warmup=1.0),
        dict(alignment_steps=3, step_weights=(1.0, 2.0)),
        dict(alignment_steps=2, step_weights=(1.0, -1.0)),
        dict(alignment_steps=2, step_weights=(0.0, 0.0)),
        dict(alignment_steps=2, step_weights=(1.0, math.nan)),
        dict(optimizer='sgd'),
        dict(precision='fp16'),
        dict(start='zero'),
        dict(losses=(('topp', 1.0),)),
        dict(losses=(('topk', -1.0),)),
        dict(losses=(), feature=0.0),
        dict(feature=-1.0),
        dict(k=0),
        dict(chunk=0),
        dict(betas=(1.0, 0.95)),
        dict(betas=(0.99, 0.95)),
        dict(betas=(0.9,)),
        dict(betas=(0.9, -1.0)),
        dict(vocab=-1),
        dict(alignment_steps=1, own_tokens=True),
        dict(row=-5),
        dict(steps=2.5),
        dict(tokens=10.5),
    ],
    ids=str,
)
def test_bad_settings(wrong):
    with pytest.raises(DecodingError, match=': '):
        HeadTraining(**wrong)


def test_settings_from_a_file_are_the_same():
    c = HeadTraining(alignment_steps=2, step_weights=(1.0, 0.5), losses=(('topk', 0.5),))
    assert HeadTraining(**json.loads(json.dumps(asdict(c)))) == c
    for name, recipe in RECIPES.items():
        assert HeadTraining(**recipe).alignment_steps in (1, 3), name
    assert (
        RECIPES['eagle2'] == dict(alignment_steps=1, losses=(('soft_ce', 1.0),))
        and HeadTraining(**RECIPES['hass']) == HeadTraining()
    )


# ---- what is measured and written


@pytest.fixture(scope='module')
def written():
    "A toy, and what it writes greedily: examples and held-out texts"
    lm = toy_lm(vocab=76)
    texts = target_texts(lm, [f'{a}{b}' for a in 'abcdefgh' for b in 'uvwxyz'], new_tokens=16, batch=48)
    return lm, Kept(lm, [Example(t.ids, torch.arange(len(t.ids)) >= t.prompt) for t in texts[:40]]), texts[40:]


LEARNING = replace(CONFIG, steps=60, tokens=256, start='random', eval_every=60, save_every=60, lr=1e-2, noise=0.0)


def test_a_head_learns(written, tmp_path):
    lm, store, held = written
    run = start_run(lm, store, tmp_path, LEARNING)
    first = th.evaluate(run, held, None)
    last = train(run, held).history[-1]
    assert (
        sum(run.losses[-1]) < sum(run.losses[0])
        and last['chain_3'] > first['chain_3'] + 0.2
        and last['chain_5'] > first['chain_5'] + 0.2
    )
    assert last['rates'][0] > first['rates'][0] + 0.05 and last['step'] == 60


def test_recorded_acceptance_is_that_of_the_saved_head(written, tmp_path):
    lm, store, held = written
    tree = dict(depth=2, top_k=3, nodes=6)
    run = train(
        start_run(
            lm,
            store,
            tmp_path,
            replace(LEARNING, precision='bf16', steps=45, eval_every=20, vocab=60),
            vocab=draft_vocabulary(store.examples, 60, 76)[:2],
        ),
        held,
        tree=tree,
    )
    log = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert (
        [r['losses'] for r in log[:45]] == run.losses
        and [r['step'] for r in log[:45]] == list(range(1, 46))
        and log[45:] == run.history
        and [h['step'] for h in run.history] == [20, 40, 45]
    )
    best = max(run.history, key=lambda h: h['chain_5'])
    frozen = target_weights(lm.model)  # the first of equals
    assert best['chain_5'] > 1.1  # else any head would do
    for name, row in (('last', run.history[-1]), ('best', best)):
        head = load_head(tmp_path / name, lm.model, torch.bfloat16)
        assert head.vocab.equal(run.head.vocab)
        embed, rows = frozen.embed.bfloat16(), draft_rows(head, frozen).bfloat16()
        found = measure_acceptance(head, embed, rows, held, vocab=head.vocab, chain=(3, 5), tree=tree)
        assert [found[n].tau for n in ('chain 3', 'chain 5', 'tree 6')] == [
            row[n] for n in ('chain_3', 'chain_5', 'tree_6')
        ] and list(found['chain 5'].rates) == row['rates']
    assert math.isclose(run.history[0]['loss'], sum(map(sum, run.losses[:20])) / sum(map(len, run.losses[:20])))
    text = (tmp_path / 'last' / 'README.md').read_text()
    assert (
        f'after step 45: chain of 3 {run.history[-1]["chain_3"]:.2f}' in text
        and '| lr | 0.01 |' in text
        and 'base_model: toy' in text
    )


def test_texts_that_are_learnt_from_are_measured_apart(written, tmp_path, capsys):
    lm, store, held = written
    noted = Noted()
    of = [
        Text(e.ids, int(e.response.nonzero()[0, 0]), f) for e, (_, _, f) in zip(store.examples[:2], store.read([0, 1]))
    ]
    two = Kept(lm, store.examples[:2])  # so few that they are learnt by heart
    run = train(
        start_run(
            lm, two, tmp_path, replace(LEARNING, eval_every=30), accelerator=th.new_accelerator(lm, LEARNING, noted)
        ),
        held,
        learnt=of,
    )
    last = run.history[-1]
    assert (
        last['learnt_chain_5'] > last['chain_5'] + 0.5
        and th.evaluate(run, held, None, held)['learnt_chain_5'] == last['chain_5']
    )
    assert [v['learnt_chain_5'] for _, v in noted.rows if 'chain_5' in v] == [h['learnt_chain_5'] for h in run.history]
    sentence = f'on training text, chain of 5 {last["learnt_chain_5"]:.2f}'
    assert sentence in capsys.readouterr().out and sentence in (tmp_path / 'last' / 'README.md').read_text()


def test_best_is_the_best_and_stays_it(tmp_path, monkeypatch):
    "Better, best, as good, worse: also when the run is left between them"
    taus = {2: 1.2, 4: 1.5, 6: 1.5, 8: 1.1, 9: 1.3}
    seen = {}

    def scripted(run, texts, tree, learnt):
        seen[run.done] = plain_copy(run.head).fc.weight
        return dict(step=run.done, loss=1.0, rates=[None], chain_3=1.0, chain_5=taus[run.done])

    monkeypatch.setattr(th, 'evaluate', scripted)
    config = replace(CONFIG, eval_every=2)
    for n in (5, 2, 2):
        run = train(begin(tmp_path, config), TEXTS, stop_after=n)
    assert run.done == 9 and run.best == 1.5 and [h['chain_5'] for h in run.history] == list(taus.values())
    for name, step in (('best', 4), ('last', 9)):
        assert load_file(tmp_path / name / 'model.safetensors')['fc.weight'].equal(seen[step].bfloat16())
    assert (
        'chain of 5 1.50' in (tmp_path / 'best' / 'README.md').read_text()
        and 'chain of 5 1.30' in (tmp_path / 'last' / 'README.md').read_text()
    )


def test_target_is_left_as_it_was(tmp_path):
    lm = toy_lm()
    flags = [p.requires_grad_(i % 2 == 0).requires_grad for i, p in enumerate(lm.model.parameters())]
    was = {k: v.clone() for k, v in lm.model.state_dict().items()}
    train(start_run(lm, OnlineFeatures(lm, toy_examples(6)), tmp_path, replace(CONFIG, steps=3)), TEXTS)
    assert (
        [p.requires_grad for p in lm.model.parameters()] == flags
        and all(p.grad is None for p in lm.model.parameters())
        and not lm.model.training
    )
    assert all(torch.equal(v, was[k]) for k, v in lm.model.state_dict().items())


def test_going_on_from_a_head(tmp_path):
    "The head that is given stays as it is, can be given twice, and brings its draft vocabulary"
    vocab = draft_vocabulary(STORE.examples, 30, 97)[:2]
    train(begin(tmp_path / 'a', replace(CONFIG, steps=3), vocab=vocab))
    head = load_head(tmp_path / 'a' / 'last', LM.model, torch.float32).requires_grad_(False)
    was = {k: v.clone() for k, v in head.state_dict().items()}
    losses = []
    for name in 'bc':
        run = begin(tmp_path / name, init=head)
        now = plain_copy(run.head)
        for k, v in now.state_dict().items():
            torch.testing.assert_close(v, was[k], rtol=1e-6, atol=0)  # divided by the scales and multiplied again
        assert now.vocab.equal(vocab[0]) and (run.done, run.losses) == (0, [])
        losses.append(train(run, stop_after=2).losses)
        assert (
            head.state_dict().keys() == was.keys()
            and all(torch.equal(v, was[k]) for k, v in head.state_dict().items())
            and not any(p.requires_grad for p in head.parameters())
        )
    assert losses[0] == losses[1]
    assert begin(tmp_path / 'b', init=head).done == 2  # a run that is under way goes on where it was


def test_two_precisions_in_one_process(tmp_path):
    for precision in ('bf16', 'no', 'bf16'):
        assert begin(tmp_path / precision, replace(CONFIG, precision=precision)).frozen.embed.dtype == (
            torch.float32 if precision == 'no' else torch.bfloat16
        )


def test_sample_is_random_bounded_and_repeatable():
    class Lengths:
        lengths = [10] * 100

    a = th.sample_numbers(Lengths, 0, 205)
    assert (
        len(a) == len(set(a)) == 20
        and a == th.sample_numbers(Lengths, 0, 205) != th.sample_numbers(Lengths, 1, 205)
        and a != list(range(20))
    )
    assert len(th.sample_numbers(Lengths, 0, 1)) == 1 and sorted(th.sample_numbers(Lengths)) == list(range(100))
