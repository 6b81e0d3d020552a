"""Every way of decoding on the stand-in and on the CPU, as JSON: {way: tokens alike, forward passes, host reads}

Run by test_standin.py in a process of its own. A host read before the first `Step` or after the last is not counted.
"""

import json, sys, tempfile
from pathlib import Path
import torch, torch_npu
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding.loop import LM
from npu_lora_decoding.decoding.sampling import Plain
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.hass.checkpoint import save_head
from npu_lora_decoding.speculation.head_drafter import HASS
from npu_lora_decoding.speculation.joint import JointDrafter
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup
from npu_lora_decoding.temp_lora.generation import TempLoRA
from helpers.loops import calm_model, knowing_head
from helpers.toys import toy_tokenizer

torch.set_num_threads(1)
N = 16
FOLDER = Path(tempfile.mkdtemp())
COLD = CoLD(0.1, 0.5)
PROMPT = torch.randint(4, 76, (12,), generator=generator(1)).repeat(3)  # it repeats, so that a lookup finds something
SHORT = PROMPT[:7]
LONG = torch.randint(4, 76, (40,), generator=generator(2))


def language_model(device):
    "Return a toy with its adapter, all of it on one device"
    model = calm_model(vocab=76, context=256)
    model.generation_config.eos_token_id = None
    toy_adapter(model, FOLDER / 'adapter', lora_alpha=1)
    if not (FOLDER / 'head').exists():
        save_head(knowing_head(model), FOLDER / 'head', model)
    model.to(device)
    return LM(model, toy_tokenizer(), load_adapter(FOLDER / 'adapter', model), 'toy')


def head(**options):
    return HASS(FOLDER / 'head', adaptive=False, **options)


def joined():
    return JointDrafter((head(), PromptLookup(adaptive=False)), adaptive=False)


def memory():
    return TempLoRA(chunk=16, window=64, context=16, train_context=16, r=4, dropout=0.1)


WAYS = {
    'greedy': dict(),
    'cold': dict(target=COLD),
    'cold, batch': dict(target=COLD, batch=2),
    'processors': dict(target=COLD, repetition_penalty=1.2, min_new_tokens=4),
    'sampling, seed': dict(target=COLD, do_sample=True, temperature=0.8, top_p=0.9, seed=3),
    'sampling, generator': dict(target=COLD, do_sample=True, temperature=0.8),
    'lookup': dict(drafter=lambda: PromptLookup(adaptive=False)),
    'lookup, adaptive': dict(drafter=PromptLookup),
    'hass': dict(drafter=head),
    'hass, adaptive': dict(drafter=lambda: HASS(FOLDER / 'head')),
    'hass chain, cold': dict(target=COLD, drafter=lambda: head(chain=True)),
    'hass, cold, seed': dict(target=COLD, drafter=head, do_sample=True, temperature=0.8, seed=3),
    'joined, batch': dict(drafter=joined, batch=2),
    'joined, four, cold': dict(target=COLD, drafter=joined, batch=4),
    'joined, batch, adaptive': dict(drafter=lambda: JointDrafter((HASS(FOLDER / 'head'), PromptLookup())), batch=2),
    'temp-lora': dict(memory=memory, prompt=LONG),
    'temp-lora, cold, hass': dict(target=COLD, drafter=head, memory=memory, prompt=LONG),
}


class Counted:
    "Takes the host reads between the first step and the last"

    def __init__(self):
        self.passes = -1
        self.reads = {}

    def __call__(self, step):
        self.passes += 1
        if self.passes == 0:
            torch_npu.reads.clear()
        self.reads = dict(torch_npu.reads)


def generate(lm, *, prompt=PROMPT, batch=1, target=Plain(), drafter=None, memory=None, **options):
    "Return the tokens of one way, and what was counted"
    counted = Counted()
    prompts = [prompt, SHORT, PROMPT[5:], PROMPT[3:20]][:batch]
    torch.manual_seed(0)
    made = dict(drafter=drafter and drafter(), memory=memory and memory())
    result = lm.generate(prompts, target, chat=False, max_new_tokens=N, stream=counted, **made, **options)
    return [[t.id for t in tokens] for tokens in result.tokens], counted


def measured(names):
    "Return what each way gave on both devices"
    cpu = language_model('cpu')
    npu = language_model('npu')
    found = {}
    for name in names:
        tokens, counted = generate(npu, **WAYS[name])
        expected, _ = generate(cpu, **WAYS[name])
        found[name] = dict(same=tokens == expected, passes=counted.passes, reads=counted.reads)
    return found


if __name__ == '__main__':
    print(json.dumps(measured(sys.argv[1:] or WAYS)))
