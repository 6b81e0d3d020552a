"Which keys are cached, when they are recomputed, and that reading with a cache is reading"

import pytest, torch
from dataclasses import replace
from hypothesis import given, settings as examples, strategies as st
from transformers import DynamicCache
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.temp_lora.cache_reuse import (
    CacheLedger,
    Reader,
    drop_oldest,
    should_recompute,
    key_drift,
    parse_rule,
)
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.temp_lora.generation import TempLoRA
from npu_lora_decoding.temp_lora.adapter import TemporaryAdapter, learn, token_losses

TEXT = torch.randint(3, 97, (200,), generator=generator(0))
RULES = ('chunk', 'window', 'every:1', 'every:2', 'every:3', 'drift:0.001', 'drift:0.05', 'drift:9')
MODEL = toy_model()

shapes = st.integers(2, 12).flatmap(
    lambda d: st.integers(d + 1, 60).flatmap(lambda w: st.tuples(st.just(d), st.just(w), st.integers(1, w - d)))
)


@pytest.mark.slow
@examples(max_examples=60)
@given(shapes, st.sampled_from(RULES), st.sampled_from([0.0, 3e-3]), st.integers(20, 120))
def test_reading_is_reading(shape, rule, lr, length):
    """What is in context never exceeds the window; at rate zero the losses are those of a model that reads the same
    tokens from scratch, whatever the policy"""
    d, w, c = shape
    losses = []
    s = TempLoRA(chunk=d, window=w, context=c, train_context=8, r=2, alpha=2.0, lr=lr, recompute=rule, epochs=1)
    phi = TemporaryAdapter(MODEL, s)
    reader = Reader(MODEL, s)
    for a in range(0, length, d):
        b = min(a + d, length)
        if b < 2:
            continue
        with phi.bank.attached([0]):
            got = reader.losses(TEXT, a, b, phi.version)
        first = reader.ledger.first
        assert b - first <= w and a - first >= min(a, c) and reader.ledger.stop == b - 1
        assert (
            reader.cache.get_seq_length() == len(reader.ledger.versions) == b - 1 - first
        )  # one token short, and positions begin at 0
        if lr == 0:
            torch.testing.assert_close(
                got, token_losses(MODEL, TEXT[first : b - 1], TEXT[max(a, 1) : b]), rtol=1e-4, atol=1e-4
            )
        if b - a == d:
            learn(phi, TEXT[max(0, a - 8) : b], d)


def test_nothing_stale_under_the_policy_chunk():
    s = TempLoRA(chunk=6, window=24, context=10, train_context=8, r=2, lr=3e-3, recompute='chunk')
    phi = TemporaryAdapter(MODEL, s)
    reader = Reader(MODEL, s)
    for a in range(0, 60, 6):
        with phi.bank.attached([0]):
            got = reader.losses(TEXT, a, a + 6, phi.version)
            torch.testing.assert_close(
                got, token_losses(MODEL, TEXT[max(0, a - 10) : a + 5], TEXT[max(a, 1) : a + 6]), rtol=1e-4, atol=1e-4
            )
        assert set(reader.ledger.versions) == {phi.version}
        learn(phi, TEXT[max(0, a - 8) : a + 6], 6)


@pytest.mark.parametrize('window,context,chunk', [(24, 6, 6), (24, 18, 6), (25, 6, 6), (40, 3, 7)])
def test_a_prefill_serves_k_chunks(window, context, chunk):
    s = TempLoRA(chunk=chunk, window=window, context=context)
    marks = CacheLedger()
    served = []
    for a in range(0, 60 * chunk, chunk):
        if should_recompute(s, marks, a):
            marks = CacheLedger(max(0, a - context))
            served.append(0)
        marks.add(a + chunk - 1, 0)
        marks.chunks += 1
        served[-1] += 1
    assert set(served[2:-1]) == {(window - context) // chunk}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=12), st.integers(0, 20))
def test_marks_know_every_column(adds, first):
    marks = CacheLedger(first)
    want = []
    at = first
    for more, version in adds:
        at += more
        want += [version] * more
        marks.add(at, version)
    assert marks.versions == want and marks.stop == at


def test_stale_keys_are_used_and_newer_ones_are_not():
    "Under `window` the loss of a chunk is that of the new adapter on keys of the old one"
    s = TempLoRA(chunk=8, window=32, context=8, train_context=8, r=4, alpha=4.0, lr=0.02)
    phi = TemporaryAdapter(MODEL, s)
    reader = Reader(MODEL, s)
    cache = DynamicCache(config=MODEL.config)
    with phi.bank.attached([0]):
        reader.losses(TEXT, 0, 8, 0)
        token_losses(MODEL, TEXT[:7], TEXT[1:8], cache)
        learn(phi, TEXT[:8], 8)
        got = reader.losses(TEXT, 8, 16, phi.version)
        torch.testing.assert_close(got, token_losses(MODEL, TEXT[7:15], TEXT[8:16], cache), rtol=1e-5, atol=1e-5)
        assert (
            got - token_losses(MODEL, TEXT[:15], TEXT[8:16])
        ).abs().max() > 1e-3  # fresh keys would say something else
    assert reader.ledger.spans == [(7, 0), (15, 1)]


def test_drift_is_measured_and_the_cache_is_not_touched():
    phi = TemporaryAdapter(MODEL, TempLoRA(r=4, alpha=4.0, lr=0.02, train_context=8))
    cache = DynamicCache(config=MODEL.config)
    with phi.bank.attached([0]):
        token_losses(MODEL, TEXT[:40], TEXT[40:41], cache)
        before = [x.clone() for l in cache.layers for x in (l.keys, l.values)]
        assert key_drift(MODEL, cache, TEXT[30:40], 40) < 1e-5
        drifts = []
        for a in range(3):
            learn(phi, TEXT[8 * a : 8 * a + 16], 8)
            drifts.append(key_drift(MODEL, cache, TEXT[30:40], 40))
    assert 1e-4 < drifts[0] < drifts[-1]
    assert all(torch.equal(x, y) for x, y in zip(before, (x for l in cache.layers for x in (l.keys, l.values))))


@examples(max_examples=40)
@given(shapes, st.integers(0, 5), st.integers(20, 120))
def test_sliding_is_seeing_the_sinks_and_the_latest(shape, sinks, length):
    """With one layer, whose keys remember nothing but their own token, sliding equals reading sinks and latest tokens
    from scratch; every token is read once"""
    d, w, _ = shape
    one = toy_model(num_hidden_layers=1)
    read = []
    if sinks >= w - d:
        return
    reader = Reader(one, TempLoRA(chunk=d, window=w, context=1, recompute=f'slide:{sinks}', epochs=0))
    for a in range(0, length - length % d, d):
        b = a + d
        before = reader.ledger.stop
        if b < 2:
            continue
        got = reader.losses(TEXT, a, b)
        m = reader.ledger
        read += range(before, m.stop)
        assert m.cached == reader.cache.get_seq_length() == min(b - 1, w - 1) and m.sinks == (sinks if m.first else 0)
        torch.testing.assert_close(
            got,
            token_losses(one, torch.cat([TEXT[: m.sinks], TEXT[m.first : b - 1]]), TEXT[max(a, 1) : b]),
            rtol=1e-4,
            atol=1e-4,
        )
    assert read == list(range(len(read)))


def test_a_window_that_never_fills_does_not_slide():
    s = TempLoRA(chunk=8, window=64, context=8, epochs=0)
    a = Reader(MODEL, s)
    b = Reader(MODEL, replace(s, recompute='slide:4'))
    for start in range(0, 64, 8):
        assert torch.equal(a.losses(TEXT, start, start + 8), b.losses(TEXT, start, start + 8))


def test_positions_that_are_not_rotary_are_refused():
    cache = DynamicCache(config=MODEL.config)
    with torch.no_grad():
        MODEL(TEXT[None, :9], past_key_values=cache)
    rotary = MODEL.model.rotary_emb
    try:
        MODEL.model.rotary_emb = None
        with pytest.raises(DecodingError, match='needs rotary'):
            drop_oldest(MODEL, cache, 2, 0)
    finally:
        MODEL.model.rotary_emb = rotary


@pytest.mark.parametrize(
    'rule', ['never', '', 'every', 'every:0', 'every:-1', 'every:1.5', 'every:nan', 'drift:0', 'drift:x', 'chunk:2:3']
)
def test_rules_that_make_no_sense_are_refused(rule):
    with pytest.raises(DecodingError, match='use chunk, window'):
        parse_rule(rule)
