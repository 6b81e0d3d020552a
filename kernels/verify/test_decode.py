"""Whole decodes with every operator served by its lowered Ascend code: the tokens are those of the torch references, in fp32

SmolLM2-135M with its King James adapter, alone; and a random toy model for what one prompt does not show, a padded batch.
"""

import collections
import pytest
import torch
import npu_lora_kernels
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding.sampling import Plain
from npu_lora_decoding.decoding.loop import Decoder, Drafter
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.foundations.models import encode, shipped_adapter
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.decoding.tree import Tree
from npu_lora_kernels.targets import ASCEND, using
from npu_lora_kernels.launch import running
from verify.runner import Runner

VERSE = 'He who walks with wise men will be wise, but a companion of fools will suffer.'
PROMPT = [
    dict(role='system', content='Rewrite the verse in the English of the King James Bible.'),
    dict(role='user', content=VERSE),
]


class KnownAnswers(Drafter):
    "A drafter with a tree of four nodes: one draft token is right every other step, and its sibling is wrong"

    def __init__(self, answers):
        self.answers = answers
        self.steps = 0

    def propose(self, state, rows):
        self.steps += 1
        return Tree(
            torch.tensor([self.nodes(*o) for o in zip(self.answers, state.text)]),
            torch.tensor([[-1, 0, 0, 2]] * len(state.text)),
            'known',
        )

    def nodes(self, answer, text):
        "Return the tokens of one sequence's tree"
        right, then, *_ = answer[len(text) : len(text) + 2].tolist() + [0, 0]
        return [int(text[-1]), 96, right if self.steps % 2 else 95, then]


@pytest.fixture(scope='module')
def launches():
    "Serve all operators on the CPU by kernels whose launches are lowered and executed; count the launches"
    library = torch.library.Library('npu_lora', 'IMPL')
    taken = collections.Counter()

    def served(name, host):
        def call(*args):
            runner = Runner()
            with running(runner), using(ASCEND['Ascend910B3']):
                out = host(*args)
            taken.update(launch.lowered.name for launch in runner.launches)
            return out

        library.impl(name, call, 'CPU')

    for name, host in npu_lora_kernels.kernels().items():
        served(name, host)
    ops._KERNELS['cpu'] = dict.fromkeys(npu_lora_kernels.kernels(), 'lowered')
    yield taken
    ops._KERNELS['cpu'] = {}
    library._destroy()


def toy(folder):
    "Return a random model, its adapters and a padded batch"
    model = toy_model()
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = torch.randint(3, 95, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return model, AdapterBank(model, [load_adapter(toy_adapter(model, folder), model)], ops.lora), ids, mask


def smollm2(folder):
    "Return the embedded model, its adapter and one verse"
    lm = load(adapter=shipped_adapter())
    return lm.model, AdapterBank(lm.model, [lm.adapter], ops.lora), *encode(lm, [PROMPT])


def decode(model, bank, ids, mask, target, drafter=None):
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(
        input_ids=ids, attention_mask=mask, custom_generate=Decoder(target, drafter, bank=bank), **options
    )


WAYS = {'greedy': (Plain(), False), 'CoLD': (CoLD(0.1, 0.5), False), 'CoLD over trees': (CoLD(0.1, 0.5), True)}


@pytest.mark.parametrize('target, trees', WAYS.values(), ids=WAYS)
@pytest.mark.parametrize('make', [toy, smollm2])
def test_tokens_do_not_change(launches, tmp_path, make, target, trees):
    model, bank, ids, mask = make(tmp_path)
    with ops.references():
        wanted = decode(model, bank, ids, mask, target)
    launches.clear()
    got = decode(model, bank, ids, mask, target, drafter=KnownAnswers(wanted) if trees else None)
    assert torch.equal(got, wanted)
    used = {'lora_shrink_kernel', 'lora_expand_kernel'}
    if 'base' in target.roles:
        used.add('cold_candidates_kernel')
    if trees:
        used.add('kv_commit_kernel')
    assert used <= set(launches), f'only {dict(launches)} were launched'
    assert make is toy or 'lora_shrink_tile_kernel' in launches, 'a prompt of 16 tokens and more goes to the cube'
