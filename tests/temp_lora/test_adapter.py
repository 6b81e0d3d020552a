"The temporary adapter: no trace of it, whatever happens; all of a chunk or nothing; the same bits after a pause"

import gc, hashlib
from contextlib import nullcontext
from dataclasses import replace
import pytest, torch
from hypothesis import given, settings as examples, strategies as st
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.temp_lora import adapter as temp_lora
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.temp_lora.checkpoint import load_document, save_document
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.foundations.models import FAMILIES
from npu_lora_decoding.foundations.model_shape import shape_of
from npu_lora_decoding.foundations.model_shape import TARGETS, target_layers
from npu_lora_decoding.temp_lora.generation import TempLoRA
from npu_lora_decoding.temp_lora.adapter import (
    TemporaryAdapter,
    backward_chunk,
    copy_state,
    learn,
    logits_of,
    temporary,
    token_losses,
)
from helpers.memories import digest, traces

SMALL = TempLoRA(chunk=16, window=48, train_context=16, r=4, alpha=4.0, lr=3e-3)
TEXT = torch.randint(3, 97, (400,), generator=generator(0))


def subject():
    "A model whose flags and modes are not all alike"
    model = toy_model().train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_()
    return model


def raises(error):
    def hook(grad):
        raise error

    return hook


ENDS = dict(
    normal=None,
    error=RuntimeError('in the middle of training'),
    ctrl_c=KeyboardInterrupt(),
    memory=torch.OutOfMemoryError('simulated'),
    memory_cpu=MemoryError(),
    left=GeneratorExit(),
)


@pytest.mark.parametrize('how', ENDS)
@pytest.mark.parametrize('with_task', [False, True])
def test_no_trace(how, with_task, tmp_path):
    model = subject()
    error = ENDS[how]
    task = load_adapter(toy_adapter(model, tmp_path), model) if with_task else None
    before = traces(model)
    try:
        # inside the bank's block what learning leaves behind would be cleared away by the bank
        with temporary(model, SMALL, task) as phi, phi.bank.attached([0]) if with_task else nullcontext():
            learn(phi, TEXT[:32], 16)
            if error:
                next(iter(phi.B.values())).register_hook(raises(error))
            learn(phi, TEXT[16:48], 16)
            assert error is None
    except BaseException as e:
        assert e is error
    assert traces(model) == before


def test_an_interrupted_chunk_is_not_learned():
    phi = TemporaryAdapter(toy_model(), SMALL)
    learn(phi, TEXT[:32], 16)
    kept = copy_state(phi)
    read = [s.A.clone() for s in phi.bank.slices.values()]
    calls = []

    def second_update(grad):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = phi.A['model.layers.0.mlp.down_proj'].register_hook(second_update)
    with pytest.raises(KeyboardInterrupt):
        learn(phi, TEXT[16:48], 16)
    handle.remove()
    now = copy_state(phi)
    assert phi.version == 1 and len(calls) == 2
    assert digest(now[0]) == digest(kept[0]) and torch.equal(now[2], kept[2])
    assert all(torch.equal(a[k], b[k]) for a, b in zip(now[1], kept[1]) for k in b)
    assert all(torch.equal(a, s.A) for a, s in zip(read, phi.bank.slices.values()))
    other = TemporaryAdapter(phi.model, SMALL)
    learn(other, TEXT[:32], 16)
    assert learn(other, TEXT[16:48], 16) == learn(phi, TEXT[16:48], 16)  # as if nothing had happened


@pytest.mark.slow
def test_twelve_documents_do_not_grow():
    model = subject()
    counts = []
    before = traces(model)
    for i in range(12):
        with temporary(model, SMALL) as phi, phi.bank.attached([0]):
            learn(phi, TEXT[i : i + 32], 16)
        del phi
        gc.collect()
        counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert traces(model) == before and len(set(counts[2:])) == 1


def test_the_global_generator_is_not_asked_and_seeds_decide():
    model = toy_model()
    out = []
    for outer in (1, 2):
        torch.manual_seed(outer)
        phi = TemporaryAdapter(model, SMALL)
        out.append([learn(phi, TEXT[a : a + 32], 16) for a in (0, 16, 32)])
    assert out[0] == out[1]
    phi = TemporaryAdapter(model, replace(SMALL, seed=1))
    assert [learn(phi, TEXT[a : a + 32], 16) for a in (0, 16, 32)] != out[0]


@pytest.mark.parametrize('family', FAMILIES)
def test_loss_and_gradient_are_those_of_the_model(family):
    model = toy_model(family)
    phi = TemporaryAdapter(model, replace(SMALL, dropout=0.0))
    for b in phi.B.values():
        b.data.normal_(std=0.1, generator=generator(1))
    from npu_lora_decoding.temp_lora.adapter import _learning

    with _learning(phi):
        labels = TEXT[:40].clone()
        labels[:24] = -100
        want = torch.nn.functional.cross_entropy(model(TEXT[None, :40]).logits[0, :-1].float(), labels[1:])
        grads = torch.autograd.grad(want, phi.parameters())
        assert abs(backward_chunk(model, TEXT[:40], 16) - want.item()) < 1e-4
    for w, g in zip(phi.parameters(), grads):
        torch.testing.assert_close(w.grad, g, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('targets', TARGETS)
def test_rate_zero_is_the_base_bit_for_bit(dtype, targets):
    model = toy_model().to(dtype)
    want = token_losses(model, TEXT[:63], TEXT[32:64])
    with temporary(model, replace(SMALL, lr=0.0, targets=targets)) as phi:
        for a in range(0, 64, 16):
            learn(phi, TEXT[a : a + 32], 16)
        assert phi.version == 4 and all(w.dtype == torch.float32 for w in phi.parameters())
        with phi.bank.attached([0]):
            assert torch.equal(token_losses(model, TEXT[:63], TEXT[32:64]), want)


@examples(max_examples=20)
@given(st.integers(1, 3), st.integers(0, 2), st.sampled_from(sorted(TARGETS)), st.integers(0, 1000))
def test_reading_and_learning_see_one_model(epochs, before, targets, seed):
    "The loss of the next update, without dropout, is the one that the bank gives"
    phi = TemporaryAdapter(toy_model(), replace(SMALL, dropout=0.0, epochs=epochs, targets=targets, seed=seed))
    for a in range(before):
        learn(phi, TEXT[16 * a : 16 * a + 32], 16)
    with phi.bank.attached([0]):
        reads = token_losses(phi.model, TEXT[:31], TEXT[16:32]).mean().item()
    assert abs(learn(phi, TEXT[:32], 16)[0] - reads) < 1e-4


@pytest.mark.parametrize('names', [('expert',), ('expert', 'phi'), ('expert', 'task')])
def test_the_bank_holds_what_is_learned_under_every_name(names, tmp_path):
    model = toy_model()
    task = load_adapter(toy_adapter(model, tmp_path), model)
    with temporary(model, SMALL, task, names) as phi:
        learn(phi, TEXT[:32], 16)
        assert phi.bank.equals(AdapterBank(model, [phi.adapter(name) for name in names], ops.lora))


def test_the_first_chunk_is_learned_at_more_than_nothing():
    phi = TemporaryAdapter(toy_model(), SMALL)
    learn(phi, TEXT[:16], 16)  # no prefix: the first token is not predicted
    assert all(w.any() for w in phi.B.values()) and phi.version == 1


@pytest.mark.parametrize('stop', [1, 2, 3])
def test_resumed_is_bit_equal(stop, tmp_path):
    model = toy_model()
    go = lambda phi, first, last: [learn(phi, TEXT[max(0, 16 * k - 16) : 16 * k + 16], 16) for k in range(first, last)]
    whole, one, two = (TemporaryAdapter(model, SMALL) for _ in range(3))
    want = go(whole, 0, 4)
    got = go(one, 0, stop)
    save_document(one, tmp_path / 'phi.safetensors', TEXT[: 16 * stop])
    n, _, _ = load_document(two, tmp_path / 'phi.safetensors', TEXT)
    assert n == 16 * stop and want == got + go(two, stop, 4)
    assert digest(whole.parameters()) == digest(two.parameters())
    assert all(
        torch.equal(a.A, b.A) and torch.equal(a.B[0], b.B[0])
        for a, b in zip(whole.bank.slices.values(), two.bank.slices.values())
    )
    assert [f.name for f in tmp_path.iterdir()] == ['phi.safetensors']


def test_a_file_of_something_else_is_refused(tmp_path):
    model = toy_model()
    file = tmp_path / 'phi.safetensors'
    phi = TemporaryAdapter(model, SMALL)
    learn(phi, TEXT[:16], 16)
    save_document(phi, file, TEXT[:16])
    for who, ids, what in (
        (TemporaryAdapter(model, replace(SMALL, r=8)), TEXT, 'other settings'),
        (phi, TEXT[1:], 'another text'),
        (phi, TEXT[:8], 'another text'),
        (TemporaryAdapter(toy_model(seed=5), SMALL), TEXT, 'another model'),
    ):
        with pytest.raises(DecodingError, match=what):
            load_document(who, file, ids)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DecodingError, match='damaged'):
        load_document(phi, file, TEXT)


@pytest.mark.parametrize(
    'bad',
    [
        dict(chunk=48),
        dict(chunk=60),
        dict(chunk=0),
        dict(context=40),
        dict(context=0),
        dict(r=0),
        dict(epochs=-1),
        dict(dropout=1.0),
        dict(lr=-1.0),
        dict(targets='k'),
        dict(amateur='x'),
        dict(warmup=0),
        dict(max_repetition=0.0),
        dict(max_repetition=1.1),
    ],
)
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(DecodingError, match=': '):
        replace(SMALL, **bad)


def test_quantised_and_merged_bases_are_refused(tmp_path):
    model = toy_model()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(64 * 32 // 2, 1, dtype=torch.uint8), requires_grad=False
    )  # two numbers a byte
    with pytest.raises(DecodingError, match='quantised'):
        target_layers(model)
    with pytest.raises(DecodingError, match='quantised'):
        shape_of(model)
    whole = shape_of(toy_model())
    packed = shape_of(model, None)  # reading it without learning can be counted
    assert (packed.P, packed.head, packed.adapted, packed.still_adapted) == (whole.P, whole.head, 0, 0)
    from peft import PeftModel

    model = toy_model()
    peft = PeftModel.from_pretrained(model, toy_adapter(model, tmp_path))
    assert 'model.layers.0.self_attn.q_proj' in target_layers(model)  # the wrapper, not what is in it
    peft.merge_adapter()
    with pytest.raises(DecodingError, match='unmerge_adapter'):
        target_layers(model)


@pytest.mark.parametrize('p', [0.05, 0.5, 0.9])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dropout_drops_a_share_and_keeps_the_mean(p, dtype):
    x = torch.ones(301, 333, dtype=dtype, requires_grad=True)
    y = temp_lora._drop(x, p, generator(3))
    y.sum().backward()
    dropped = y == 0
    assert abs(dropped.float().mean() - p) < 4 * (p * (1 - p) / x.numel()) ** 0.5 and y.dtype == dtype
    torch.testing.assert_close(y[~dropped], torch.full_like(y[~dropped], 1 / (1 - p)), rtol=1e-2, atol=0)
    assert (
        torch.equal(x.grad == 0, dropped)
        and torch.equal(y, temp_lora._drop(x, p, generator(3)))
        and not torch.equal(y, temp_lora._drop(x, p, generator(4)))
    )
    rows = dropped.float()  # neighbours, in both directions and four apart, have nothing to do with each other
    for a, b in ((rows[:, 1:], rows[:, :-1]), (rows[1:], rows[:-1]), (rows[:, 4:], rows[:, :-4])):
        assert abs((a * b).mean() - p * p) < 0.01
    assert torch.equal(temp_lora._drop(x, 0.0, generator(3)), x)


def first_norm(clip):
    "Return the norm of all gradients together, as the optimizer sees them in its first update"
    model = subject()
    norms = []
    with temporary(model, replace(SMALL, clip=clip, dropout=0.0)) as phi, phi.bank.attached([0]):
        phi.opt.step = lambda: norms.append(torch.stack([p.grad.norm() for p in phi.parameters()]).norm())
        learn(phi, TEXT[:32], 16)
    return norms[0]


def test_large_gradients_are_clipped_and_small_ones_are_left():
    free = first_norm(1e9)
    torch.testing.assert_close(first_norm(2 * free.item()), free, rtol=0.0, atol=0.0)
    torch.testing.assert_close(first_norm(free.item() / 3), free / 3, rtol=1e-4, atol=0.0)
