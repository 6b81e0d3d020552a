"Aligned steps against the decoder's own cache and against the definition, for every family, length and packing"

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.hass.alignment import (
    aligned_attention,
    aligned_step,
    target_mask,
    own_step_mask,
    next_inputs,
    next_tokens,
    shift,
)
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.hass.head import DraftHead, HEAD_FAMILIES, head_config


def toy_head(family='llama', seed=0, dtype=torch.float32, **config):
    head = DraftHead(head_config(toy_model(family, **config).config)).requires_grad_(False)
    g = generator(seed)
    for p in head.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
    return head.to(dtype)


def literal(q, keys, values, segments):
    "The definition: column c <= i of the same text shows step max(1, j - (i - c))"
    B, H, T, k = q.shape
    j = len(keys)
    out = torch.zeros_like(q)
    share = H // keys[0].shape[1]
    for b in range(B):
        for i in range(T):
            see = [(c, max(1, j - (i - c))) for c in range(i + 1) if segments[b, i] == segments[b, c] >= 0]
            for h in range(H):
                if see:
                    out[b, h, i] = (
                        torch.stack([keys[s - 1][b, h // share, c] for c, s in see]) @ q[b, h, i] * k**-0.5
                    ).softmax(0) @ torch.stack([values[s - 1][b, h // share, c] for c, s in see])
    return out


# Texts as packed rows: lengths of the texts, the rest of the row is padding
rows = st.lists(st.integers(1, 6), min_size=0, max_size=3)


def as_segments(lengths, t):
    return ([i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * t)[:t]


@settings(max_examples=40)
@given(
    st.lists(rows, min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 6),
    st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    st.integers(0, 10**6),
)
def test_attention_is_the_definition(texts, t, j, heads, seed):
    g = generator(seed)
    h, kv = heads
    b = len(texts)
    rand = lambda heads: torch.randn(b, heads, t, 4, generator=g, dtype=torch.float64)
    segments = torch.tensor([as_segments(x, t) for x in texts])
    q = rand(h)
    keys = [rand(kv) for _ in range(j)]
    values = [rand(kv) for _ in range(j)]
    got = aligned_attention(q, keys, values, segments)
    real = (segments >= 0)[:, None, :, None]
    torch.testing.assert_close(got * real, literal(q, keys, values, segments))
    assert got.isfinite().all()


@settings(max_examples=40)
@given(st.lists(rows, min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 6))
def test_masks_cover_each_column_once(texts, t, j):
    segments = torch.tensor([as_segments(x, t) for x in texts])
    count = target_mask(segments, j).long()
    for o in range(j - 1):
        near = own_step_mask(segments, o)
        for i in range(t):
            if i >= o:
                count[:, i, i - o] += near[:, i]
            else:
                assert not near[:, i].any()
    assert torch.equal(
        count,
        (
            (segments[:, :, None] == segments[:, None]) & (segments >= 0)[:, None] & torch.ones(t, t).tril().bool()
        ).long(),
    )


def test_step_one_is_ordinary_attention():
    head = toy_head()
    e, f = torch.randn(2, 2, 7, 32)
    segments = torch.zeros(2, 7, dtype=torch.long)
    positions = torch.arange(7).expand(2, 7)
    want, _ = head(e, f, positions, torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 7, 7))
    torch.testing.assert_close(
        aligned_step(head, e, [f], head.rotations(positions), segments), want, rtol=1e-5, atol=1e-5
    )


def steps(head, e, f, segments, positions, n):
    inputs = [f]
    predictions = []
    rotations = head.rotations(positions)
    for _ in range(n):
        predictions.append(aligned_step(head, e, inputs, rotations, segments))
        inputs.append(next_inputs(inputs[-1], predictions[-1], segments))
    return predictions


def decoded(head, e, f, lengths, n):
    "Draft after prefixes of `lengths` slots, with a cache whose shorter rows have a gap"
    b = len(lengths)
    row = torch.arange(len(lengths))
    longest = int(lengths.max())
    valid = torch.arange(longest) < lengths[:, None]
    out, past = head(
        e[:, :longest],
        f[:, :longest],
        torch.arange(longest).expand(b, -1),
        valid[:, None] & torch.ones(longest, longest, dtype=torch.bool).tril(),
    )
    outs = [out[row, lengths - 1]]
    for j in range(n - 1):
        slot = lengths + j
        valid = torch.cat([valid, torch.ones(b, 1, dtype=torch.bool)], 1)
        out, past = head(e[row, slot][:, None], outs[-1][:, None], slot[:, None], valid[:, None], past)
        outs.append(out[:, 0])
    return outs


@pytest.mark.parametrize('family', HEAD_FAMILIES)
def test_training_sees_what_decoding_sees(family):
    n = 5
    b = 3
    t = 11
    head = toy_head(family)
    e, f = torch.randn(2, b, t, 32)
    predictions = steps(head, e, f, torch.zeros(b, t, dtype=torch.long), torch.arange(t).expand(b, t), n)
    for m in range(1, t - n + 2):  # every prefix length, beside two others
        for lengths in (torch.tensor([m, m, m]), torch.tensor([m, 1, t - n + 1])):
            for j, out in enumerate(decoded(head, e, f, lengths, n)):
                torch.testing.assert_close(out, predictions[j][torch.arange(b), lengths + j - 1], rtol=1e-4, atol=1e-5)


def test_nothing_of_the_future_counts():
    head = toy_head()
    e, f = torch.randn(2, 1, 8, 32)
    args = torch.zeros(1, 8, dtype=torch.long), torch.arange(8)[None], 4
    before = steps(head, e, f, *args)
    e[:, 5:], f[:, 5:] = 9.0, -9.0
    for a, b in zip(before, steps(head, e, f, *args)):
        assert torch.equal(a[:, :5], b[:, :5]) and not torch.equal(a[:, 5:], b[:, 5:])


def test_padding_changes_nothing_and_stays_finite():
    head = toy_head()
    e, f = torch.randn(2, 2, 9, 32)
    positions = torch.arange(9).expand(2, 9)
    n = 4
    segments = torch.tensor([[0] * 9, [-1] * 9])
    both = steps(head, e, f, segments, positions, n)
    alone = steps(head, e[:1], f[:1], segments[:1], positions[:1], n)
    for x, y in zip(both, alone):
        torch.testing.assert_close(x[:1], y, rtol=1e-5, atol=1e-5)
        assert x.isfinite().all()
    live = toy_head().requires_grad_()
    sum(x[0].square().mean() + 0 * x[1].sum() for x in steps(live, e, f, segments, positions, n)).backward()
    assert all(p.grad.isfinite().all() for p in live.parameters())


def test_inputs_move_one_slot_and_carry_no_gradient():
    inputs = torch.randn(2, 6, 3)
    predictions = torch.randn(2, 6, 3, requires_grad=True)
    segments = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, -1, -1, -1, -1]])
    got = next_inputs(inputs, predictions, segments)
    for b in range(2):
        for i in range(6):
            first = i == 0 or segments[b, i] != segments[b, i - 1] or segments[b, i] < 0
            assert torch.equal(got[b, i], inputs[b, i] if first else predictions[b, i - 1])
    assert not got.requires_grad


@pytest.mark.parametrize('by', range(8))
def test_shift(by):
    x = torch.randn(2, 5, 3)
    got = shift(x, by)
    for i in range(5):
        assert torch.equal(got[:, i], x[:, i - by] if i >= by else torch.zeros(2, 3))


def test_gradients_reach_earlier_keys_and_stop_at_predictions():
    head = toy_head(dtype=torch.float64).requires_grad_()
    e, f = torch.randn(2, 1, 5, 32, dtype=torch.float64)
    segments = torch.zeros(1, 5, dtype=torch.long)
    positions = torch.arange(5)[None]
    rotations = head.rotations(positions)
    predicted = torch.randn(1, 5, 32, dtype=torch.float64, requires_grad=True)
    inputs = [f, next_inputs(f, predicted, segments)]
    loss = lambda: aligned_step(head, e, inputs, rotations, segments).square().sum()
    loss().backward()
    assert predicted.grad is None
    with torch.no_grad():  # a finite difference, so that nothing of our own is trusted
        for name in (
            'fc.weight',
            'layers.0.self_attn.k_proj.weight',
            'layers.0.self_attn.v_proj.weight',
            'layers.0.self_attn.q_proj.weight',
        ):
            p = head.get_parameter(name)
            was = p.clone()
            at = (3, 5)
            ends = []
            for step in (1e-6, -1e-6):
                p[at] += step
                ends.append(loss())
                p.copy_(was)
            torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, p.grad[at], rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    "The most numbers that one tensor holds"

    most = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return out


def test_nothing_is_steps_times_t_times_t():
    b = 1
    h = 2
    t = 64
    j = 6
    make = lambda: torch.randn(b, h, t, 4)
    q = make()
    keys = [make() for _ in range(j)]
    values = [make() for _ in range(j)]
    segments = torch.zeros(b, t, dtype=torch.long)
    with Largest() as seen:
        aligned_attention(q, keys, values, segments)
    assert t * t * h < seen.most <= h * t * (t + j)


def test_bf16_is_near_fp32():
    head = toy_head()
    e, f = torch.randn(2, 2, 9, 32)
    args = torch.zeros(2, 9, dtype=torch.long), torch.arange(9).expand(2, 9), 3
    for a, b in zip(steps(head, e, f, *args), steps(toy_head(dtype=torch.bfloat16), e.bfloat16(), f.bfloat16(), *args)):
        assert (
            b.dtype == torch.bfloat16 and (a - b.float()).norm() < 0.05 * a.norm()
        )  # a few roundings of 2**-8, through three steps


def test_every_tensor_is_made_where_the_others_are():
    with torch.device('meta'):
        e = torch.empty(2, 5, 32)
        f = torch.empty(2, 5, 32)
        segments = torch.zeros(2, 5, dtype=torch.long)
        positions = torch.zeros(2, 5, dtype=torch.long)
    out = steps(toy_head().to('meta'), e, f, segments, positions, 3)  # a tensor left on the CPU would be refused
    assert all(x.device.type == 'meta' and x.shape == (2, 5, 32) for x in out)


def test_tokens_move_as_features_do():
    tokens = torch.arange(12).view(2, 6)
    drafted = tokens + 100
    segments = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, -1, -1, -1, -1]])
    moved = next_inputs(tokens[..., None].float(), drafted[..., None].float(), segments)[..., 0]
    assert torch.equal(next_tokens(tokens, drafted, segments), moved.long())


def test_with_its_own_tokens_a_step_sees_what_a_free_chain_sees():
    "Draft freely from every prefix, tokens and features its own, with a cache; aligned steps say the same at once"
    head = toy_head()
    n = 4
    b = 2
    t = 10
    g = generator(3)
    embed, w = torch.randn(2, 7, 32, generator=g)
    f = torch.randn(b, t, 32, generator=g)
    ids = torch.randint(0, 7, (b, t), generator=g)
    segments = torch.zeros(b, t, dtype=torch.long)
    rotations = head.rotations(torch.arange(t).expand(b, t))
    inputs = [f]
    read = [ids]
    outs = []
    for _ in range(n):
        outs.append(aligned_step(head, [embed[x] for x in read], inputs, rotations, segments))
        inputs.append(next_inputs(inputs[-1], outs[-1], segments))
        read.append(next_tokens(read[-1], (outs[-1] @ w.T).argmax(-1), segments))
    assert (read[1] != ids).any()
    for m in range(1, t - n + 1):
        see = torch.ones(m, m, dtype=torch.bool).tril().expand(b, m, m)
        out, past = head(embed[ids[:, :m]], f[:, :m], torch.arange(m).expand(b, m), see)
        out = out[:, -1]
        for j in range(n):
            torch.testing.assert_close(out, outs[j][:, m - 1 + j], rtol=1e-4, atol=1e-5)
            slot = torch.full((b, 1), m + j)
            token = (out @ w.T).argmax(-1)
            valid = torch.ones(b, 1, m + j + 1, dtype=torch.bool)
            if m + j < t:
                out, past = head(embed[token][:, None], out[:, None], slot, valid, past)
                out = out[:, 0]


def test_embeddings_of_each_step_are_one_a_step():
    head = toy_head()
    e, f = torch.randn(2, 1, 5, 32)
    segments = torch.zeros(1, 5, dtype=torch.long)
    rotations = head.rotations(torch.arange(5)[None])
    same = aligned_step(head, [e, e], [f, f], rotations, segments)
    assert torch.equal(same, aligned_step(head, e, [f, f], rotations, segments))
    with pytest.raises(ValueError):
        aligned_step(head, [e], [f, f], rotations, segments)
