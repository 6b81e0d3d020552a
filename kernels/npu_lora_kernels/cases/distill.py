"""Cases of the Top-K distillation loss and its gradient"""

import torch
from npu_lora_decoding.foundations import ops
from npu_lora_kernels.distill import topk_loss_backward, topk_loss_forward
from . import Case

# A sum of up to 2,048 numbers one after another, and of 24 such sums, may be off by 2,072 * 2^-24 = 1.24e-4 of itself. A
# log-sum-exp is off by that number, a probability by that part of it, the loss by both: d (P + loss). A device adds as a tree
# and is far better.
SUMS = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), (1.3e-4, 1.3e-4))
# The gradient has no sums: one rounding to its dtype, and before it the difference of two numbers below |grad| < 4, each exact
# to some 2^-24 of itself
ROUNDED = {torch.float16: (1e-6, 2**-10), torch.bfloat16: (1e-6, 2**-7), torch.float32: (1e-6, 2e-6)}


def _logits(t, v, k, dtype, generator):
    """Return logits whose `k` largest are distinct in every dtype, because `torch.topk` may choose any of two equal ones

    They lie behind the first block where there is room.
    """
    x = (torch.randn(t, v, generator=generator) * 4).clamp(max=3.0)
    first = 2100 if v > 2100 + k else 0
    places = torch.empty(t, k, dtype=torch.int64)
    for row in places:
        row.copy_(first + torch.randperm(v - first, generator=generator)[:k])
    largest = 3.25 + torch.arange(k).expand(t, k) * (0.25 if k <= 16 else 0.125)
    return x.scatter_(1, places, largest).to(dtype)


def _holes(x, keep, generator):
    "Put -inf at half of the places of `x` that are not in `keep`, the last token and the whole first block among them"
    holes = torch.rand(x.shape, generator=generator) < 0.5
    holes[:, :2100] = True
    holes[:, -1] = True
    return x.masked_fill_(holes.scatter(1, keep, False), -torch.inf)


def _broken(*rows):
    "Put NaN into the first row of the first, the second row of the second, ..."
    for i, x in enumerate(rows):
        x[i, -1] = torch.nan


def _pair(shape, dtype, generator, holes, broken):
    "Return the logits of a draft and a target of `shape` (t, v, k)"
    t, v, k = shape
    draft = torch.randn(t, v, generator=generator).mul_(4).to(dtype)
    target = _logits(t, v, k, dtype, generator)
    if holes:
        _holes(draft, target.topk(k).indices, generator)
        _holes(target, target.topk(k).indices, generator)
    if broken:
        _broken(draft, target)
    return draft, target


def _named(what, shape, holes, broken):
    "Return the name of a case"
    t, v, k = shape
    return f'{what} t={t} v={v} k={k}{" holes" * holes}{" NaN" * broken}'


def forward(*shape, holes=False, broken=False, work=''):
    "The loss of `t` rows; `holes`: half of the tokens have no probability; `broken`: the first two rows hold NaN"

    def make(dtype, generator):
        return *_pair(shape, dtype, generator, holes, broken), shape[-1]

    name = _named('loss', shape, holes, broken)
    return Case('distill', name, topk_loss_forward, ops.topk_loss_forward_torch, make, tolerance=SUMS, work=work)


def backward(*shape, holes=False, broken=False, work=''):
    "The gradient of such a loss, from the reference's own forward pass"

    def make(dtype, generator):
        draft, target = _pair(shape, dtype, generator, holes, broken)
        grad = torch.rand(len(draft), generator=generator) * 8 - 4
        return grad, draft, *ops.topk_loss_forward_torch(draft, target, shape[-1])[1:]

    name = _named('gradient', shape, holes, broken)
    return Case('distill', name, topk_loss_backward, ops.topk_loss_backward_torch, make, tolerance=ROUNDED, work=work)


SHAPES: list[tuple[tuple, dict]] = [
    ((0, 97, 1), {}),
    ((1, 97, 1), {}),
    ((5, 97, 10), {}),
    ((1, 2049, 10), {}),
    ((5, 2049, 64), dict(holes=True)),
    ((5, 4099, 10), dict(holes=True)),
    ((33, 4099, 10), dict(holes=True, broken=True)),
    ((41, 97, 10), {}),
    ((1, 49152, 10), {}),
    ((8, 49152, 10), dict(work='distillation, 8 rows of 49,152 logits')),
]
CASES = [make(*shape, **special) for make in (forward, backward) for shape, special in SHAPES]


def random_case(draw):
    "Draw a loss or a gradient"
    from hypothesis import strategies as st

    v = draw(st.integers(2, 5000))
    t = draw(st.integers(0, 45)) if v < 500 else draw(st.integers(2, 4))
    make = draw(st.sampled_from([forward, backward]))
    k = draw(st.integers(1, min(v // 2, 64)))
    return make(t, v, k, holes=draw(st.booleans()), broken=t > 1 and draw(st.booleans()))


MUTANTS = [
    ("total = total * tl.exp(top - higher) +", "total = total +"),  # not rescaled
    ("tl.exp(x - higher)", "tl.exp(x - top)"),  # the block before's maximum
    ("stop = tl.minimum(v0 + part, v)\n        top", "stop = v0 + part\n        top"),  # reads behind the last row
    # padding counts as logits
    (
        "mask=vs < stop, other=-float('inf')).to(tl.float32)\n            higher",
        "mask=vs < stop, other=0.).to(tl.float32)\n            higher",
    ),
    ("top = -3.4028234663852886e38", "top = -float('inf')"),
    ("(tile // parts).to(tl.int64) * v", "(tile % parts).to(tl.int64) * v"),
    ("row_scale * tl.exp(x - row_lse)", "tl.exp(x - row_lse)"),
    (".to(out.dtype.element_ty), mask=vs < stop)", ".to(out.dtype.element_ty))"),  # writes into the next row
    ("scale = grad * top_p.sum(1)", "scale = grad"),
    ("scale[:, None] * top_q - grad[:, None] * top_p", "scale[:, None] * top_q"),
    ("return out.logsumexp(1)", "return out.amax(1)"),
    # an input is changed
    (
        'tl.store(out + tile, top + tl.log(total))',
        'tl.store(out + tile, top + tl.log(total)); tl.store(row + v0, top.to(logits.dtype.element_ty))',
    ),
]
