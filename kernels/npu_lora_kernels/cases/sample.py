"""Cases of drawing a token, bit for bit

Logits and adversaries are those of the greedy selection, under temperatures from nearly greedy to nearly uniform. Every row has
a key of its own. Where all scores tie, noise alone decides: a bit of it that differs is a token that differs.
"""

import torch
from npu_lora_decoding.foundations import ops
from npu_lora_kernels.sample import cold_sample, plain_sample
from . import Case
from .cold import (
    REAL,
    SQUARE,
    WHOLE,
    _border,
    _broken,
    _crossing,
    _equal,
    _holes,
    _implausible,
    _logits,
    _masked,
    _named,
)
from .cold import _plain, _rising, one


def _flat(e, a):
    "All tokens tie"
    e.fill_(1)
    a.fill_(0)


def _level(e, a, temperature):
    g = ops.gumbel(_keys(e.shape[:-1]), e.shape[-1])
    s = -g * temperature
    e.copy_(torch.where(s / temperature == -g, s, s - 1))
    a.fill_(0)


def _levelled(e, a):
    """Scores that undo the noise: all tokens tie exactly, so the first one is best

    A token whose noise is larger by its last bit wins.
    """
    _level(e, a, one(1.0))


def _divided(e, a):
    "The same at another temperature: a quotient that is larger by its last bit wins"
    _level(e, a, WARM)


def _excluded(e, a):
    "A top-k processor left every 40th token, in the first row one, in the last none"
    keep = torch.arange(e.shape[-1]) % 40 == 0
    e.masked_fill_(~keep, -torch.inf)
    e[0, :-1] = -torch.inf
    e[0, -1] = 1
    e[-1] = -torch.inf


def _not_numbers(e, a):
    "NaN or plus infinity in some rows: first, last, in the middle"
    v = e.shape[-1]
    for row, (i, x) in enumerate(((0, torch.nan), (v - 1, torch.nan), (v // 2, torch.inf), (v - 1, torch.inf))):
        e[row, i] = x


def _keys(shape):
    "Return a key for each row, far from one another"
    generator = torch.Generator().manual_seed(3)
    sequences = torch.randint(-(2**31), 2**31, (shape.numel(), 2), generator=generator).int()
    return ops.position_keys(sequences, torch.arange(shape.numel())[:, None]).view(*shape, 2)


def _arguments(kind, shape, change, alpha, beta, temperature):
    "Return a function that makes (e, a, settings by name, keys)"

    def make(dtype, generator):
        e, a = _logits(kind, shape, dtype, generator)
        change(e, a)
        steps = torch.linspace(0, 1, shape[:-1].numel()).view(*shape[:-1], 1)
        rows = dict(alpha=0.62 - 0.6 * steps, beta=1.5 - 2 * steps, temperature=0.3 + 1.1 * steps)
        given = dict(alpha=alpha, beta=beta, temperature=temperature)
        return e, a, {k: rows[k] if x is None else x for k, x in given.items()}, _keys(shape[:-1])

    return make


def case(contrast, shape, kind=REAL, change=_plain, alpha=None, beta=None, temperature=None, **options):
    "A case on logits of `shape`; alpha, beta and temperature: one value, or None for one that differs from row to row"
    shape = torch.Size(shape)
    arguments = _arguments(kind, shape, change, alpha=alpha, beta=beta, temperature=temperature)

    def make_cold(dtype, generator):
        e, a, settings, keys = arguments(dtype, generator)
        return e, a, *settings.values(), keys

    def make_plain(dtype, generator):
        e, _, settings, keys = arguments(dtype, generator)
        return e, settings['temperature'], keys

    host, reference, make = (
        (cold_sample, ops.cold_sample_torch, make_cold)
        if contrast
        else (plain_sample, ops.plain_sample_torch, make_plain)
    )
    settings = dict(alpha=alpha, beta=beta, temperature=temperature)
    given = [f'{n}={_named(x)}' for n, x in settings.items() if x is not None]
    words = ['cold' if contrast else 'plain', 'x'.join(map(str, shape)), kind, change.__name__[1:], *given]
    return Case('sample', ' '.join(words), host, reference, make, **options)


def cold(*args, **kwargs):
    return case(True, *args, **kwargs)


def plain(*args, **kwargs):
    return case(False, *args, **kwargs)


WARM = one(0.7)
HOT = one(20.0)  # noise decides
COOL = one(0.01)  # the scores do
USUAL = dict(alpha=one(0.1), beta=one(0.5), temperature=WARM)
CASES = [
    *[make(shape) for make in (cold, plain) for shape in ((1, 1), (7, 1), (2, 97), (7, 97), (1, 2048), (2, 49153))],
    *[make(shape, WHOLE) for make in (cold, plain) for shape in ((7, 97), (50, 6000), (2, 3, 97))],
    *[make((40, 900), REAL, _flat) for make in (cold, plain)],
    *[
        make((9, 9000), REAL, change, **only, temperature=t, dtypes=(torch.float32,))
        for make, only in ((plain, {}), (cold, dict(alpha=one(1e-12), beta=one(0.0))))
        for change, t in ((_levelled, one(1.0)), (_divided, WARM))
    ],
    *[make((41, 9000), REAL, _plain, temperature=t) for make in (cold, plain) for t in (HOT, COOL)],
    *[make((6, n), REAL, _crossing) for make in (cold, plain) for n in (97, 5000)],
    cold((7, 97), WHOLE, alpha=one(1.0), beta=one(0.5)),
    cold((7, 97), WHOLE, alpha=one(0.1), beta=one(0.0)),
    cold((7, 9000), alpha=one(1e-6), beta=one(3.0), temperature=HOT),
    cold(
        (2, 3, 97),
        WHOLE,
        alpha=torch.tensor([[[0.1]], [[0.4]]]),
        beta=torch.tensor([[[0.5], [-0.5], [2.0]]]),
        temperature=torch.tensor([[[2.0]], [[0.5]]]),
    ),
    cold((3, 5000), REAL, _holes),
    cold((2, 4200), REAL, _masked, beta=one(0.5)),
    cold((7, 97), REAL, _broken),
    cold((7, 5000), REAL, _broken),
    *[
        cold(shape, REAL, change, alpha=one(0.5), beta=one(0.5), temperature=t)
        for change in (_implausible, _equal, _rising)
        for shape, t in (((1, 49153), COOL), ((3, 9000), HOT), ((41, 9000), COOL))
    ],
    cold((3, 9000), REAL, _border, alpha=SQUARE, beta=one(0.5)),
    *[plain((6, n), REAL, change) for change in (_excluded, _not_numbers) for n in (97, 5000)],
    cold((1, 49152), **USUAL, work='draw from one pair, 49,152 tokens'),
    cold((8, 151936), **USUAL, work='draws from eight pairs, 151,936 tokens'),
    plain((1, 49152), temperature=WARM, work='draw from one row, 49,152 tokens'),
]


def random_case(draw):
    "Draw a shape, a kind of logits, what is special in them and the settings"
    from hypothesis import strategies as st

    m = draw(st.integers(1, 9))
    v = draw(st.integers(1, 200) | st.integers(2000, 9000))
    contrast = draw(st.booleans())
    special = [_holes, _masked, _implausible, _rising] if contrast else [_excluded]
    changes = [_plain, _crossing, _flat] if v < 4200 else [_plain, _crossing, _flat, *special]
    settings = dict(temperature=draw(st.none() | st.floats(2**-7, 64, width=32).map(one)))
    if contrast:
        settings['alpha'] = draw(st.none() | st.floats(2**-13, 1, width=32).map(one))
        settings['beta'] = draw(st.none() | st.floats(-1, 4, width=32).map(one))
    kind = draw(st.sampled_from([REAL, WHOLE]))
    return case(contrast, (m, v), kind, draw(st.sampled_from(changes)), **settings)


STAGE_1 = 'e_top, a_floor, s, likely = _scan(e_k, a_k, e_top, a_floor, log_alpha_row, beta_row)'
MUTANTS = [
    ('tl.load(keys + row * 2), tl.load(keys + row * 2 + 1)', 'tl.load(keys), tl.load(keys + 1)'),  # the first row's key
    ('tl.load(keys + row * 2), tl.load(keys + row * 2 + 1)', 'tl.load(keys + row * 2), tl.load(keys + row * 2)'),
    ('first + tokens * second', 'first + (tokens + 1) * second'),  # the next token's noise
    ('first + tokens * second', 'first + tokens'),
    # the temperature before the plausible set
    (
        STAGE_1,
        STAGE_1.replace('(e_k, a_k,', '(e_k / temperature_row, a_k / temperature_row,').replace(
            'beta_row)', 'beta_row); s = s * temperature_row'
        ),
    ),
    ('tl.div_rn(s, temperature)', 's * (1. / temperature)'),  # off by a bit
    ('tl.div_rn(s, temperature)', 's'),
    # the noise of the next cell, and of one cell in a power of two
    ('bits = _bits(tl.where(t > 0, t, -t))', 'bits = _bits(tl.where(t > 0, t, -t)) + 4096'),
    ('m = (bits >> 12) & 0x7ff', 'm = (bits >> 12) & 0x7fe'),
    ('(hashed >> 8) | 1', '(hashed >> 9) | 1'),
    ('(x >> 16) & 0xffff', '(x >> 16)'),  # the sign is repeated
    ('* 1.52587890625e-05', '* 1.5258e-05'),
    ('+ 11375', '+ 11374'),  # another rounding of a coefficient
    ('tl.where(t > 0, log - y,', 'tl.where(t > 0, log,'),
    # noise is left out, or the scores' floor, where a part is looked at again
    (
        's = _score(e_k, a_k, threshold, a_floor, beta_row)\n                s = _noisy(s, k + lanes, temperature_row, first, second)',
        's = _score(e_k, a_k, threshold, a_floor, beta_row)',
    ),
    ('range(tl.sum(again, 0))', 'range(0)'),  # never looks again
    ('better = likely & (s > best)', 'better = likely & (s >= best)'),
    ('s = tl.where(s < INF, s, INF)', 's = tl.where(s == s, s, -INF)'),  # NaN passes
    ('(best > -INF) & (best < INF)', '(best < INF)'),  # a row without a score
    ('best_k = tl.where(s > best, k, best_k)', 'best_k = tl.where(s >= best, k, best_k)'),
    ('tl.where(on & (bound == best), tokens, 2147483647)', 'tl.where(on & (bound >= best - 1), tokens, 2147483647)'),
    (
        's = _load(scores + row * v, k + lanes, stop)',
        's = tl.load(scores + row * v + k + lanes, mask=k + lanes < stop, other=0.).to(tl.float32)',
    ),
    (
        'rest[\'temperature\'], rest[\'temperature_stride\'] = _rows(temperature, e)',
        'rest[\'temperature\'], rest[\'temperature_stride\'] = _rows(temperature.flatten()[:1], e)',
    ),
]
