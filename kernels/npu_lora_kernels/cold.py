"""CoLD: the contrast of expert and base logits, each row read once

Plausible:  e_i >= T,  T = log(alpha) + max(e)
Score:      s_i = e_i + beta * (e_i - max(a_i, floor)),  floor = the least a_i above -inf;  -inf where not plausible

Stage 1 reads every part of the vocabulary once. It does not know T, only the part's maximum so far, so it scores a superset
of the plausible set and keeps the best candidate. Nothing plausible in the part scores higher: a candidate that proves
plausible is the part's best token, one that does not is a bound. Stage 2 takes the best of the candidates that stand, and
looks again only at parts whose candidate fell and whose bound leaves room for a better token, or for the same score at a
lower index.
"""
import torch
import triton
import triton.language as tl
from .checks import check_tensor, require
from .launch import launch
from .targets import target_of

INF = tl.constexpr(float('inf'))
# What varies with the batch: a specialisation for each would compile in the middle of decoding
VARYING = ['tiles', 'alpha_stride', 'beta_stride', 'parts']

@triton.jit
def _load(x, ks, stop):
    "Return one block of logits in fp32, -inf from `stop` on"
    return tl.load(x + ks, mask=ks < stop, other=-INF).to(tl.float32)

@triton.jit
def _row(top, floor, log_alpha, parts, PARTS: tl.constexpr):
    "Return a row's threshold, its floor and whether the maxima of both of its logits are finite"
    ps = tl.arange(0, PARTS)
    e_top = tl.max(tl.load(top + ps, mask=ps < parts, other=-INF), 0)
    a_floor = tl.min(tl.load(floor + ps, mask=ps < parts, other=INF), 0)
    return tl.load(log_alpha) + e_top, a_floor, (e_top > -INF) & (a_floor > -INF) & (a_floor < INF)

@triton.jit
def _scan(e_k, a_k, e_top, a_floor, log_alpha_row, beta_row):
    "Return the maximum of e and the floor of a so far, this block's scores, and which of its tokens may be plausible"
    e_max = tl.max(e_k, 0)
    e_top = tl.where(e_max > e_top, e_max, e_top)
    finite = a_k > -INF
    # NaN and inf in either row are not below inf after the addition: they make the floor -inf
    least = tl.where(e_k + a_k < INF, tl.where(finite, a_k, INF), -INF)
    a_floor = tl.where(least < a_floor, least, a_floor)
    # no score without the row's floor: a bound that nothing passes
    s = tl.where(finite, e_k + beta_row * (e_k - a_k), INF)
    return e_top, a_floor, s, e_k >= log_alpha_row + e_top

@triton.jit
def _first(best, best_k, lanes, v):
    "Return the best score of all lanes, and the lowest token that has it"
    s = tl.max(best, 0)
    return s, tl.min(tl.where(best == s, best_k + lanes, v - 1), 0)

@triton.jit
def _standing(top, score, expert, token, on, threshold, v):
    "Return the best score and token of a row's candidates that stand, and 1 for each part to look at again"
    bound = tl.load(score, mask=on, other=-INF)
    stands = (tl.load(expert, mask=on, other=-INF) >= threshold) & (bound < INF)
    best = tl.max(tl.where(stands, bound, -INF), 0)
    i = tl.min(tl.where(stands & (bound == best), tl.load(token, mask=on, other=0), v), 0)
    room = (tl.load(top, mask=on, other=-INF) >= threshold) & (bound >= best)
    return best, i, tl.where(room, tl.where(stands, 0, 1), 0)

@triton.jit
def _better(s, ks, best, i, v):
    "Return the best score and token so far, with those of one more block"
    s_k = tl.max(s, 0)
    i_k = tl.min(tl.where(s == s_k, ks, v), 0)
    i = tl.where((s_k > best) | ((s_k == best) & (i_k < i)), i_k, i)
    return tl.where(s_k > best, s_k, best), i

@triton.jit
def _score(e, a, threshold, floor, beta):
    "Return the scores of one block, -inf outside the plausible set"
    return tl.where(e >= threshold, e + beta * (e - tl.where(a > floor, a, floor)), -INF)

@triton.jit(do_not_specialize=VARYING)
def cold_candidates_kernel(top, floor, score, expert, token, tiles, e, a, log_alpha, beta, alpha_stride, beta_stride, v,
                           parts, part, BLOCK: tl.constexpr):
    "One tile: maximum of e, floor of a and best candidate in one part of one row"
    lanes = tl.arange(0, BLOCK)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile // parts
        k0 = tile % parts * part
        stop = tl.minimum(k0 + part, v)
        log_alpha_row = tl.load(log_alpha + row * alpha_stride)
        beta_row = tl.load(beta + row * beta_stride)
        e_top = -INF
        a_floor = tl.full((BLOCK,), INF, tl.float32)
        best = tl.full((BLOCK,), -INF, tl.float32)
        best_k = tl.zeros((BLOCK,), tl.int32)
        for k in range(k0, stop, BLOCK):
            e_k = _load(e + row * v, k + lanes, stop)
            a_k = _load(a + row * v, k + lanes, stop)
            e_top, a_floor, s, likely = _scan(e_k, a_k, e_top, a_floor, log_alpha_row, beta_row)
            better = likely & (s > best)
            best = tl.where(better, s, best)
            best_k = tl.where(better, k, best_k)
        s, i = _first(best, best_k, lanes, v)
        tl.store(top + tile, e_top)
        tl.store(floor + tile, tl.min(a_floor, 0))
        tl.store(score + tile, s)
        tl.store(expert + tile, tl.load(e + row * v + i).to(tl.float32))
        tl.store(token + tile, i)

@triton.jit(do_not_specialize=VARYING)
def cold_select_kernel(out, top, floor, score, expert, token, tiles, e, a, log_alpha, beta, alpha_stride, beta_stride, v,
                       parts, part, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    "One tile: the token of one row"
    lanes = tl.arange(0, BLOCK)
    ps = tl.arange(0, PARTS)
    for row in range(tl.program_id(0), tiles, tl.num_programs(0)):
        at = row * parts + ps
        on = ps < parts
        beta_row = tl.load(beta + row * beta_stride)
        log_alpha_at = log_alpha + row * alpha_stride
        threshold, a_floor, sound = _row(top + row * parts, floor + row * parts, log_alpha_at, parts, PARTS)
        best, i, again = _standing(top + at, score + at, expert + at, token + at, on=on, threshold=threshold, v=v)
        p = -1
        for _ in range(tl.sum(again, 0)):
            p = tl.min(tl.where((again > 0) & (ps > p), ps, PARTS), 0)
            stop = tl.minimum(p * part + part, v)
            for k in range(p * part, stop, BLOCK):
                e_k = _load(e + row * v, k + lanes, stop)
                a_k = _load(a + row * v, k + lanes, stop)
                s = _score(e_k, a_k, threshold, a_floor, beta_row)
                best, i = _better(s, k + lanes, best, i, v)
        tl.store(out + row, tl.where(sound, i, -1).to(tl.int64))

@triton.jit(do_not_specialize=VARYING)
def cold_scores_kernel(out, top, floor, tiles, e, a, log_alpha, beta, alpha_stride, beta_stride, v, parts, part,
                       PARTS: tl.constexpr, BLOCK: tl.constexpr):
    "One tile: the scores of one part of one row"
    lanes = tl.arange(0, BLOCK)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile // parts
        k0 = tile % parts * part
        stop = tl.minimum(k0 + part, v)
        beta_row = tl.load(beta + row * beta_stride)
        log_alpha_at = log_alpha + row * alpha_stride
        threshold, a_floor, sound = _row(top + row * parts, floor + row * parts, log_alpha_at, parts, PARTS)
        for k in range(k0, stop, BLOCK):
            e_k = _load(e + row * v, k + lanes, stop)
            a_k = _load(a + row * v, k + lanes, stop)
            s = _score(e_k, a_k, threshold, a_floor, beta_row)
            tl.store(out + row * v + k + lanes, tl.where(sound, s, float('nan')), mask=k + lanes < stop)

def _rows(x, e):
    "Return the value of each row of `e`, and its stride: 0 where one value serves all"
    x = x.reshape(1) if x.numel() == 1 else x.expand(*e.shape[:-1], 1).reshape(-1)
    return x, int(len(x) > 1)

def _check_logits(e):
    "Check the logits that decide the shape of all others"
    check_tensor('e', e, (None,) * max(1, e.dim()))
    require(0 < e.numel() < 2**31, f'e holds {e.numel()} logits', 'pass at least one, and fewer than 2**31 at a time')

def _check_settings(e, **settings):
    "Check settings of which there is one, or one for each row of `e`"
    for name, x in settings.items():
        check_tensor(name, x, (None,) * x.dim(), torch.float32, e.device)
        fits = x.dim() == e.dim() and all(n in (1, rows) for n, rows in zip(x.shape, (*e.shape[:-1], 1)))
        require(
            fits or x.numel() == 1,
            f'{name} has shape {tuple(x.shape)}',
            'give it one value, or one for each row of e in shape (..., 1)')

def _check(e, a, alpha, beta):
    _check_logits(e)
    check_tensor('a', a, e.shape, e.dtype, e.device)
    _check_settings(e, alpha=alpha, beta=beta)

def cut(e, block, target):
    "Return how many parts each row is cut into, and their width: a part for every core, of whole blocks"
    v = e.shape[-1]
    rows = e.numel() // v
    part = triton.cdiv(triton.cdiv(v, block), max(1, target.cores // rows)) * block
    return triton.cdiv(v, part), part

def room_for(names, e, parts):
    "Return tensors for what stage 1 finds in every part"
    shape = e.numel() // e.shape[-1], parts
    types = {name: torch.int32 if name == 'token' else torch.float32 for name in names}
    return {name: torch.empty(shape, dtype=dtype, device=e.device) for name, dtype in types.items()}

def _candidates(e, a, alpha, beta):
    "Run stage 1; return what it found (top, floor, score, expert, token), the other arguments of stage 2 and its constants"
    _check(e, a, alpha, beta)
    target = target_of(e.device)
    block = target.blocks.vocabulary
    parts, part = cut(e, block, target)
    found = room_for(('top', 'floor', 'score', 'expert', 'token'), e, parts)
    rest = dict(e=e, a=a, v=e.shape[-1], parts=parts, part=part)
    rest['log_alpha'], rest['alpha_stride'] = _rows(alpha.log(), e)
    rest['beta'], rest['beta_stride'] = _rows(beta, e)
    tiles = found['top'].numel()
    launch(cold_candidates_kernel, target.programs(tiles), found | rest | dict(tiles=tiles), BLOCK=block)
    return found, rest, dict(PARTS=triton.next_power_of_2(target.cores), BLOCK=block)

def cold_select(e, a, alpha, beta):
    """Return the token with the best contrastive score `(...)`, the lowest index among ties

    It is -1 where a row's best logit, of e or of a, is not finite.
    """
    found, rest, constants = _candidates(e, a, alpha, beta)
    out = torch.empty(e.shape[:-1], dtype=torch.int64, device=e.device)
    arguments = found | rest | dict(out=out, tiles=out.numel())
    launch(cold_select_kernel, target_of(e.device).programs(out.numel()), arguments, **constants)
    return out

def cold_scores(e, a, alpha, beta):
    """Return the contrastive scores of every token `(..., v)` in fp32, -inf outside the plausible set

    They are NaN where a row's best logit, of e or of a, is not finite.
    """
    found, rest, constants = _candidates(e, a, alpha, beta)
    out = torch.empty(e.shape, dtype=torch.float32, device=e.device)
    tiles = found['top'].numel()
    arguments = rest | dict(out=out, top=found['top'], floor=found['floor'], tiles=tiles)
    launch(cold_scores_kernel, target_of(e.device).programs(tiles), arguments, **constants)
    return out
