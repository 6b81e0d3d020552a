"What a computation copies of a model's weights, counted and not timed"

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_COPIES = {
    torch.ops.aten.clone,
    torch.ops.aten._to_copy,
    torch.ops.aten.copy_,
    torch.ops.aten.repeat,
    torch.ops.aten.cat,
}
_BATCHED = {torch.ops.aten.bmm, torch.ops.aten.baddbmm}


def _bytes(x):
    return x.numel() * x.element_size()


class WeightCopies(TorchDispatchMode):
    """Sums the bytes of weights that are materialised inside the block

    A batched product with a weight counts: bf16 ones copy the expanded weight, fp32 ones read it once for every row.
    """

    def __init__(self, *weights):
        super().__init__()
        self.places = {w.untyped_storage().data_ptr() for w in weights}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        operands = [x for x in _flat(args) if isinstance(x, torch.Tensor) and self._is_weight(x)]
        if packet in _BATCHED:
            self.bytes += sum(map(_bytes, operands))
        elif packet in _COPIES and operands:
            self.bytes += _bytes(out)
        return out

    def _is_weight(self, x):
        return x.layout == torch.strided and x.untyped_storage().data_ptr() in self.places


def _flat(args):
    for x in args:
        yield from _flat(x) if isinstance(x, (list, tuple)) else [x]


def of_model(model):
    "Return a counter of all weights of a model"
    return WeightCopies(*model.parameters())
