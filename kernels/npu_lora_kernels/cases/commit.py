"""Cases of the KV commit: the cache is compared bit for bit, and its bits are random, so that it holds NaNs of every payload"""

import torch
from npu_lora_decoding.foundations import ops
from npu_lora_kernels.commit import kv_commit
from . import Case


def _planes(n, shape, dtype, generator):
    words = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    end = 1 << 8 * dtype.itemsize - 1
    bits = [torch.randint(-end, end, shape, generator=generator, dtype=words) for _ in range(n)]
    return [x.view(dtype) for x in bits]


def _orders(b, m, free, generator):
    """Return `m` ascending nodes of each row, out of `free`

    The last node is the last column's, and in odd rows all others are in place already.
    """
    order = torch.stack([torch.randperm(max(m, free), generator=generator)[:m].sort().values for _ in range(b)])
    order[1::2] = torch.arange(m)
    order[:, -1] = max(m, free) - 1
    return order


def _counts(b, m, count, broken):
    "Return how many nodes each row accepts"
    if broken:
        return torch.full((b,), m)
    return (m - torch.arange(b)) % (m + 1) if count is None else torch.full((b,), count)


def case(n, shape, *, m, start, count=None, broken=False, work=''):
    """A commit of `m` nodes in `n` planes of `shape` (b, g, s, k)

    Rows accept 0 to m nodes, or `count`; `broken`: with indices outside of the cache.
    """
    b, g, s, k = shape

    def make(dtype, generator):
        order = _orders(b, m, s - start, generator)
        if broken:
            order[:, 0] = -1
            order[0, -1] = s - start
            order[-1, m // 2] = 1 << 40
        return _planes(n, shape, dtype, generator), order, _counts(b, m, count, broken), start

    special = (f' count={count}' if count is not None else '') + ' broken' * broken
    name = f'commit planes={n} b={b} g={g} s={s} k={k} m={m} start={start}{special}'
    return Case('commit', name, kv_commit, ops.kv_commit_torch, make, mutates=(0,), work=work)


CASES = [
    case(2, (1, 1, 9, 64), m=1, start=0),
    case(2, (3, 3, 40, 64), m=5, start=7),
    case(6, (3, 3, 40, 80), m=5, start=7),
    case(2, (1, 8, 70, 128), m=17, start=33),
    case(2, (1, 24, 24, 64), m=5, start=3),  # more heads than one block, in blocks of eight
    case(2, (1, 3, 20, 64), m=5, start=3, count=0),
    case(2, (1, 3, 20, 64), m=5, start=3, count=9),  # more than there are nodes
    case(2, (3, 3, 20, 64), m=5, start=15),  # the last column of the cache, in as many columns as nodes
    case(2, (1, 3, 20, 64), m=5, start=20),  # no column left
    case(6, (3, 3, 40, 80), m=17, start=7, broken=True),
    case(2, (1, 8, 12, 128), m=5, start=4, broken=True),
    # keys and values of 30 layers, five of sixteen nodes
    case(60, (1, 3, 512, 64), m=5, start=496, work='30 layers of SmolLM2-135M, 5 of 16 nodes'),
]


def random_case(draw):
    "Draw a commit with any of the pitfalls"
    from hypothesis import strategies as st

    m, free, start = (draw(st.integers(low, high)) for low, high in ((1, 9), (0, 12), (0, 5)))
    n, b, g, k = (draw(st.integers(1, most)) for most in (3, 3, 9, 130))
    count = draw(st.none() | st.integers(0, m))
    return case(n, (b, g, start + m + free, k), m=m, start=start, count=count, broken=draw(st.booleans()))


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
    # an input is changed
    ('x = tl.load(column', 'tl.store(order + row * m + j, node + 1); x = tl.load(column'),
]
