"What the stand-in finds, as JSON: reads by the host, each by its kind, and tensors of two devices in one operator"

import json
import torch, torch_npu
from transformers import StoppingCriteria
from npu_lora_decoding.decoding.sampling import Plain
from npu_lora_decoding.foundations.devices import generator, get_device
import ways

READS = {
    'item': lambda x: x.sum().item(),
    'bool': lambda x: bool(x.any()),
    'int': lambda x: int(x.sum()),
    'tolist': lambda x: x.tolist(),
    'cpu': lambda x: x.cpu(),
    'numpy': lambda x: x.cpu().numpy(),
    'to': lambda x: x.to('cpu'),
    'nonzero': lambda x: x.nonzero(),
    'mask': lambda x: x[x > 0],
    'equal': lambda x: torch.equal(x, x),
    'unique': lambda x: x.unique(),
    'synchronize': lambda x: torch.npu.synchronize(),
}
SILENT = {
    'product': lambda x: x[:, None] @ x[None],
    'in place': lambda x: x.add_(1).masked_fill_(x > 2, 0),
    'scalar': lambda x: x * torch.tensor(2),
    'upload': lambda x: x + torch.arange(3).to(x.device),
    'view': lambda x: x.view(1, 3).mT[1:].flatten(),
}
MIXED = {
    'add': lambda x: x + torch.ones(3),
    'cat': lambda x: torch.cat([x, torch.ones(3)]),
    'where': lambda x: torch.where(x > 0, x, torch.ones(3)),
    'draw': lambda x: torch.multinomial(x, 1, generator=generator(0)),
}


def reads(f):
    "Return how often a function makes the host read a value"
    x = torch.arange(1.0, 4.0, device='npu')
    torch_npu.reads.clear()
    f(x)
    return sum(torch_npu.reads.values())


def error(f):
    "Return the message of the error that a function raises; None without any"
    try:
        f(torch.ones(3, device='npu'))
    except RuntimeError as e:
        return str(e).partition('\n')[0]


class Reads(StoppingCriteria):
    "A planted bug: it reads one value of every text"

    def __call__(self, ids, scores, **kw):
        return torch.full((len(ids),), ids.to('npu').sum().item() < 0, device=ids.device)


class Strays(Plain):
    "A planted bug: a tensor of the CPU among those of the device"

    def select(self, expert, base=None):
        return super().select(expert + torch.zeros(expert.shape), base)


def draws():
    "Return draws with a generator of the device, twice from one seed, and once more"
    p = torch.full((50,), 0.02, device='npu')
    found = [torch.multinomial(p, 8, True, generator=g).tolist() for g in (generator(1, 'npu'), generator(1, 'npu'))]
    g = generator(1, 'npu')
    return [*found, *(torch.multinomial(p, 8, True, generator=g).tolist() for _ in range(2))]


def loop():
    "Return what is found of bugs that are planted in decoding"
    lm = ways.language_model('npu')
    sites = ways.generate(lm, stopping_criteria=[Reads()])[1]
    try:
        ways.generate(lm, target=Strays())
        stray = None
    except RuntimeError as e:
        stray = str(e).partition('\n')[0]
    return dict(reads=sites.reads, passes=sites.passes, stray=stray)


if __name__ == '__main__':
    found = dict(device=str(get_device()), draws=draws(), loop=loop())
    found['reads'] = {name: reads(f) for name, f in READS.items()}
    found['silent'] = {name: reads(f) for name, f in SILENT.items()}
    found['mixed'] = {name: error(f) for name, f in MIXED.items()}
    print(json.dumps(found))
