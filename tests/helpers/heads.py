"Toy draft heads, and what they are trained on"

import os, sys, torch
from accelerate import Accelerator
from dataclasses import replace
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.hass.acceptance import Text
from npu_lora_decoding.hass.chat_data import Example
from npu_lora_decoding.hass.config import HeadTraining
from npu_lora_decoding.hass.features import OnlineFeatures
from npu_lora_decoding.hass.draft_adapter import draft_layers
from npu_lora_decoding.hass.head import DraftHead, head_config
from npu_lora_decoding.hass.train import start_run, train
from npu_lora_decoding.foundations import files
from npu_lora_decoding.foundations.adapters import Adapter, LoraWeights
from helpers.toys import toy_lm


def random_head(lm, bias=False, seed=0, vocab=None, round=True):
    "A head with random weights everywhere, norms and biases too, at a scale at which every part counts"
    head = DraftHead(head_config(lm.model.config), fc_bias=bias).requires_grad_(False)
    g = generator(seed)
    for p in head.parameters():
        x = torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 1.0)
        p.copy_(x.bfloat16() if round else x)
    if vocab:
        head.vocab = torch.randperm(76, generator=g)[:vocab]
        head.counts = torch.arange(vocab, 0, -1)
    return head


LENGTHS = (9, 1, 5, 14, 2, 7, 7, 3)


def examples_of(lengths=LENGTHS, seed=0, v=76):
    "Random texts whose second half is an answer"
    g = generator(seed)
    return [Example(torch.randint(3, v, (n,), generator=g), torch.arange(n) >= n // 2) for n in lengths]


CONFIG = HeadTraining(
    steps=9,
    tokens=120,
    alignment_steps=2,
    precision='no',
    warmup=0.3,
    noise=0.1,
    k=5,
    save_every=2,
    eval_every=4,
    lr=3e-3,
)


def toy_examples(n=14, seed=0):
    "Random texts of 8 to 24 tokens, the first 4 of them a prompt"
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 97, (int(torch.randint(8, 25, (), generator=g)),), generator=g) for _ in range(n)]
    return [Example(x, torch.arange(len(x)) >= 4) for x in ids]


class Kept(OnlineFeatures):
    "The same, but the target reads every text once only"

    def __init__(self, lm, examples):
        super().__init__(lm, examples)
        self.rows = [super(Kept, self).read([i])[0] for i in range(len(examples))]

    def read(self, numbers):
        return [self.rows[i] for i in numbers]


LM = toy_lm()

STORE = Kept(LM, toy_examples())

TEXTS = [Text(ids, 4, f) for ids, _, f in STORE.rows[:3]]


def begin(folder, config=CONFIG, store=STORE, **options):
    return start_run(LM, store, folder, config, data='toy', **options)


# a batch of 30 tokens is a single row
CASES = dict(
    texts=CONFIG,
    packed=replace(CONFIG, row=48, noise=0.0, alignment_steps=3),
    lonely=replace(CONFIG, tokens=30, optimizer='adamw', eval_every=3),
    drawn=replace(CONFIG, alignment_steps=3, sample_one_step=True, cache_targets=True),
)


def noting(run):
    "Return a list that gets the norm of every step's gradient before it is clipped: Muon, AdamW and clipping all hide its size"
    norms = []
    clip = Accelerator.clip_grad_norm_

    def noted(params, size):
        norms.append(clip(run.accelerator, params, size))
        return norms[-1]

    run.accelerator.clip_grad_norm_ = noted
    return norms


def child(folder, config, die=None, before=False):
    "Train; before or after the `die`th write comes into its place be gone, as kill -9 does it: nothing is tidied up"
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, 'w')
    real = files._publish
    count = []

    def published(*args):
        count.append(args)
        if len(count) == die and before:
            os._exit(77)
        real(*args)
        if len(count) == die:
            os._exit(77)

    if die:
        files._publish = published
    train(begin(folder, config), TEXTS)


def draft_adapter(head, seed=0, rank=3, size=0.5):
    "A random draft adapter at a scale at which it changes what is drafted"
    g = generator(seed)
    layers = {}
    for path, layer in draft_layers(head).items():
        A = torch.randn(rank, layer.in_features, generator=g) * layer.in_features**-0.5
        B = torch.randn(layer.out_features, rank, generator=g) * layer.out_features**-0.5
        layers[path] = LoraWeights(A, B, size)
    return Adapter(f'draft {seed}', layers)
