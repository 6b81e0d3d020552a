"""What works with which adapter: every tuner of PEFT, from a folder and in memory, by every method, on a tiny random model.

python tools/peft_sweep.py [NAME ...]              print a line for each row, all tuners or those named; status 1 for a fault
python tools/peft_sweep.py --json FILE [NAME ...]  write the rows into a file too

Each row is `equal` (the tokens are those of PEFT's own model under transformers' greedy `generate`, or of two forward passes a token
under contrast), `refused` (a `DecodingError` in one sentence), or a fault: `wrong` tokens, or a `traceback` of something else.
"""

import contextlib
import copy
import io
import json
import math
import re
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from npu_lora_decoding import CoLD, PromptLookup, TempLoRA
from npu_lora_decoding.decoding.loop import Decoder
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.foundations.adapters import load_adapter, toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.lora import AdapterBank
from quantised_toys import BASES

IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
IDS[1, :3] = 0
MASK[1, :3] = 0
NEW = 12
OPTIONS = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
TARGET = CoLD(alpha=0.1, beta=0.5)
METHODS = {
    'plain': lambda: Decoder(),
    'plain, prompt lookup': lambda: Decoder(drafter=PromptLookup()),
    'contrast': lambda: Decoder(TARGET),
}
FAULTS = ('wrong', 'traceback')


@dataclass(frozen=True)
class Row:
    tuner: str
    place: str
    method: str
    outcome: str
    message: str = ''


# --- Tuners

PROMPTS = (
    'PROMPT_TUNING',
    'MULTITASK_PROMPT_TUNING',
    'P_TUNING',
    'PREFIX_TUNING',
    'CARTRIDGE',
    'CPT',
    'ADAPTION_PROMPT',
)
FIELDS = {  # What a type needs beside, or instead of, two target modules
    'MULTITASK_PROMPT_TUNING': dict(num_tasks=2),
    'P_TUNING': dict(encoder_hidden_size=8),
    'CPT': dict(cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]),
    'ADAPTION_PROMPT': dict(adapter_len=4, adapter_layers=2),
    'ADALORA': dict(init_r=6, target_r=4, total_step=100),
    'IA3': dict(target_modules=['q_proj', 'v_proj', 'down_proj'], feedforward_modules=['down_proj']),
    'LN_TUNING': dict(target_modules=['input_layernorm', 'post_attention_layernorm']),
    'TRAINABLE_TOKENS': dict(token_indices=list(range(5, 60)), target_modules=['embed_tokens']),
    'VBLORA': dict(num_vectors=8, vector_length=8, r=2),
    'FOURIERFT': dict(n_frequency=40),
    'WAVEFT': dict(n_frequency=40),
    'OFT': dict(oft_block_size=8),
    'BOFT': dict(boft_block_size=8),
    'C3A': dict(block_size=8),
    'OSF': dict(effective_rank=4),
    'BEFT': dict(target_modules=['v_proj']),
    'POLY': dict(n_tasks=2, n_skills=2),
    'MISS': dict(r=4),
    'ROAD': dict(group_size=8),
    'SHIRA': dict(r=4),
    'PSOFT': dict(r=4),
    'SHADOW': dict(target_modules=None, r=4),
}
GENERATE = {'POLY': dict(task_ids=torch.tensor([0, 1]))}  # Further arguments of `generate`


def config_of(kind):
    "Return a configuration of a type of PEFT that fits a model of two layers"
    fields = dict(num_virtual_tokens=3) if kind in PROMPTS else dict(target_modules=['q_proj', 'v_proj'])
    if kind == 'ADAPTION_PROMPT':
        fields = {}
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type='CAUSAL_LM', **fields | FIELDS.get(kind, {}))


def lora(**fields):
    plain = dict(task_type='CAUSAL_LM', r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj'])
    return LoraConfig(**plain | fields)


def variants():
    "Return the kinds of LoRA: name -> configuration"
    from peft.tuners.lora import config as c

    tokens = list(range(5, 60))
    return {
        'LORA': lora(),
        'LORA, rsLoRA': lora(use_rslora=True),
        'LORA, patterns': lora(rank_pattern={'q_proj': 2}, alpha_pattern={r'1\.self_attn\.v_proj': 3}),
        'LORA, all linear layers': lora(target_modules='all-linear'),
        'LORA, one layer': lora(layers_to_transform=[1]),
        'LORA, LM head': lora(target_modules=['q_proj', 'lm_head']),
        'LORA, Gaussian': lora(init_lora_weights='gaussian'),
        'LORA, orthogonal': lora(init_lora_weights='orthogonal'),
        'LORA, MiCA': lora(init_lora_weights='mica'),
        'LORA, PiSSA': lora(init_lora_weights='pissa'),
        'LORA, OLoRA': lora(init_lora_weights='olora'),
        'LORA, LoftQ': lora(init_lora_weights='loftq', loftq_config=dict(loftq_bits=4, loftq_iter=1)),
        'LORA, DoRA': lora(use_dora=True),
        'LORA, bias of B': lora(lora_bias=True),
        'LORA, biases of LoRA layers': lora(bias='lora_only'),
        'LORA, all biases': lora(bias='all'),
        'LORA, modules to save': lora(modules_to_save=['lm_head']),
        'LORA, norms to save': lora(modules_to_save=['input_layernorm']),
        'LORA, embedding': lora(target_modules=['q_proj', 'embed_tokens']),
        'LORA, embedding alone': lora(target_modules=['embed_tokens']),
        'LORA, token indices': lora(trainable_token_indices=tokens),
        'LORA, layer replication': lora(layer_replication=[[0, 2], [1, 2]]),
        'LORA, aLoRA': lora(alora_invocation_tokens=[int(IDS[0, 6])]),
        'LORA, KaSA': lora(kasa_config=c.KasaConfig()),
        'LORA, VeLoRA': lora(velora_config=c.VeloraConfig(num_groups=4)),
        'LORA, MonteCLoRA': lora(monteclora_config=c.MontecloraConfig()),
        'LORA, BD-LoRA': lora(
            use_bdlora=c.BdLoraConfig(
                target_modules_bd_a=['o_proj'], target_modules_bd_b=['q_proj', 'v_proj'], nblocks=2
            )
        ),
    }


def train(model, seed=5):
    "Move every weight that PEFT trains, so that the adapter changes the tokens; return the model"
    g = torch.Generator().manual_seed(seed)
    for w in model.parameters():
        if w.requires_grad:
            w.data = w.data + 0.3 * torch.randn(w.shape, generator=g)
    return model.eval()


def base_of(name):
    "Return the model below a tuner"
    return toy_model(attention_bias=True) if 'bias' in name else toy_model()


def experts(base):
    "Return a PEFT model with two trained adapters"
    model = train(get_peft_model(copy.deepcopy(base), lora()))
    model.add_adapter('second', lora(r=2, target_modules=['v_proj', 'up_proj']))
    model.set_adapter('second')
    train(model, seed=6)
    model.set_adapter('default')
    return model


def switched(model, on):
    model.base_model.set_adapter(on)
    return model


def scaled(model, scale):
    for m in model.modules():
        if hasattr(m, 'scale_layer'):
            m.scale_layer(scale)
    return model


def weighted(model):
    model.add_weighted_adapter(['default', 'second'], [0.7, 0.5], 'both', combination_type='cat')
    model.set_adapter('both')
    return model


def merged(model):
    model.merge_adapter()
    return model


def half_merged(model):
    next(m for m in model.modules() if hasattr(m, 'lora_A')).merge()
    return model


def half_off(model):
    next(m for m in model.modules() if hasattr(m, 'lora_A')).enable_adapters(False)
    return model


def off(model):
    model.base_model.disable_adapter_layers()
    return model


def around_another(base):
    inner = train(get_peft_model(copy.deepcopy(base), config_of('LOHA')))
    return train(get_peft_model(inner.get_base_model(), lora()), seed=6)


def router(base):
    "Return an X-LoRA of two adapters, from their folders"
    from peft import XLoraConfig

    with tempfile.TemporaryDirectory() as folder:
        folders = {str(k): f'{folder}/{k}' for k in range(2)}
        for k, place in folders.items():
            train(get_peft_model(copy.deepcopy(base), lora()), seed=5 + int(k)).save_pretrained(place)
        base.config.use_cache = False
        config = XLoraConfig(task_type='CAUSAL_LM', hidden_size=32, xlora_depth=2, adapters=folders)
        return train(get_peft_model(copy.deepcopy(base), config))


STATES = {  # Of a PEFT model in memory; none of them is in a folder
    'LORA, two adapters': lambda base: experts(base),
    'LORA, the second adapter': lambda base: switched(experts(base), 'second'),
    'LORA, two active adapters': lambda base: switched(experts(base), ['default', 'second']),
    'LORA, scaled': lambda base: scaled(experts(base), 0.5),
    'LORA, weighted adapter': lambda base: weighted(experts(base)),
    'LORA, merged': lambda base: merged(experts(base)),
    'LORA, merged in one layer': lambda base: half_merged(experts(base)),
    'LORA, switched off': lambda base: off(experts(base)),
    'LORA, switched off in one layer': lambda base: half_off(experts(base)),
    'LORA around LoHa': around_another,
    'XLORA': router,
}


def tuners():
    "Return every tuner: name -> function of a base that returns its PEFT model"
    kinds = [kind.value for kind in PeftType if kind.value not in ('LORA', 'XLORA')]
    made = {
        name: lambda base, c=config: train(get_peft_model(copy.deepcopy(base), c))
        for name, config in variants().items()
    }
    made |= STATES
    return made | {
        kind: lambda base, k=kind: train(get_peft_model(copy.deepcopy(base), config_of(k))) for kind in kinds
    }


# --- References


@torch.no_grad()
def last(model, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1].float()


def contrast(expert, base):
    "Return CoLD's tokens by two whole forward passes a token, as `TARGET` weighs them"
    ids = IDS
    mask = MASK
    for _ in range(NEW):
        e = last(expert, ids, mask)
        a = last(base, ids, mask)
        scores = e + TARGET.beta * (e - a)
        scores = scores.masked_fill(e < math.log(TARGET.alpha) + e.amax(-1, keepdim=True), -torch.inf)
        ids = torch.cat([ids, scores.argmax(-1)[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


def generate(model, **options):
    return model.generate(input_ids=IDS, attention_mask=MASK, **OPTIONS, **options)


# --- Rows

SENTENCE = re.compile(r'[^\n]+: [^\n]+\.')


def outcome(want, run, plain=None):
    "Return what became of one decoding, and its message; `learned` where the tokens need only be others than `plain`"
    try:
        got = run()
    except DecodingError as e:
        return ('refused' if SENTENCE.fullmatch(str(e)) else 'traceback'), str(e)
    except Exception as e:
        return 'traceback', f'{type(e).__name__}: {str(e)[:160]}'
    if plain is not None:
        return ('wrong', 'nothing was learned') if torch.equal(got, plain) else ('learned', '')
    reference = want()
    if reference.shape == got.shape and torch.equal(reference, got):
        return 'equal', ''
    return 'wrong', f'{got[0, -6:].tolist()} instead of {reference[0, -6:].tolist()}'


def in_memory(name, model, base):
    "Yield the rows of a PEFT model in memory"
    extra = GENERATE.get(name, {})
    wants = dict.fromkeys(METHODS, lambda: generate(model, **extra)) | dict(contrast=lambda: contrast(model, base))
    if name != 'LORA, switched off':
        assert not torch.equal(
            generate(model, **extra), generate(base)
        ), f'{name} changes no token: the sweep proves nothing'
    for method, make in METHODS.items():
        run = lambda make=make: generate(model, **extra, custom_generate=make())
        yield Row(name, 'memory', method, *outcome(wants[method], run))


def from_folder(name, model, base):
    "Yield the rows of the folder that the PEFT model saves"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = lambda: PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        wants = dict.fromkeys(METHODS, lambda: generate(again())) | dict(contrast=lambda: contrast(again(), base))

        def run(make):
            decoder = make()
            decoder.bank = AdapterBank(base, [load_adapter(folder, base)], ops.lora)
            return generate(base, custom_generate=decoder)

        for method, make in METHODS.items():
            yield Row(name, 'folder', method, *outcome(wants[method], lambda make=make: run(make)))


@contextlib.contextmanager
def quiet():
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter('ignore')
            torch.manual_seed(0)
            yield
    finally:
        logging.set_verbosity(before)


def rows_of(name, make):
    "Return the rows of one tuner; one row `not built` where PEFT itself cannot build it here"
    with quiet():
        base = base_of(name)
        try:
            model = make(base)
            generate(model, **GENERATE.get(name, {}))
        except Exception as e:
            return [Row(name, '', '', 'not built', f'{type(e).__name__}: {str(e)[:160]}')]
        rows = list(in_memory(name, model, base))
        return rows if name in STATES else rows + list(from_folder(name, model, base))


def sweep(names=()):
    "Return the rows of all tuners, or of those named"
    made = tuners()
    return [row for name in names or made for row in rows_of(name, made[name])]


def quantised_rows(name, base, **config):
    "Return the rows of a LoRA above a quantised base"
    with quiet():
        model = train(get_peft_model(copy.deepcopy(base), lora(**config)))
        return [*in_memory(name, model, base), *from_folder(name, model, base)]


def quantised_sweep():
    "Return the rows of all quantised bases; one row `not built` where a library is not installed"
    rows = []
    for name, make in BASES.items():
        try:
            base = make()
        except ImportError as e:
            rows.append(Row(name, '', '', 'not built', f'no {e.name or e}'))
            continue
        rows += quantised_rows(name, base)
        rows.append(Row(name, 'memory', 'Temp-LoRA', *learns(base)))
    return rows


def learns(base):
    "Return whether a temporary adapter learns above a quantised base: no other program has tokens to compare with"
    memory = TempLoRA(chunk=6, window=16, train_context=6, r=4, alpha=4.0, lr=0.1, epochs=1)
    options = OPTIONS | dict(max_new_tokens=24)
    with quiet():
        plain = base.generate(IDS[:1], **options)
        return outcome(
            lambda: None, lambda: base.generate(IDS[:1], custom_generate=Decoder(memory=memory), **options), plain
        )


def counts(rows):
    "Return how often there was which outcome"
    kinds = ('equal', 'learned', 'refused', *FAULTS, 'not built')
    return {kind: sum(row.outcome == kind for row in rows) for kind in kinds}


def environment():
    "Return the versions that rows were made with, as a row"
    names = ('peft', 'transformers', 'torch', 'torchao', 'bitsandbytes', 'hqq')
    installed = {name: version(name) for name in names if find_spec(name)}
    return dict(tuner='environment', **installed)


def main(names):
    "Print the rows, and return whether one is a fault"
    file = None
    if names[:1] == ['--json']:
        file, names = Path(names[1]), names[2:]
    found = sweep(names) + ([] if names else quantised_sweep())
    for row in found:
        print(f'{row.outcome:10}{row.tuner:40}{row.place:8}{row.method:22}{row.message}')
    print(counts(found))
    if file is not None:
        rows = [*map(asdict, found), environment()]
        file.write_text('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')
    return any(row.outcome in FAULTS for row in found)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
