"Features of the target: padding, adapters, shards that survive kills and full disks, the slots of a batch and the plan of an epoch"

import errno, json, os, random, resource, shutil, signal
from collections import Counter
from types import SimpleNamespace
import psutil, pytest, torch
from hypothesis import given, strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from npu_lora_decoding.hass import features
from npu_lora_decoding.foundations.adapters import LoraWeights, load_adapter, toy_adapter, toy_model
from npu_lora_decoding.hass.alignment import aligned_step, next_inputs
from npu_lora_decoding.hass.chat_data import Example
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.hass.losses import distill
from npu_lora_decoding.hass.head import DraftHead, check_vocab, target_weights, head_config
from npu_lora_decoding.hass.features import (
    Batch,
    HiddenStateFiles,
    OnlineFeatures,
    StoredFeatures,
    batch_of,
    check_room,
    data_hash,
    draft_vocabulary,
    plan_epoch,
    shards_bytes,
    target_features,
    write_features,
)
from npu_lora_decoding.decoding.loop import LM
from helpers.toys import toy_lm
from helpers.heads import LENGTHS, examples_of


def ids_of(examples):
    return [e.ids for e in examples]


def naive(model, texts):
    with torch.no_grad():
        return [
            model(x[None], output_hidden_states=True).hidden_states[-1][0] for x in texts
        ]  # behind the norm: what the LM head reads


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # fp32, sums of up to 64 products in another order


@pytest.fixture
def lm():
    return toy_lm()


# ---- features


@pytest.mark.parametrize('family', ['llama', 'qwen2', 'qwen3', 'mistral', 'gemma2'])
@pytest.mark.parametrize('batch', [1, 3, 64])
def test_padded_equals_one_by_one(family, batch):
    lm = toy_lm(family)
    examples = examples_of()
    for got, want in zip(target_features(lm, ids_of(examples), batch), naive(lm.model, ids_of(examples)), strict=True):
        close(got, want)


def test_features_do_not_keep_the_batch(lm):
    for f, e in zip(target_features(lm, ids_of(examples_of())), examples_of()):
        assert f.untyped_storage().nbytes() == len(e.ids) * 32 * 4


def test_an_adapter_is_the_targets(lm, tmp_path):
    from peft import PeftModel

    folder = toy_adapter(lm.model, tmp_path)
    texts = ids_of(examples_of())
    before = target_features(lm, texts)
    tuned = LM(lm.model, lm.tokenizer, load_adapter(folder, lm.model))
    peft = PeftModel.from_pretrained(toy_model(), folder)
    for got, want, base in zip(target_features(tuned, texts), naive(peft.base_model.model, texts), before):
        close(got, want)
        assert (got - base).abs().mean() > 0.1
    assert all(torch.equal(a, b) for a, b in zip(target_features(lm, texts), before))  # nothing is left attached


# ---- the hash


def test_hash_sees_every_weight(lm):
    "One bit of one number in each parameter, norms and embeddings too"
    examples = examples_of()
    seen = set()
    first = data_hash(lm, examples)
    for name, p in lm.model.named_parameters():
        flat = p.data.view(-1).view(torch.int32)
        flat[-1] ^= 1
        seen.add(data_hash(lm, examples))
        flat[-1] ^= 1
    assert len(seen) == len(list(lm.model.parameters())) and first not in seen and data_hash(lm, examples) == first


def test_hash_sees_every_token_and_mask(lm):
    examples = examples_of()
    seen = set()
    for i, e in enumerate(examples):
        for j in range(len(e.ids)):
            one = torch.arange(len(e.ids)) == j
            for other in (Example(torch.where(one, e.ids + 1, e.ids), e.response), Example(e.ids, e.response ^ one)):
                seen.add(data_hash(lm, [*examples[:i], other, *examples[i + 1 :]]))
    others = [
        examples[::-1],
        examples[1:],
        [Example(torch.cat(ids_of(examples)), torch.cat([e.response for e in examples]))],
    ]
    seen |= {data_hash(lm, o) for o in others} | {data_hash(lm, examples)}
    assert len(seen) == 2 * sum(LENGTHS) + 4


def test_hash_sees_adapter_and_scale(lm, tmp_path):
    examples = examples_of()
    a, b = (load_adapter(toy_adapter(lm.model, tmp_path / str(s), seed=s), lm.model) for s in (1, 2))
    path, w = next(iter(a.layers.items()))
    louder = type(a)(a.name, a.layers | {path: LoraWeights(w.A, w.B, w.scale * 2)})
    assert len({data_hash(LM(lm.model, lm.tokenizer, x), examples) for x in (None, a, b, louder)}) == 4
    renamed = type(a)('elsewhere', a.layers)
    assert data_hash(LM(lm.model, lm.tokenizer, a), examples) == data_hash(
        LM(lm.model, lm.tokenizer, renamed), examples
    )


def test_hash_sees_the_precision(lm):
    assert data_hash(lm, examples_of()) != data_hash(LM(toy_model().bfloat16(), lm.tokenizer), examples_of())


# ---- shards


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('per_shard', [1, 3, 8, 100])
def test_stored_equals_online(dtype, per_shard, tmp_path, lm):
    lm = LM(lm.model.to(dtype), lm.tokenizer)
    examples = examples_of()
    stored = StoredFeatures(write_features(lm, examples, tmp_path, per_shard))
    online = OnlineFeatures(lm, examples)
    assert stored.lengths == online.lengths == list(LENGTHS)
    assert len(list(tmp_path.glob('*.safetensors'))) == -(-8 // per_shard)
    for i in range(0, 8, per_shard):
        part = list(range(i, min(8, i + per_shard)))
        for got, want in zip(stored.read(part), online.read(part), strict=True):
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want))
    for (ids, _, f), i in zip(stored.read([5, 0, 5]), [5, 0, 5]):
        assert torch.equal(ids, examples[i].ids) and f.dtype == dtype and f.shape == (LENGTHS[i], 32)


def test_a_read_touches_its_own_pages_only(tmp_path):
    "A shard of 64 MB is opened, and some of it read, within a few MB of memory"
    about = dict(data='x', lengths=[250] * 500)
    features.save_tensors(
        dict(
            ids=torch.zeros(125_000, dtype=torch.int32),
            response=torch.ones(125_000, dtype=torch.bool),
            features=torch.ones(125_000, 128),
        ),
        tmp_path / 'features-0000.safetensors',
        dict(about=json.dumps(about)),
    )
    (tmp_path / 'features.json').write_text(
        json.dumps(dict(target='x', per_shard=500, dtype='float32', count=500, files=['x']))
    )
    rss = lambda: psutil.Process().memory_info().rss
    before = rss()
    stored = StoredFeatures(tmp_path)
    some = stored.read([0, 250, 499])
    assert rss() - before < 16e6 and all(f.nbytes == 250 * 128 * 4 and bool((f == 1).all()) for _, _, f in some)


def test_estimate_meets_the_files(tmp_path, lm):
    folder = write_features(lm, examples_of(), tmp_path, 3)
    size = sum(f.stat().st_size for f in folder.glob('*.safetensors'))
    assert (
        shards_bytes(examples_of(), 32, torch.float32) == sum(LENGTHS) * 133 and 0 < size - sum(LENGTHS) * 133 < 3 * 512
    )


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def failing(error, after):
    "A `save_tensors` that breaks in the middle of the file number `after`"
    real = features.save_tensors
    count = iter(range(100))

    def save_tensors(tensors, file, metadata):
        if next(count) != after:
            return real(tensors, file, metadata)
        file.write_bytes(b'half of it')
        raise error

    return save_tensors


@pytest.mark.parametrize(
    'error',
    [
        OSError(errno.ENOSPC, 'No space left on device'),
        SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)'),
    ],
    ids=['os', 'safetensors'],
)
@pytest.mark.parametrize('after', [0, 1, 2])
def test_a_full_disk_leaves_whole_shards(tmp_path, lm, monkeypatch, error, after):
    whole = contents(write_features(lm, examples_of(), tmp_path / 'whole', 3))
    with monkeypatch.context() as m:
        m.setattr(features, 'save_tensors', failing(error, after))
        with pytest.raises(
            DecodingError,
            match='No space left on device.*make room or choose another folder, then give the same command again',
        ):
            write_features(lm, examples_of(), tmp_path / 'f', 3)
    there = contents(tmp_path / 'f')
    assert len(there) == 1 + after and all(whole[k] == v for k, v in there.items())
    with pytest.raises(DecodingError, match=f'lacks {3 - after} of 3 shards'):
        StoredFeatures(tmp_path / 'f')
    done = []
    write_features(lm, examples_of(), tmp_path / 'f', 3, progress=lambda *x: done.append(x))
    assert contents(tmp_path / 'f') == whole and done == [(i + 1, 3 - after) for i in range(3 - after)]


def in_child(work):
    "Run `work` in a process of its own; return how it ended"
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except DecodingError as e:
            os._exit(3 if 'make room' in str(e) else 4)
        except BaseException:
            os._exit(5)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_limit_of_the_system_while_writing(tmp_path, lm):
    "The real error, not one we made"

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        write_features(lm, examples_of(), tmp_path / 'f', 3)

    assert os.waitstatus_to_exitcode(in_child(work)) == 3
    assert not list((tmp_path / 'f').glob('features-*'))
    assert StoredFeatures(write_features(lm, examples_of(), tmp_path / 'f', 3)).lengths == list(LENGTHS)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('where', ['between', 'within'])
def test_kill_9(tmp_path, lm, monkeypatch, where):
    whole = contents(write_features(lm, examples_of(), tmp_path / 'whole', 3))
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)

    def between():
        write_features(lm, examples_of(), tmp_path / 'f', 3, progress=lambda done, of: kill())

    def within():
        features.save_tensors = lambda tensors, file, metadata: (file.write_bytes(b'half of it'), kill())
        write_features(lm, examples_of(), tmp_path / 'f', 3)

    assert os.waitstatus_to_exitcode(in_child(locals()[where])) == -signal.SIGKILL
    assert len(list((tmp_path / 'f').glob('features-*.safetensors'))) == (where == 'between')
    write_features(lm, examples_of(), tmp_path / 'f', 3)
    assert {k: v for k, v in contents(tmp_path / 'f').items() if not k.endswith('.part')} == whole
    assert StoredFeatures(tmp_path / 'f').lengths == list(LENGTHS)


def test_small_disks_are_refused_before_a_byte_is_written(tmp_path, lm, monkeypatch):
    needed = sum(LENGTHS) * 133
    disk = lambda free: monkeypatch.setattr(shutil, 'disk_usage', lambda p: SimpleNamespace(free=free))
    disk(needed)  # the headers and the note want room too
    with pytest.raises(
        DecodingError,
        match=r'the features take 0.00 GB but .* has 0.00 GB free: choose another disk, fewer conversations, or compute them online',
    ):
        write_features(lm, examples_of(), tmp_path / 'a' / 'b')
    assert not (tmp_path / 'a').exists()
    disk(int(needed * 1.06))
    write_features(lm, examples_of(), tmp_path / 'a' / 'b')
    with pytest.raises(DecodingError, match='the features take'):
        disk(needed // 2)
        write_features(lm, examples_of(), tmp_path / 'c', 3, share=(0, 3))  # the other processes write to the same disk
    disk(0)  # nothing is missing, so nothing is needed
    write_features(lm, examples_of(), tmp_path / 'a' / 'b')
    with pytest.raises(DecodingError):
        check_room(1, tmp_path)


def test_another_run_in_the_folder_is_refused(tmp_path, lm):
    folder = write_features(lm, examples_of(), tmp_path / 'f', 3)
    adapter = load_adapter(toy_adapter(lm.model, tmp_path / 'a'), lm.model)
    before = contents(folder)
    for other, examples, per_shard, named in [
        (toy_lm(seed=1), examples_of(), 3, 'target or adapter'),
        (LM(lm.model, lm.tokenizer, adapter), examples_of(), 3, 'target or adapter'),
        (lm, examples_of(seed=1), 3, 'set of conversations'),
        (lm, examples_of()[:-1], 3, 'set of conversations'),
        (lm, examples_of()[1:], 3, 'set of conversations'),
        (lm, examples_of()[:-1] + examples_of(seed=1), 3, 'set of conversations'),
        (lm, examples_of(), 4, 'per_shard'),
        (LM(toy_model().bfloat16(), lm.tokenizer), examples_of(), 3, 'dtype'),
    ]:
        with pytest.raises(
            DecodingError, match=f'holds features with another .*{named}.*: write into another folder, or remove it'
        ):
            write_features(other, examples, folder, per_shard)
    assert contents(folder) == before


def _truncate(f):
    f.write_bytes(f.read_bytes()[:-7])


def _garbage(f):
    f.write_bytes(b'\xff' * 300)


def _empty(f):
    f.write_bytes(b'')


def _unsigned(f):
    features.save_tensors(dict(ids=torch.zeros(1)), f, {})


@pytest.mark.parametrize('damage', [_truncate, _garbage, _empty, _unsigned])
def test_a_damaged_shard_is_named(tmp_path, lm, damage):
    folder = write_features(lm, examples_of(), tmp_path, 3)
    damage(folder / 'features-0001.safetensors')
    with pytest.raises(
        DecodingError, match='features-0001.safetensors is damaged .*: remove it and write the features again'
    ):
        StoredFeatures(folder)
    with pytest.raises(
        DecodingError, match='features-0001.safetensors is damaged .*: remove it and write the features again'
    ):
        write_features(lm, examples_of(), folder, 3)
    (folder / 'features-0001.safetensors').unlink()
    assert StoredFeatures(write_features(lm, examples_of(), folder, 3)).lengths == list(LENGTHS)


def test_a_shard_of_another_run_is_found_out(tmp_path, lm):
    folder = write_features(lm, examples_of(), tmp_path / 'a', 3)
    other = write_features(lm, examples_of(seed=1), tmp_path / 'b', 3)
    shutil.copy(other / 'features-0001.safetensors', folder)
    with pytest.raises(
        DecodingError, match='features-0001.safetensors holds features of another target or other conversations'
    ):
        StoredFeatures(folder)
    (folder / 'features.json').unlink()  # whose the files are, they say themselves
    assert contents(write_features(lm, examples_of(seed=1), folder, 3)) == contents(other)


@pytest.mark.parametrize('begun', range(1, 8))
@pytest.mark.parametrize('processes', [1, 2, 3])
def test_more_conversations_keep_whole_shards(tmp_path, lm, begun, processes):
    whole = contents(write_features(lm, examples_of(), tmp_path / 'whole', 3))
    folder = write_features(lm, examples_of()[:begun], tmp_path / 'f', 3)
    before = {f: f.stat().st_mtime_ns for f in sorted(folder.glob('*.safetensors'))[: begun // 3]}
    for rank in reversed(range(processes)):
        write_features(lm, examples_of(), folder, 3, share=(rank, processes))
    assert (
        contents(folder) == whole
        and all(f.stat().st_mtime_ns == at for f, at in before.items())
        and StoredFeatures(folder).lengths == list(LENGTHS)
    )


def test_missing_and_damaged_notes(tmp_path, lm):
    with pytest.raises(DecodingError, match='holds no features: write them first'):
        StoredFeatures(tmp_path)
    folder = write_features(lm, examples_of(), tmp_path / 'f')
    for text in ('{"data"', '{"data": "of an older version"}', '[]'):
        (folder / 'features.json').write_text(text)
        for call in (lambda: StoredFeatures(folder), lambda: write_features(lm, examples_of(), folder)):
            with pytest.raises(DecodingError, match='features.json is (damaged|not valid JSON)'):
                call()
    for bad in (dict(examples=[]), dict(per_shard=0), dict(batch=0)):
        with pytest.raises(DecodingError, match='give at least one of each'):
            write_features(lm, **{**dict(examples=examples_of(), folder=tmp_path / 'g'), **bad})


# ---- draft vocabulary


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12), min_size=1, max_size=5),
    st.integers(1, 10),
)
def test_draft_vocabulary_equals_counting(texts, size):
    examples = [Example(torch.tensor([i for i, _ in t]), torch.tensor([r for _, r in t])) for t in texts]
    count = Counter(i for t in texts for i, r in t if r)
    want = sorted(range(10), key=lambda i: (-count[i], i))[:size]
    ids, counts, share = draft_vocabulary(examples, size, 10)
    assert ids.tolist() == want and counts.tolist() == [count[i] for i in want]
    assert share == pytest.approx(sum(count[i] for i in want) / max(1, count.total()))
    check_vocab(ids, counts, 10)  # what a head accepts


@pytest.mark.parametrize('size', [0, -1, 77])
def test_sizes_of_a_draft_vocabulary(size):
    with pytest.raises(DecodingError, match='choose 1 to 76'):
        draft_vocabulary(examples_of(), size, 76)


# ---- batches

TEXT = st.tuples(st.integers(1, 7), st.integers(0, 10**6))


def text_of(n, seed):
    g = generator(seed)
    return torch.randint(0, 50, (n,), generator=g), torch.rand(n, generator=g) < 0.6, torch.randn(n, 3, generator=g)


@given(st.lists(st.lists(TEXT, min_size=1, max_size=3), min_size=1, max_size=4))
def test_batch_equals_slot_by_slot(rows):
    "Every slot, found again in its text; texts of one and two tokens too"
    rows = [[text_of(*x) for x in row] for row in rows]
    batch = batch_of(rows, numbers=('n',))
    for r, row in enumerate(rows):
        at = 0
        for s, (ids, response, f) in enumerate(row):
            n = len(ids)
            for i in range(n):
                c = at + i
                assert (
                    batch.ids[r, c] == ids[i] and torch.equal(batch.features[r, c], f[i]) and batch.positions[r, c] == i
                )
                assert batch.segments[r, c] == (s if i + 1 < n else -1)
                assert bool(batch.keep[r, c]) == (i + 2 < n and bool(response[i + 1]) and bool(response[i + 2]))
                if i + 1 < n:
                    assert batch.next_ids[r, c] == ids[i + 1] and torch.equal(batch.next_features[r, c], f[i + 1])
            at += n
        assert (
            not batch.keep[r, at:].any()
            and (batch.segments[r, at:] == -1).all()
            and not batch.ids[r, at:].any()
            and not batch.features[r, at:].any()
        )
    assert batch.numbers == ('n',) and batch.ids.shape[1] == max(sum(len(x[0]) for x in row) for row in rows)
    moved = batch.to('meta')
    assert moved.numbers == ('n',) and all(
        getattr(moved, k).device.type == 'meta' for k in ('ids', 'features', 'segments', 'keep', 'positions')
    )


def test_features_keep_their_dtype():
    assert (
        batch_of(
            [[(torch.tensor([1, 2]), torch.tensor([True, True]), torch.ones(2, 3, dtype=torch.bfloat16))]]
        ).features.dtype
        == torch.bfloat16
    )


def losses(batch, head, frozen, n=3):
    e = frozen.embed[batch.next_ids]
    inputs = [batch.features]
    out = []
    for _ in range(n):
        predicted = aligned_step(head, e, inputs, head.rotations(batch.positions), batch.segments)
        out.append(distill(predicted, batch.next_features, batch.keep, frozen.lm_head)[0])
        inputs.append(next_inputs(inputs[-1], predicted, batch.segments))
    return torch.stack(out)


@pytest.mark.parametrize('family', ['llama', 'qwen2', 'qwen3', 'mistral'])
def test_packed_rows_learn_the_same(family):
    "Loss and gradient of packed rows are those of rows with one text"
    lm = toy_lm(family)
    read = OnlineFeatures(lm, examples_of()).read(range(8))
    frozen = target_weights(lm.model)
    grads = []
    values = []
    for batch in (
        batch_of([[x] for x in read]),
        batch_of([[read[3], read[1]], [read[0], read[2]], [read[5], read[6]], [read[4], read[7]]]),
    ):
        torch.manual_seed(0)
        head = DraftHead(head_config(lm.model.config))
        total = losses(batch, head, frozen)
        total.sum().backward()
        values.append(total.detach())
        grads.append(torch.cat([p.grad.flatten() for p in head.parameters()]))
    close(*values)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)  # sums over all slots in another order


# ---- plans

PLAN = dict(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    tokens=st.integers(1, 200),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
    row=st.none() | st.integers(1, 80),
    window=st.integers(1, 50),
)


@given(**PLAN)
def test_a_plan_covers_all_and_stays_small(lengths, tokens, seed, epoch, row, window):
    given_ = list(lengths)
    state = random.getstate()
    plan = plan_epoch(lengths, tokens, seed, epoch, row, window)
    assert sorted(j for rows in plan for r in rows for j in r) == list(range(len(lengths)))
    wide = lambda rows: max(sum(lengths[j] for j in r) for r in rows)
    assert all(rows and (len(rows) * wide(rows) <= tokens or len(rows) == 1) for rows in plan)
    assert all(len(r) == 1 or row and sum(lengths[j] for j in r) <= row for rows in plan for r in rows)
    assert (
        plan == plan_epoch(tuple(lengths), tokens, seed, epoch, row, window)
        and lengths == given_
        and random.getstate() == state
    )


def test_a_plan_depends_on_seed_and_epoch():
    plans = [plan_epoch(list(range(1, 60)), 200, s, e) for s in range(3) for e in range(3)]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


def test_batches_come_in_random_order():
    "Sorting inside a window must not mean short texts first"
    lengths = list(range(1, 101))
    first = [lengths[plan_epoch(lengths, 200, 0, e)[0][0][0]] for e in range(30)]
    assert 30 < sum(first) / 30 < 90 and len(set(first)) > 10


def test_padding_is_small():
    lengths = (torch.randn(600, generator=generator(0)) * 0.6 + 4.6).exp().clamp(12, 500).long().tolist()
    for row in (None, 512):
        padded = sum(
            len(rows) * max(sum(lengths[j] for j in r) for r in rows) for rows in plan_epoch(lengths, 4096, 0, 0, row)
        )
        assert sum(lengths) / padded > 0.85


def test_no_examples_are_refused():
    with pytest.raises(DecodingError, match='there is no example'):
        plan_epoch([], 10, 0, 0)


# ---- hidden states that another program stored


def layers_of(lm, ids):
    "Three layers' states and the last one before the final norm, as speculators stores them `(t, 4, d)`"
    seen = []
    hook = lm.model.base_model.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        out = lm.model.base_model(ids[None], output_hidden_states=True)
    hook.remove()
    return torch.stack([*(out.hidden_states[i][0] for i in (0, 1, 1)), seen[0][0]], 1)


def stored(lm, folder, examples, ids_name='input_ids', states=lambda x: x):
    folder.mkdir(exist_ok=True)
    for i, e in enumerate(examples):
        tensors = {ids_name: e.ids, 'loss_mask': e.response.to(torch.uint8)}
        x = states(layers_of(lm, e.ids)).contiguous()
        save_file(tensors | dict(hidden_states=x), folder / f'hs_{i}.safetensors')
    return folder


LONG = (9, 5, 14, 7, 6, 8, 11, 4, 6, 9, 5)  # more than ten: numbers are sorted as numbers


def after_norm(lm, x):
    return lm.model.base_model.norm(x[:, -1]).detach()


@pytest.mark.parametrize('family', ['llama', 'qwen2', 'qwen3', 'mistral', 'gemma2'])
@pytest.mark.parametrize('kind', ['before the norm', 'after it', 'after it, several layers', 'bf16'])
def test_states_of_another_program_are_the_targets_features(tmp_path, family, kind):
    lm = toy_lm(family)
    examples = examples_of(LONG)
    ways = {
        'before the norm': lambda x: x,
        'after it': lambda x: after_norm(lm, x),
        'after it, several layers': lambda x: torch.stack([x[:, 0], after_norm(lm, x)], 1),
        'bf16': lambda x: x.bfloat16(),
    }
    name = 'token_ids' if kind == 'bf16' else 'input_ids'
    store = HiddenStateFiles(stored(lm, tmp_path / 'states', examples, name, ways[kind]), lm)
    assert store.is_before_norm == (not kind.startswith('after'))
    assert store.lengths == list(LONG)
    want = target_features(lm, ids_of(examples))
    for (ids, response, f), e, g in zip(store.read(range(11)), examples, want, strict=True):
        assert torch.equal(ids, e.ids) and torch.equal(response, e.response) and f.dtype == g.dtype
        torch.testing.assert_close(f, g, rtol=1e-4, atol=0.1 if kind == 'bf16' else 1e-4)
    store.hold_out(3)
    assert store.lengths == list(LONG[:-3]) and len(store.examples) == len(store.files) == 8


def changed(folder, n, **change):
    file = folder / f'hs_{n}.safetensors'
    tensors = {name: x.clone() for name, x in load_file(file).items()} | change
    save_file({name: x for name, x in tensors.items() if x is not None}, file)


MASK = torch.tensor([0, 0, 1, 1, 2], dtype=torch.uint8)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(loss_mask=None), r"hs_1.safetensors has no .'loss_mask'.: give a file with"),
        (dict(input_ids=None), r"hs_1.safetensors has no .'input_ids'.: give a file with"),
        (dict(hidden_states=None), r"hs_1.safetensors has no .'hidden_states'.: give a file with"),
        (
            dict(hidden_states=torch.zeros(5, 4, 16)),
            'hs_1.safetensors are 16 wide, but those of toy are 32: give files of',
        ),
        (dict(hidden_states=torch.zeros(4, 4, 32)), 'hs_1.safetensors holds states of 4 tokens for 5 ids: generate'),
        (dict(hidden_states=torch.zeros(160)), r'the hidden states in .*hs_1.safetensors are \(160,\): give'),
        (dict(hidden_states=torch.full((5, 4, 32), torch.nan)), 'hs_1.safetensors are not finite: generate the hidden'),
        (dict(loss_mask=MASK[:4]), 'the loss mask in .*hs_1.safetensors does not mark its 5 ids'),
        (dict(loss_mask=MASK), 'the loss mask in .*hs_1.safetensors does not mark its 5 ids'),
        (
            dict(input_ids=torch.tensor([5, 6, 7, 8, 97])),
            'hs_1.safetensors holds ids outside the 97 tokens of toy: give',
        ),
        (
            dict(input_ids=torch.tensor([5, 6, 7, 8, -1])),
            'hs_1.safetensors holds ids outside the 97 tokens of toy: give',
        ),
        (dict(input_ids=torch.tensor([5.0, 6, 7, 8, 9])), 'the ids in .*hs_1.safetensors are torch.float32'),
        (dict(input_ids=torch.tensor([5, 6, 7, 8, 9])), 'hs_1.safetensors does not hold the last hidden states of toy'),
    ],
    ids=str,
)
def test_hidden_states_that_do_not_belong_together_are_named(lm, tmp_path, change, message):
    folder = stored(lm, tmp_path / 'states', examples_of((9, 5, 14)))
    changed(folder, 1, **change)
    with pytest.raises(DecodingError, match=message):
        HiddenStateFiles(folder, lm)


def test_other_states_and_other_files_are_named(lm, tmp_path):
    examples = examples_of((9, 5, 14))
    task = load_adapter(toy_adapter(lm.model, tmp_path / 'task', lora_alpha=64), lm.model)
    folder = stored(lm, tmp_path / 'states', examples)
    for other in (LM(toy_model(seed=1), lm.tokenizer, name='other'), LM(lm.model, lm.tokenizer, task, 'toy')):
        with pytest.raises(
            DecodingError, match='does not hold the last hidden states of (other|toy with .*task) .* off'
        ):
            HiddenStateFiles(folder, other)
    with pytest.raises(DecodingError, match='some files in .*states hold states before the final norm, some after it'):
        mixed = stored(lm, tmp_path / 'states', examples)
        changed(mixed, 0, hidden_states=after_norm(lm, layers_of(lm, examples[0].ids)))
        HiddenStateFiles(mixed, lm)
    stored(lm, folder, examples)
    file = folder / 'hs_2.safetensors'
    whole = file.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(DecodingError, match='hs_2.safetensors is damaged or cut short'):
            HiddenStateFiles(folder, lm)
    file.write_bytes(whole)
    torch.save(dict(x=1), folder / 'data_0.pt')
    with pytest.raises(DecodingError, match='data_0.pt is a pickle, which can run code: convert it: python -c'):
        HiddenStateFiles(folder, lm)
    (tmp_path / 'empty').mkdir()
    for name, message in (('empty', 'holds no .safetensors file'), ('nowhere', 'there is no folder')):
        with pytest.raises(DecodingError, match=message):
            HiddenStateFiles(tmp_path / name, lm)


def test_the_line_that_converts_a_pickle_does(lm, tmp_path):
    import subprocess, sys

    examples = examples_of((9, 5))
    for i, e in enumerate(examples):
        layers = list(layers_of(lm, e.ids).unbind(1))
        torch.save(dict(input_ids=e.ids, loss_mask=e.response, hidden_states=layers), tmp_path / f'data_{i}.pt')
    for _ in examples:
        with pytest.raises(DecodingError, match='convert it: ') as refused:
            HiddenStateFiles(tmp_path, lm)
        line = str(refused.value).partition('python -c "')[2].partition('", and remove')[0]
        subprocess.run([sys.executable, '-c', line], cwd=tmp_path, check=True)
        next(iter(sorted(tmp_path.glob('*.pt')))).unlink()
    close(HiddenStateFiles(tmp_path, lm).read([1])[0][2], target_features(lm, [examples[1].ids])[0])
