"Greedy, sampling and beam search against transformers, on toy models of every family"

import pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from npu_lora_decoding.decoding.baseline import (
    _filtered,
    apply_temperature,
    beam_search,
    draw,
    greedy_cached,
    greedy_naive,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_logits,
    positions_of,
    sample_cached,
)
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.foundations.models import FAMILIES

WINDOWED = ('mistral', 'gemma2', 'gemma3_text')
PAD = 1  # not 0: transformers' beam search takes a pad token of 0 for "none" and fills with the end token


@pytest.fixture(scope='module', params=FAMILIES)
def model(request):
    "A toy of each family; windows shorter than the sequences, so that they matter"
    return toy_model(request.param, **(dict(sliding_window=6) if request.param in WINDOWED else {}))


def batch(seed=0, lengths=(7, 3, 5, 1)):
    t = max(lengths)
    mask = torch.stack([(torch.arange(t) >= t - n).long() for n in lengths])
    return torch.randint(3, 97, mask.shape, generator=generator(seed)) * mask, mask


def reference(model, ids, mask, n, eos=(), **kwargs):
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=n,
        eos_token_id=list(eos) or None,
        pad_token_id=PAD,
        **{**dict(do_sample=False), **kwargs},
    )


def same(a, b):
    assert a.shape == b.shape and torch.equal(a, b), f'\n{a}\n{b}'


def ends(model, ids, mask, how):
    "End tokens that occur in what the model says: none, one, or three"
    written = greedy_naive(model, ids, mask, 10)[:, ids.shape[1] :]
    return {
        'none': [],
        'one': [written[0, 2].item()],
        'three': [written[0, 2].item(), written[1, 5].item(), written[2, 0].item()],
    }[how]


@pytest.mark.parametrize('how', ['none', 'one', 'three'])
@pytest.mark.parametrize('seed', [0, 1])
def test_greedy(model, seed, how):
    ids, mask = batch(seed)
    eos = ends(model, ids, mask, how)
    want = reference(model, ids, mask, 10, eos)
    same(greedy_naive(model, ids, mask, 10, eos, PAD), want)
    same(greedy_cached(model, ids, mask, 10, eos, PAD), want)
    if how != 'none':
        assert (want[:, 7:] == PAD).any() or want.shape[1] < 17


def test_greedy_stops_when_all_ended(model):
    ids, mask = batch()
    eos = set(greedy_naive(model, ids, mask, 1)[:, -1].tolist())
    for greedy in (greedy_naive, greedy_cached):
        assert greedy(model, ids, mask, 10, eos).shape[1] == 8


def test_rows_do_not_meet(model):
    "A row of a padded batch says what it says alone"
    ids, mask = batch()
    fused_projections = greedy_cached(model, ids, mask, 10)
    for row, prompt, real in zip(fused_projections, ids, mask.bool()):
        alone = prompt[real][None]
        same(row[7:], greedy_cached(model, alone, torch.ones_like(alone), 10)[0, alone.shape[1] :])


@pytest.mark.parametrize('how', ['none', 'one', 'three'])
@pytest.mark.parametrize('m,penalty', [(2, 1.0), (3, 0.0), (4, -1.0), (5, 2.0)])
def test_beam_search(model, m, penalty, how):
    ids, mask = batch()
    eos = ends(model, ids, mask, how)
    got = beam_search(model, ids, mask, num_beams=m, new_tokens=10, eos_ids=eos, pad_id=PAD, length_penalty=penalty)
    same(got, reference(model, ids, mask, 10, eos, num_beams=m, length_penalty=penalty, early_stopping=False))


@pytest.mark.parametrize('seed', range(12))
def test_beam_search_sweep(seed):
    "Many models and random end tokens, up to most of the vocabulary: rare ways of ending come up"
    model = toy_model(seed=seed, initializer_range=0.15)
    ids, mask = batch(seed, (4, 2))
    eos = torch.randperm(97, generator=generator(seed))[: (1, 4, 12, 60)[seed % 4]].tolist()
    for m in (2, 4):
        for penalty in (-0.5, 1.0, 3.0):
            same(
                beam_search(
                    model, ids, mask, num_beams=m, new_tokens=8, eos_ids=eos, pad_id=PAD, length_penalty=penalty
                ),
                reference(model, ids, mask, 8, eos, num_beams=m, length_penalty=penalty, early_stopping=False),
            )


def test_one_beam_is_greedy(model):
    ids, mask = batch()
    eos = ends(model, ids, mask, 'three')
    same(
        beam_search(model, ids, mask, num_beams=1, new_tokens=10, eos_ids=eos, pad_id=PAD),
        greedy_cached(model, ids, mask, 10, eos, PAD),
    )


def test_beams_wider_than_the_vocabulary_are_exhaustive():
    "With a beam for every sequence the search must find the best of all 5**3"
    model = toy_model(vocab=5)
    ids = torch.tensor([[3, 4]])
    found = beam_search(model, ids, torch.ones_like(ids), 125, 3)[0]
    every = torch.cat([ids.expand(125, -1), torch.cartesian_prod(*[torch.arange(5)] * 3)], 1)
    logp = model(every).logits[:, 1:-1].log_softmax(-1).gather(-1, every[:, 2:, None]).sum((1, 2))
    same(found, every[logp.argmax()])


def test_beam_fills_with_the_pad_asked_for():
    model = toy_model()
    ids, mask = batch()
    eos = ends(model, ids, mask, 'three')
    a, b = (
        beam_search(model, ids, mask, num_beams=4, new_tokens=10, eos_ids=eos, pad_id=pad, length_penalty=0.0)
        for pad in (0, PAD)
    )
    assert (a != b).any() and (a[a != b] == 0).all() and (b[a != b] == PAD).all()


@pytest.mark.parametrize('seed', range(4))
def test_sample_equals_transformers_under_one_seed(model, seed):
    ids, mask = batch()
    how = dict(temperature=1.4, top_k=30, top_p=0.9, min_p=0.02)
    eos = ends(model, ids, mask, 'three')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        want = reference(model, ids, mask, 10, eos, do_sample=True, **how)
    before = torch.get_rng_state()
    same(sample_cached(model, ids, mask, 10, generator=generator(seed), eos_ids=eos, pad_id=PAD, **how), want)
    same(torch.get_rng_state(), before)


rows = st.integers(0, 10**6).flatmap(
    lambda seed: st.tuples(st.just(seed), st.integers(1, 4), st.integers(1, 60), st.integers(0, 2), st.floats(0.01, 20))
)


def logits_of(row):
    "Random logits; few decimals make ties, a large factor makes probabilities of zero"
    seed, b, v, decimals, scale = row
    return (torch.randn(b, v, generator=generator(seed)) * scale).round(decimals=decimals)


def exactly(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@settings(max_examples=150, deadline=None)
@given(rows, st.floats(0.05, 5), st.integers(1, 80), st.one_of(st.floats(0.01, 1), st.just(1e-9)), st.floats(0, 1))
def test_filters_equal_transformers(row, temperature, top_k, top_p, min_p):
    x = logits_of(row)
    exactly(apply_temperature(x, temperature), TemperatureLogitsWarper(temperature)(None, x))
    exactly(keep_top_k(x, top_k), TopKLogitsWarper(top_k)(None, x))
    exactly(keep_top_p(x, top_p), TopPLogitsWarper(top_p)(None, x))
    exactly(keep_min_p(x, min_p), MinPLogitsWarper(min_p)(None, x))
    chain = LogitsProcessorList(
        [
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k),
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
        ]
    )
    exactly(
        _filtered(x, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).softmax(-1),
        chain(None, x).softmax(-1),
    )


@settings(max_examples=150, deadline=None)
@given(rows, st.integers(1, 80), st.floats(0.01, 1), st.floats(0, 1))
def test_filter_properties(row, top_k, top_p, min_p):
    x = logits_of(row)
    for kept in (keep_top_k(x, top_k), keep_top_p(x, top_p), keep_min_p(x, min_p)):
        same(kept[kept.isfinite()], x[kept.isfinite()])  # a filter removes, it never changes
        exactly(kept.amax(-1), x.amax(-1))  # the best stays, or one that ties with it
        exactly(kept.softmax(-1)[~kept.isfinite()], torch.zeros(int((~kept.isfinite()).sum())))
    assert (keep_top_k(x, top_k).isfinite().sum(-1) >= min(top_k, x.shape[-1])).all()
    held = (x.softmax(-1) * keep_top_p(x, top_p).isfinite()).sum(-1)
    assert (held >= top_p - 1e-5).all()  # rounding of a sum of 60 numbers in fp32


@settings(max_examples=100, deadline=None)
@given(rows, st.integers(1, 5), st.integers(0, 10**6))
def test_draw_never_takes_what_was_filtered(row, top_k, seed):
    scores = keep_top_k(logits_of(row), top_k)
    tokens = draw(scores, generator(seed))
    assert tokens.shape == scores.shape[:1] and scores.gather(-1, tokens[:, None]).isfinite().all()


def test_draw_follows_the_distribution():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = torch.bincount(draw(p.log().expand(20000, -1), generator(0)), minlength=4).double()
    chi2 = ((counts - 20000 * p) ** 2 / (20000 * p)).sum()
    assert chi2 < 16.3  # 99.9% point of chi-square with 3 degrees of freedom
    assert ((counts - 5000) ** 2 / 5000).sum() > 16.3  # and a uniform drawer would be noticed


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_positions_count_real_tokens(lengths):
    _, mask = batch(lengths=lengths)
    for row, n in zip(positions_of(mask), lengths):
        assert row[-n:].tolist() == list(range(n)) and not row[:-n].any()


def test_logits_are_fp32():
    ids, mask = batch()
    assert next_logits(toy_model().bfloat16(), ids, mask).dtype == torch.float32


@pytest.mark.parametrize(
    'what,call',
    [
        ('new_tokens is 0', lambda m, i, k: greedy_cached(m, i, k, 0)),
        ('new_tokens is 0', lambda m, i, k: greedy_naive(m, i, k, 0)),
        ('padded on the right', lambda m, i, k: beam_search(m, i, k.flip(1))),
        ('are not a batch of prompts', lambda m, i, k: greedy_cached(m, i[0], k[0], 4)),
        ('are not a batch of prompts', lambda m, i, k: sample_cached(m, i, k[:, 1:], 4)),
        ('num_beams is 0', lambda m, i, k: beam_search(m, i, k, 0)),
        ('temperature is 0', lambda m, i, k: sample_cached(m, i, k, 4, temperature=0)),
        ('temperature is nan', lambda m, i, k: sample_cached(m, i, k, 4, temperature=float('nan'))),
        ('top_k is -1', lambda m, i, k: sample_cached(m, i, k, 4, top_k=-1)),
        ('top_p is 0', lambda m, i, k: sample_cached(m, i, k, 4, top_p=0)),
        ('top_p is 1.1', lambda m, i, k: sample_cached(m, i, k, 4, top_p=1.1)),
        ('min_p is -0.1', lambda m, i, k: sample_cached(m, i, k, 4, min_p=-0.1)),
    ],
)
def test_bad_input_is_named(what, call):
    with pytest.raises(DecodingError, match=what):
        call(toy_model(), *batch())
