"""Every way of decoding on a small model of every family: equal to the model's own generate, or refused in one sentence

The reference is transformers. Plain decoding is compared with its greedy search. Under contrast its search is made to write the
tokens that we chose, once with the adapter and once without, and gives the logits of both along the text. Small random models may
agree on tokens by luck, so log-probabilities must agree too.
"""

import contextlib
import functools
import io
import math
import re
import warnings
from dataclasses import dataclass
import torch
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.pytorch_utils import Conv1D
from npu_lora_decoding.cold.rule import CoLD
from unittest import mock
from npu_lora_decoding.decoding import runner
from npu_lora_decoding.foundations import programs
from helpers.loops import exported
from npu_lora_decoding.decoding.loop import Decoder
from npu_lora_decoding.evaluation.kernel_check import ScriptedDrafter
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.hass.checkpoint import save_head
from npu_lora_decoding.hass.head import DraftHead, head_config
from npu_lora_decoding.speculation.head_drafter import HASS
from helpers.families import VOCAB, build

PROMPT = 12  # Longer than the windows
PADDING = 3  # Of the second prompt
NEW = 22  # Two windows more
TOLERANCE = 1e-3  # Of a log-probability
ALPHA = 0.1
BETA = 0.5


@dataclass(frozen=True)
class Row:
    "What became of one way of decoding"

    model: str  # Name of the case
    family: str  # `model_type` of the model, or of the case where there is none
    kind: str  # Class of the model
    way: str
    outcome: str  # equal, refused, wrong or error; unsupported: transformers or PEFT cannot do it themselves
    message: str = ''


class Wrong(Exception):
    "The output differs from transformers'"


class Unsupported(Exception):
    "PEFT or transformers cannot do it themselves, so there is nothing to compare with"


def _require(condition, what):
    if not condition:
        raise Wrong(what)


# --- The reference


def prompts(rows):
    "Return one prompt, or two of which the second one is padded on the left"
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (2, PROMPT), generator=g)
    mask = torch.ones_like(ids)
    ids[1, :PADDING] = 0
    mask[1, :PADDING] = 0
    return dict(input_ids=ids[:rows], attention_mask=mask[:rows])


class _Written(LogitsProcessor):
    "Makes a search write known tokens `(b, n)`"

    def __init__(self, tokens):
        self.tokens = tokens
        self.steps = 0

    def __call__(self, ids, scores):
        token = self.tokens[:, self.steps, None]
        self.steps += 1
        return torch.full_like(scores, -math.inf).scatter(1, token, 0.0)


def generate(model, rows=2, **options):
    "Return transformers' output for the prompts"
    with contextlib.redirect_stdout(io.StringIO()):  # some models print warnings at every step
        return model.generate(
            **prompts(rows),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            **options,
        )


def reference(model, tokens=None, rows=2):
    "Return what transformers' search writes `(b, n)` and the log-probabilities of every step `(b, n, v)`"
    processors = LogitsProcessorList([] if tokens is None else [_Written(tokens)])
    out = generate(model, rows, output_logits=True, logits_processor=processors)
    return out.sequences[:, -NEW:], torch.stack(out.logits, 1).float().log_softmax(-1)


# --- Our output against it


def _agree(out, tokens, logps):
    "Raise `Wrong` unless the tokens' log-probabilities are those of transformers, for each role"
    for name, known in logps.items():
        rows = [[getattr(t, name) for step in out.steps for t in step.tokens[b]] for b in range(len(tokens))]
        expected = known.gather(-1, tokens[..., None])[..., 0]
        error = (torch.tensor(rows) - expected).abs().max()
        _require(error < TOLERANCE, f'{name} differs by {error:.2g}')


def _used_drafts(out):
    "Raise `Wrong` unless draft tokens were accepted and rejected"
    drafted = sum(step.tree.tokens.numel() - len(step.tokens) for step in out.steps[1:])
    accepted = sum(int(step.accepted.sum()) - len(step.tokens) for step in out.steps[1:])
    _require(0 < accepted < drafted, f'{accepted} of {drafted} draft tokens were accepted')


def check_plain(model, known, rows=2, **options):
    "Compare plain decoding with transformers' greedy search"
    tokens, logps = known
    out = generate(model, rows, custom_generate=Decoder(**options))
    ours = out.sequences[:, -NEW:]
    _require(torch.equal(ours, tokens), _difference(ours, tokens))
    _agree(out, tokens, dict(logp=logps))
    if isinstance(options.get('drafter'), ScriptedDrafter):
        _used_drafts(out)


def _difference(ours, known):
    places = (ours != known).nonzero() if ours.shape == known.shape else []
    return (
        f'tokens differ from place {int(places[:, 1].min())} on' if len(places) else f'the shape is {tuple(ours.shape)}'
    )


def check_contrast(model, known=None, **options):
    "Check that every token is the best under contrast, by the logits of expert and base; return the tokens and those logits"
    out = generate(model, custom_generate=Decoder(CoLD(ALPHA, BETA), **options))
    tokens = out.sequences[:, -NEW:]
    if known is None or not torch.equal(known[0], tokens):
        known = tokens, *_expert_and_base(model, tokens)
    _, expert, base = known
    scores = (expert + BETA * (expert - base)).masked_fill(_implausible(expert), -math.inf)
    loss = (scores.amax(-1) - scores.gather(-1, tokens[..., None])[..., 0]).max()
    _require(loss < TOLERANCE, f'a token is worse than the best by {loss:.2g}')
    _agree(out, tokens, dict(logp=expert, base_logp=base))
    if isinstance(options.get('drafter'), ScriptedDrafter):
        _used_drafts(out)
    return known


def _expert_and_base(model, tokens):
    "Return the log-probabilities along the text, with the adapter and without"
    expert = reference(model, tokens)[1]
    with model.disable_adapter():
        base = reference(model, tokens)[1]
    _require((expert - base).abs().max() > 0.05, 'the adapter changes nothing')
    return expert, base


def _implausible(expert):
    return expert < math.log(ALPHA) + expert.amax(-1, keepdim=True)


def scripted(model, tokens):
    "Return a drafter that drafts these tokens, right and wrong in turn"
    return ScriptedDrafter(tokens, 1 if model.config.is_encoder_decoder else PROMPT)


# --- Adapters


_MIXERS = re.compile(r'attn|attention|mixer|mamba|mlstm|temporal|conv|linear_attn')
_OTHERS = re.compile(r'mlp|ffn|expert|feed_forward|moe|vision|audio|router|out_proj|gate')


def mixer_layers(model):
    "Return the paths of the linear layers with which tokens see each other"
    head = model.get_output_embeddings()
    linear = {
        path: m for path, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head
    }
    inside = [path for path in linear if _MIXERS.search(path) and not _OTHERS.search(path)]
    return inside or list(linear)


def adapted(model, layers):
    "Return the model with a random LoRA adapter on all linear layers, or on those that mix tokens"
    target = 'all-linear' if layers == 'all' else '|'.join(map(re.escape, mixer_layers(model)))
    config = LoraConfig(task_type='CAUSAL_LM', r=4, lora_alpha=8, target_modules=target)
    with warnings.catch_warnings(action='ignore'):
        peft = get_peft_model(model, config)
    g = torch.Generator().manual_seed(5)
    for p in peft.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=g)
    return peft.eval()


# --- Heads


def head_folder(model, folder):
    "Write a random draft head of the model"
    head = DraftHead(head_config(model.config)).requires_grad_(False)
    g = torch.Generator().manual_seed(7)
    for p in head.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
    save_head(head, folder, model)
    return folder


# --- Ways


@contextlib.contextmanager
def captured():
    "Let compiled steps be captured as one graph, without the minute that a compiler takes"
    torch._dynamo.reset()
    kept = runner._compiled_step
    patched = mock.patch.object(programs, 'program_of', exported)
    patched.start()
    runner._compiled_step = torch.compile(runner._step, backend='eager', dynamic=False, fullgraph=True)
    try:
        yield
    finally:
        runner._compiled_step = kept
        patched.stop()
        torch._dynamo.reset()


class Sweep:
    "The ways of one model; what transformers writes is computed once"

    def __init__(self, case, folder=None):
        self.case = case
        self.folder = folder
        self.model = build(case)
        self.known = reference(self.model)
        self.peft = functools.cache(self._peft)
        self.contrasted = functools.cache(self._contrasted)

    def _peft(self, layers):
        "Return the model with an adapter, and what transformers writes with it"
        try:
            peft = adapted(build(self.case), layers)
            return peft, reference(peft)
        except Exception as e:
            raise Unsupported(_line(e)) from e

    def _contrasted(self, layers):
        return check_contrast(self.peft(layers)[0])

    def plain(self):
        check_plain(self.model, self.known)
        check_plain(self.model, reference(self.model, rows=1), rows=1)

    def drafts(self):
        check_plain(self.model, self.known, drafter=scripted(self.model, self.known[0]))

    def static(self):
        with captured():
            check_plain(self.model, self.known, compile=True)

    def static_drafts(self):
        with captured():
            check_plain(self.model, self.known, compile=True, drafter=scripted(self.model, self.known[0]))

    def head(self):
        head = head_folder(self.model, self.folder)
        check_plain(self.model, self.known, drafter=HASS(head, depth=2, top_k=2, nodes=4, adaptive=False))

    def adapter(self, layers):
        check_plain(*self.peft(layers))

    def contrast(self, layers):
        self.contrasted(layers)

    def contrast_drafts(self, layers):
        known = self.contrasted(layers)
        peft, _ = self.peft(layers)
        check_contrast(peft, known, drafter=scripted(peft, known[0]))


WAYS = ('plain', 'adapter', 'contrast', 'drafts', 'contrast_drafts', 'static', 'static_drafts', 'head')
FEWER = 'with an adapter on attention layers alone; on all linear layers: '
_WITH_ADAPTER = ('adapter', 'contrast', 'contrast_drafts')


def _tried(way, *args):
    "Return outcome and message of one way"
    try:
        way(*args)
    except DecodingError as e:
        return 'refused', str(e)
    except Unsupported as e:
        return 'unsupported', str(e)
    except Wrong as e:
        return 'wrong', str(e)
    except Exception as e:
        return 'error', _line(e)
    return 'equal', ''


def _line(e):
    return f'{type(e).__name__}: {" ".join(str(e).split())[:200]}'


def outcome(sweep, way):
    "Return outcome and message; an adapter on all linear layers that cannot be had is tried on those that mix tokens"
    method = getattr(sweep, way)
    if way not in _WITH_ADAPTER:
        return _tried(method)
    first, message = _tried(method, 'all')
    if first not in ('refused', 'unsupported'):
        return first, message
    second, other = _tried(method, 'mixers')
    if second == 'equal':
        return second, f'{FEWER}{message}'
    return (first, message) if second == 'unsupported' else (second, other)


def sweep(case, ways=WAYS, folder=None):
    "Return a `Row` for each way of decoding with one model"
    try:
        state = Sweep(case, folder)
    except Exception as e:
        return [Row(case.name, case.family, '', way, 'unsupported', _line(e)) for way in ways]
    family = state.model.config.model_type
    kind = type(state.model).__name__
    return [Row(case.name, family, kind, way, *outcome(state, way)) for way in ways]


class Everything:
    "A set of names that holds all of them"

    def __contains__(self, name):
        return True
