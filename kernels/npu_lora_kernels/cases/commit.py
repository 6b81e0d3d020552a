"""Cases of the KV commit: the cache is compared bit for bit, and its bits are random, so that it holds NaNs of every payload"""

import torch
from npu_lora_decoding.foundations import ops
from npu_lora_kernels.commit import kv_commit
from . import Case


def _planes(n, shape, dtype, generator):
    words = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return [
        torch.randint(
            -1 << 8 * dtype.itemsize - 1, 1 << 8 * dtype.itemsize - 1, shape, generator=generator, dtype=words
        ).view(dtype)
        for _ in range(n)
    ]


def _orders(b, m, free, generator):
    "Return `m` ascending nodes of each row, out of `free`; the last node is the last column's, and in odd rows all others are in place already"
    order = torch.stack([torch.randperm(max(m, free), generator=generator)[:m].sort().values for _ in range(b)])
    order[1::2] = torch.arange(m)
    order[:, -1] = max(m, free) - 1
    return order


def case(n, b, g, s, k, m, start, count=None, broken=False, work=''):
    "A commit of `m` nodes in `n` planes; rows accept 0 to m nodes, or `count`; `broken`: with indices outside of the cache"

    def make(dtype, generator):
        order = _orders(b, m, s - start, generator)
        if broken:
            order[:, 0], order[0, -1], order[-1, m // 2] = -1, s - start, 1 << 40
        counts = (
            torch.full((b,), m)
            if broken
            else (m - torch.arange(b)) % (m + 1) if count is None else torch.full((b,), count)
        )
        return _planes(n, (b, g, s, k), dtype, generator), order, counts, start

    name = (
        f'commit planes={n} b={b} g={g} s={s} k={k} m={m} start={start}'
        + (f' count={count}' if count is not None else '')
        + ' broken' * broken
    )
    return Case('commit', name, kv_commit, ops.kv_commit_torch, make, mutates=(0,), work=work)


CASES = [
    case(2, 1, 1, 9, 64, 1, 0),
    case(2, 3, 3, 40, 64, 5, 7),
    case(6, 3, 3, 40, 80, 5, 7),
    case(2, 1, 8, 70, 128, 17, 33),
    case(2, 1, 24, 24, 64, 5, 3),  # more heads than one block, in blocks of eight
    case(2, 1, 3, 20, 64, 5, 3, count=0),
    case(2, 1, 3, 20, 64, 5, 3, count=9),  # more than there are nodes
    case(2, 3, 3, 20, 64, 5, 15),  # the last column of the cache, in as many columns as nodes
    case(2, 1, 3, 20, 64, 5, 20),  # no column left
    case(6, 3, 3, 40, 80, 17, 7, broken=True),
    case(2, 1, 8, 12, 128, 5, 4, broken=True),
    case(
        60, 1, 3, 512, 64, 5, 496, work='30 layers of SmolLM2-135M, 5 of 16 nodes'
    ),  # keys and values of 30 layers, five of sixteen nodes
]


def random_case(draw):
    "Draw a commit with any of the pitfalls"
    from hypothesis import strategies as st

    m, free = draw(st.integers(1, 9)), draw(st.integers(0, 12))
    start = draw(st.integers(0, 5))
    return case(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 9)),
        start + m + free,
        draw(st.integers(1, 130)),
        m,
        start,
        draw(st.none() | st.integers(0, m)),
        draw(st.booleans()),
    )


MUTANTS = [
    ('range(tl.minimum(tl.load(count + row), m).to(tl.int32))', 'range(m)'),  # what was not accepted moves too
    ('tl.minimum(tl.load(count + row), m)', 'tl.load(count + row)'),  # reads behind `order`
    ('(node > j) & (node < s - start)', 'node > j'),  # reads behind the cache
    ('(node > j) & (node < s - start)', 'node < s - start'),  # reads before the cache
    ('(node < s - start)', '(node <= s - start)'),
    ('(start + node) * k', '(start + node - 1) * k'),
    ('(start + j) * k', 'j * k'),
    ('tl.load(column + (start + node) * k, mask=(ks < k)[None, :])', 'tl.load(column + (start + node) * k)'),
    ('x, mask=(ks < k)[None, :])', 'x)'),  # rows of 80 are written as 128
    ('row = tile // row_tiles % b', 'row = tile // row_tiles'),
    ('x = tl.load(column', 'tl.store(order + row * m + j, node + 1); x = tl.load(column'),  # an input is changed
]
