"The operators: one meaning for reference, fake function and compiled code, and a kernel only where it may serve"

import functools, importlib.util, sys
from types import SimpleNamespace
import pytest, torch
from hypothesis import given, settings, strategies as st
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.foundations.lora import LoraWeights, stack_slices

compiled = pytest.mark.skipif(not ops.compiles(), reason='torch.compile finds no C++ compiler')


def lora_args(seed=0, b=3, t=2, d=40, widths=(12, 7), ranks=((4, 2), (0, 3)), ids=(1, -1, 0), dtype=torch.float32):
    g = generator(seed)
    weight = lambda r, o: (
        LoraWeights(torch.randn(r, d, generator=g).to(dtype), torch.randn(o, r, generator=g).to(dtype), 0.7)
        if r
        else None
    )
    s = stack_slices([[weight(r, o) for r in row] for row, o in zip(ranks, widths)])
    return (
        [torch.randn(b, t, o, generator=g).to(dtype) for o in widths],
        torch.randn(b, t, d, generator=g).to(dtype),
        s.A,
        s.B,
        s.scale,
        s.ranks,
        torch.tensor(ids),
    )


def calls():
    "Return arguments for every operator"
    g = generator(1)
    y, x, A, B, scale, ranks, ids = lora_args()
    e, a = torch.randn(2, 3, 50, generator=g)
    alpha_beta = torch.full((3, 1), 0.1), torch.full((3, 1), 0.5)
    temperature_keys = torch.full((3, 1), 0.7), torch.tensor([[5, 7], [-3, 1], [2, 9]], dtype=torch.int32)
    draft, target = torch.randn(2, 4, 50, generator=g)
    _, lse, top_p, top_i = ops.topk_loss_forward(draft, target, 5)
    return dict(
        lora=(y, x, A, B, scale, ranks, ids),
        lora_shrink=(x, A, scale, ranks, ids, 2),
        lora_expand=(y, torch.randn(2, 3, 2, 2, 4, generator=g), B, ranks, ids),
        cold_scores=(e, a, *alpha_beta),
        cold_select=(e, a, *alpha_beta),
        cold_sample=(e, a, *alpha_beta, *temperature_keys),
        plain_sample=(e, *temperature_keys),
        kv_commit=([torch.randn(2, 2, 9, 4, generator=g)], torch.tensor([[0, 2], [1, 3]]), torch.tensor([2, 1]), 4),
        topk_loss_forward=(draft.requires_grad_(), target, 5),
        topk_loss_backward=(torch.ones(4), draft.detach(), lse.detach(), top_p.detach(), top_i),
    )


def test_every_operator_is_tried():
    assert set(calls()) == set(ops._OPERATORS) - {'toy_double', 'toy_square'}


@pytest.mark.parametrize('name', calls())
def test_operator_keeps_the_rules_of_torch_library(name):
    "Schema (what is changed in place), fake shapes, autograd registration, and compiled code with symbolic shapes"
    torch.library.opcheck(getattr(torch.ops.npu_lora, name).default, calls()[name])


REFERENCES = dict(lora=ops.lora_torch) | {name: getattr(ops, f'{name}_torch') for name in calls() if name != 'lora'}
FACES = {name: getattr(ops, name) for name in calls()}
DIFFERENTIABLE = {'topk_loss_forward'}


@pytest.fixture
def kernels(monkeypatch):
    "Serve every operator on the CPU by its reference, and note who was called"
    library = torch.library.Library('npu_lora', 'IMPL')
    called = []
    for name, reference in REFERENCES.items():

        def kernel(*args, name=name, reference=reference):
            called.append(name)
            return reference(*args)

        library.impl(name, kernel, 'CPU')
    monkeypatch.setitem(ops._KERNELS, 'cpu', dict.fromkeys(REFERENCES, 'noted'))
    yield called
    library._destroy()


@pytest.mark.parametrize('name', calls())
def test_a_call_reaches_the_kernel_unless_it_must_not(kernels, name):
    "Not inside `references()`, not where it would lose a gradient, not in fp64"

    def serves(args, face=FACES[name]):
        kernels.clear()
        face(*args)
        return kernels == [name]

    args = calls()[name]
    kernels.clear()
    with torch.no_grad():
        assert serves(args)
    with torch.no_grad(), ops.references():
        assert not serves(args) and not kernels
    if name != 'kv_commit':
        train = [
            (
                [x.clone().requires_grad_() if x.is_floating_point() else x for x in a]
                if isinstance(a, list)
                else a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            )
            for a in args
        ]
        assert serves(train) == (name in DIFFERENTIABLE)
    wide = lambda a: (
        [x.double() if x.is_floating_point() else x for x in a]
        if isinstance(a, list)
        else a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
    )
    with torch.no_grad():
        assert ops.served(name, args) and not ops.served(name, [wide(a) for a in args])


def test_topk_loss_goes_the_same_way(kernels):
    draft, target, k = calls()['topk_loss_forward']
    kernels.clear()
    ops.topk_loss(draft, target, k).sum().backward()
    assert kernels == ['topk_loss_forward', 'topk_loss_backward']
    kernels.clear()
    with ops.references():
        ops.topk_loss(draft, target, k).sum().backward()
    assert not kernels
    grad = torch.autograd.grad(ops.topk_loss(draft[:, ::2], target[:, ::2], k).sum(), draft)[0]
    assert grad[:, ::2].any() and not grad[:, 1::2].any()


def test_topk_loss_refuses_a_second_derivative():
    draft, target, k = calls()['topk_loss_forward']
    with pytest.raises(DecodingError, match='the Top-K loss has no second derivative'):
        torch.autograd.grad(ops.topk_loss(draft, target, k).sum(), draft, create_graph=True)


@compiled
def test_slices_through_a_kernel_compile_whole(kernels):
    torch._dynamo.reset()
    args = calls()['lora']
    kernels.clear()
    got = torch.compile(lambda: ops.lora(*args), fullgraph=True)()
    assert 'lora' in kernels and all(torch.equal(a, b) for a, b in zip(got, ops.lora_torch(*args), strict=True))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    'kind, message',
    [
        ('meta', 'no kernels are written for meta'),
        ('cuda', 'no kernels on cuda: triton is not installed'),
        ('npu', 'no kernels on npu: triton-ascend is not installed'),
    ],
)
def test_missing_kernels_are_explained(kind, message):
    if importlib.util.find_spec('triton') and kind != 'meta':
        pytest.skip('Triton is here')
    assert ops.find_kernels(kind) == ({}, None, message)


def test_a_triton_of_another_device_or_a_broken_one_is_explained(monkeypatch):
    monkeypatch.setattr(ops.importlib.util, 'find_spec', lambda name: True)
    other = SimpleNamespace(__version__='3', backends=SimpleNamespace(backends={'nvidia': 1}))
    monkeypatch.setitem(sys.modules, 'triton', other)
    assert ops.find_kernels('npu')[2] == 'no kernels on npu: the Triton that is installed is not triton-ascend'
    monkeypatch.setitem(sys.modules, 'triton', None)  # an import of None raises
    assert ops.find_kernels('npu')[2].startswith('no kernels on npu: Triton does not start (')


@functools.cache
def toy(name):
    "Return an operator with a kernel for the CPU, whose result tells who ran: the reference doubles, the kernel doubles and adds one"
    op = ops.define_op(f'{name}(Tensor x) -> Tensor', lambda x: x * 2, torch.empty_like)
    ops.register_kernel(name, 'cpu', lambda x: x * 2 + 1, 'toy 1.0')
    return op


def test_a_kernel_serves_its_device_and_says_so():
    op = toy('toy_double')
    assert op(torch.ones(2)).tolist() == [3, 3] and ops.backend('toy_double', 'cpu') == 'toy 1.0'
    assert (
        ops.backend('lora', 'cpu')
        == ops.backend('lora', torch.device('cpu'))
        == ops.backend('toy_double', 'meta')
        == 'torch'
    )
    assert op(torch.ones(2, device='meta')).shape == (2,)


def test_a_kernel_without_a_gradient_leaves_training_to_the_reference():
    op = toy('toy_square')
    x = torch.ones(2, requires_grad=True)
    assert op(x).tolist() == [2, 2] and torch.autograd.grad(op(x).sum(), x)[0].tolist() == [2, 2]
    with torch.no_grad():
        assert op(x).tolist() == [3, 3]


@compiled
def test_a_kernel_is_a_box_to_the_compiler():
    torch._dynamo.reset()
    op = toy('toy_square')
    assert torch.compile(lambda x: op(x) + 1, fullgraph=True)(torch.ones(2)).tolist() == [4, 4]


def test_a_kernel_for_an_unknown_operator_is_refused():
    with pytest.raises(DecodingError, match="no operator 'nothing': use one of"):
        ops.register_kernel('nothing', 'cpu', None, '')


sizes = st.integers(1, 3), st.integers(1, 3), st.integers(1, 70)
widths = st.lists(st.integers(1, 9), min_size=1, max_size=3)
case = st.tuples(*sizes, widths, st.integers(1, 3), st.integers(1, 4), st.data())


@settings(max_examples=60, deadline=None)
@given(case)
def test_shrink_and_expand_are_lora_row_by_row(case):
    "The references that kernels are held against, against the loop; any number of parts; padding that is NaN is never used"
    b, t, d, widths, n, parts, data = case
    ranks = [[data.draw(st.integers(0, 6)) for _ in range(n)] for _ in widths]
    ranks[0][0] = max(1, ranks[0][0])
    if not all(map(any, ranks)):
        ranks = [[max(1, r) for r in row] for row in ranks]
    ids = [data.draw(st.integers(-1, n - 1)) for _ in range(b)]
    y, x, A, B, scale, own, ids = lora_args(0, b=b, t=t, d=d, widths=widths, ranks=ranks, ids=ids)
    layers = A, B, scale, own
    want = ops.lora(y, x, *layers, ids)
    padding = torch.arange(A.shape[2]) >= own[..., None]
    A = A.masked_fill(padding[..., None], torch.nan)
    B = [B_z.masked_fill(p[..., None], torch.nan) for B_z, p in zip(B, padding)]
    h = ops.lora_shrink(x, A, scale, own, ids, parts)
    assert h.shape == (parts, b, t, len(widths), A.shape[2]) and not h[:, ids < 0].any()
    for got, w, y_z in zip(ops.lora_expand(y, h, B, own, ids), want, y):
        torch.testing.assert_close(got, w, rtol=1e-4, atol=1e-4)
        assert torch.equal(got[ids < 0].view(torch.int32), y_z[ids < 0].view(torch.int32))


def test_an_id_without_adapter_is_nan_and_touches_no_other_row():
    y, x, A, B, scale, ranks, _ = lora_args()
    ids = torch.tensor([2, -1, -5])
    out = ops.lora_expand(y, ops.lora_shrink(x, A, scale, ranks, ids, 1), B, ranks, ids)
    assert all(o[[0, 2]].isnan().all() and torch.equal(o[1], y_z[1]) for o, y_z in zip(out, y))


commits = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 6), st.integers(0, 8), st.data())


def test_commit_moves_no_more_than_were_accepted():
    "What `order` holds behind `count` may be a column of the cache: it must not move"
    x = torch.arange(6.0).view(1, 1, 6, 1).clone()
    ops.kv_commit([x], torch.tensor([[1, 2, 3]]), torch.tensor([1]), 2)
    assert x.flatten().tolist() == [0, 1, 3, 3, 4, 5]


@settings(max_examples=100, deadline=None)
@given(commits)
def test_commit_moves_accepted_nodes_and_nothing_else(case):
    b, g, start, free, data = case
    nodes = [
        data.draw(st.lists(st.integers(0, max(0, free - 1)), max_size=free, unique=True).map(sorted)) for _ in range(b)
    ]
    m = max(map(len, nodes))
    order = torch.tensor(
        [n + [data.draw(st.sampled_from([0, -3, 99, max(0, free - 1)]))] * (m - len(n)) for n in nodes],
        dtype=torch.long,
    ).view(b, m)
    planes = [torch.randn(b, g, start + free, 4, generator=generator(i)) for i in range(2)]
    before = [x.clone() for x in planes]
    ops.kv_commit(planes, order, torch.tensor([len(n) for n in nodes]), start)
    for x, old in zip(planes, before):
        for i, n in enumerate(nodes):
            assert torch.equal(x[i, :, start : start + len(n)], old[i, :, [start + j for j in n]])
            assert torch.equal(x[i, :, :start], old[i, :, :start]) and torch.equal(
                x[i, :, start + len(n) :], old[i, :, start + len(n) :]
            )


def test_commit_skips_columns_outside_the_cache_and_keeps_nan_bits():
    x = (
        torch.arange(8, dtype=torch.int32).add(0x7F800001).view(torch.float32).view(1, 1, 8, 1).clone()
    )  # signalling NaNs, all different
    before = x.view(torch.int32).clone()
    ops.kv_commit([x], torch.tensor([[1, 6, 99]]), torch.tensor([3]), 3)
    after = x.view(torch.int32)
    assert after.flatten().tolist() == [
        *before.flatten().tolist()[:3],
        before[0, 0, 4, 0].item(),
        *before.flatten().tolist()[4:],
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 10**6), st.data())
def test_topk_loss_is_the_plain_definition(t, v, seed, data):
    k = data.draw(st.integers(1, v))
    g = generator(seed)
    draft = (torch.randn(t, v, generator=g) * 4).requires_grad_()
    target = torch.randn(t, v, generator=g) * 4
    plain = lambda z: -(target.softmax(-1).topk(k)[0] * z.log_softmax(-1).gather(1, target.topk(k)[1])).sum(-1)
    weight = torch.rand(t, generator=g)
    torch.testing.assert_close(ops.topk_loss(draft, target, k), plain(draft), rtol=1e-5, atol=1e-5)
    ours, theirs = (
        torch.autograd.grad((f(draft) * weight).sum(), draft)[0] for f in (lambda z: ops.topk_loss(z, target, k), plain)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def special_logits(kind, gen, v, dtype):
    "Return expert and base logits with what is special in them"
    e, a = (torch.randn(2, 3, v, generator=gen).mul(4).to(dtype) for _ in range(2))
    if kind == 'ties':
        e = e.round()
        a = a.round()
    if kind == 'flat':
        e[0] = 1
    if kind == 'nan':
        e[0, 0, v // 2] = torch.nan
    if kind == 'inf':
        a[0, 1, 0] = torch.inf
    if kind == 'base':
        a[1, 2, e[1, 2].argmax()] = -torch.inf
    return e, a


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@given(st.integers(0, 2**31), st.integers(2, 300), st.sampled_from(['plain', 'ties', 'flat', 'nan', 'inf', 'base']))
def test_the_plausible_few_are_enough(dtype, seed, v, kind):
    "To choose, and to draw: noise and temperature act on plausible tokens only"
    gen = torch.Generator().manual_seed(seed)
    e, a = special_logits(kind, gen, v, dtype)
    alpha = torch.rand(2, 1, 1, generator=gen).clamp(0.005)
    beta = torch.rand(2, 1, 1, generator=gen) * 3 - 1
    temperature = torch.rand(2, 3, 1, generator=gen) * 3 + 0.01
    keys = torch.randint(-(2**31), 2**31, (2, 3, 2), generator=gen).int()
    logits = e, a, alpha, beta
    noise = temperature, keys
    assert torch.equal(ops.cold_select_few(*logits), ops.cold_select_torch(*logits))
    assert torch.equal(ops.cold_sample_few(*logits, *noise), ops.cold_sample_torch(*logits, *noise))


def drawing(n, v=6, seed=0):
    "Return logits of expert and base, settings, and the keys of `n` positions"
    gen = generator(seed)
    e, a = torch.randn(2, 1, v, generator=gen)
    keys = ops.position_keys(torch.tensor([seed, 1], dtype=torch.int32), torch.arange(n))
    return (e.repeat(n, 1), a.repeat(n, 1)), [torch.tensor([[x]]) for x in (0.1, 0.5, 0.8)], keys


def chi_square(tokens, p):
    expected = p[p > 0] * len(tokens)
    count = tokens.bincount(minlength=len(p))
    assert not count[p == 0].any()
    return ((count[p > 0] - expected) ** 2 / expected).sum().item()


SAME = 20.5  # Of at most five degrees of freedom: exceeded once in a thousand


@pytest.mark.parametrize('seed', range(4))
def test_draws_follow_their_distributions(seed):
    (e, a), (alpha, beta, temperature), keys = drawing(20000, seed=seed)
    of_cold = (ops.cold_scores(e[:1], a[:1], alpha, beta) / temperature).softmax(-1)[0]
    of_plain = (e[0] / temperature[0]).softmax(-1)
    settings = alpha, beta, temperature, keys
    assert chi_square(ops.cold_sample(e, a, *settings), of_cold) < SAME
    assert chi_square(ops.cold_sample_torch(e, a, *settings), of_cold) < SAME
    assert chi_square(ops.plain_sample(e, temperature, keys), of_plain) < SAME
    # another temperature, and the noise of one position for all, are noticed
    assert chi_square(ops.plain_sample(e, temperature * 1.2, keys), of_plain) > SAME
    assert chi_square(ops.plain_sample(e, temperature, keys[:1].expand_as(keys)), of_plain) > SAME


def test_a_draw_is_the_best_of_scores_and_noise():
    "At the row's own key, and in no other order of contrast, plausible set and temperature"
    (e, a), (alpha, beta, temperature), keys = drawing(3000, 40)
    scores = torch.where(e >= alpha.log() + e.amax(-1, keepdim=True), e + beta * (e - a), -torch.inf)
    want = (scores / temperature + ops.gumbel(keys, 40)).argmax(-1)
    assert torch.equal(ops.cold_sample(e, a, alpha, beta, temperature, keys), want)
    hot = e / temperature
    early = torch.where(
        hot >= alpha.log() + hot.amax(-1, keepdim=True), hot + beta * (hot - a / temperature), -torch.inf
    )
    planted = {
        'the next row\'s noise': scores / temperature + ops.gumbel(keys.roll(1, 0), 40),
        'the next token\'s noise': scores / temperature + ops.gumbel(keys, 40).roll(1, -1),
        'the plausible set after the temperature': early + ops.gumbel(keys, 40),
    }
    for name, noisy in planted.items():
        assert not torch.equal(noisy.argmax(-1), want), name


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_without_a_best_score_has_no_draw(dtype):
    gen = generator(0)
    e = torch.randn(6, 30, generator=gen).to(dtype)
    e[0, 3] = torch.nan
    e[1, 29] = torch.inf
    e[2] = -torch.inf
    e[3, 1:] = -torch.inf
    e[4, ::2] = -torch.inf
    keys = torch.randint(-(2**31), 2**31, (6, 2), generator=gen).int()
    tokens = ops.plain_sample(e, torch.full((6, 1), 0.7), keys)
    assert (tokens < 0).tolist() == [True, True, True, False, False, False]
    assert tokens[3] == 0 and tokens[4] % 2 == 1
    one = torch.ones(1, 1)
    assert ops.cold_sample(e, torch.zeros_like(e), one, one, one, keys).tolist()[:4] == [-1, -1, -1, 0]
    a = torch.zeros_like(e)
    a[5, 7] = torch.nan
    assert ops.cold_sample(e, a, one, one, one, keys)[5] == -1


@compiled
def test_a_compiled_draw_is_the_same():
    torch._dynamo.reset()
    (e, a), settings, keys = drawing(50, 3000)
    both = lambda *args: (ops.cold_sample_torch(*args), ops.plain_sample_torch(args[0], *args[4:]))
    args = e, a, *settings, keys
    got = torch.compile(both, fullgraph=True)(*args)
    torch._dynamo.reset()
    assert all(torch.equal(g, w) for g, w in zip(got, both(*args), strict=True))
