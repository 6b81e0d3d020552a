"""Drawing a token: scores and Gumbel noise of which the best token is a draw from softmax, each row read once

Plain:  best of scores_i / temperature + g_i
CoLD:   best of s_i / temperature + g_i, with the contrast s of cold.py, -inf where not plausible

The noise g is computed where it is needed, from the key of the row's position and the number of the token, and never stored.
It is int32 arithmetic that wraps, in the order of `npu_lora_decoding.foundations.ops`, so it has the same bits. The stages are
those of cold.py: a candidate is the best of a superset of the plausible tokens of its part, noise included.
"""
import torch
import triton
import triton.language as tl
from .checks import check_tensor
from .cold import INF, VARYING, _better, _check, _check_logits, _check_settings, _first, _load, _row, _rows, _scan, _score
from .cold import _standing, cut, room_for
from .launch import launch
from .targets import target_of

ALSO_VARYING = [*VARYING, 'temperature_stride']

@triton.jit
def _mix(x):
    "Return int32 numbers scattered, one to one"
    x = x ^ ((x >> 16) & 0xffff)
    x = x * 0x21f0aaad
    x = x ^ ((x >> 15) & 0x1ffff)
    x = x * 0x735a2d97
    return x ^ ((x >> 15) & 0x1ffff)

@triton.jit
def _bits(q):
    "Return the bits in fp32 of integers below 2^24"
    return q.to(tl.float32).to(tl.int32, bitcast=True)

@triton.jit
def _minus_log(bits, scale: tl.constexpr):
    "Return -ln(q / 2^scale) in units of 2^-16, from the bits of q in fp32"
    m = (bits >> 12) & 0x7ff
    y = ((m * -1115) >> 11) + 5338
    y = ((y * m) >> 11) - 12377
    y = ((y * m) >> 11) + 20632
    y = ((y * m) >> 11) - 32569
    y = ((y * m) >> 11) + 65509
    y = ((y * m) >> 11) + 16
    return (scale + 127 - (bits >> 23)) * 45426 - y

@triton.jit
def _gumbel_of(hashed):
    "Return the noise that 32 bits stand for"
    t = (hashed >> 8) | 1
    bits = _bits(tl.where(t > 0, t, -t))
    middle = ((bits & -0x1000) | 0x800).to(tl.float32, bitcast=True)
    u = (middle * 0.0009765625).to(tl.int32)  # 2^-10
    y = ((u * 19193) >> 14) - 5154
    y = ((y * u) >> 14) + 11375
    y = ((y * u) >> 14) + 13255
    y = ((y * u) >> 14) + 32786
    y = (y * u) >> 14
    log = _minus_log(bits, 24)
    return tl.where(t > 0, log - y, _minus_log(_bits(log), 16)).to(tl.float32) * 1.52587890625e-05  # 2^-16

@triton.jit
def _key(keys, row):
    "Return the two numbers of a row's key"
    return tl.load(keys + row * 2), tl.load(keys + row * 2 + 1)

@triton.jit
def _noisy(s, tokens, temperature, first, second):
    "Return scores at a temperature with the noise of their tokens; `/` alone would be off by a bit on CUDA"
    return tl.div_rn(s, temperature) + _gumbel_of(_mix(first + tokens * second))

@triton.jit(do_not_specialize=ALSO_VARYING)
def cold_noisy_kernel(top, floor, score, expert, token, tiles, e, a, log_alpha, beta, temperature, keys, alpha_stride,
                      beta_stride, temperature_stride, v, parts, part, BLOCK: tl.constexpr):
    "One tile: maximum of e, floor of a and best candidate, noise included, in one part of one row"
    lanes = tl.arange(0, BLOCK)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile // parts
        k0 = tile % parts * part
        stop = tl.minimum(k0 + part, v)
        log_alpha_row = tl.load(log_alpha + row * alpha_stride)
        beta_row = tl.load(beta + row * beta_stride)
        temperature_row = tl.load(temperature + row * temperature_stride)
        first, second = _key(keys, row)
        e_top = -INF
        a_floor = tl.full((BLOCK,), INF, tl.float32)
        best = tl.full((BLOCK,), -INF, tl.float32)
        best_k = tl.zeros((BLOCK,), tl.int32)
        for k in range(k0, stop, BLOCK):
            e_k = _load(e + row * v, k + lanes, stop)
            a_k = _load(a + row * v, k + lanes, stop)
            e_top, a_floor, s, likely = _scan(e_k, a_k, e_top, a_floor, log_alpha_row, beta_row)
            s = _noisy(s, k + lanes, temperature_row, first, second)
            better = likely & (s > best)
            best = tl.where(better, s, best)
            best_k = tl.where(better, k, best_k)
        s, i = _first(best, best_k, lanes, v)
        tl.store(top + tile, e_top)
        tl.store(floor + tile, tl.min(a_floor, 0))
        tl.store(score + tile, s)
        tl.store(expert + tile, tl.load(e + row * v + i).to(tl.float32))
        tl.store(token + tile, i)

@triton.jit(do_not_specialize=ALSO_VARYING)
def cold_sample_kernel(out, top, floor, score, expert, token, tiles, e, a, log_alpha, beta, temperature, keys, alpha_stride,
                       beta_stride, temperature_stride, v, parts, part, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    "One tile: the token of one row"
    lanes = tl.arange(0, BLOCK)
    ps = tl.arange(0, PARTS)
    for row in range(tl.program_id(0), tiles, tl.num_programs(0)):
        at = row * parts + ps
        on = ps < parts
        beta_row = tl.load(beta + row * beta_stride)
        temperature_row = tl.load(temperature + row * temperature_stride)
        first, second = _key(keys, row)
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
                s = _noisy(s, k + lanes, temperature_row, first, second)
                best, i = _better(s, k + lanes, best, i, v)
        tl.store(out + row, tl.where(sound, i, -1).to(tl.int64))

@triton.jit(do_not_specialize=['tiles', 'temperature_stride', 'parts'])
def plain_noisy_kernel(score, token, tiles, scores, temperature, keys, temperature_stride, v, parts, part,
                       BLOCK: tl.constexpr):
    "One tile: the best token, noise included, in one part of one row; +inf where a score is not a number"
    lanes = tl.arange(0, BLOCK)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile // parts
        k0 = tile % parts * part
        stop = tl.minimum(k0 + part, v)
        temperature_row = tl.load(temperature + row * temperature_stride)
        first, second = _key(keys, row)
        best = tl.full((BLOCK,), -INF, tl.float32)
        best_k = tl.zeros((BLOCK,), tl.int32)
        for k in range(k0, stop, BLOCK):
            s = _load(scores + row * v, k + lanes, stop)
            s = _noisy(s, k + lanes, temperature_row, first, second)
            s = tl.where(s < INF, s, INF)
            best_k = tl.where(s > best, k, best_k)
            best = tl.where(s > best, s, best)
        s, i = _first(best, best_k, lanes, v)
        tl.store(score + tile, s)
        tl.store(token + tile, i)

@triton.jit(do_not_specialize=['tiles', 'parts'])
def plain_sample_kernel(out, score, token, tiles, parts, BLOCK_PARTS: tl.constexpr):
    "One tile: the token of one row"
    ps = tl.arange(0, BLOCK_PARTS)
    for row in range(tl.program_id(0), tiles, tl.num_programs(0)):
        on = ps < parts
        bound = tl.load(score + row * parts + ps, mask=on, other=-INF)
        best = tl.max(bound, 0)
        tokens = tl.load(token + row * parts + ps, mask=on, other=0)
        i = tl.min(tl.where(on & (bound == best), tokens, 2147483647), 0)
        tl.store(out + row, tl.where((best > -INF) & (best < INF), i, -1).to(tl.int64))

def _check_noise(e, temperature, keys):
    _check_settings(e, temperature=temperature)
    check_tensor('keys', keys, (*e.shape[:-1], 2), torch.int32, e.device)

def _plan(names, e, temperature, keys):
    "Return where stage 1 puts what it finds, the arguments that all kernels share, the grid's target and its tiles"
    target = target_of(e.device)
    parts, part = cut(e, target.blocks.noise, target)
    found = room_for(names, e, parts)
    rest = dict(keys=keys, v=e.shape[-1], parts=parts, part=part)
    rest['temperature'], rest['temperature_stride'] = _rows(temperature, e)
    return found, rest, target

def cold_sample(e, a, alpha, beta, temperature, keys):
    """Return the token with the best contrastive score, divided by the temperature, plus noise `(...)`

    It is -1 where a row's best logit, of e or of a, is not finite.
    """
    _check(e, a, alpha, beta)
    _check_noise(e, temperature, keys)
    found, rest, target = _plan(('top', 'floor', 'score', 'expert', 'token'), e, temperature, keys)
    rest |= dict(e=e, a=a)
    rest['log_alpha'], rest['alpha_stride'] = _rows(alpha.log(), e)
    rest['beta'], rest['beta_stride'] = _rows(beta, e)
    tiles = found['top'].numel()
    block = target.blocks.noise
    launch(cold_noisy_kernel, target.programs(tiles), found | rest | dict(tiles=tiles), BLOCK=block)
    out = torch.empty(e.shape[:-1], dtype=torch.int64, device=e.device)
    arguments = found | rest | dict(out=out, tiles=out.numel())
    constants = dict(PARTS=triton.next_power_of_2(target.cores), BLOCK=block)
    launch(cold_sample_kernel, target.programs(out.numel()), arguments, **constants)
    return out

def plain_sample(scores, temperature, keys):
    "Return the token with the best score, divided by the temperature, plus noise `(...)`; -1 where the best is not finite"
    _check_logits(scores)
    _check_noise(scores, temperature, keys)
    found, rest, target = _plan(('score', 'token'), scores, temperature, keys)
    tiles = found['score'].numel()
    arguments = found | rest | dict(scores=scores, tiles=tiles)
    launch(plain_noisy_kernel, target.programs(tiles), arguments, BLOCK=target.blocks.noise)
    out = torch.empty(scores.shape[:-1], dtype=torch.int64, device=scores.device)
    arguments = found | dict(out=out, tiles=out.numel(), parts=rest['parts'])
    block = triton.next_power_of_2(target.cores)
    launch(plain_sample_kernel, target.programs(out.numel()), arguments, BLOCK_PARTS=block)
    return out
