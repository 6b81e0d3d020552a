"""Every combination of target, drafter and memory through the one loop

A valid one generates what a naive loop generates, token by token, and another is refused by a sentence before any forward pass.
Five factors are multiplied out, the options around them are covered by pairs. `python tests/test_matrix.py` prints what was
covered as Markdown.
"""

import contextlib, io, random, sys, tempfile, time
from collections import Counter, namedtuple
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import combinations, product, zip_longest
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
import pytest, torch
from tokenizers.decoders import Fuse
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)
import npu_lora_decoding.decoding.runner as rows_module
import npu_lora_decoding.speculation.adaptive as sizing
from npu_lora_decoding.foundations import ops, programs
from npu_lora_decoding.speculation import compiled_draft
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding.sampling import Plain, sequence_key
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.decoding.loop import Decoder
from npu_lora_decoding.hass.checkpoint import load_head, save_head
from npu_lora_decoding.hass.draft_adapter import DraftAdapter, adapter_fingerprint, save_draft_adapter
from npu_lora_decoding.speculation.joint import JointDrafter
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.decoding.loop import LM
from npu_lora_decoding.speculation.head_drafter import HASS
from npu_lora_decoding.temp_lora.generation import TempLoRA
from npu_lora_decoding.temp_lora.adapter import learn, temporary
from npu_lora_decoding.temp_lora.generation import repetition
from helpers.loops import Pair, eager_dynamo

# `small` is a fixture
from helpers.loops import Collects, calm_model, chi_square, exact, count_drafted, knowing_head, sampled, small
from helpers.heads import draft_adapter
from helpers.memories import traces
from helpers.toys import toy_tokenizer

# new tokens; how near two scores may lie to be confused, and how far log-probabilities may be off (fp32, sums in
# another order)
N = 14
SEED = 3  # of the noise
TIE = 1e-4

# --- the factors; the first value of each is its default

TARGETS = dict(
    plain=Plain(),
    cold=CoLD(0.05, 1.0),
    still=CoLD(0.1, 0.0),
    back=CoLD(0.1, -0.7),
    one=CoLD(1.0, 3.0),
    all=CoLD(1e-9, 0.4),
    each=CoLD((0.05, 0.1, 0.3), (1.0, 0.0, -0.7)),
)
DRAFTERS = ('none', 'lookup', 'chain', 'chain cut', 'tree', 'tree cut', 'joined')
WRITES = TempLoRA(chunk=6, window=18, context=6, train_context=6, epochs=1, warmup=1, r=2, alpha=2.0, lr=0.03)
MEMORIES = dict(
    none=None,
    roomy=replace(WRITES, window=200, context=190, lr=0.0),
    tight=replace(WRITES, lr=0.0),
    window=WRITES,
    chunk=replace(WRITES, recompute='chunk'),
    every=replace(WRITES, recompute='every:2', context=3),
    drift=replace(WRITES, recompute='drift:1e-4', train_context=9),
    slide=replace(WRITES, recompute='slide:1'),
    wide=replace(WRITES, window=999),
)
FAMILIES = dict(
    llama=('llama', {}),
    mha=('llama', dict(num_key_value_heads=4, tie_word_embeddings=True)),
    mistral=('mistral', dict(sliding_window=6)),
    qwen2=('qwen2', dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    qwen3=('qwen3', dict(tie_word_embeddings=True)),
    gemma2=('gemma2', dict(sliding_window=6)),
    wide=('llama', dict(vocab=80)),
)
# how much the layers of a toy count, where tied embeddings would only repeat the last token
BY = dict(mha=0.2, qwen3=0.2, gemma2=1.0)
ENTRIES = ('decoder', 'decoder, no adapter', 'lm', 'lm, no adapter', 'peft', 'peft, off', 'peft, merged')
# beyond the first: what is not supported
ASKS = ('nothing', 'beams', 'scores', 'guidance', 'contrastive search', 'filled cache', 'flex attention', 'max_length')

FACTORS = dict(
    target=tuple(TARGETS),
    drafter=DRAFTERS,
    memory=tuple(MEMORIES),
    batch=('one', 'padded', 'three'),
    cache=('growing', 'static'),
    entry=ENTRIES,
    family=tuple(FAMILIES),
    amateur=('base', 'task', 'phi'),
    max_repetition=(1.0, 0.05),
    sizing=('pays', 'loses', 'fixed'),
    how=('greedy', 'draws', 'top_p', 'min_p', 'seed'),
    rules=('none', 'penalty', 'n-grams', 'banned', 'grammar'),
    ends=('length', 'eos', 'strings', 'pair', 'one'),
    stream=('no', 'text', 'tokens'),
    record=(True, False),
    attention=('own', 'eager'),
    ask=ASKS,
    draft_adapter=('none', 'trained'),
)
# multiplied out
CORE = dict(
    target=('plain', 'cold', 'back', 'one', 'each'),
    drafter=('none', 'lookup', 'chain', 'tree', 'tree cut', 'joined'),
    memory=tuple(MEMORIES),
    batch=FACTORS['batch'],
    cache=FACTORS['cache'],
)
Case = namedtuple('Case', FACTORS, defaults=[v[0] for v in FACTORS.values()])


def cold(c):
    return 'base' in TARGETS[c.target].roles


def adapted(c):
    return c.entry in ('decoder', 'lm', 'peft')


def headed(c):
    return c.drafter not in ('none', 'lookup')


def of_lm(c):
    return c.entry.startswith('lm')


def outside(c):
    "Whether a case is not a part of the product: lm.generate pads batches only, and some wishes are granted in plain decoding"
    return (
        of_lm(c)
        and c.batch == 'padded'
        or c.ask == 'max_length'
        and not of_lm(c)
        or c.ask == 'flex attention'
        and c.drafter == 'none'
        or c.ask == 'guidance'
        and not cold(c)
        and c.drafter == c.memory == 'none'
        or c.draft_adapter != 'none'
        and not headed(c)
    )


REFUSED = {  # a part of the sentence -> when it, or another that holds as well, is reported
    'only one answer can be streamed': lambda c: c.stream == 'text' and c.batch == 'three',
    'give max_new_tokens': lambda c: c.ask == 'max_length',
    'use beam_search of': lambda c: c.ask == 'beams' and of_lm(c),
    'beam search cannot be combined': lambda c: c.ask == 'beams' and not of_lm(c),
    'does not return scores': lambda c: c.ask == 'scores',
    'passes of its own': lambda c: c.ask == 'guidance',
    'leave penalty_alpha': lambda c: c.ask == 'contrastive search',
    'continue from a filled cache': lambda c: c.ask == 'filled cache' and not c.entry.startswith('lm'),
    'sets past_key_values itself': lambda c: c.ask == 'filled cache' and c.entry.startswith('lm'),
    'trees need a mask': lambda c: c.ask == 'flex attention',
    'values of alpha or beta': lambda c: c.target == 'each' and c.batch != 'three',
    'there is no adapter': lambda c: cold(c) and c.memory == 'none' and c.entry.endswith(('no adapter', 'off')),
    'merged into the weights': lambda c: c.entry == 'peft, merged' and (cold(c) or c.memory != 'none'),
    'a head for another model': lambda c: headed(c) and (c.entry == 'peft, merged' or c.family == 'gemma2'),
    'learns one document': lambda c: c.memory != 'none' and c.batch == 'three',
    'the prompt is padded': lambda c: c.memory != 'none' and c.batch == 'padded',
    'decode with compile=False': lambda c: c.memory != 'none' and c.cache == 'static',
    'slide is for reading': lambda c: c.memory == 'slide',
    'choose a smaller window': lambda c: c.memory == 'wide',
    'needs layers that see the window of': lambda c: c.memory == 'drift' and 'sliding_window' in FAMILIES[c.family][1],
    'the draft adapter': lambda c: c.draft_adapter != 'none' and headed(c) and not adapted(c),
    'needs a task adapter': lambda c: c.memory != 'none' and c.amateur != 'base' and cold(c) and not adapted(c),
}


def refusals(c):
    return [sentence for sentence, when in REFUSED.items() if when(c)]


# --- what is decoded


def prompts(lengths):
    t = max(lengths)
    mask = torch.stack([(torch.arange(t) >= t - n).long() for n in lengths])
    return torch.randint(4, 76, mask.shape, generator=generator(3)) * mask, mask


_PROMPTS = dict(one=prompts((9,)), padded=tuple(x[1:] for x in prompts((9, 7))), three=prompts((9, 5, 2)))
TMP = tempfile.TemporaryDirectory()


class Subject:
    "A toy of one family, in every form that it is called in"

    def __init__(self, family):
        kind, config = FAMILIES[family]
        self.folder = Path(TMP.name) / family
        self.model = calm_model(kind, BY.get(family, 0.04), seed=1, **dict(vocab=76) | config)
        self.family = family
        self.model.generation_config.eos_token_id = None
        self.adapter = load_adapter(toy_adapter(self.model, self.folder / 'adapter', lora_alpha=1), self.model)
        self.bank = AdapterBank(self.model, [self.adapter], ops.lora)
        self.tokenizer = toy_tokenizer()
        self._drafters = {}
        self.tokenizer.backend_tokenizer.decoder = Fuse()  # stop strings want text without spaces between its tokens
        self.lm, self.bare_lm = LM(self.model, self.tokenizer, self.adapter, 'toy'), LM(
            self.model, self.tokenizer, None, 'toy'
        )

    @cached_property
    def peft(self):
        import copy
        from peft import PeftModel

        out = PeftModel.from_pretrained(copy.deepcopy(self.model), self.folder / 'adapter').eval()
        with out.disable_adapter():
            pass  # PEFT sets flags when it switches back on
        return out

    @cached_property
    def merged(self):
        import copy

        out = copy.deepcopy(self.peft)
        out.merge_adapter()
        return out

    def called(self, c):
        return self.merged if c.entry == 'peft, merged' else self.peft if c.entry.startswith('peft') else self.model

    def bare(self, c):
        return m.base_model.model if (m := self.called(c)) is not self.model else m

    @cached_property
    def heads(self):
        few = torch.randperm(76, generator=generator(1))[:50].tolist()
        return {
            cut: save_head(knowing_head(self.model, few if cut else None, 0.3), self.folder / f'head{cut}', self.model)
            for cut in (False, True)
        }

    @cached_property
    def drafts(self):
        "Draft adapters on the heads, for the adapter: random ones, which change what is drafted"
        found = {}
        for cut, folder in self.heads.items():
            head = load_head(folder, self.model)
            draft = DraftAdapter(draft_adapter(head, size=1.0), adapter_fingerprint(self.adapter))
            found[cut] = save_draft_adapter(draft, self.folder / f'draft{cut}', head, torch.float32)
        return found

    def drafter(self, c):
        "One object serves all texts of a model"
        key = (
            c.drafter,
            c.sizing == 'fixed',
            c.entry in ('peft, merged',),
            c.entry.startswith('peft'),
            c.draft_adapter,
        )
        if c.drafter != 'none' and key not in self._drafters:
            adaptive = c.sizing != 'fixed'
            lookup = PromptLookup(
                min_ngram=1, draft_tokens=4, corpus=[naive(Case(family=self.family))[0][0]], adaptive=adaptive
            )
            # this family has no heads
            owner = subject('llama' if self.family == 'gemma2' else self.family)
            is_cut = 'cut' in c.drafter
            draft = owner.drafts[is_cut] if c.draft_adapter != 'none' and headed(c) else None
            size = dict(depth=3, top_k=3, nodes=7, adaptive=adaptive)
            hass = HASS(owner.heads[is_cut], chain='chain' in c.drafter, adapter=draft, **size)
            self._drafters[key] = (
                lookup
                if c.drafter == 'lookup'
                else hass if c.drafter != 'joined' else JointDrafter((hass, lookup), nodes=7, adaptive=adaptive)
            )
        return self._drafters.get(key)


@lru_cache(None)
def subject(family):
    return Subject(family)


class Draws:
    "Adds Gumbel noise that depends on the text alone: the best of the noisy scores is a draw, and the same draw whoever drafted it"

    before_contrast = False
    keeps_state = False
    known = {}

    def noise(self, text, v):
        if (text, v) not in self.known:
            self.known[text, v] = -(-torch.rand(v, generator=generator(hash(text) % 2**31)).log()).log()
        return self.known[text, v]

    def __call__(self, text, scores):
        return scores + torch.stack([self.noise(tuple(t), scores.shape[-1]) for t in text.tolist()])


HOW = dict(
    draws=[TemperatureLogitsWarper(1.3), Draws()],
    top_p=[TemperatureLogitsWarper(1.3), TopPLogitsWarper(0.8), Draws()],
    min_p=[TemperatureLogitsWarper(1.3), MinPLogitsWarper(0.1), Draws()],
)


def grammar(b, text):
    return [t for t in range(4, 76) if (t + b) % 3 != len(text) % 3]


def batch(c):
    return _PROMPTS[c.batch]


def free(c):
    return naive(c._replace(ends='length'))  # what would be generated: shows where to end, and what to ban


def banned(c):
    if refusals(c):
        return [[5], [6, 7]]
    written = naive(c._replace(ends='length', rules='none'))[0][0]
    return [[written[2]], written[5:7]]


def constraints(c):
    "Return the arguments of transformers, and the same as processors: before the contrast, and after it"
    if c.rules == 'penalty':
        return dict(repetition_penalty=1.3), [], [RepetitionPenaltyLogitsProcessor(1.3)]
    if c.rules == 'n-grams':
        return dict(no_repeat_ngram_size=2), [NoRepeatNGramLogitsProcessor(2)], []
    if c.rules == 'banned':
        return dict(bad_words_ids=banned(c)), [NoBadWordsLogitsProcessor(banned(c))], []
    if c.rules == 'grammar':
        return dict(prefix_allowed_tokens_fn=grammar), [], []
    return {}, [], []


def endings(c):
    "Return the end tokens, stop strings and pairs of tokens that end a text, and how long it may become"
    if refusals(c):
        written = [[5] * 10]
    else:
        written = [] if c.ends in ('length', 'one') else [x[0] for x in free(c)]
    eos = [written[0][6], written[-1][3], 75] if c.ends == 'eos' else []
    words = (
        [subject(c.family).tokenizer.decode(written[0][5:7]), subject(c.family).tokenizer.decode(written[-1][8:9])]
        if c.ends == 'strings'
        else []
    )
    return (
        eos,
        [w for w in words if w],
        [tuple(t[k : k + 2]) for k, t in zip((4, 7, 9), written)] if c.ends == 'pair' else [],
        1 if c.ends == 'one' else N,
    )


# --- a loop without rows, trees and marks: every sequence alone, one cache a role, one token a forward pass


class Naive:
    def __init__(self, c, b):
        ids, mask = batch(c)
        self.c = c
        self.b = b
        self.model = subject(c.family).bare(c)
        self.padded = ids[b]
        self.target = TARGETS[c.target].of(b)
        self.text = ids[b, mask[b].bool()]
        self.given = int(mask[b].sum())
        self.learned = 0
        self.first = 0
        self.served = 1
        memory = MEMORIES[c.memory]
        self.memory = memory and replace(memory, amateur=c.amateur, max_repetition=c.max_repetition)
        self.learns = self.memory is not None and self.memory.lr > 0
        s = subject(c.family)
        self.task = s.adapter if adapted(c) else None
        if c.entry.startswith('peft'):
            self.model = self.model if c.entry == 'peft, merged' else s.model
        self.bank, self.ids = (s.bank if self.task else AdapterBank(self.model, [])), dict(
            expert=0 if self.task else -1, base=0 if self.memory and c.amateur == 'task' and self.task else -1
        )
        self.vocab = len(s.tokenizer) if of_lm(c) and cold(c) else None

    def write(self):
        "Return the tokens, how far the two best scores of each lay apart, and what expert and base thought of it"
        names = ('expert', *((self.c.amateur,) if cold(self.c) and self.c.amateur != 'base' else ()))
        with (
            temporary(self.model, self.memory, self.task, names) if self.learns else contextlib.nullcontext()
        ) as self.phi:
            if self.learns:
                self.bank = self.phi.bank
                self.ids = dict(expert=0, base=len(names) - 1 or -1)
            self.learn()
            self.begin(len(self.text))
            eos, words, pairs, n = endings(self.c)
            stop = ([StopStringCriteria(subject(self.c.family).tokenizer, words)] if words else []) + [Pair(set(pairs))]
            written = []
            while True:
                written.append(self.next())
                self.text, self.padded = (
                    torch.cat([x, x.new_tensor([written[-1][0]])]) for x in (self.text, self.padded)
                )
                if len(written) == n or written[-1][0] in eos or any(f(self.padded[None], None).item() for f in stop):
                    break
                if self.learn():
                    self.begin(len(self.text) - 1)
                self.feed(self.text[-1:])
        return [list(x) for x in zip(*written)]

    def learn(self):
        "Learn what is complete; return whether the cache is to be recomputed"
        if self.memory is None:
            return False
        m = self.memory
        new = False
        complete = len(self.text) - self.learned >= self.memory.chunk
        every = dict(chunk=1, every=2).get(m.recompute.partition(':')[0])
        while len(self.text) - self.learned >= m.chunk:
            stop = self.learned + m.chunk
            if self.learns and repetition(self.text[max(self.learned, self.given) : stop]) <= m.max_repetition:
                learn(self.phi, self.text[max(0, self.learned - m.train_context) : stop], m.chunk)
                new = True
            self.learned = stop
        if not complete:
            return False
        due = self.learned - self.first + m.chunk > m.window or self.served == every or 'drift' in m.recompute and new
        if due or len(self.text) == self.given:
            self.first = max(0, self.learned - m.latest)
            self.served = 1
        else:
            self.served += 1
        return due

    def begin(self, stop):
        self.caches = {role: DynamicCache(config=self.model.config) for role in self.target.roles}
        if stop > self.first:
            self.feed(self.text[self.first : stop])

    def feed(self, tokens):
        self.logits = {}
        for role, cache in self.caches.items():
            with torch.no_grad(), self.bank.attached([self.ids[role]]):
                self.logits[role] = self.model(input_ids=tokens[None], past_key_values=cache).logits[0, -1:].float()

    def noise(self, v):
        "The noise of the next token, from the prompt alone"
        key = torch.tensor(sequence_key(SEED, 0, self.text[: self.given]), dtype=torch.int32)
        return ops.gumbel(ops.position_keys(key, torch.tensor([len(self.text) - self.given])), v)

    def next(self):
        e = self.logits['expert'].clone()
        text = self.padded[None]
        target = self.target
        _, hard, soft = constraints(self.c)
        if self.vocab:
            e[:, self.vocab :] = -torch.inf
        for p in hard:
            e = p(text, e)
        if self.c.rules == 'grammar':
            e = torch.full_like(e, -torch.inf).index_copy(1, torch.tensor(k := grammar(self.b, self.padded)), e[:, k])
        expert = e
        if cold(self.c):
            e = torch.where(
                e >= torch.tensor(target.alpha).log() + e.max(), e + target.beta * (e - self.logits['base']), -torch.inf
            )
        for p in [*soft, *HOW.get(self.c.how, [])]:
            e = p(text, e)
        if self.c.how == 'seed':
            e = TemperatureLogitsWarper(1.3)(text, e) + self.noise(e.shape[-1])
        top, second = e[0].topk(2).values.tolist()
        token = int(e[0].argmax())
        return (
            token,
            top - second,
            *(float(x[0].log_softmax(-1)[token]) for x in (expert, self.logits.get('base', expert))),
        )


def distinguished(c):
    "Return the case without what a naive loop does not know"
    drop = {
        k: FACTORS[k][0]
        for k in ('drafter', 'cache', 'sizing', 'stream', 'record', 'ask', 'attention', 'draft_adapter')
    }
    if c.memory == 'roomy' and (not cold(c) or c.amateur == 'base' and adapted(c)):
        drop |= dict(memory='none')  # learns nothing and sees everything
    memory = drop.get('memory', c.memory)
    if memory == 'none' or not cold(c):
        drop |= dict(amateur='base')
    if memory in ('none', 'roomy', 'tight'):
        drop |= dict(max_repetition=1.0)
    entry = (
        c.entry
        if c.entry == 'peft, merged' or of_lm(c) and c.family == 'wide' and cold(c)
        else 'decoder' if adapted(c) else 'decoder, no adapter'
    )
    return c._replace(**drop, entry=entry)


@lru_cache(None)
def _naive(c):
    return [Naive(c, b).write() for b in range(len(batch(c)[0]))]


def naive(c):
    return _naive(distinguished(c))


# --- one case through the library


class Bench:
    "What can be seen of a run from outside: how many forward passes the model made, and whether the global generator was used"

    def __enter__(self):
        self.passes = 0
        look = torch.nn.Embedding.forward

        def counting(layer, ids):
            self.passes += 1
            return look(layer, ids)

        counting.token_wise = True  # it counts, and reads nothing of other tokens
        self.patch = patch.object(torch.nn.Embedding, 'forward', counting)
        torch.manual_seed(5)
        self.before = torch.get_rng_state()
        self.patch.start()

    def __exit__(self, *_):
        self.patch.stop()
        self.drew = not torch.equal(torch.get_rng_state(), self.before)


PATCHES = {
    ops: dict(compiles=lambda device=None: True),
    rows_module: dict(_compiled_step=rows_module._step, _compiled_step_hidden=rows_module._step_hidden),
    programs: dict(program_of=lambda f, inputs, about: programs._uncompiled(f)),
    compiled_draft: dict(program_of=lambda f, inputs, about: programs._uncompiled(f)),
}
COSTS = dict(
    pays=lambda rows, sizes: {n: 1e3 + n for n in sizes},
    loses=lambda rows, sizes: {n: 1.0 if n == 1 else 1e3 for n in sizes},
    fixed=None,
)


@contextlib.contextmanager
def settings(c):
    "A static cache without its compiler, costs that do not depend on the machine, attention of one kind"
    model = subject(c.family).bare(c)
    kind = model.config._attn_implementation
    ours = 'flex_attention' if c.ask == 'flex attention' else kind if c.attention == 'own' else c.attention
    with contextlib.ExitStack() as stack:
        for module, names in {**PATCHES, sizing: dict(pass_seconds=COSTS[c.sizing])}.items():
            stack.enter_context(patch.multiple(module, **names))
        if c.entry == 'peft, off':
            stack.enter_context(subject(c.family).peft.disable_adapter())
        model.config._attn_implementation = ours
        try:
            yield
        finally:
            model.config._attn_implementation = kind


def filled(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    return cache


def asked(c):
    "Return the options of what is not supported"
    t = batch(c)[0].shape[1]
    return (
        {
            'nothing': {},
            'beams': dict(num_beams=2),
            'scores': dict(output_scores=True, return_dict_in_generate=True),
            'guidance': dict(guidance_scale=1.5),
            'contrastive search': dict(penalty_alpha=0.6),
            'flex attention': {},
            'max_length': dict(max_length=12),
        }.get(c.ask)
        if c.ask != 'filled cache'
        else dict(past_key_values=filled(subject(c.family).bare(c)))
    )


def options(c):
    "Return the options of one case, for both ways in"
    eos, words, pairs, n = endings(c)
    out = dict(max_new_tokens=n, do_sample=c.how == 'seed', **constraints(c)[0])
    if c.how == 'seed':
        out |= dict(temperature=1.3, top_k=0)
    elif c.how != 'greedy':
        out['logits_processor'] = LogitsProcessorList(HOW[c.how])
    if eos or of_lm(c):
        out['eos_token_id'] = eos or None  # None: lm.generate would take the tokenizer's end token
    stops = [Pair(set(pairs))] * bool(pairs)
    if words and of_lm(c):
        out['stop_strings'] = words
    elif words:
        stops.append(StopStringCriteria(subject(c.family).tokenizer, words))
    if stops:
        out['stopping_criteria'] = StoppingCriteriaList(stops)
    return out | {k: v for k, v in asked(c).items() if not (k == 'return_dict_in_generate' and of_lm(c))}


def parts(c):
    memory = MEMORIES[c.memory] and replace(MEMORIES[c.memory], amateur=c.amateur, max_repetition=c.max_repetition)
    return TARGETS[c.target], subject(c.family).drafter(c), memory


def stream_of(c):
    "Return the streamer of a case"
    if c.stream == 'tokens':
        return Collects()
    return TextStreamer(subject(c.family).tokenizer, skip_prompt=True) if c.stream == 'text' else None


def streamed(c, stream, printed, ids, tokens):
    "Check that what was streamed is what was generated"
    if c.stream == 'tokens':
        pad = subject(c.family).lm.pad_id if of_lm(c) else 0
        columns = [list(column) for column in zip_longest(*tokens, fillvalue=pad)]  # as plain decoding streams them
        assert stream.got == [ids.flatten().tolist(), *columns, 'end'], 'the stream is another text'
    if c.stream == 'text':
        text = subject(c.family).tokenizer.decode(tokens[0], skip_special_tokens=of_lm(c))
        assert printed == text + '\n', 'the stream is another text'


def run(c, bench):
    "Return the tokens of each sequence, and the steps"
    s = subject(c.family)
    ids, mask = batch(c)
    kw = options(c)
    plugged = parts(c)
    stream = stream_of(c)
    with settings(c), bench, contextlib.redirect_stdout(io.StringIO()) as printed:
        if of_lm(c):
            if c.stream == 'tokens':
                kw['streamer'] = stream
            lm = s.lm if adapted(c) else s.bare_lm
            out = lm.generate(
                [x[m.bool()] for x, m in zip(ids, mask)],
                *plugged,
                stream=c.stream == 'text',
                compile=c.cache == 'static',
                seed=SEED if c.how == 'seed' else None,
                record=c.record,
                **kw,
            )
        else:
            decoder = Decoder(
                *plugged,
                bank=s.bank if c.entry == 'decoder' else None,
                streamer=stream,
                compile=c.cache == 'static',
                seed=SEED if c.how == 'seed' else None,
                record=c.record,
            )
            out = s.called(c).generate(
                input_ids=ids,
                attention_mask=mask,
                custom_generate=decoder,
                pad_token_id=0,
                **dict(return_dict_in_generate=True) | kw,
            )
    tokens = [[t.id for x in out.steps for t in x.tokens[b]] for b in range(len(ids))]
    streamed(c, stream, printed.getvalue(), ids, tokens)
    returned(c, s, ids, out, tokens)
    return tokens, out.steps


def returned(c, s, ids, out, tokens):
    "Check that texts, sequences and records are those of the tokens"
    if of_lm(c):
        assert tokens == [[t.id for t in r] for r in out.tokens] and out.texts == [
            s.tokenizer.decode(t, skip_special_tokens=True) for t in tokens
        ], 'the texts are other tokens'
    else:
        assert [r[ids.shape[1] :][: len(t)].tolist() for r, t in zip(out.sequences, tokens)] == tokens and not any(
            r[ids.shape[1] + len(t) :].any() for r, t in zip(out.sequences, tokens)
        ), 'the sequences are other tokens'
    assert all(
        (t.logp is not None) == c.record for x in out.steps for r in x.tokens for t in r
    ), 'records that nobody asked for, or none'


REPORT = {}
TIES = []
REPORTED = Counter()


def state(c):
    model = subject(c.family).bare(c)
    return *traces(model)[:3], model.config._attn_implementation, str(model.generation_config)


def check(c, part):
    "Return what is wrong with a case, if anything, and count it"
    count = REPORT.setdefault(part, Counter())
    bench = Bench()
    subject(c.family).called(c)  # a trace of making it is none of ours
    reasons = refusals(c)
    before, error, got = (state(c), None, None)
    try:
        got = run(c, bench)
    except DecodingError as e:
        error = str(e)
    except Exception as e:
        error = f'{type(e).__name__}: {e}'
    count['refused' if reasons else 'valid'] += 1
    if reasons:
        ours = [x for x in reasons if x in (error or '')]
        if not ours:
            return f'{c}: {error!r} is none of {reasons}'
        if bench.passes:
            return f'{c}: refused after {bench.passes} passes: {error}'
        REPORTED[ours[0]] += 1
    elif error is not None:
        return f'{c}: {error}'
    elif wrong := compare(c, *got, count):
        return f'{c}: {wrong}'
    if bench.drew:
        return f'{c}: drew from the global generator'
    after = state(c)
    names = ('weights', 'hooks and forward functions', 'flags', 'attention', 'generation config')
    return None if after == before else f'{c}: left a trace in {[n for n, x, y in zip(names, after, before) if x != y]}'


def compare(c, tokens, steps, count):
    count['drafted'] += sum(t.proposer != 'target' for x in steps for r in x.tokens for t in r)
    count['passes'] += len(steps)
    count['tokens'] += sum(map(len, tokens))
    for b, (ours, (want, gaps, *logps)) in enumerate(zip(tokens, naive(c), strict=True)):
        at = next((i for i, (x, y) in enumerate(zip(ours, want)) if x != y), None)
        if at is not None and gaps[at] <= TIE:
            TIES.append((c, b, at, gaps[at]))
            count['ties'] += 1
        elif ours == want:
            thought = [
                [getattr(t, name) for x in steps for t in x.tokens[b]]
                for name in (('logp', 'base_logp') if cold(c) else ('logp',))
            ]
            off = max(abs(x - y) for us, them in zip(thought, logps) for x, y in zip(us, them)) if c.record else 0
            if off > TIE:
                return f'sequence {b} has the right tokens, but log-probabilities that are {off:.1e} off'
        else:
            return (
                f'sequence {b} differs from place {at}: {ours} instead of {want}, where the two best scores lie '
                f'{gaps[at or 0]:.1e} apart'
            )


def problems(cases, part):
    return [p for c in cases if not outside(c) and (p := check(c, part))]


# --- the cases

CROSSED = 'target x drafter x memory x batch x cache'


@pytest.mark.parametrize('memory', CORE['memory'])
@pytest.mark.parametrize('target', CORE['target'])
def test_all_of_the_core(target, memory):
    assert not (
        wrong := problems(
            (Case(target, d, memory, b, k) for d, b, k in product(*(CORE[f] for f in ('drafter', 'batch', 'cache')))),
            CROSSED,
        )
    ), '\n'.join(wrong)


@pytest.mark.parametrize('memory', ['none', 'window', 'drift'])
@pytest.mark.parametrize('target', ['plain', 'cold', 'each'])
def test_the_core_with_a_seed(target, memory):
    "Sampled texts equal those of a loop that knows neither rows, trees nor batches"
    crossed = product(CORE['drafter'], CORE['batch'], CORE['cache'])
    wrong = problems((Case(target, d, memory, b, k, how='seed') for d, b, k in crossed), 'sampled with a seed')
    assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('memory', ['none', 'window'])
@pytest.mark.parametrize('target', ['plain', 'cold'])
def test_the_core_with_a_draft_adapter(target, memory):
    crossed = product(('chain', 'tree', 'tree cut', 'joined'), CORE['batch'], CORE['cache'])
    cases = (Case(target, d, memory, b, k, draft_adapter='trained') for d, b, k in crossed)
    wrong = problems(cases, 'with a draft adapter')
    assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('cache', FACTORS['cache'])
def test_a_draft_adapter_changes_what_is_drafted(cache):
    def accepted(**options):
        steps = run(Case(drafter='tree', sizing='fixed', cache=cache, **options), Bench())[1]
        return [[t.proposer for t in step.tokens[0]] for step in steps]

    assert accepted(draft_adapter='trained') != accepted()


def test_each_factor_acts():
    "Else a matrix would compare one text with itself"
    # tokens; with log-probabilities
    written = lambda **kw: tuple(naive(Case(**kw))[0][0])
    seen = lambda **kw: str(naive(Case(**kw))[0])
    # alpha 1 and beta 0 are the expert's own choice
    assert written(target='one') == written(target='still') == written() == written(memory='roomy')
    shown = [
        seen(target=t, memory=m)
        for t in ('plain', 'cold', 'back', 'all')
        for m in ('none', 'tight', 'window', 'chunk', 'every', 'drift')
    ]
    assert len(set(shown)) == len(shown)
    for name in ('how', 'rules'):
        for x in FACTORS[name][1:]:
            assert any(written(family=f, **{name: x}) != written(family=f) for f in FAMILIES), x
    assert len({written(target='cold', memory='window', amateur=a) for a in FACTORS['amateur']}) == 3
    assert len({written(entry=e) for e in ENTRIES}) > 1
    assert any(
        seen(family=f, memory='window', max_repetition=0.05) != seen(family=f, memory='window') for f in FAMILIES
    )
    assert len({len(written(ends=e)) for e in ('length', 'eos', 'strings', 'one')}) > 2


@pytest.mark.parametrize('memory', ['none', 'window'])
def test_draft_tokens_are_accepted(memory):
    for d in DRAFTERS[1:]:
        assert count_drafted(SimpleNamespace(steps=run(Case(drafter=d, memory=memory), Bench())[1])) > 1, d


def pairs_of(c):
    return set(combinations(enumerate(c), 2))


def fill(fixed, fits, g, tries=400):
    "Return a random case with these values that fits, defaults among the others; None where none is found"

    def value(i, values):
        if i in fixed:
            return fixed[i]
        return values[0] if g.random() < 0.5 else g.choice(values)

    for _ in range(tries):
        c = Case(*(value(i, values) for i, values in enumerate(FACTORS.values())))
        if fits(c):
            return c


def covering(fits):
    "Return few cases that fit, and the pairs of values that none of them can have: greedily, all pairs of the others are in one"
    g = random.Random(0)
    values = list(enumerate(FACTORS.values()))
    left = {((i, x), (j, y)) for (i, v), (j, w) in combinations(values, 2) for x in v for y in w}
    cases = []
    never = []
    for pair in sorted(left, key=str):
        if pair not in left:
            continue
        if (c := fill(dict(pair), fits, g)) is None:
            never.append(pair)
            left.discard(pair)
            continue
        c = max(
            [c, *(o for _ in range(15) if (o := fill(dict(pair), fits, g, 40)))], key=lambda o: len(pairs_of(o) & left)
        )
        cases.append(c)
        left -= pairs_of(c)
    return cases, never


valid = lambda c: not outside(c) and not refusals(c)
refused = lambda c: not outside(c) and bool(refusals(c))
PARTS = {'options, in pairs': valid, 'options, in pairs, with something refused': refused}


@lru_cache(None)
def covered(part):
    return covering(PARTS[part])


def test_a_pair_that_is_never_valid_is_refused_by_itself():
    for pair in covered('options, in pairs')[1]:
        c = Case()._replace(**{list(FACTORS)[i]: x for i, x in pair})
        assert refusals(c) or outside(c), pair


SHARES = 8  # so that a failure is found soon


@pytest.mark.slow
@pytest.mark.parametrize('share', range(SHARES))
@pytest.mark.parametrize('part', PARTS)
def test_options_in_pairs(part, share):
    assert not (wrong := problems(covered(part)[0][share::SHARES], part)), '\n'.join(wrong)


@pytest.mark.parametrize('sentence', REFUSED)
def test_each_refusal_alone(sentence):
    "Nothing else is wrong, so no other check can stand in for this one"
    g = random.Random(1)
    cases = []
    while len(cases) < 3:
        c = fill({}, lambda c: not outside(c) and refusals(c) == [sentence], g, 100_000)
        cases.append(c)
    assert not (wrong := problems(cases, 'one reason to refuse')), '\n'.join(wrong)


# --- the compiled path, by tracing alone: one program a target


@pytest.mark.parametrize(
    'c', [Case(), Case('cold', 'tree', batch='three', sizing='fixed', record=True)], ids=['plain', 'cold, tree']
)
def test_traced_programs(c, monkeypatch):
    eager_dynamo(monkeypatch)
    monkeypatch.setattr(
        rows_module,
        '_compiled_step_hidden',
        torch.compile(rows_module._step_hidden, dynamic=False, fullgraph=True, backend='eager'),
    )
    monkeypatch.setattr(compiled_draft, 'program_of', lambda f, inputs, about: programs._uncompiled(f))
    c = c._replace(cache='static')
    with patch(f'{__name__}.PATCHES', {}):
        assert compare(c, *run(c, Bench()), REPORT.setdefault('traced by torch.compile', Counter(valid=1))) is None


# --- drawn tokens: the distribution

WARPED = {
    'temperature': (dict(temperature=0.4), [TemperatureLogitsWarper(0.4)]),
    'top_p': (dict(top_p=0.8), [TopPLogitsWarper(0.8)]),
    'min_p': (dict(min_p=0.6), [MinPLogitsWarper(0.6)]),
    'penalty': (dict(repetition_penalty=9.0), [RepetitionPenaltyLogitsProcessor(9.0)]),
}
DRAWN = [
    ('plain', 'lookup', 'top_p', 'growing'),
    ('cold', 'joined', 'temperature', 'growing'),
    ('back', 'tree', 'min_p', 'static'),
    ('all', 'chain', 'penalty', 'growing'),
]


@pytest.mark.parametrize('target,drafter,warp,cache', DRAWN)
def test_drawn_tokens_have_the_distribution(small, target, drafter, warp, cache):
    "All continuations of two tokens are enumerated; draws without the wish behind `warp` are found out"
    kw, processors = WARPED[warp]

    def process(texts, scores):
        for p in processors:
            scores = p(texts, scores)
        return scores

    hass = HASS(small.folder, nodes=6, depth=2, top_k=3, chain=drafter == 'chain')
    d = (
        PromptLookup(min_ngram=1, corpus=[[3, 1, 2, 1], [2, 2]])
        if drafter == 'lookup'
        else JointDrafter((hass, PromptLookup(min_ngram=1))) if drafter == 'joined' else hass
    )
    with settings(Case(cache=cache)):
        counts, p, hits = sampled(
            small, TARGETS[target], d, 500, 2, process=process, rows=dict(compile=cache == 'static'), **kw
        )
        got, limit = chi_square(counts, p, 500)
        assert got < limit and hits > 40, (got, limit, hits)
    got, limit = chi_square(counts, exact(small, TARGETS[target], [3, 1, 2], 2).clamp(min=1e-9), 500)
    assert got > limit, 'the wish does nothing here'
    REPORT.setdefault('drawn without a seed: chi-square of all continuations', Counter()).update(
        valid=1, tokens=1000, drafted=hits
    )


# --- the tables


def table(rows):
    return '\n'.join(
        '| ' + ' | '.join(f'{x:,}' if isinstance(x, int) else str(x) for x in r) + ' |'
        for r in [rows[0], ['---'] * len(rows[0]), *rows[1:]]
    )


def tables():
    "Return what was covered, as Markdown"
    cells = lambda c: [c[k] for k in ('valid', 'refused', 'tokens', 'drafted', 'passes')]
    whole = sum(REPORT.values(), Counter())
    parts = table(
        [
            ('combinations', 'valid', 'refused', 'tokens compared', 'of them drafted', 'passes'),
            *((k, *cells(c)) for k, c in REPORT.items()),
            ('together', *cells(whole)),
        ]
    )
    excused = f'Mismatches excused because the two best scores lie within {TIE:g}: {len(TIES)}. Unexplained: 0.'
    return '\n\n'.join([parts, excused, table([('refused by', 'combinations'), *REPORTED.most_common()])])


def main():
    torch.set_num_threads(1)
    start = time.process_time()
    wrong = []
    wrong += problems((Case(*x) for x in product(*CORE.values())), CROSSED)
    for part in PARTS:
        wrong += problems(covered(part)[0], part)
    if wrong:
        sys.exit('\n'.join(wrong))
    print(tables())
    print(f'{time.process_time() - start:.0f} s', file=sys.stderr)


if __name__ == '__main__':
    main()
