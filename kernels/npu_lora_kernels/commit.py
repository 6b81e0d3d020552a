"""Commit the accepted path of a tree to the KV cache: its nodes move to the first free columns, in place

planes[p][i, :, start + j] = planes[p][i, :, start + order[i, j]]   for j < count[i]

A move happens only where j < order[i, j] < s - start: a node that is in place stays, an index outside the cache is skipped.
The keys and values of all layers go in one launch, which finds them through a table of their addresses. Only bits move: the
words are integers as wide as the cache's numbers, because a float may lose what its NaN carries.
"""
import torch
import triton
import triton.language as tl
from .checks import FLOATS, check_tensor, require
from .launch import launch
from .targets import target_of

_WORDS = {2: tl.int16, 4: tl.int32}

# What changes from step to step: a new specialisation would compile in the middle of decoding
VARYING = ['start', 'tiles', 'b', 'm', 's']

@triton.jit(do_not_specialize=VARYING)
def kv_commit_kernel(table, order, count, start, tiles, b, g, m, s, k,
                     WORD: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr):
    "One tile: the accepted path of one row, in `BLOCK_G` heads of one plane"
    # No program reads what another wrote: a tile's heads belong to it alone. Nor does a move read what an earlier one of
    # its tile wrote: those wrote columns below j, and this one reads a column above j
    row_tiles = g // BLOCK_G
    ks = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        plane = tl.load(table + tile // (row_tiles * b)).to(tl.pointer_type(WORD))
        row = tile // row_tiles % b
        heads = tile % (row_tiles * b) * BLOCK_G + tl.arange(0, BLOCK_G)
        column = plane + heads.to(tl.int64)[:, None] * s * k + ks[None, :]
        for j in range(tl.minimum(tl.load(count + row), m).to(tl.int32)):
            node = tl.load(order + row * m + j)
            # a branch, not a mask: on Ascend a store behind a mask that is more than a plain bound reads the whole block,
            # unmasked, and writes it back
            if (node > j) & (node < s - start):
                x = tl.load(column + (start + node) * k, mask=(ks < k)[None, :])
                tl.store(column + (start + j) * k, x, mask=(ks < k)[None, :])

def kv_commit(planes, order, count, start):
    "Move the accepted nodes of every row to the columns from `start` on, in all `planes` at once"
    b, g, s, k, m = _check(planes, order, count, start)
    target = target_of(order.device)
    heads = min(g & -g, target.blocks.heads)  # a power of two that divides g: no head of a block is masked
    tiles = len(planes) * b * (g // heads)
    arguments = dict(table=list(planes), order=order, count=count, start=start, tiles=tiles, b=b, g=g, m=m, s=s, k=k)
    word = _WORDS[planes[0].element_size()]
    launch(kv_commit_kernel, target.programs(tiles), arguments, WORD=word, BLOCK_G=heads, BLOCK_K=triton.next_power_of_2(k))

def _check(planes, order, count, start):
    "Return b, g, s, k, m"
    require(len(planes) > 0, 'planes is empty', 'pass the keys and values of at least one layer')
    require(planes[0].dim() == 4, f'planes[0] has shape {tuple(planes[0].shape)}', 'give it shape (b, g, s, k)')
    for i, x in enumerate(planes):
        dtypes = FLOATS if i == 0 else planes[0].dtype
        check_tensor(f'planes[{i}]', x, planes[0].shape, dtypes, order.device)
    b, g, s, k = planes[0].shape
    check_tensor('order', order, (b, None), torch.int64)
    check_tensor('count', count, (b,), torch.int64, order.device)
    require(
        0 <= start <= s,
        f'start is {start}, the cache has {s} columns',
        'pass the number of columns that are kept as they are')
    return b, g, s, k, order.shape[1]
