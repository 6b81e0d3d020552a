"""LoRA for a batch whose rows use different adapters: shrink `x` to the rank, expand to the layer's width

Shrink:  h[p, b, t, z] = scale[z, i] * A[z, i] @ x[b, t], summed over the p-th part of the width,  i = ids[b]
Expand:  out[z][b, t] = y[z][b, t] + B[z][i].T @ sum_p h[p, b, t, z]

The z slices are layers that read the same input (q, k and v; gate and up). An id of -1 is a base row: its `h` is zero, its
output is `y` bit for bit. An id that names no adapter reads nothing and gives NaN: a device cannot raise without stopping the
pipeline, and the decoding loop reports NaN by row. Sums run in fp32 in a fixed order without atomics, so a result repeats bit
for bit.
"""
import torch
import triton
import triton.language as tl
from .checks import check_tensor, require
from .launch import launch
from .targets import target_of

MAX_RANK = 256
MAX_PARTS = 16
ALIGN = 32  # Parts of the width are multiples of so many columns, 64 bytes of fp16, so that every transfer starts aligned
BURST = 256  # Least columns worth a transfer: 512 bytes of fp16, from which it runs at full speed
# What varies with the batch, the text and the layer: a specialisation for each would compile in the middle of decoding
VARYING = ['tiles', 'm', 'b', 't', 'n', 'parts', 'z0', 'z_i']
CUBE_ROWS = 16  # From so many tokens with one adapter on, a cube core takes the work: its smallest operand has 16 rows

@triton.jit
def _adapter(ids, ranks, row, n, z_i, r):
    "Return a row's adapter (0 where it has none), its rank in one slice, and whether it has one"
    i = tl.load(ids + row)
    own = (i >= 0) & (i < n)
    i = tl.where(own, i, 0)
    return i, tl.where(own, tl.minimum(tl.load(ranks + z_i * n + i), r), 0), own

@triton.jit(do_not_specialize=VARYING)
def lora_shrink_kernel(h, x, A, scale, ranks, ids, tiles, m, t, n, z, r, d, parts, part,
                       BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    "A tile is `BLOCK_R` ranks of one row and slice, summed over one part of the width, on a vector core"
    rank_tiles = tl.cdiv(r, BLOCK_R)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # a row's tiles are neighbours: those of a base row cost nothing, and those of the others spread evenly over the cores
        r0 = tile % rank_tiles * BLOCK_R
        z_i = tile // rank_tiles % z
        p = tile // (rank_tiles * z) % parts
        row = tile // (rank_tiles * z * parts)
        k0 = p * part
        x_row = x + row.to(tl.int64) * d
        i, rank, own = _adapter(ids, ranks, row // t, n, z_i, r)
        # base rows, and ranks above the adapter's own, read nothing
        stop = tl.where(r0 < rank, tl.minimum(k0 + part, d), k0)
        rs = r0 + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for k in range(k0, stop, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            x_k = tl.load(x_row + ks, mask=ks < stop, other=0.).to(tl.float32)
            inside = (rs < rank)[:, None] & (ks < stop)[None, :]
            a = tl.load(A + ((z_i * n + i) * r + rs)[:, None] * d + ks[None, :], mask=inside, other=0.).to(tl.float32)
            acc += a * x_k[None, :]
        h_r = tl.where(own, tl.sum(acc, 1) * tl.load(scale + z_i * n + i), 0.)
        tl.store(h + ((p * m + row) * z + z_i) * r + rs, h_r, mask=rs < r)

@triton.jit
def _expand_slice(out, y, B, o, c, z_i, h, ranks, ids, row, m, t, n, z, r, parts,
                  BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr):
    "Add the adapter to `BLOCK_O` columns of one row and slice"
    i, rank, own = _adapter(ids, ranks, row // t, n, z_i, r)
    os = c * BLOCK_O + tl.arange(0, BLOCK_O)
    ps = tl.arange(0, BLOCK_P)
    acc = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        rs = r0 + tl.arange(0, BLOCK_R)
        summed = (ps < parts)[:, None] & (rs < rank)[None, :]
        h_r = tl.sum(tl.load(h + ((ps * m + row) * z + z_i)[:, None] * r + rs[None, :], mask=summed, other=0.), 0)
        inside = (rs < rank)[:, None] & (os < o)[None, :]
        b = tl.load(B + (i * r + rs)[:, None] * o + os[None, :], mask=inside, other=0.).to(tl.float32)
        acc += b * h_r[:, None]
    base = tl.load(ids + row // t) == -1
    at = row.to(tl.int64) * o
    y_o = tl.load(y + at + os, mask=os < o, other=0.)
    delta = tl.where(own, tl.sum(acc, 0), float('nan'))
    tl.store(out + at + os, tl.where(base, y_o, (y_o.to(tl.float32) + delta).to(y_o.dtype)), mask=os < o)

@triton.jit(do_not_specialize=VARYING)
def lora_expand_kernel(out0, out1, out2, y0, y1, y2, B0, B1, B2, h, ranks, ids, tiles, m, t, n, z0, z, r,
                       o0, o1, o2, parts,
                       SLICES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr):
    "A tile is `BLOCK_O` columns of one row, in one of up to three slices, on a vector core"
    c0 = tl.cdiv(o0, BLOCK_O)
    c1 = tl.cdiv(o1, BLOCK_O)
    columns = tiles // m
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile // columns
        c = tile % columns
        if SLICES == 1:
            _expand_slice(
                out0, y0, B0, o0, c, z0, h=h, ranks=ranks, ids=ids, row=row, m=m, t=t, n=n, z=z, r=r,
                parts=parts, BLOCK_P=BLOCK_P, BLOCK_R=BLOCK_R, BLOCK_O=BLOCK_O)
        elif c < c0:
            _expand_slice(
                out0, y0, B0, o0, c, z0, h=h, ranks=ranks, ids=ids, row=row, m=m, t=t, n=n, z=z, r=r,
                parts=parts, BLOCK_P=BLOCK_P, BLOCK_R=BLOCK_R, BLOCK_O=BLOCK_O)
        elif SLICES == 2:
            _expand_slice(
                out1, y1, B1, o1, c - c0, z0 + 1, h=h, ranks=ranks, ids=ids, row=row, m=m, t=t, n=n, z=z, r=r,
                parts=parts, BLOCK_P=BLOCK_P, BLOCK_R=BLOCK_R, BLOCK_O=BLOCK_O)
        elif c < c0 + c1:
            _expand_slice(
                out1, y1, B1, o1, c - c0, z0 + 1, h=h, ranks=ranks, ids=ids, row=row, m=m, t=t, n=n, z=z, r=r,
                parts=parts, BLOCK_P=BLOCK_P, BLOCK_R=BLOCK_R, BLOCK_O=BLOCK_O)
        else:
            _expand_slice(
                out2, y2, B2, o2, c - c0 - c1, z0 + 2, h=h, ranks=ranks, ids=ids, row=row, m=m, t=t, n=n, z=z, r=r,
                parts=parts, BLOCK_P=BLOCK_P, BLOCK_R=BLOCK_R, BLOCK_O=BLOCK_O)

@triton.jit(do_not_specialize=VARYING)
def lora_shrink_tile_kernel(h, x, A, scale, ranks, ids, tiles, b, t, n, z, r, d, parts, part,
                            BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile is `BLOCK_T` tokens of one sequence times `BLOCK_R` ranks of one slice, summed over one part of the width

    It runs on a cube core: tokens of a sequence share their adapter.
    """
    rank_tiles = tl.cdiv(r, BLOCK_R)
    token_tiles = tl.cdiv(t, BLOCK_T)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        r0 = tile % rank_tiles * BLOCK_R
        z_i = tile // rank_tiles % z
        p = tile // (rank_tiles * z) % parts
        t0 = tile // (rank_tiles * z * parts) % token_tiles * BLOCK_T
        row = tile // (rank_tiles * z * parts * token_tiles)
        k0 = p * part
        stop = tl.minimum(k0 + part, d)
        i, rank, own = _adapter(ids, ranks, row, n, z_i, r)
        ts = tl.arange(0, BLOCK_T)
        rs = r0 + tl.arange(0, BLOCK_R)
        here = (row * t + t0).to(tl.int64)
        acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for k in range(k0, tl.where(r0 < rank, stop, k0), BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            read = (ts < t - t0)[:, None] & (ks < stop)[None, :]
            x_k = tl.load(x + here * d + ts[:, None] * d + ks[None, :], mask=read, other=0.)
            inside = (rs < rank)[:, None] & (ks < stop)[None, :]
            a = tl.load(A + ((z_i * n + i) * r + rs)[:, None] * d + ks[None, :], mask=inside, other=0.)
            acc = tl.dot(x_k, tl.trans(a), acc, input_precision='ieee')
        h_t = tl.where(own, acc * tl.load(scale + z_i * n + i), 0.)
        written = (ts < t - t0)[:, None] & (rs < r)[None, :]
        tl.store(h + ((p * b * t + here) * z + z_i) * r + ts[:, None] * (z * r) + rs[None, :], h_t, mask=written)

@triton.jit(do_not_specialize=VARYING)
def lora_expand_tile_kernel(out, y, B, h, ranks, ids, tiles, b, t, n, z_i, z, r, o, parts,
                            BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr):
    "A tile is `BLOCK_T` tokens of one sequence times `BLOCK_O` columns of one slice, on a cube core"
    token_tiles = tl.cdiv(t, BLOCK_T)
    column_tiles = tl.cdiv(o, BLOCK_O)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        os = tile % column_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
        t0 = tile // column_tiles % token_tiles * BLOCK_T
        ts = tl.arange(0, BLOCK_T)
        row = tile // (column_tiles * token_tiles)
        here = (row * t + t0).to(tl.int64)
        i, rank, own = _adapter(ids, ranks, row, n, z_i, r)
        acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
        for r0 in range(0, rank, BLOCK_R):
            rs = r0 + tl.arange(0, BLOCK_R)
            h_r = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for p in range(parts):
                summed = (ts < t - t0)[:, None] & (rs < rank)[None, :]
                h_p = h + ((p * b * t + here) * z + z_i) * r + ts[:, None] * (z * r) + rs[None, :]
                h_r += tl.load(h_p, mask=summed, other=0.)
            read = (rs < rank)[:, None] & (os < o)[None, :]
            B_r = tl.load(B + (i * r + rs)[:, None] * o + os[None, :], mask=read, other=0.)
            # the cube multiplies numbers of one type: h is rounded to the layer's, as every LoRA layer does between its two products
            acc = tl.dot(h_r.to(B_r.dtype), B_r, acc, input_precision='ieee')
        base = tl.load(ids + row) == -1
        inside = (ts < t - t0)[:, None] & (os < o)[None, :]
        y_o = tl.load(y + here * o + ts[:, None] * o + os[None, :], mask=inside, other=0.)
        sum_ = y_o.to(tl.float32) + tl.where(own, acc, float('nan'))
        tl.store(out + here * o + ts[:, None] * o + os[None, :], tl.where(base, y_o, sum_.to(y_o.dtype)), mask=inside)

def cdiv(a, b): return -(-a // b)
def next_power_of_2(n): return 1 << (n - 1).bit_length()

def part_width(d, parts):
    "Return the columns of one of `parts` parts of width `d`"
    return cdiv(cdiv(d, parts), ALIGN) * ALIGN if parts > 1 else d

def shrink_plan(m, z, r, d, target):
    """Return `(BLOCK_R, parts)` of a shrink of m rows on vector cores

    Half the rows of a CoLD batch are base rows and cost nothing, so the others have to fill the cores: first the width is
    split, down to one burst, then the ranks, down to 2.
    """
    rows = cdiv(m, 2) * z
    block_r = min(target.blocks.rank, next_power_of_2(r))
    most = max(1, min(MAX_PARTS, d // BURST))
    while rows * cdiv(r, block_r) * most < target.cores and block_r > 2: block_r //= 2
    parts = min(most, cdiv(target.cores, rows * cdiv(r, block_r)))
    return block_r, cdiv(d, part_width(d, parts))

def expand_plan(m, r, widths, target):
    """Return `(BLOCK_R, BLOCK_O)` of an expand of m rows on vector cores

    To fill them the columns of a tile are halved, down to rows of half a burst, many of which go in one transfer.
    """
    def tiles(block_o): return cdiv(m, 2) * sum(cdiv(o, block_o) for o in widths)
    block_o = target.blocks.width
    while tiles(block_o) < target.cores and block_o > BURST // 2: block_o //= 2
    return min(target.blocks.rank, next_power_of_2(r)), block_o

def tile_plan(t, r, target):
    "Return `(BLOCK_T, BLOCK_R)` on cube cores, whose smallest operand is 16 x 16"
    block_t, block_r = (min(target.blocks.tokens, max(16, next_power_of_2(n))) for n in (t, r))
    return block_t, block_r

def shrink_parts(x, A):
    """Return into how many partial sums to split the width, so that every core of this device has work

    These are vector cores, or cube cores where many tokens share an adapter.
    """
    b, t, d = x.shape
    z, _, r, _ = A.shape
    target = target_of(x.device)
    if t < CUBE_ROWS: return shrink_plan(b * t, z, r, d, target)[1]
    block_t, block_r = tile_plan(t, r, target)
    tiles = cdiv(b, 2) * cdiv(t, block_t) * z * cdiv(r, block_r)
    parts = min(MAX_PARTS, cdiv(target.cube_cores, tiles), max(1, d // BURST))
    return cdiv(d, part_width(d, parts))

def lora_shrink(x, A, scale, ranks, ids, parts):
    """Return `h` `(parts, b, t, z, r)` fp32, the partial sums of `scale * A @ x` with each row's adapter, zero for base rows

    x `(b, t, d)`, A `(z, n, r, d)` of its dtype with ranks padded, scale `(z, n)` fp32, ranks `(z, n)` int32 the adapters'
    own, ids `(b,)` int64; parts from `shrink_parts`.
    """
    check_shrink(x, A, scale, ranks, ids, parts)
    h = torch.empty(parts, *x.shape[:2], A.shape[0], A.shape[2], dtype=torch.float32, device=x.device)
    shrink = _shrink_tiles if x.shape[1] >= CUBE_ROWS else _shrink_rows
    shrink(h, x, A, scale, ranks, ids)
    return h

def _shrink_rows(h, x, A, scale, ranks, ids):
    "Launch the shrink on vector cores"
    b, t, d = x.shape
    z, n, r, _ = A.shape
    parts = h.shape[0]
    target = target_of(x.device)
    part = part_width(d, parts)
    block_r, _ = shrink_plan(b * t, z, r, d, target)
    tiles = b * t * parts * z * cdiv(r, block_r)
    tensors = dict(h=h, x=x, A=A, scale=scale, ranks=ranks, ids=ids)
    sizes = dict(tiles=tiles, m=b * t, t=t, n=n, z=z, r=r, d=d, parts=parts, part=part)
    block_k = target.blocks.width if part > BURST else BURST
    launch(lora_shrink_kernel, target.programs(tiles), tensors | sizes, BLOCK_R=block_r, BLOCK_K=block_k)

def _shrink_tiles(h, x, A, scale, ranks, ids):
    "Launch the shrink on cube cores"
    b, t, d = x.shape
    z, n, r, _ = A.shape
    parts = h.shape[0]
    target = target_of(x.device)
    block_t, block_r = tile_plan(t, r, target)
    tiles = b * cdiv(t, block_t) * parts * z * cdiv(r, block_r)
    tensors = dict(h=h, x=x, A=A, scale=scale, ranks=ranks, ids=ids)
    sizes = dict(tiles=tiles, b=b, t=t, n=n, z=z, r=r, d=d, parts=parts, part=part_width(d, parts))
    blocks = dict(BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_K=target.blocks.tile_width)
    launch(lora_shrink_tile_kernel, target.programs(tiles, cube=True), tensors | sizes, **blocks)

def lora_expand(y, h, B, ranks, ids):
    """Return for each slice `y + B.T @ h`, `(b, t, o)`, with each row's adapter; base rows keep their bits

    y list of `(b, t, o_z)`, h `(parts, b, t, z, r)` fp32 from `lora_shrink`, B list of `(n, r, o_z)` of y's dtype, ranks
    `(z, n)` int32, ids `(b,)` int64.
    """
    check_expand(y, h, B, ranks, ids)
    out = [torch.empty_like(y_z, memory_format=torch.contiguous_format) for y_z in y]
    if y[0].shape[1] >= CUBE_ROWS:
        for z_i in range(len(y)):
            _expand_tiles(out[z_i], y[z_i], B[z_i], h=h, ranks=ranks, ids=ids, z_i=z_i)
    else:
        for z0 in range(0, len(y), 3):
            three = slice(z0, z0 + 3)
            _expand_rows(out[three], y[three], B[three], h=h, ranks=ranks, ids=ids, z0=z0)
    return out

def _three(name, xs):
    "Return up to three arguments by name: the kernel never touches what stands in for a slice that is absent"
    return {f'{name}{i}': xs[min(i, len(xs) - 1)] for i in range(3)}

def _expand_rows(out, y, B, *, h, ranks, ids, z0):
    "Launch the expand of up to three slices on vector cores"
    parts, b, t, z, r = h.shape
    target = target_of(h.device)
    widths = [y_z.shape[2] for y_z in y]
    block_r, block_o = expand_plan(b * t, r, widths, target)
    tiles = b * t * sum(cdiv(o, block_o) for o in widths)
    slices = _three('out', out) | _three('y', y) | _three('B', B) | _three('o', widths)
    sizes = dict(tiles=tiles, m=b * t, t=t, n=ranks.shape[1], z0=z0, z=z, r=r, parts=parts)
    blocks = dict(SLICES=len(y), BLOCK_P=1 if parts == 1 else MAX_PARTS, BLOCK_R=block_r, BLOCK_O=block_o)
    arguments = slices | dict(h=h, ranks=ranks, ids=ids) | sizes
    launch(lora_expand_kernel, target.programs(tiles), arguments, **blocks)

def _expand_tiles(out, y, B, *, h, ranks, ids, z_i):
    "Launch the expand of one slice on cube cores"
    parts, b, t, z, r = h.shape
    o = y.shape[2]
    target = target_of(h.device)
    block_t, block_r = tile_plan(t, r, target)
    tiles = b * cdiv(t, block_t) * cdiv(o, target.blocks.tile_width)
    tensors = dict(out=out, y=y, B=B, h=h, ranks=ranks, ids=ids)
    sizes = dict(tiles=tiles, b=b, t=t, n=ranks.shape[1], z_i=z_i, z=z, r=r, o=o, parts=parts)
    blocks = dict(BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_O=target.blocks.tile_width)
    launch(lora_expand_tile_kernel, target.programs(tiles, cube=True), tensors | sizes, **blocks)

def lora(y, x, A, B, scale, ranks, ids):
    """Return for each slice `y + scale * B.T @ A @ x`, `(b, t, o)`, with each row's adapter: `lora_shrink` and `lora_expand`

    What a model hands over may be a view, and one id may stand for all rows: both are copied here, and only here.
    """
    x = x.contiguous()
    ids = ids.expand(x.shape[0]).contiguous()
    h = lora_shrink(x, A, scale, ranks, ids, shrink_parts(x, A))
    return lora_expand([y_z.contiguous() for y_z in y], h, B, ranks, ids)

def check_shrink(x, A, scale, ranks, ids, parts):
    "Raise `DecodingError` for arguments that `lora_shrink` cannot take"
    check_tensor('x', x, (None, None, None))
    check_tensor('A', A, (None, None, None, x.shape[2]), x.dtype, x.device)
    z, n, r, _ = A.shape
    require(1 <= r <= MAX_RANK, f'the rank is {r}', f'use adapters of rank 1 to {MAX_RANK}')
    require(
        x.numel() > 0 and n > 0 and z > 0,
        f'there is nothing to do for x {tuple(x.shape)} and A {tuple(A.shape)}',
        'give at least one row, token, column, adapter and slice')
    check_tensor('scale', scale, (z, n), torch.float32, x.device)
    _check_adapters(x, n, z, ranks, ids)
    require(1 <= parts <= MAX_PARTS, f'parts is {parts}', 'take it from shrink_parts')

def check_expand(y, h, B, ranks, ids):
    "Raise `DecodingError` for arguments that `lora_expand` cannot take"
    check_tensor('h', h, (None, None, None, None, None), torch.float32)
    parts, b, t, z, r = h.shape
    n = ranks.shape[-1]
    require(
        len(y) == len(B) == z,
        f'there are {len(y)} outputs and {len(B)} Bs for {z} slices',
        'give one of each for every slice of h')
    require(1 <= r <= MAX_RANK, f'the rank is {r}', f'use adapters of rank 1 to {MAX_RANK}')
    require(1 <= parts <= MAX_PARTS, f'h has {parts} parts', 'take it from lora_shrink')
    for i, (y_z, B_z) in enumerate(zip(y, B)):
        check_tensor(f'y[{i}]', y_z, (b, t, None), device=h.device)
        require(
            y_z.numel() > 0,
            f'y[{i}] has shape {tuple(y_z.shape)}',
            'leave out slices of width zero, and empty batches')
        check_tensor(f'B[{i}]', B_z, (n, r, y_z.shape[2]), y[0].dtype, h.device)
        require(y_z.dtype == y[0].dtype, f'y[{i}] is {y_z.dtype}, y[0] is {y[0].dtype}', 'give all slices one dtype')
    _check_adapters(y[0], n, z, ranks, ids)

def _check_adapters(x, n, z, ranks, ids):
    check_tensor('ranks', ranks, (z, n), torch.int32, x.device)
    check_tensor('ids', ids, (x.shape[0],), torch.int64, x.device)
