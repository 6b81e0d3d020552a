"Toy models whose linear layers are quantised: by layers of our own, which need no library, and by the libraries that are installed"

from importlib import import_module
import torch
import torch.nn.functional as F
from npu_lora_decoding.foundations.adapters import toy_model

WIDE = dict(hidden_size=64, intermediate_size=128, head_dim=16)


class Packed(torch.nn.Linear):
    "A linear layer whose weight is stored in bytes, one scale a row"

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.bias = linear.bias
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(whole, requires_grad=False)

    def whole(self):
        return self.weight.float() * self.scale

    def forward(self, x):
        return F.linear(x, self.whole().to(x.dtype), self.bias)

    forward.token_wise = True  # vouched for, as the layers of known libraries are


class RoundedInput(Packed):
    "The same with 8-bit activations, whose step is that of all rows"

    def forward(self, x):
        step = x.abs().amax().clamp(min=1e-6) / 127
        return super().forward((x / step).round() * step)

    forward.token_wise = True  # wrongly: what it rounds has to be found by the probe


class HalfOutput(Packed):
    "The same, which answers in bf16 whatever it is asked in"

    def forward(self, x):
        return super().forward(x).bfloat16()

    forward.token_wise = True


class OddKind(torch.nn.Module):
    "A quantised layer that does not derive from `torch.nn.Linear` and has no weight, as those of HQQ and AWQ"

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.register_buffer('bits', linear.weight.detach().half())

    def forward(self, x):
        return F.linear(x, self.bits.to(x.dtype))

    forward.token_wise = True


def swapped(make):
    "Return a toy model with `make(layer)` in place of every linear layer but the LM head"
    model = toy_model(**WIDE)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and path != 'lm_head':
            parent, _, name = path.rpartition('.')
            setattr(model.get_submodule(parent), name, make(layer))
    return model.eval()


def _torchao(config):
    quantization = import_module('torchao.quantization')
    model = toy_model(**WIDE)
    chosen = lambda m, path: isinstance(m, torch.nn.Linear) and 'lm_head' not in path
    quantization.quantize_(model, config(quantization), chosen)
    return model


def torchao_int8():
    return _torchao(lambda q: q.Int8WeightOnlyConfig())


def torchao_int4():
    return _torchao(lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.granularity.PerGroup(32)))


def torchao_int8_activations():
    return _torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig())


def hqq():
    quantize = import_module('hqq.core.quantize')
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    return swapped(lambda m: quantize.HQQLinear(m, config, compute_dtype=torch.float32, device='cpu'))


def bitsandbytes_4bit():
    bnb = import_module('bitsandbytes')

    def make(m):
        layer = bnb.nn.Linear4bit(m.in_features, m.out_features, bias=False, quant_type='nf4')
        layer.weight = bnb.nn.Params4bit(m.weight.data.clone(), requires_grad=False, quant_type='nf4')
        return layer.to('cpu')

    model = swapped(make)
    model.is_loaded_in_4bit = True
    return model


def bitsandbytes_8bit():
    bnb = import_module('bitsandbytes')

    def make(m):
        layer = bnb.nn.Linear8bitLt(m.in_features, m.out_features, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(m.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        return layer.to('cpu')

    model = swapped(make)
    model.is_loaded_in_8bit = True
    return model


BASES = {
    'weights in 8 bits': lambda: swapped(Packed),
    'the same, and rounded activations': lambda: swapped(RoundedInput),
    'the same, and another output type': lambda: swapped(HalfOutput),
    'torchao, int8 weights': torchao_int8,
    'torchao, int4 weights': torchao_int4,
    'torchao, int8 weights and activations': torchao_int8_activations,
    'HQQ, 4 bits': hqq,
    'bitsandbytes, 4 bits': bitsandbytes_4bit,
    'bitsandbytes, 8 bits': bitsandbytes_8bit,
}
LIBRARIES = (torchao_int8, torchao_int4, torchao_int8_activations, hqq, bitsandbytes_4bit, bitsandbytes_8bit)
