"Toys and checks of the decoding loop that several tests share"

import math, npu_lora_decoding.decoding.runner as rows_module, pytest, torch
from dataclasses import dataclass
from itertools import product
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding.loop import Decoder
from npu_lora_decoding.decoding.sampling import Plain
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.hass.checkpoint import save_head
from npu_lora_decoding.hass.head import DraftHead, head_config
from npu_lora_decoding.speculation import adaptive, compiled_draft
from npu_lora_decoding.foundations import programs
from transformers import StoppingCriteria

N = 10


def generate(model, ids, mask, decoder=None, seed=0, **kw):
    "Call transformers' generate, with or without our loop, from one state of the global generator"
    kw = dict(max_new_tokens=N, do_sample=False, eos_token_id=None, pad_token_id=0) | kw
    if decoder is not None:
        kw['custom_generate'] = decoder
    torch.manual_seed(seed)
    return model.generate(input_ids=ids, attention_mask=mask, **kw)


def same(a, b):
    assert a.shape == b.shape and torch.equal(a, b), f'\n{a}\n{b}'


class EndsOn(StoppingCriteria):
    "Ends a sequence after any of these tokens"

    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)
        self.calls = 0

    def __call__(self, ids, scores, **kw):
        self.calls += 1
        return torch.isin(ids[:, -1], self.tokens)


class Pair(StoppingCriteria):
    "Ends a sequence whose last two tokens are one of these pairs"

    def __init__(self, pairs):
        self.pairs = pairs

    def __call__(self, ids, scores, **kw):
        return torch.tensor([tuple(r[-2:].tolist()) in self.pairs for r in ids])


def exported(f, inputs, about):
    "Return a function as `program_of` records it, without compiling the record"
    record = torch.export.export(programs._Module(f), tuple(x.detach() for x in inputs), strict=False).module()
    return programs._uncompiled(record)


def uncompiled(monkeypatch):
    "Let the static path run without its compiler: layers and drafts as functions of all their tensors"
    monkeypatch.setattr(ops, 'compiles', lambda device=None: True)
    monkeypatch.setattr(rows_module, '_compiled_step', rows_module._step)
    monkeypatch.setattr(rows_module, '_compiled_step_hidden', rows_module._step_hidden)
    for module in (programs, compiled_draft):
        monkeypatch.setattr(module, 'program_of', lambda f, inputs, about: programs._uncompiled(f))


def eager_dynamo(monkeypatch):
    "torch.compile's tracing and guards without its slow code generation, for whole models"
    monkeypatch.setattr(rows_module, 'layer_programs', lambda model: None)
    torch._dynamo.reset()
    monkeypatch.setattr(ops, 'compiles', lambda device=None: True)
    monkeypatch.setattr(
        rows_module, '_compiled_step', torch.compile(rows_module._step, dynamic=False, fullgraph=True, backend='eager')
    )


PLAIN = Plain()
COLD = CoLD(0.05, 1.0)


@dataclass
class Toy:
    "A target that mostly goes by its last token, so that a head which knows that is often right and sometimes wrong"

    model: object
    head: DraftHead
    folder: object
    bank: AdapterBank


def calm_model(family='llama', by=0.07, **config):
    "A toy that mostly goes by its last token"
    model = toy_model(family, **config)
    for l in model.model.layers:
        l.self_attn.o_proj.weight.mul_(by)
        l.mlp.down_proj.weight.mul_(by)
    return model


def knowing_head(model, vocab=None, noise=1.0):
    "A head that knows what a calm model goes by, more or less"
    head = DraftHead(head_config(model.config)).requires_grad_(False)
    g = generator(0)
    for p in head.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
    head.fc.weight.mul_(0.2 * noise)
    head.fc.weight[:, :32] += 3 * torch.eye(32)
    head.layers[0].self_attn.o_proj.weight.mul_(0.1 * noise)
    head.layers[0].mlp.down_proj.weight.mul_(0.1 * noise)
    for p in head.parameters():
        p.copy_(p.bfloat16())  # what the file can hold
    if vocab is not None:
        head.vocab = torch.tensor(vocab)
    return head


def toy(tmp, family='llama', v=23, context=256, seed=0, vocab=None):
    model = calm_model(family, vocab=v, context=context, seed=seed)
    head = knowing_head(model, vocab)
    bank = AdapterBank(model, [load_adapter(toy_adapter(model, tmp / 'adapter', lora_alpha=1), model)], ops.lora)
    return Toy(model, head, save_head(head, tmp / 'head', model), bank)


def count_drafted(out):
    return sum(x.proposer != 'target' for s in out.steps for r in s.tokens for x in r)


class Collects:
    "A streamer that keeps what it is given"

    def __init__(self):
        self.got = []

    def put(self, x):
        self.got.append(x.flatten().tolist())

    def end(self):
        self.got.append('end')


def exact(t, target, prompt, n, process=lambda texts, scores: scores):
    "Probability of each continuation of `n` tokens `(v,) * n`; `process` is what is done to the scores before the draw"
    v = t.model.config.vocab_size
    p = torch.ones((), dtype=torch.float64)
    for k in range(n):
        texts = torch.tensor([[*prompt, *c] for c in product(range(v), repeat=k)])
        with torch.no_grad():
            if target == PLAIN:
                scores = t.model(texts).logits[:, -1]
            else:
                with t.bank.attached([0] * len(texts)):
                    e = t.model(texts).logits[:, -1]
                with t.bank.attached([-1] * len(texts)):
                    a = t.model(texts).logits[:, -1]
                scores = target.combine(e, a)
        p = p[..., None] * process(texts, scores).double().softmax(-1).view(*[v] * k, v)
    return p


def chi_square(counts, p, runs):
    "The statistic, and its 99.99% point (Wilson-Hilferty); cells with few expected runs are taken together"
    counts = counts.flatten().double()
    want = p.flatten() * runs
    assert not counts[want == 0].any()  # implausible tokens are never drawn
    big = want >= 5
    c, w = (torch.cat([x[big], x[~big].sum()[None]]) for x in (counts, want))
    c, w = (c, w) if w[-1] >= 5 else (c[:-1], w[:-1])
    k = len(c) - 1
    return float(((c - w) ** 2 / w).sum()), k * (1 - 2 / (9 * k) + 3.72 * math.sqrt(2 / (9 * k))) ** 3


# --- fixtures: a test module that imports their names has them


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    return toy(tmp_path_factory.mktemp('llama'))


@pytest.fixture(autouse=True)
def paying(monkeypatch):
    "Costs at which every draft token pays, so that trees do not depend on the machine"
    monkeypatch.setattr(adaptive, 'pass_seconds', lambda rows, sizes: {n: 1e3 + n for n in sizes})


@pytest.fixture(params=['growing', 'static'])
def rows(request, monkeypatch):
    "Options of the Decoder for each kind of cache; the static one without its compiler"
    uncompiled(monkeypatch)
    return dict(compile=request.param == 'static')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    t = toy(tmp_path_factory.mktemp('small'), v=4)
    t.model.lm_head.weight.mul_(0.25)  # more than one token is likely
    save_head(t.head, t.folder, t.model)  # the fingerprint of the model as it is now
    return t


def sampled(t, target, drafter, runs, n=3, batch=250, process=lambda texts, scores: scores, rows={}, **kw):
    "Counts of the continuations of one prompt, their probabilities, and how many draft tokens were accepted"
    v = t.model.config.vocab_size
    prompt = [3, 1, 2]
    counts = 0
    hits = 0
    ids = torch.tensor([prompt]).repeat(batch, 1)
    for i in range(runs // batch):
        out = generate(
            t.model,
            ids,
            torch.ones_like(ids),
            Decoder(target, drafter, bank=None if target == PLAIN else t.bank, record=False, **rows),
            seed=i,
            **dict(max_new_tokens=n, do_sample=True, top_k=0, return_dict_in_generate=True) | kw,
        )
        code = (out.sequences[:, 3:] * v ** torch.arange(n - 1, -1, -1)).sum(-1)
        counts = counts + torch.bincount(code, minlength=v**n)
        hits = hits + count_drafted(out)
    return counts, exact(t, target, prompt, n, process), hits
