"""Cases of the contrastive selection, bit for bit

Whole-number logits tie within a block, across blocks and across parts. Two adversaries make stage 2 look again: a token that
is plausible in its part but not in its row, with a contrast that beats everything, and expert logits that rise from block to
block, so that each earlier block's candidate falls.
"""

import torch
from npu_lora_decoding.foundations import ops
from npu_lora_kernels.cold import cold_scores, cold_select
from . import Case

REAL = 'real'
WHOLE = 'whole'


def _logits(kind, shape, dtype, generator):
    e = torch.randn(shape, generator=generator) * 3
    a = e * 0.5 + torch.randn(shape, generator=generator) * 2
    return [(x.round() if kind == WHOLE else x).to(dtype) for x in (e, a)]


def _plain(e, a):
    pass


def _only(e, a, tokens, rest=(0, 0)):
    "Give these tokens their logits, expert and base, and all others those of `rest`"
    for x, value in zip((e, a), rest):
        x.fill_(value)
    for i, logits in tokens.items():
        for x, value in zip((e, a), logits):
            x[..., i] = value


def _holes(e, a):
    "Base logits of -inf: a third of them, each row's best token and, in the first row, all but one"
    a[torch.rand(a.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = -torch.inf
    a.scatter_(-1, e.argmax(-1, keepdim=True), -torch.inf)
    a[0] = -torch.inf
    a[..., e.shape[-1] // 2] = 1


def _masked(e, a):
    "Expert logits of -inf, a whole first block and the end, and base logits that a processor set to the dtype's minimum"
    e[..., :2100] = -torch.inf
    e[..., -5:] = -torch.inf
    a[..., 3::7] = torch.finfo(a.dtype).min


def _broken(e, a):
    "NaN in the expert's or the base's logits of all rows but the last, first, last and in the middle"
    v = e.shape[-1]
    for row, i in enumerate((0, 0, v - 1, v - 1, v // 2, v // 2)):
        (e, a)[row % 2][row, i] = torch.nan


def _implausible(e, a):
    """In two parts, the best token by contrast is plausible there only

    Beside it is the row's best token, in the one part or the other, as beta tells.
    """
    v = e.shape[-1]
    _only(e, a, {5: (10, 10), v // 2: (9.75, 5), v // 2 + 2: (9.25, -20), v - 9: (9.5, 4.375), v - 7: (9.25, -20)})


def _equal(e, a):
    "Three tokens of one score: the first is plausible in its part only, the second is the row's lowest, the third elsewhere"
    _only(e, a, {5: (9, 3), 9: (9.5, 4.5), -9: (10, 6)})


def _rising(e, a):
    "Each block's maximum is above the one before, and the lower ones have the stronger contrast"
    block = torch.arange(e.shape[-1]) // 2048
    e.copy_(block * 0.75 + e / 64)
    a.copy_(block * 4.0 + a / 16)


def _crossing(e, a):
    "What follows a row in memory would win in it: the next row begins with larger logits"
    e += 8 * torch.arange(len(e))[:, None]
    e[:, :3] += 4


def _border(e, a):
    """The best tokens lie exactly on the threshold, one in the part of the maximum

    log(alpha) is -2, and at 64 a device whose logarithm is off by its last bits finds the same sum.
    """
    _only(e, a, {1: (66, 0), 3: (64, -50), -2: (64, -50)}, rest=(60, 0))


def _late(e, a):
    "All tokens of the row tie, but for the first part: it has a higher maximum and no better score"
    _only(e, a, {0: (1.5, 4)}, rest=(1, 1))


def case(host, reference, shape, kind=REAL, change=_plain, alpha=None, beta=None, dtypes=Case.dtypes, work=''):
    "A case on logits of `shape`; alpha and beta: one value, or None for one that differs from row to row"

    def make(dtype, generator):
        e, a = _logits(kind, shape, dtype, generator)
        change(e, a)
        steps = torch.linspace(0, 1, shape[:-1].numel()).view(*shape[:-1], 1)
        return e, a, 0.62 - 0.6 * steps if alpha is None else alpha, 1.5 - 2 * steps if beta is None else beta

    shape = torch.Size(shape)
    given = [f'{n}={_named(x)}' for n, x in (('alpha', alpha), ('beta', beta)) if x is not None]
    name = ' '.join([host.__name__.removeprefix('cold_'), 'x'.join(map(str, shape)), kind, change.__name__[1:], *given])
    return Case('cold', name, host, reference, make, dtypes, work=work)


def _named(x):
    return f'{x.item():.3g}' if x.numel() == 1 else 'x'.join(map(str, x.shape))


def one(x):
    return torch.tensor([[x]], dtype=torch.float32)


def select(*args, **kwargs):
    return case(cold_select, ops.cold_select_torch, *args, **kwargs)


def scores(*args, **kwargs):
    return case(cold_scores, ops.cold_scores_torch, *args, **kwargs)


SQUARE = one(-2.0).exp()  # its logarithm is -2 again
BOTH = [  # of selection and scores
    *[((shape,), {}) for shape in ((1, 1), (7, 1), (2, 97), (7, 97), (1, 2048), (2, 49153))],
    *[((shape, WHOLE), {}) for shape in ((7, 97), (2, 2048), (7, 9000), (50, 6000), (2, 49153))],
    *[
        (((7, 97), WHOLE), dict(alpha=one(alpha), beta=one(beta)))
        for alpha, beta in ((1.0, 0.5), (0.1, 0.0), (0.05, -1.0), (1e-6, 3.0))
    ],
    (((2, 3, 97), WHOLE), dict(alpha=torch.tensor([[[0.1]], [[0.4]]]), beta=torch.tensor([[[0.5], [-0.5], [2.0]]]))),
    (((3, 5000), REAL, _holes), {}),
    (((3, 5000), WHOLE, _holes), {}),
    (((2, 4200), REAL, _masked), dict(beta=one(0.5))),
    (((2, 4200), REAL, _masked), dict(beta=one(3.0))),
    (((3, 5000), REAL, _holes), dict(alpha=one(0.1), beta=one(0.0))),
    *[
        ((shape, REAL, change), dict(alpha=one(0.5), beta=one(0.5)))
        for change in (_implausible, _equal, _rising)
        for shape in ((1, 49153), (3, 9000), (41, 9000))
    ],
    (((3, 9000), REAL, _implausible), dict(alpha=one(0.5))),
    (((6, 97), REAL, _crossing), {}),
    (((3, 5000), REAL, _crossing), {}),
    (((3, 9000), REAL, _border), dict(alpha=SQUARE, beta=one(0.5))),
    *[((shape, REAL, _late), dict(alpha=one(0.1), beta=one(0.5))) for shape in ((3, 9000), (41, 9000))],
]
USUAL = dict(alpha=one(0.1), beta=one(0.5))
CASES = [make(*args, **options) for make in (select, scores) for args, options in BOTH] + [
    select((7, 97), REAL, _broken),
    select((7, 5000), REAL, _broken),
    select((1, 49152), **USUAL, work='token of one pair, 49,152 tokens'),
    select((8, 151936), **USUAL, work='tokens of eight pairs, 151,936 tokens'),
    scores((1, 49152), **USUAL, work='scores of one pair, 49,152 tokens'),
]


def random_case(draw):
    "Draw a shape, a kind of logits and what is special in them"
    from hypothesis import strategies as st

    m = draw(st.integers(1, 9))
    v = draw(st.integers(1, 200) | st.integers(2000, 9000))
    changes = [_plain, _crossing] if v < 4200 else [_plain, _holes, _masked, _implausible, _rising, _crossing]
    alpha = draw(st.none() | st.floats(2**-13, 1, width=32).map(one))
    beta = draw(st.none() | st.floats(-1, 4, width=32).map(one))
    make = draw(st.sampled_from([select, scores]))
    kind = draw(st.sampled_from([REAL, WHOLE]))
    return make((m, v), kind, draw(st.sampled_from(changes)), alpha=alpha, beta=beta)


MUTANTS = [
    ('stands = (tl.load(expert, mask=on, other=-INF) >= threshold)', 'stands = (bound == bound)'),
    ('e_k >= log_alpha_row', 'e_k > log_alpha_row'),
    ('tl.where(e >= threshold, e +', 'tl.where(e > threshold, e +'),
    # the highest of the ties
    (
        'tl.min(tl.where(best == s, best_k + lanes, v - 1), 0)',
        'tl.max(tl.where(best == s, best_k + lanes, 0), 0)',
    ),
    ('& (s > best)', '& (s >= best)'),
    (
        'i = tl.min(tl.where(stands & (bound == best), tl.load(token, mask=on, other=0), v), 0)',
        'i = tl.max(tl.where(stands & (bound == best), tl.load(token, mask=on, other=0), -1), 0)',
    ),
    ('((s_k == best) & (i_k < i))', '((s_k == best) & (i_k > i))'),
    ('range(tl.sum(again, 0))', 'range(0)'),  # never looks again
    ('range(tl.sum(again, 0))', 'range(tl.minimum(tl.sum(again, 0), 1))'),
    ('& (bound >= best)', '& (bound > best)'),  # no second look for the same score at a lower index
    ('& (bound < INF)', '& (bound == bound)'),
    ('s = tl.where(finite, e_k + beta_row * (e_k - a_k), INF)', 's = e_k + beta_row * (e_k - a_k)'),
    ('e - tl.where(a > floor, a, floor)', 'e - a'),  # -inf is not clamped
    ('tl.where(finite, a_k, INF), -INF)', 'a_k, -INF)'),  # -inf as floor
    ('tl.where(e_k + a_k < INF, tl.where(finite, a_k, INF), -INF)', 'tl.where(finite, a_k, INF)'),  # NaN passes
    ('e_top = tl.where(e_max > e_top, e_max, e_top)', 'e_top = e_max'),  # the last block's maximum
    ('stop = tl.minimum(k0 + part, v)\n        log_alpha_row', 'stop = k0 + part\n        log_alpha_row'),
    ('log_alpha_row = tl.load(log_alpha + row * alpha_stride)', 'log_alpha_row = tl.load(log_alpha)'),
    (
        'on = ps < parts\n        beta_row = tl.load(beta + row * beta_stride)',
        'on = ps < parts\n        beta_row = tl.load(beta)',
    ),
    ('mask=ks < stop, other=-INF', 'mask=ks >= 0, other=-INF'),  # the last block runs into the next row
    ('mask=ks < stop, other=-INF', 'mask=ks < stop, other=0.'),
    ('mask=k + lanes < stop)', 'mask=k + lanes >= 0)'),
    # an input is changed
    (
        'tl.store(out + row, tl.where(sound, i, -1).to(tl.int64))',
        'tl.store(out + row, tl.where(sound, i, -1).to(tl.int64)); tl.store(beta + row * beta_stride, beta_row + 1.)',
    ),
]
