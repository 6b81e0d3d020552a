"Distillation losses: every loss against its sum, sizes and dtypes, chunks, places that do not count, and bad objectives"

import dataclasses, json, math
import pytest, torch
from hypothesis import given, settings, strategies as st
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.hass.losses import (
    LINEAR,
    LOSSES,
    OVERLAP,
    Objective,
    _mixed,
    distill,
    feature_loss,
    frequency_topk,
    log_overlap,
    losses_for,
    distill_targets,
    token_weights,
)

EVERY = tuple((name, 0.5 + i) for i, name in enumerate(losses_for(torch.ones(1))))


def logits(seed, t=4, v=11, dtype=torch.float64):
    g = generator(seed)
    return (torch.randn(t, v, generator=g, dtype=torch.float64).mul(2).to(dtype) for _ in range(2))


def by_hand(name, q, p, k, w):
    "One position of a loss, in plain Python, from two lists of probabilities"
    top = sorted(range(len(p)), key=lambda i: -p[i])[:k]
    entropy = -sum(x * math.log(x) for x in p)
    partly = -sum(p[i] * math.log(q[i]) for i in top)
    return dict(
        soft_ce=-sum(a * math.log(b) for a, b in zip(p, q)),
        topk=partly,
        forward_kl=sum(a * math.log(a / b) for a, b in zip(p, q)),
        reverse_kl=sum(b * math.log(b / a) for a, b in zip(p, q)),
        total_variation=sum(abs(a - b) for a, b in zip(p, q)) / 2,
        weighted_topk=partly * (1 - entropy / math.log(len(p))),
        frequency_topk=-sum(w[i] * p[i] * math.log(q[i]) for i in top),
        nla=-math.log(sum(map(min, p, q))),
        lk_hybrid=hybrid_by_hand(q, p),
    )[name]


def hybrid_by_hand(q, p):
    "KL of what the target draws among the tokens of q, and the overlap of all that it draws"
    alpha = sum(map(min, p, q))
    share = math.exp(-3 * alpha)
    inside = sum(p)
    kl = sum(a / inside * math.log(a / inside / b) for a, b in zip(p, q))
    return share * kl + (1 - share) * (1 - alpha)


def differentiable(loss, name, z, y, inside=None):
    "The same with the share of the hybrid held, which finite differences would move"
    if name != 'lk_hybrid':
        return loss
    share = (-3 * log_overlap(z.detach(), y, inside).exp()).exp()
    return lambda x, y, k: _mixed(x, y, share, inside)


@pytest.mark.parametrize('name', [n for n, _ in EVERY])
@pytest.mark.parametrize('k', [1, 3, 11])
def test_losses_are_their_sums(name, k):
    z, y = logits(k)
    w = token_weights(torch.arange(11)).double()
    got = losses_for(w)[name](z, y, k)
    want = [by_hand(name, q, p, k, w.tolist()) for q, p in zip(z.softmax(-1).tolist(), y.softmax(-1).tolist())]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    loss = differentiable(losses_for(w)[name], name, z, y)
    assert torch.autograd.gradcheck(lambda x: loss(x, y, k), z.requires_grad_())
    held, own = (torch.autograd.grad(f(z, y, k).sum(), z)[0] for f in (loss, losses_for(w)[name]))
    torch.testing.assert_close(own, held)  # the share itself gets no gradient


@pytest.mark.parametrize('name', OVERLAP)
@pytest.mark.parametrize('size', [2, 4, 11])
def test_what_a_draft_vocabulary_leaves_out_is_not_accepted(name, size):
    "Logits of the first `size` of 15 tokens, against sums over probabilities of all 15"
    z, whole = logits(size, v=15)
    z = z[:, :size].contiguous()
    few = whole[:, :size]
    inside = few.logsumexp(-1) - whole.logsumexp(-1)
    loss = losses_for(inside=inside)[name]
    kept = [p[:size] for p in whole.softmax(-1).tolist()]
    want = [by_hand(name, q, p, 1, p) for q, p in zip(z.softmax(-1).tolist(), kept)]
    torch.testing.assert_close(loss(z, few, 1), torch.tensor(want, dtype=torch.float64))
    overlap = log_overlap(z, few, inside).exp()
    assert (overlap <= inside.exp() + 1e-12).all()
    smooth = differentiable(loss, name, z, few, inside)
    assert torch.autograd.gradcheck(lambda x: smooth(x, few, 1), z.requires_grad_())
    renormalised = LOSSES[name](z, few, 1)
    assert (loss(z, few, 1) > renormalised).all()


def test_the_hybrid_is_kl_far_away_and_total_variation_near():
    z, y = logits(1)
    far = torch.full_like(y, 0.0)
    far[:, 0] = 60.0
    sure = torch.full_like(y, 0.0)
    sure[:, 1] = 60.0
    torch.testing.assert_close(LOSSES['lk_hybrid'](far, sure), LOSSES['forward_kl'](far, sure))
    near = LOSSES['lk_hybrid'](y + 1e-3 * z, y)
    tv = LOSSES['total_variation'](y + 1e-3 * z, y)
    torch.testing.assert_close(near, (1 - math.exp(-3)) * tv, rtol=0.02, atol=1e-7)
    torch.testing.assert_close(LOSSES['nla'](z, y), -(1 - LOSSES['total_variation'](z, y)).log())


def test_overlap_losses_in_chunks_use_the_whole_lm_head():
    predicted, feature, keep, head, scale, _ = setting(5, b=3, t=7, v=14)
    ids = torch.tensor([7, 2, 9, 4, 13])
    tokens = (('nla', 0.7), ('lk_hybrid', 0.4), ('soft_ce', 0.1))
    inside = ((feature @ head.T).log_softmax(-1)[..., ids]).logsumexp(-1)[keep]
    terms = Objective(0.2, tokens, k=3).terms(predicted[keep], feature[keep], head[ids], scale, inside=inside)
    want = sum(w * x.mean() for w, x in terms)
    grad = torch.autograd.grad(want, predicted)[0]
    for chunk in (1, 4, 512):
        how = dict(objective=Objective(0.2, tokens, k=3, chunk=chunk), scale=scale, whole=head)
        made = distill_targets(feature, keep, head[ids], how['objective'], whole=head)
        torch.testing.assert_close(made, inside)
        for targets in (None, made):
            total, _ = distill(predicted, feature, keep, head[ids], targets=targets, **how)
            torch.testing.assert_close(total, want)
            torch.testing.assert_close(torch.autograd.grad(total, predicted)[0], grad)
    without, _ = distill(predicted, feature, keep, head[ids], Objective(0.2, tokens, k=3), scale)
    assert without < want  # renormalised: what lies outside would count as accepted
    with pytest.raises(DecodingError, match='the whole LM head does not hold the 14 rows'):
        distill(predicted, feature, keep, head, Objective(tokens=tokens, k=3), whole=head[ids])


@pytest.mark.parametrize('name', [n for n, _ in EVERY])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_wide_finite_and_best_at_the_target(name, dtype):
    loss = losses_for(torch.ones(5000))[name]
    z, y = logits(0, 3, 5000, dtype)
    far = z * 100  # probabilities that underflow
    for draft in (z, far, y):
        x = draft.clone().requires_grad_()
        got = loss(x, y, 10)
        got.sum().backward()
        assert (
            got.dtype == torch.float32
            and got.shape == (3,)
            and got.isfinite().all()
            and x.grad.isfinite().all()
            and x.grad.dtype == dtype
        )
        torch.testing.assert_close(
            x.grad.float().sum(-1), torch.zeros(3), rtol=0, atol=0.02
        )  # a constant on all logits changes nothing; half precision rounds 5,000 terms
    if 'topk' not in name:
        assert (loss(y, y, 10) <= loss(z, y, 10) + 1e-5).all()


def test_token_weights():
    counts = torch.tensor([1000, 10, 0, 0])
    assert torch.equal(token_weights(counts, 0), torch.ones(4))
    w = token_weights(counts)
    assert (w[1:] >= w[:-1]).all() and w[2] == w[3] and w.isfinite().all()
    torch.testing.assert_close((w * counts).sum() / counts.sum(), torch.tensor(1.0))
    for bad in (torch.zeros(3), torch.tensor([1, -1])):
        with pytest.raises(DecodingError, match='token counts'):
            token_weights(bad)
    z, y = logits(0)
    for rarity in (None, torch.ones(10)):
        with pytest.raises(DecodingError, match='weight for each token'):
            frequency_topk(z, y, 3, rarity)


def plain(predicted, feature, keep, head, objective, scale, rarity):
    terms = objective.terms(predicted[keep], feature[keep], head, scale, rarity)
    return sum(w * x.mean() for w, x in terms), torch.stack([x.mean() for _, x in terms])


def setting(seed, b=2, t=5, d=6, v=11, dtype=torch.float64):
    g = generator(seed)
    predicted, feature, head = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((b, t, d), (b, t, d), (v, d))
    )
    keep = torch.rand(b, t, generator=g) < 0.6
    keep[0, 0] = True
    return (
        predicted.requires_grad_(),
        feature,
        keep,
        head,
        torch.rand(d, generator=g, dtype=torch.float64).to(dtype) + 0.5,
        torch.rand(v, generator=g, dtype=torch.float64).to(dtype),
    )


@pytest.mark.parametrize('linear', [False, True])
@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 6), st.integers(1, 8), st.integers(1, 11))
def test_chunks_change_nothing(linear, seed, b, t, chunk, k):
    predicted, feature, keep, head, scale, rarity = setting(seed, b, t)
    objective = Objective(
        0.7, [(name, w) for name, w in EVERY if name in LINEAR or not linear], k, chunk
    )  # linear losses have a way of their own
    total, parts = distill(predicted, feature, keep, head, objective=objective, scale=scale, rarity=rarity)
    want, wanted = plain(predicted, feature, keep, head, objective=objective, scale=scale, rarity=rarity)
    torch.testing.assert_close((total, parts), (want, wanted))
    torch.testing.assert_close(
        torch.autograd.grad(2.5 * total, predicted)[0], torch.autograd.grad(2.5 * want, predicted)[0]
    )
    with_targets, _ = distill(
        predicted,
        feature,
        keep,
        head,
        objective=objective,
        scale=scale,
        rarity=rarity,
        targets=distill_targets(feature, keep, head, objective, rarity),
    )
    assert torch.equal(with_targets, total)


def test_no_place_counts():
    predicted, feature, keep, head, *_ = setting(0)
    total, parts = distill(predicted, feature, torch.zeros_like(keep), head, Objective(k=4))
    assert total == 0 and not parts.any() and not torch.autograd.grad(total, predicted)[0].any()


def test_places_that_do_not_count_may_hold_anything():
    predicted, feature, keep, head, scale, rarity = setting(1)
    run = lambda g, f: torch.autograd.grad(
        distill(g, f, keep, head, objective=Objective(tokens=EVERY, k=4), scale=scale, rarity=rarity)[0], g
    )[0]
    want = run(predicted, feature)
    with torch.no_grad():
        dirty = torch.where(keep[..., None], predicted, torch.nan)
        odd = torch.where(keep[..., None], feature, torch.inf)
    assert torch.equal(run(dirty.requires_grad_(), odd), want) and not want[~keep].any()


def test_only_predictions_have_a_gradient():
    predicted, feature, keep, head, scale, _ = setting(2)
    feature.requires_grad_(), head.requires_grad_()
    total, parts = distill(predicted, feature, keep, head, Objective(k=4), scale)
    total.backward()
    assert predicted.grad is not None and feature.grad is None and head.grad is None and not parts.requires_grad
    with torch.no_grad():
        assert torch.equal(distill(predicted, feature, keep, head, Objective(k=4), scale)[0], total)


def test_without_gradient_none_is_computed(monkeypatch):
    predicted, feature, keep, head, scale, _ = setting(2)
    monkeypatch.setattr(torch.autograd, 'grad', None)
    assert distill(predicted.detach(), feature, keep, head, Objective(k=4), scale)[0].isfinite()


def test_second_derivative_is_refused():
    predicted, feature, keep, head, *_ = setting(0)
    (grad,) = torch.autograd.grad(
        distill(predicted, feature, keep, head, Objective(k=4))[0], predicted, create_graph=True
    )
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_half_precision():
    predicted, feature, keep, head, scale, rarity = setting(3, dtype=torch.bfloat16)
    wide = [x.detach().double() if x.is_floating_point() else x for x in (predicted, feature, keep, head)]
    total, _ = distill(predicted, feature, keep, head, Objective(k=4))
    torch.testing.assert_close(
        total.double(), distill(*wide, Objective(k=4))[0], rtol=2e-2, atol=2e-2
    )  # bf16 logits of size 3: steps of 2**-7
    assert total.dtype == torch.float32 and torch.autograd.grad(total, predicted)[0].dtype == torch.bfloat16


def test_rows_of_a_draft_vocabulary():
    predicted, feature, keep, head, *_ = setting(4)
    ids = torch.tensor([7, 2, 9, 4])
    total, _ = distill(predicted, feature, keep, head[ids], Objective(feature=0.0, tokens=(('soft_ce', 1.0),), k=4))
    z = (predicted @ head[ids].T)[keep]
    y = (feature @ head[ids].T)[keep]
    torch.testing.assert_close(total, LOSSES['soft_ce'](z, y).mean())


@pytest.mark.parametrize(
    'bad,message',
    [
        (dict(tokens=(('kl', 1.0),)), "no loss 'kl': use one of soft_ce"),
        (dict(k=0), 'k is 0'),
        (dict(k=2.0), 'k is 2.0'),
        (dict(chunk=0), 'chunk is 0'),
        (dict(feature=-0.1), 'at least 0'),
        (dict(tokens=(('topk', -1.0),)), 'at least 0'),
        (dict(tokens=(('topk', float('nan')),)), 'at least 0'),
        (dict(tokens=(('topk', float('inf')),)), 'at least 0'),
        (dict(feature=0.0, tokens=(('topk', 0.0),)), 'above 0'),
        (dict(feature=0, tokens=()), 'above 0'),
    ],
)
def test_bad_objectives(bad, message):
    with pytest.raises(DecodingError, match=message):
        Objective(**bad)


def test_objective_survives_a_file():
    objective = Objective(tokens=EVERY, k=3)
    assert Objective(**json.loads(json.dumps(dataclasses.asdict(objective)))) == objective and hash(objective)


@pytest.mark.parametrize('change', ['predicted', 'keep', 'head', 'mask', 'k', 'rarity'])
def test_shapes_that_do_not_fit(change):
    predicted, feature, keep, head, *_ = setting(0)
    objective = Objective(
        k=12 if change == 'k' else 4, tokens=(('frequency_topk', 1.0),) if change == 'rarity' else (('topk', 1.0),)
    )
    if change == 'predicted':
        predicted = predicted[:, 1:]
    if change == 'keep':
        keep = keep[:, 1:]
    if change == 'head':
        head = head[:, 1:]
    if change == 'mask':
        keep = keep.long()
    with pytest.raises(
        DecodingError, match={'k': 'k is 12', 'rarity': 'weight for each token'}.get(change, 'do not fit')
    ):
        distill(predicted, feature, keep, head, objective)


def test_scale_counts_differences_in_spreads():
    a = torch.randn(4, 6)
    b = torch.randn(4, 6)
    torch.testing.assert_close(feature_loss(a * 7, b * 7, 7.0), feature_loss(a, b))
    assert feature_loss(a, a).eq(0).all()
    torch.testing.assert_close(feature_loss(a, a + 3), torch.full((4,), 2.5))  # |3| - 1/2, mean over the width
