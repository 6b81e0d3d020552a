"A head's start: scales, weights at one scale, plain copies, random numbers and least squares"

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import parametrize
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.hass.head import DraftHead, HEAD_FAMILIES, head_config
from npu_lora_decoding.hass.checkpoint import load_head, save_head
from npu_lora_decoding.hass.initialization import (
    Scales,
    least_squares,
    least_squares_start,
    measure_scales,
    plain_copy,
    precondition,
    random_start,
)

KINDS = [(f, {}) for f in HEAD_FAMILIES] + [('llama', dict(attention_bias=True, mlp_bias=True))]
SCALES = Scales(torch.logspace(-2, 0, 32), torch.logspace(-1, 1.5, 32))
NAMES = [f'{f}{"-biases" if more else ""}' for f, more in KINDS]


def toy_head(family='llama', more=None, bias=True, seed=0):
    "A head with random weights everywhere, norms and biases too"
    head = DraftHead(head_config(toy_model(family, **(more or {})).config), fc_bias=bias)
    g = generator(seed)
    for p in head.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.3
    return head


def outputs(head, b=2, t=7, seed=1):
    g = generator(seed)
    e = torch.randn(b, t, 32, generator=g) * SCALES.embed
    f = torch.randn(b, t, 32, generator=g) * SCALES.feature
    return head(e, f, torch.arange(t).expand(b, t), torch.ones(t, t, dtype=torch.bool).tril().expand(b, t, t))[0]


def near(got, want, rtol=1e-4):
    torch.testing.assert_close(
        got, want, rtol=rtol, atol=rtol * float(want.detach().abs().max())
    )  # w / s * s is w up to the last bit; sums of 64 such terms


def texts(lengths=(30, 9, 2, 1, 17), d=6, v=20, seed=0, device=None):
    g = generator(seed)
    return [
        (
            torch.randint(0, v, (n,), generator=g),
            torch.rand(n, generator=g) < 0.7,
            torch.randn(n, d, generator=g) * 10 ** torch.linspace(-1, 1, d),
        )
        for n in lengths
    ]


EMBED = torch.randn(20, 6, generator=generator(5)) * 0.1

# ---- scales


def test_scales_equal_a_loop():
    got = measure_scales(texts(), EMBED)
    seen = [(EMBED[i], f[j]) for ids, _, f in texts() for j, i in enumerate(ids)]
    for x, k in ((got.embed, 0), (got.feature, 1)):
        torch.testing.assert_close(x, (sum(s[k].double() ** 2 for s in seen) / len(seen)).sqrt().float())


def test_silent_dimensions_are_not_divided_by():
    "A dimension that is always zero, or all of them"
    silent = [(ids, r, f * torch.tensor([1.0, 1, 1, 1, 1, 0])) for ids, r, f in texts()]
    s = measure_scales(silent, EMBED).feature
    whole = torch.cat([f for _, _, f in silent]).pow(2).mean().sqrt()
    torch.testing.assert_close(s[-1], whole / 1000)
    assert bool((measure_scales(texts(), torch.zeros(20, 6)).embed > 0).all())
    head = precondition(
        toy_head(),
        Scales(
            SCALES.embed,
            measure_scales([(i, r, torch.zeros(len(i), 32)) for i, r, _ in texts()], torch.zeros(20, 32)).feature,
        ),
    )
    assert outputs(head).isfinite().all()


def test_scales_of_bf16_are_fp32():
    got = measure_scales([(i, r, f.bfloat16()) for i, r, f in texts()], EMBED.bfloat16())
    want = measure_scales(texts(), EMBED)
    for a, b in zip((got.embed, got.feature), (want.embed, want.feature)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2**-8, atol=0)


# ---- scaled weights


@pytest.mark.parametrize('family,more', KINDS, ids=NAMES)
@pytest.mark.parametrize('bias', [False, True])
def test_scaling_changes_nothing(family, more, bias):
    "Outputs, and the gradient of every weight but for its scale"
    head = toy_head(family, more, bias)
    want = outputs(head)
    want.pow(2).mean().backward()
    grads = {n: p.grad.clone() for n, p in head.named_parameters()}
    shapes = {n: p.shape for n, p in head.named_parameters()}
    head.zero_grad()
    precondition(head, SCALES)
    got = outputs(head)
    got.pow(2).mean().backward()
    near(got, want)
    for n, p in head.named_parameters():
        plain = n.replace('parametrizations.weight.original', 'weight')
        scale = head.get_submodule(plain.rpartition('.')[0]).parametrizations.weight[0].scale if plain != n else 1.0
        assert p.shape == shapes[plain]
        near(p.grad, grads[plain] * scale, 1e-3)
    scaled = {n.split('.')[-4] for n, _ in head.named_parameters() if n.endswith('original')}
    assert scaled == {'fc', 'q_proj', 'k_proj', 'v_proj', 'o_proj', 'down_proj'} and len(grads) == len(
        list(head.parameters())
    )


def test_each_scale_stands_where_it_belongs():
    """What the optimiser sees reads and writes unit scale: fc in all rows and columns, q, k,
    v by what they read, o and down by what they write
    """
    head = precondition(toy_head(), SCALES)
    e = SCALES.embed
    f = SCALES.feature
    one = torch.ones
    attention = head.layers[0].self_attn
    want = {}
    want[head.fc] = f[:, None] / torch.cat([e, f])
    for p in (attention.q_proj, attention.k_proj, attention.v_proj):
        want[p] = one(p.out_features, 1) / f
    for p in (attention.o_proj, head.layers[0].mlp.down_proj):
        want[p] = f[:, None] * one(1, p.in_features)
    for p, s in want.items():
        torch.testing.assert_close(p.parametrizations.weight[0].scale, s)
        torch.testing.assert_close(p.weight, p.parametrizations.weight.original * s)


def test_scaling_twice_is_refused():
    with pytest.raises(DecodingError, match='scaled already: take a plain_copy of it first'):
        precondition(precondition(toy_head(), SCALES), SCALES)
    near(outputs(precondition(plain_copy(precondition(toy_head(), SCALES)), SCALES)), outputs(toy_head()))


def test_an_update_moves_what_it_should():
    "A step of size one in the optimiser's weight is a step of size S in the real one"
    head = precondition(toy_head(), SCALES)
    before = head.fc.weight.detach().clone()
    with torch.no_grad():
        head.fc.parametrizations.weight.original.add_(1.0)
    near(head.fc.weight.detach() - before, head.fc.parametrizations.weight[0].scale)


@pytest.mark.parametrize('family,more', KINDS, ids=NAMES)
@pytest.mark.parametrize('scaled', [False, True])
def test_plain_copy(family, more, scaled, tmp_path):
    head = toy_head(family, more)
    head.vocab = torch.tensor([4, 2])
    head.counts = torch.tensor([9, 1])
    if scaled:
        precondition(head, SCALES)
    head.train()
    copy = plain_copy(head)
    near(outputs(copy), outputs(head))
    assert (
        not copy.training
        and not any(p.requires_grad for p in copy.parameters())
        and not any(parametrize.is_parametrized(m) for m in copy.modules())
    )
    assert (
        head.training
        and all(p.requires_grad for p in head.parameters())
        and parametrize.is_parametrized(head.fc) == scaled
    )
    assert torch.equal(copy.vocab, head.vocab) and torch.equal(copy.counts, head.counts)
    target = toy_model(family, **more)
    again = load_head(save_head(copy, tmp_path / 'head', target, torch.float32), target)
    assert again.state_dict().keys() == toy_head(family, more).state_dict().keys() and all(
        torch.equal(x, copy.state_dict()[k]) for k, x in again.state_dict().items()
    )
    kept = {k: x.clone() for k, x in copy.state_dict().items()}
    with torch.no_grad():
        for p in head.parameters():
            p.add_(1.0)
    assert all(torch.equal(x, kept[k]) for k, x in copy.state_dict().items())  # a copy, not a view


def test_plain_copy_keeps_the_dtype():
    assert {p.dtype for p in plain_copy(precondition(toy_head().bfloat16(), SCALES)).parameters()} == {torch.bfloat16}


# ---- random numbers


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('family,more', KINDS, ids=NAMES)
def test_random_start_depends_on_its_seed_only(family, more, scaled):
    "Biases too, which torch would draw from its own state"

    def made(seed, noise):
        torch.manual_seed(noise)
        head = DraftHead(head_config(toy_model(family, **more).config), fc_bias=True)
        return random_start(precondition(head, SCALES) if scaled else head, seed)

    a = made(0, 1)
    b = made(0, 2)
    c = made(1, 1)
    state = torch.get_rng_state()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters())) and torch.equal(
        state, torch.get_rng_state()
    )
    assert not torch.equal(a.fc.weight, c.fc.weight) and all(
        not p.any() for n, p in a.named_parameters() if n.endswith('bias')
    )
    for m in a.modules():
        if isinstance(m, nn.Linear):
            w = m.parametrizations.weight.original if parametrize.is_parametrized(m) else m.weight
            quiet = 0.3 if m in (a.layers[0].self_attn.o_proj, a.layers[0].mlp.down_proj) else 1.0
            assert float(w.detach().std()) == pytest.approx(quiet * m.in_features**-0.5, rel=0.15)


def test_random_start_keeps_the_scale_of_features():
    head = random_start(precondition(toy_head(bias=False), SCALES))
    for p in head.layers[0].post_attention_layernorm.parameters():
        p.data.fill_(1.0)
    ratio = outputs(head, b=16, t=20).detach().pow(2).mean((0, 1)).sqrt() / SCALES.feature
    assert 0.5 < float(ratio.min()) and float(ratio.max()) < 3


# ---- least squares


def naive(examples, embed, scales, ridge):
    pairs = [
        (torch.cat([embed[ids[i + 1]] / scales.embed, f[i] / scales.feature]), f[i + 1] / scales.feature)
        for ids, response, f in examples
        for i in range(len(ids) - 1)
        if response[i + 1]
    ]
    x, y = (torch.stack(z).double() for z in zip(*pairs))
    extra = (ridge * x.pow(2).sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.linalg.lstsq(
        torch.cat([x, extra]), torch.cat([y, y.new_zeros(x.shape[1], y.shape[1])])
    ).solution.T.float()


@given(st.integers(0, 1000), st.sampled_from([1e-3, 1e-2, 1.0, 100.0]))
@settings(max_examples=25)
def test_least_squares_equals_lstsq(seed, ridge):
    data = texts((20, 9, 3, 1, 2), seed=seed)
    s = measure_scales(data, EMBED)
    torch.testing.assert_close(
        least_squares(data, EMBED, s, ridge), naive(data, EMBED, s, ridge), rtol=1e-3, atol=1e-3
    )  # x.T @ x is summed in fp32


def test_a_linear_world_is_learnt():
    "Where the next feature is a matrix times the inputs, that matrix comes out"
    g = generator(0)
    w = torch.randn(6, 12, generator=generator(1)) * 0.3
    data = []
    for _ in range(40):
        ids = torch.randint(0, 20, (30,), generator=g)
        f = [torch.randn(6, generator=g)]
        for i in ids[1:]:
            f.append(w @ torch.cat([EMBED[i], f[-1]]))
        data.append((ids, torch.ones(30, dtype=torch.bool), torch.stack(f)))
    s = Scales(torch.ones(6), torch.ones(6))
    torch.testing.assert_close(least_squares(data, EMBED, s, 1e-7), w, rtol=1e-2, atol=1e-2)


def test_only_answers_are_fitted():
    "What is read or drafted for the prompt changes nothing"

    def broken(ids, response, f):
        touched = response.clone()
        touched[:-1] |= response[1:]  # the feature before an answer's token is read
        return torch.where(response, ids, 0), response, torch.where(touched[:, None], f, 99.0)

    data = texts()
    s = measure_scales(data, EMBED)
    assert torch.equal(least_squares([broken(*x) for x in data], EMBED, s), least_squares(data, EMBED, s))
    with pytest.raises(DecodingError, match='no example has an answer to learn from: give texts with answers'):
        least_squares([(i, torch.zeros_like(r), f) for i, r, f in data], EMBED, s)


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_least_squares_start(scaled, dtype):
    "The head's fc computes the linear prediction, in plain units, also where the head was scaled by other numbers; nothing else moves"
    data = texts(d=32)
    embed = torch.randn(20, 32, generator=generator(2))
    s = measure_scales(data, embed)
    head = toy_head(bias=False).to(dtype)
    if scaled:
        precondition(head, Scales(s.embed * 3, s.feature * 0.5))
    others = [p.detach().clone() for n, p in head.named_parameters() if not n.startswith('fc')]
    least_squares_start(head, data, embed, s)
    want = least_squares(data, embed, s) * s.feature[:, None] / torch.cat([s.embed, s.feature])
    torch.testing.assert_close(head.fc.weight.float(), want, rtol=1e-5 if dtype == torch.float32 else 2**-6, atol=0)
    assert all(
        torch.equal(p, q) for p, q in zip(others, [p for n, p in head.named_parameters() if not n.startswith('fc')])
    ) and all(p.requires_grad for p in head.parameters())
