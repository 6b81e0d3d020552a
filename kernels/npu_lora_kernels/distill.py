"""Top-K distillation (HASS): the draft's cross-entropy on the target's K likeliest tokens, without a softmax of either in memory

p = softmax(target), log q = log_softmax(draft), both over the whole vocabulary:
loss = - sum over the K largest p_i of p_i log q_i,   d loss / d draft_j = P q_j - p_j [j in Top-K],   P = sum of the K p_i

Each row of logits is read once for its log-sum-exp and once more for the gradient, which is written in the draft's dtype.
Sums run in fp32 in a fixed order, without atomics. Among equal logits at the K-th place `torch.topk` chooses whose p_j counts.
Either may hold -inf, the draft only outside the Top-K; a row with NaN or +inf gives NaN.
"""
import torch
import triton
import triton.language as tl
from .checks import FLOATS, check_tensor, require
from .launch import launch
from .targets import target_of

@triton.jit
def logsumexp_kernel(out, logits, tiles, v, part, parts, BLOCK_V: tl.constexpr):
    "One tile: the log-sum-exp of one part of a row, read once: its sum is rescaled whenever a larger logit comes"
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = logits + (tile // parts).to(tl.int64) * v
        v0 = tile % parts * part
        stop = tl.minimum(v0 + part, v)
        top = -3.4028234663852886e38  # the lowest number instead of -inf, which would make NaN of its difference with itself
        total = 0.
        for i in range(v0, stop, BLOCK_V):
            vs = i + tl.arange(0, BLOCK_V)
            x = tl.load(row + vs, mask=vs < stop, other=-float('inf')).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
        tl.store(out + tile, top + tl.log(total))

@triton.jit
def softmax_gradient_kernel(out, logits, lse, scale, tiles, v, part, parts, BLOCK_V: tl.constexpr):
    "One tile: scale * softmax(logits) on one part of a row"
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        t = tile // parts
        row = t.to(tl.int64) * v
        v0 = tile % parts * part
        stop = tl.minimum(v0 + part, v)
        row_lse = tl.load(lse + t)
        row_scale = tl.load(scale + t)
        for i in range(v0, stop, BLOCK_V):
            vs = i + tl.arange(0, BLOCK_V)
            x = tl.load(logits + row + vs, mask=vs < stop, other=-float('inf')).to(tl.float32)
            tl.store(out + row + vs, (row_scale * tl.exp(x - row_lse)).to(out.dtype.element_ty), mask=vs < stop)

def _parts(t, v, target):
    "Return (columns of a part, parts): a row is split only when there are fewer rows than cores"
    block = target.blocks.vocabulary
    part = triton.cdiv(triton.cdiv(v, max(1, target.cores // max(1, t))), block) * block
    return part, triton.cdiv(v, part)

def logsumexp_rows(logits):
    "Return the log-sum-exp `(t,)` fp32 of logits `(t, v)`; NaN for a row that holds NaN or +inf"
    t, v = logits.shape
    target = target_of(logits.device)
    part, parts = _parts(t, v, target)
    out = torch.empty(t, parts, dtype=torch.float32, device=logits.device)
    arguments = dict(out=out, logits=logits, tiles=t * parts, v=v, part=part, parts=parts)
    launch(logsumexp_kernel, target.programs(t * parts), arguments, BLOCK_V=target.blocks.vocabulary)
    return out.logsumexp(1)

def topk_loss_forward(draft, target, k):
    "Return (loss `(t,)`, draft's log-sum-exp `(t,)`, target's `k` largest probabilities and their tokens `(t, k)`)"
    check_tensor('draft', draft, (None, None))
    check_tensor('target', target, draft.shape, device=draft.device)
    require(1 <= k <= draft.shape[1], f'k is {k} for a vocabulary of {draft.shape[1]}', 'choose k between 1 and the vocabulary')
    top, top_i = target.topk(k)
    draft_lse = logsumexp_rows(draft)
    top_p = (top.float() - logsumexp_rows(target)[:, None]).exp()
    loss = (top_p * (draft_lse[:, None] - draft.gather(1, top_i).float())).sum(1)
    return loss, draft_lse, top_p, top_i

def topk_loss_backward(grad, draft, draft_lse, top_p, top_i):
    "Return the gradient `(t, v)` of the loss in the draft's logits, in their dtype"
    _check_backward(grad, draft, draft_lse, top_p, top_i)
    t, v = draft.shape
    target = target_of(draft.device)
    part, parts = _parts(t, v, target)
    scale = grad * top_p.sum(1)
    out = torch.empty_like(draft)
    arguments = dict(out=out, logits=draft, lse=draft_lse, scale=scale, tiles=t * parts, v=v, part=part, parts=parts)
    launch(softmax_gradient_kernel, target.programs(t * parts), arguments, BLOCK_V=target.blocks.vocabulary)
    # the few tokens of the Top-K are written again, from fp32: adding to what is there would round twice
    top_q = (draft.gather(1, top_i).float() - draft_lse[:, None]).exp()
    return out.scatter_(1, top_i, (scale[:, None] * top_q - grad[:, None] * top_p).to(out.dtype))

def _check_backward(grad, draft, draft_lse, top_p, top_i):
    check_tensor('draft', draft, (None, None))
    t = draft.shape[0]
    device = draft.device
    check_tensor('grad', grad, (t,), torch.float32, device)
    check_tensor('draft_lse', draft_lse, (t,), torch.float32, device)
    check_tensor('top_p', top_p, (t, None), torch.float32, device)
    check_tensor('top_i', top_i, top_p.shape, torch.int64, device)
