"Adapters on rows: the vectorised form against the loop, base rows bit for bit, and no trace in the model"

import copy
import pytest, torch
from hypothesis import given, settings, strategies as st
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.foundations.lora import (
    AdapterBank,
    adapter_from_peft,
    join_layers,
    lora_naive,
    lora_segments,
    lora_stacked,
    lora_torch as lora_slices,
    segments,
    stack_layers,
    stack_slices,
    fused_projections,
)
from npu_lora_decoding.foundations.adapters import Adapter, load_adapter, LoraWeights, toy_adapter, toy_model
from npu_lora_decoding.foundations.models import FAMILIES

compiled = pytest.mark.skipif(not ops.compiles(), reason='torch.compile finds no C++ compiler')
TOLERANCE = dict(rtol=1e-4, atol=1e-4)  # fp32 sums of up to 40 products of normal numbers, in another order


def weights(seed, d, o, ranks):
    g = generator(seed)
    return [
        LoraWeights(torch.randn(r, d, generator=g), torch.randn(o, r, generator=g), 0.5 + k)
        for k, r in enumerate(ranks)
    ]


def rows(seed, b, t, d, o):
    "Inputs, and outputs that hold zeros of both signs: `-0. + 0.` is `0.`, other bits"
    g = generator(seed)
    y = torch.randn(b, t, o, generator=g)
    y[torch.rand(y.shape, generator=g) < 0.2] = -0.0
    return y, torch.randn(b, t, d, generator=g)


def one_slice(op):
    "The form for one layer of an operation on slices"

    def single(y, x, A, B, scale, ids):
        ranks = torch.full((1, len(A)), A.shape[1], dtype=torch.int32)
        adapters = A[None], [B], scale[None], ranks
        return op([y], x, *adapters, ids)[0]

    return single


lora_torch = one_slice(lora_slices)
lora_op = one_slice(ops.lora)


def bits(x):
    return x.view(torch.int32)


def same_bits(a, b):
    assert a.shape == b.shape and torch.equal(bits(a), bits(b))


ranks = st.lists(st.integers(1, 9), min_size=1, max_size=4)
cases = ranks.flatmap(
    lambda r: st.tuples(
        st.just(r),
        st.lists(st.integers(-1, len(r) - 1), min_size=1, max_size=6),
        st.integers(0, 10**6),
        st.sampled_from([1, 3, 90]),
        st.integers(1, 40),
        st.integers(1, 40),
    )
)


@settings(max_examples=200)
@given(cases)
def test_torch_equals_naive(case):
    ranks, ids, seed, t, d, o = case
    layers = weights(seed, d, o, ranks)
    y, x = rows(seed, len(ids), t, d, o)
    ids = torch.tensor(ids)
    given_y = y.clone()
    want = lora_naive(y, x, layers, ids)
    for op in (lora_stacked, lora_segments, lora_torch, lora_op):
        got = op(y, x, *stack_layers(layers), ids)
        torch.testing.assert_close(got, want, **TOLERANCE)
        same_bits(got[ids < 0], y[ids < 0])
        same_bits(y, given_y)  # nothing is written in place
    same_bits(want[ids < 0], y[ids < 0])


@given(st.lists(st.integers(-1, 3), max_size=12))
def test_segments_cover_the_adapter_rows_once(ids):
    found = segments(tuple(ids))
    assert {i: k for start, stop, k in found for i in range(start, stop)} == {i: k for i, k in enumerate(ids) if k >= 0}
    assert all(
        a[1] <= b[0] and (a[1] < b[0] or a[2] != b[2]) for a, b in zip(found, found[1:])
    )  # sorted, and as few as possible


@pytest.mark.parametrize('op', [lora_stacked, lora_segments, lora_torch, lora_op])
def test_one_id_is_for_all_rows(op):
    y, x = rows(0, 4, 3, 24, 40)
    stack = stack_layers(weights(0, 24, 40, [4, 2]))
    torch.testing.assert_close(
        op(y, x, *stack, torch.tensor([1])), op(y, x, *stack, torch.tensor([1] * 4)), rtol=0, atol=0
    )
    with pytest.raises(RuntimeError):
        op(y, x, *stack, torch.tensor([1, 0, 1]))  # three ids do not fit four rows


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('t', [1, 200])
def test_half_precision_is_the_rounded_fp32_result(dtype, t):
    """Whichever form runs, many tokens or few, the result is within the rounding of shrink, expand and sum;
    expert rows change, base rows do not"""
    y, x = rows(0, 3, t, 40, 24)
    layers = weights(0, 40, 24, [4])
    ids = torch.tensor([0, -1, 0])
    half = [v.to(dtype) for v in (y, x, *stack_layers(layers))]
    exact = lora_torch(*(v.float() for v in half), ids)
    for op in (lora_stacked, lora_segments):
        got = op(*half, ids)
        assert got.dtype == dtype and torch.equal(got[1], half[0][1])
        assert (got.float() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_adding_zero_would_change_bits():
    "The plain formula, without choosing rows, turns -0 into 0: the bitwise comparison above notices it"
    y, x = rows(0, 2, 3, 5, 7)
    A, B, scale = stack_layers(weights(0, 5, 7, [2]))
    added = y + (x @ A[0].T * 0) @ B[0]
    assert torch.equal(added, y) and not torch.equal(bits(added), bits(y))


@settings(max_examples=50)
@given(ranks, st.integers(0, 10**6))
def test_joined_ranks_are_a_sum(ranks, seed):
    layers = weights(seed, 11, 13, ranks)
    y, x = rows(seed, 2, 3, 11, 13)
    ids = torch.zeros(2, dtype=torch.long)
    want = y + sum(lora_naive(torch.zeros_like(y), x, [w], ids) for w in layers)
    joined = join_layers(layers)
    assert joined.A.shape[0] == sum(ranks)
    torch.testing.assert_close(
        lora_torch(y, x, *stack_layers([joined]), ids), want, rtol=1e-3, atol=1e-3
    )  # up to 36 ranks with scales up to 3.5


def test_stack_pads_ranks_with_zeros_and_leaves_gaps():
    two = weights(0, 5, 7, [4, 2])
    A, B, scale = stack_layers([two[1], None, two[0]])
    assert A.shape == (3, 4, 5) and B.shape == (3, 4, 7) and scale.tolist() == [1.5, 0.0, 0.5]
    assert not A[0, 2:].any() and not B[0, 2:].any() and not A[1].any()
    y, x = rows(0, 3, 2, 5, 7)
    got = lora_torch(y, x, A, B, scale, torch.tensor([1, 2, -1]))
    torch.testing.assert_close(got[0], y[0], rtol=0, atol=0)
    torch.testing.assert_close(got[1:2], lora_naive(y[1:2], x[1:2], two, torch.tensor([0])), **TOLERANCE)


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=3).filter(
        lambda z: all(map(any, z))
    ),
    st.integers(0, 10**6),
)
def test_slices_equal_their_layers_one_by_one(ranks, seed):
    "Widths and ranks differ from slice to slice; rank 0 stands for an adapter that leaves the slice out"
    layers = [[weights(seed + z, 11, 7 + z, [w])[0] if w else None for w in r] for z, r in enumerate(ranks)]
    x = rows(seed, 4, 2, 11, 1)[1]
    ids = torch.tensor([0, 1, -1, 0])
    y = [rows(seed + z, 4, 2, 1, 7 + z)[0] for z in range(len(ranks))]
    s = stack_slices(layers)
    assert s.ranks.tolist() == ranks and s.scale.dtype == torch.float32
    for y_z, got, stack in zip(y, ops.lora(y, x, *(s.A, s.B, s.scale, s.ranks), ids), map(stack_layers, layers)):
        torch.testing.assert_close(got, lora_torch(y_z, x, *stack, ids), **TOLERANCE)
        same_bits(got[2], y_z[2])


def test_together_groups_layers_of_one_parent_by_name():
    paths = ['a.q_proj', 'a.o_proj', 'a.v_proj', 'b.q_proj', 'b.up_proj', 'b.gate_proj', 'b.down_proj', 'lm_head']
    assert fused_projections(paths) == [
        ('a.q_proj', 'a.v_proj'),
        ('a.o_proj',),
        ('b.q_proj',),
        ('b.up_proj', 'b.gate_proj'),
        ('b.down_proj',),
        ('lm_head',),
    ]


class Block(torch.nn.Module):
    "Calls its projections each with the input that its test chooses"

    def __init__(self):
        super().__init__()
        for name in ('q_proj', 'k_proj', 'v_proj'):
            setattr(self, name, torch.nn.Linear(6, 6))
        self.device = torch.device('cpu')
        self.dtype = torch.float32


def test_layers_collect_only_what_was_computed_from_their_own_input():
    "One computation for a shared input; other inputs, other orders, repeated and missing calls still give each layer its own result"
    torch.manual_seed(0)
    block = Block()
    calls = []

    def counted(*args):
        calls.append(len(args[0]))
        return lora_slices(*args)

    layers = {n: weights(i, 6, 6, [2])[0] for i, n in enumerate(('q_proj', 'k_proj', 'v_proj'))}
    bank = AdapterBank(block, [Adapter('toy', layers)], counted)
    want = lambda n, x: getattr(block, n)(x) + layers[n].scale * x @ layers[n].A.T @ layers[n].B.T
    x, other = torch.randn(2, 1, 2, 6)
    expected = {(n, name): want(n, v) for n in layers for name, v in (('x', x), ('other', other))}
    inputs = dict(x=x, other=other)
    with torch.no_grad(), bank.attached([0]):
        for sequence, times in (
            ('qx kx vx', 1),
            ('vx kx qx', 1),
            ('qx ko vo', 2),
            ('qx qx', 2),
            ('qo', 1),
            ('kx vo qo', 2),
        ):
            calls.clear()
            for n, i in sequence.split():
                name = f'{n}_proj'
                source = 'x' if i == 'x' else 'other'
                torch.testing.assert_close(getattr(block, name)(inputs[source]), expected[name, source], **TOLERANCE)
            assert len(calls) == times, sequence
    assert all(s.x is None and not s.left for s in bank._groups)


@pytest.mark.slow
@compiled
def test_lora_compiles_to_the_same():
    torch._dynamo.reset()
    y, x = rows(0, 4, 1, 24, 40)
    A, B, scale = stack_layers(weights(0, 24, 40, [4, 2]))
    ids = torch.tensor([0, -1, 1, 0])
    fast = torch.compile(lambda *a: lora_op(*a), fullgraph=True)(y, x, A, B, scale, ids)
    torch.testing.assert_close(fast, lora_op(y, x, A, B, scale, ids), **TOLERANCE)
    same_bits(fast[1], y[1])


@compiled
def test_cold_select_compiles_to_the_same():
    torch._dynamo.reset()
    g = generator(0)
    e, a = torch.randn(2, 6, 97, generator=g) * 3
    a[0, e[0].argmax()] = -torch.inf
    e[4, 9] = torch.nan
    alpha = torch.tensor([[0.05], [0.1], [0.3], [1.0], [0.1], [0.2]])
    beta = torch.tensor([[0.5], [0.0], [1.0], [2.0], [1.0], [-1.0]])
    want = ops.cold_select(e, a, alpha, beta)
    assert want[4] == -1 and (want != e.argmax(-1)).sum() > 1
    assert torch.equal(torch.compile(lambda *x: ops.cold_select(*x), fullgraph=True)(e, a, alpha, beta), want)


def adapter(model, folder, **config):
    return load_adapter(toy_adapter(model, folder, **config), model)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def with_adapter(model, loaded):
    "The model with its adapter added into the weights"
    merged = copy.deepcopy(model)
    for path, w in loaded.layers.items():
        merged.get_submodule(path).weight += w.scale * w.B @ w.A
    return merged


@pytest.mark.parametrize('family', FAMILIES)
def test_adapters_that_change_different_layers(family, tmp_path):
    model = toy_model(family)
    ids = torch.randint(3, 97, (4, 6), generator=generator(0))
    a = adapter(model, tmp_path / 'a', target_modules=['q_proj', 'down_proj'])
    b = adapter(model, tmp_path / 'b', r=2, seed=2, target_modules=['v_proj', 'down_proj'])
    assert a.layers.keys() - b.layers.keys() and b.layers.keys() - a.layers.keys() and a.layers.keys() & b.layers.keys()
    with AdapterBank(model, [a, b]).attached([1, -1, 0, 1]):
        ours = logits(model, ids)
    base = logits(model, ids)
    for i, expert in (0, b), (2, a), (3, b):
        torch.testing.assert_close(
            ours[i : i + 1], logits(with_adapter(model, expert), ids[i : i + 1]), rtol=1e-3, atol=1e-3
        )
    same_bits(ours[1], base[1])
    assert all((ours[i] - base[i]).abs().max() > 1e-2 for i in (0, 2, 3))


def shadows(model):
    return sorted(n for n, m in model.named_modules() if 'forward' in m.__dict__)


def test_nested_banks_are_restored_in_order(tmp_path):
    model = toy_model()
    ids = torch.randint(3, 97, (1, 6), generator=generator(0))
    a = adapter(model, tmp_path / 'a')
    b = adapter(model, tmp_path / 'b', seed=2, target_modules=['q_proj'])
    outer = AdapterBank(model, [a])
    inner = AdapterBank(model, [b])
    base = logits(model, ids)
    with outer.attached([0]):
        want = logits(model, ids)
        with inner.attached([0]):
            assert not torch.equal(logits(model, ids), want)
        same_bits(logits(model, ids), want)
    same_bits(logits(model, ids), base)
    assert shadows(model) == []


def test_one_bank_attached_twice_is_restored(tmp_path):
    "The inner block changes who uses the adapter; after it the outer block's rows are back"
    model = toy_model()
    ids = torch.randint(3, 97, (1, 6), generator=generator(0))
    bank = AdapterBank(model, [adapter(model, tmp_path / 'a')])
    base = logits(model, ids)
    with bank.attached([0]):
        want = logits(model, ids)
        with bank.attached([-1]):
            same_bits(logits(model, ids), base)
        same_bits(logits(model, ids), want)
    assert shadows(model) == [] and bank.ids is None


def test_a_forward_of_somebody_else_is_put_back(tmp_path):
    model = toy_model()
    bank = AdapterBank(model, [adapter(model, tmp_path / 'a')])
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = theirs = lambda x: x
    with bank.attached([0]):
        assert layer.__dict__['forward'] is not theirs
    assert layer.__dict__['forward'] is theirs


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError, SystemExit])
def test_no_trace_after_an_error(error, tmp_path):
    model = toy_model()
    bank = AdapterBank(model, [adapter(model, tmp_path / 'a')])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error), bank.attached([0]):
        assert len(shadows(model)) == sum(map(len, bank.slices))
        raise error
    assert shadows(model) == [] and bank.ids is None
    for k, v in model.state_dict().items():
        same_bits(v, before[k])


@pytest.mark.parametrize('ids', [[2], [-2], [0, 5]])
def test_ids_that_do_not_exist_are_refused(ids, tmp_path):
    model = toy_model()
    with pytest.raises(DecodingError, match='do not fit 1 adapters'), AdapterBank(
        model, [adapter(model, tmp_path / 'a')]
    ).attached(ids):
        pass
    assert shadows(model) == []


def test_an_adapter_in_memory_is_the_adapter_on_disk(tmp_path):
    from peft import PeftModel

    model = toy_model()
    folder = toy_adapter(model, tmp_path / 'a')
    inner = PeftModel.from_pretrained(copy.deepcopy(model), folder).get_base_model()
    disk = load_adapter(folder, model)
    memory = adapter_from_peft(inner)
    assert disk.layers.keys() == memory.layers.keys()
    for path, w in disk.layers.items():
        same_bits(memory.layers[path].A, w.A)
        same_bits(memory.layers[path].B, w.B)
        assert memory.layers[path].scale == w.scale
