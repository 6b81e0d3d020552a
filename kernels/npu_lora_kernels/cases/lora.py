"""LoRA: shrink and expand on vector and cube cores, alone and together

Everything a kernel must not use is NaN: padding above an adapter's rank, base rows of x, what h holds for them. Base rows of y
hold -0, infinities and NaN, and keep their bits: cases of base rows alone are compared bit for bit.
"""

import torch
from npu_lora_decoding.foundations import ops
from npu_lora_kernels import lora
from . import Case

# fp32 sums of products of normal numbers, scaled to a variance of one, in another order
SUMS = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), (2e-5, 2e-5))
# one rounding of the output, where two fp32 sums lie on both sides of a boundary
ROUNDED = {torch.float16: (2e-4, 2**-10), torch.bfloat16: (2e-4, 2**-7), torch.float32: (2e-4, 2e-5)}
# on a cube, where h is a sum itself: besides, one h below 8 may round the other way, by its last bit, times a number of B
# below 1
ROUNDED_TWICE = ROUNDED | {torch.float16: (2e-4 + 2**-8, 2**-10), torch.bfloat16: (2e-4 + 2**-5, 2**-7)}


def adapters(gen, dtype, d, widths, ranks):
    "Return stacked `A` `(z, n, r, d)`, `B`, scale and ranks, NaN above each adapter's own rank"
    ranks = torch.tensor(ranks, dtype=torch.int32)
    z, n = ranks.shape
    r = int(ranks.max())
    padding = torch.arange(r) >= ranks[..., None]
    A = (torch.randn(z, n, r, d, generator=gen) / d**0.5).masked_fill(padding[..., None], torch.nan).to(dtype)
    B = [
        (torch.randn(n, r, o, generator=gen) / r**0.5).masked_fill(p[..., None], torch.nan).to(dtype)
        for o, p in zip(widths, padding)
    ]
    return A, B, torch.rand(z, n, generator=gen) + 0.5, ranks


def inputs(gen, dtype, b, t, d, ids):
    "Return x, with NaN in base rows"
    x = torch.randn(b, t, d, generator=gen)
    x[[i == -1 for i in ids]] = torch.nan
    return x.to(dtype)


def outputs(gen, dtype, b, t, widths, ids):
    "Return y, with numbers in base rows that arithmetic would change"
    y = [torch.randn(b, t, o, generator=gen).to(dtype) for o in widths]
    for y_z in y:
        for i, k in enumerate(ids):
            if k == -1:
                y_z[i].view(-1)[:4] = torch.tensor([-0.0, torch.inf, torch.nan, -torch.inf])[: y_z[i].numel()]
    return y


def partial_sums(gen, parts, b, t, ranks, ids):
    "Return h `(parts, b, t, z, r)`, NaN where no kernel may look"
    z = len(ranks)
    n = len(ranks[0])
    r = max(map(max, ranks))
    h = torch.randn(parts, b, t, z, r, generator=gen) / parts**0.5
    for i, k in enumerate(ids):
        for z_i in range(z):
            h[:, i, :, z_i, ranks[z_i][k] if 0 <= k < n else 0 :] = torch.nan
    return h


def shrink(b, t, d, ranks, ids):
    "A shrink of `t` tokens in each of `b` rows"

    def make(dtype, gen):
        A, _, scale, own = adapters(gen, dtype, d, [1] * len(ranks), ranks)
        x = inputs(gen, dtype, b, t, d, ids)
        return x, A, scale, own, torch.tensor(ids), lora.shrink_parts(x, A)

    name = f'shrink b={b} t={t} d={d} ranks={ranks} ids={ids}'
    return Case('lora', name, lora.lora_shrink, ops.lora_shrink_torch, make, tolerance=SUMS)


def expand(b, t, widths, ranks, ids, parts=1):
    "An expand of as many slices as there are widths"

    def make(dtype, gen):
        _, B, _, own = adapters(gen, dtype, 1, widths, ranks)
        y = outputs(gen, dtype, b, t, widths, ids)
        return y, partial_sums(gen, parts, b, t, ranks, ids), B, own, torch.tensor(ids)

    cube = t >= lora.CUBE_ROWS
    tolerance = ROUNDED_TWICE if cube and parts > 1 else ROUNDED
    if set(ids) == {-1}:
        tolerance = None  # nothing but base rows: bit for bit
    name = f'expand b={b} t={t} widths={widths} ranks={ranks} ids={ids} parts={parts}'
    reference = expand_rounded if cube else ops.lora_expand_torch
    return Case('lora', name, lora.lora_expand, reference, make, tolerance=tolerance)


def expand_rounded(y, h, B, ranks, ids):
    "The reference of a cube core, which rounds the sum of h's parts"
    return ops.lora_expand_torch(y, h.sum(0, keepdim=True).to(B[0].dtype).float(), B, ranks, ids)


def both(b, t, d, widths, ranks, ids, work=''):
    "Shrink and expand together"

    def make(dtype, gen):
        A, B, scale, own = adapters(gen, dtype, d, widths, ranks)
        y = outputs(gen, dtype, b, t, widths, ids)
        return y, inputs(gen, dtype, b, t, d, ids), A, B, scale, own, torch.tensor(ids)

    tolerance = ROUNDED_TWICE if t >= lora.CUBE_ROWS else ROUNDED
    name = f'lora b={b} t={t} d={d} widths={widths} ranks={ranks} ids={ids}'
    return Case('lora', name, lora.lora, reference_both, make, tolerance=tolerance, work=work)


def reference_both(y, x, A, B, scale, ranks, ids):
    "The reference of shrink and expand together"
    expand = expand_rounded if x.shape[1] >= lora.CUBE_ROWS else ops.lora_expand_torch
    return expand(y, ops.lora_shrink_torch(x, A, scale, ranks, ids, 1), B, ranks, ids)


CASES = [
    *[
        shrink(3, 1, 577, [[r, max(1, r - 3)]], [1, -1, 0]) for r in (1, 4, 8, 16, 24, 32, 64, 128, 256)
    ],  # every rank, a ragged width
    *[shrink(2, 1, d, [[16]], [0, -1]) for d in (1, 31, 256, 1000, 4097)],  # one CoLD pair, split over the cores
    *[
        shrink(b, 1, 700, [[r]], [0] * b) for b, r in ((1, 2), (40, 4), (40, 8), (40, 16))
    ],  # with many rows, ranks stay together
    *[shrink(b, 1, 200, [[r]], [0] * b) for b, r in ((1, 1), (1, 2), (40, 4), (40, 8), (40, 16))],  # narrow layers
    shrink(5, 3, 130, [[4, 2, 0], [3, 0, 7]], [2, -1, 3, -2, 1]),  # slices, ids that name no adapter
    *[shrink(3, 20, 130, [[r, 1]], [1, -1, 0]) for r in (1, 16, 24, 64, 256)],  # cube
    shrink(2, 70, 300, [[16, 8], [5, 0]], [5, 0]),
    shrink(1, 16, 33, [[16]], [0]),
    shrink(1, 33, 1, [[33]], [0]),
    *[expand(3, 1, [100], [[r, max(1, r - 3)]], [1, -1, 0]) for r in (1, 4, 8, 16, 24, 32, 64, 128, 256)],
    *[expand(2, 1, [o], [[16]], [0, -1], parts) for o, parts in ((1, 1), (577, 3), (1000, 16))],
    expand(2, 1, [600, 40, 9], [[4]] * 3, [-1, -1], 2),  # base rows alone
    expand(2, 20, [130], [[4]], [-1, -1]),
    *[
        expand(40, 1, widths, [[r]] * len(widths), [0] * 40, parts)
        for widths, r, parts in (
            ([600], 1, 1),
            ([600], 2, 2),
            ([600, 520], 4, 1),
            ([520, 40], 8, 2),
            ([600, 530, 20], 16, 1),
            ([600, 5, 40], 16, 5),
        )
    ],
    expand(4, 2, [40, 300, 7], [[4, 2], [3, 0], [0, 9]], [1, -1, 2, 0], 2),
    expand(3, 1, [9, 8, 7, 300, 5], [[2]] * 5, [0, -1, -7]),  # three slices a launch
    *[
        expand(3, 1, [300, 20][:z], [[r]] * z, [0, -1, 0], parts)
        for z in (1, 2)
        for r in (1, 2, 4, 8)
        for parts in (1, 2)
    ],
    *[expand(2, 1, [300, 20, 30], [[r]] * 3, [0, -1], parts) for r in (1, 2, 4, 8) for parts in (1, 2)],
    *[expand(3, 20, [130], [[r, 1]], [1, -1, 0]) for r in (1, 16, 24, 64, 256)],
    expand(2, 70, [200, 9], [[16, 8], [5, 0]], [5, 0]),
    expand(1, 33, [130], [[20]], [0]),
    expand(1, 16, [1], [[16]], [0]),
    expand(2, 70, [200], [[16]], [-1, 0]),
    expand(3, 20, [130, 40], [[24, 3], [5, 16]], [1, -1, 0], 3),
    shrink(2, 20, 1100, [[16, 4]], [0, -1]),  # cube, the width split
    shrink(1, 70, 2600, [[40]], [0]),
    both(4, 2, 600, [40, 24], [[4, 2, 3], [3, 0, 4]], [0, -1, 2, 1]),
    both(2, 40, 300, [130, 40], [[4, 40], [3, 0]], [1, -1]),
    both(2, 1, 2048, [2048, 512, 512], [[16]] * 3, [0, -1], work='one CoLD pair, q k v of width 2048, rank 16'),
    both(2, 1, 4096, [4096], [[16]], [0, -1], work='one CoLD pair, 4096 to 4096, rank 16'),
    both(
        16, 1, 4096, [4096], [[16]], [0] * 8 + [-1] * 8, work='eight CoLD pairs with one adapter, 4096 to 4096, rank 16'
    ),
    both(8, 1, 4096, [4096], [[64] * 8], list(range(8)), work='eight rows with eight adapters, 4096 to 4096, rank 64'),
    both(
        2,
        64,
        2048,
        [2048, 512, 512],
        [[16]] * 3,
        [0, -1],
        work='64 tokens of one CoLD pair, q k v of width 2048, rank 16',
    ),
]

MUTANTS = [
    ('own = (i >= 0) & (i < n)', 'own = i >= 0'),  # an id that names no adapter
    ('tl.minimum(tl.load(ranks + z_i * n + i), r)', 'r'),  # padding is read
    # the last part runs into the next row
    ('stop = tl.where(r0 < rank, tl.minimum(k0 + part, d), k0)', 'stop = tl.where(r0 < rank, k0 + part, k0)'),
    # parts overlap
    (
        'row = tile // (rank_tiles * z * parts)\n        k0 = p * part',
        'row = tile // (rank_tiles * z * parts)\n        k0 = p * BLOCK_K',
    ),
    ('tl.sum(acc, 1) * tl.load(scale + z_i * n + i), 0.)', 'tl.sum(acc, 1), 0.)'),  # no scale
    # only the first part is summed
    ('(ps < parts)[:, None] & (rs < rank)[None, :]', '(ps < 1)[:, None] & (rs < rank)[None, :]'),
    # base rows go through arithmetic
    (
        'tl.where(base, y_o, (y_o.to(tl.float32) + delta).to(y_o.dtype))',
        '(y_o.to(tl.float32) + tl.where(base, 0., delta)).to(y_o.dtype)',
    ),
    # the same on the cube
    ('tl.where(base, y_o, sum_.to(y_o.dtype))', 'tl.where(base, y_o.to(tl.float32) + 0., sum_).to(y_o.dtype)'),
    ('delta = tl.where(own, tl.sum(acc, 0), float(\'nan\'))', 'delta = tl.sum(acc, 0)'),  # an unknown id passes unseen
    # the second slice takes the first one's h
    (
        'elif SLICES == 2:\n            _expand_slice(\n                out1, y1, B1, o1, c - c0, z0 + 1,',
        'elif SLICES == 2:\n            _expand_slice(\n                out1, y1, B1, o1, c - c0, z0,',
    ),
    # cube: tokens past the end
    ('written = (ts < t - t0)[:, None] & (rs < r)[None, :]', 'written = (rs < r)[None, :] & (ts >= 0)[:, None]'),
    # cube: the last columns are left out
    (
        'for k in range(k0, tl.where(r0 < rank, stop, k0), BLOCK_K):',
        'for k in range(k0, tl.where(r0 < rank, stop - BLOCK_K, k0), BLOCK_K):',
    ),
    # cube: only the last ranks count
    ('acc = tl.dot(h_r.to(B_r.dtype), B_r, acc, input', 'acc = tl.dot(h_r.to(B_r.dtype), B_r, input'),
    ('for p in range(parts):', 'for p in range(1):'),  # cube: only the first part is summed
    # cube: parts overlap
    ('        k0 = p * part\n        stop = tl.minimum(k0 + part, d)\n', '        k0 = p * part\n        stop = d\n'),
    # an input is changed
    (
        '    y_o = tl.load(y + at + os, mask=os < o, other=0.)',
        '    y_o = tl.load(y + at + os, mask=os < o, other=0.); tl.store(y + at + os, y_o + y_o, mask=os < o)',
    ),
]


def random_case(draw):
    "Draw shapes, ranks and ids, valid or not, for one call of shrink and expand together"
    from hypothesis import strategies as st

    b, t, d, z, n = (draw(st.integers(1, most)) for most in (4, 20, 300, 4, 3))
    ranks = [[draw(st.integers(0, 20)) for _ in range(n)] for _ in range(z)]
    ranks[0][0] = max(1, ranks[0][0])
    widths = [draw(st.integers(1, 150)) for _ in range(z)]
    ids = [draw(st.integers(-2, n)) for _ in range(b)]
    return both(b, t, d, widths, ranks, ids)
