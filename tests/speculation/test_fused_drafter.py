"Decoding with a head that fuses several layers: the tokens of plain decoding, and the draft tokens of a second way"

import pytest, torch
import npu_lora_decoding.decoding.runner as runner_module
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.decoding.loop import Decoder
from npu_lora_decoding.hass.checkpoint import save_head
from npu_lora_decoding.hass.fused_checkpoint import load_fused_head, save_fused_head
from npu_lora_decoding.speculation.head_drafter import HASS
from npu_lora_decoding.speculation.joint import JointDrafter
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup
from helpers.fused import Reference, check_tree, random_fused
from helpers.loops import COLD, PLAIN, calm_model, count_drafted, generate, knowing_head, same
from helpers.loops import rows  # fixture
from speculation.test_head_drafter import prompts

compiled = pytest.mark.skipif(not ops.compiles(), reason='torch.compile finds no C++ compiler')


class Toy:
    "A target of six layers, an adapter on it, and heads that read three of them"

    def __init__(self, folder):
        self.model = calm_model(vocab=23, num_hidden_layers=6)
        self.bank = AdapterBank(
            self.model, [load_adapter(toy_adapter(self.model, folder / 'adapter', lora_alpha=1), self.model)]
        )
        kinds = dict(plain={}, newer=dict(fc_norm=True, norm_output=True, norm_before_residual=True))
        self.folders = {}
        for (name, flags), layout in zip(kinds.items(), ('eagle3', 'speculators')):
            head = random_fused(self.model, w=14, **flags)
            self.folders[name] = save_fused_head(head, folder / name, self.model, layout)
        self.last = save_head(knowing_head(self.model), folder / 'last', self.model)


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return Toy(tmp_path_factory.mktemp('fused'))


DRAFTERS = dict(
    chain=lambda f: HASS(f, chain=True, adaptive=False),
    tree=lambda f: HASS(f, adaptive=False, nodes=12, top_k=4),
    sized_chain=lambda f: HASS(f, chain=True),
    sized_tree=lambda f: HASS(f),
    joined=lambda f: JointDrafter((HASS(f), PromptLookup(min_ngram=1)), adaptive=False),
)


def run(toy, target, drafter, lengths=(7, 3, 5, 1), rows={}, **kw):
    decoder = Decoder(target, drafter, bank=toy.bank if target == COLD else None, **rows)
    kw = dict(return_dict_in_generate=True, max_new_tokens=24) | kw
    return generate(toy.model, *prompts(lengths), decoder, **kw)


@pytest.mark.parametrize('lengths', [(5,), (7, 3, 5, 1)], ids=str)
@pytest.mark.parametrize('target', [PLAIN, COLD], ids=str)
@pytest.mark.parametrize('name', DRAFTERS)
@pytest.mark.parametrize('kind', ['plain', 'newer'])
def test_drafting_changes_nothing(toy, kind, name, target, lengths):
    plain = run(toy, target, None, lengths)
    fast = run(toy, target, DRAFTERS[name](toy.folders[kind]), lengths)
    same(fast.sequences, plain.sequences)
    if 'sized' not in name:
        assert any(s.tree.size > 1 for s in fast.steps)


@pytest.mark.parametrize('name', ['tree', 'chain', 'joined'])
def test_drafting_changes_nothing_on_a_static_cache(toy, rows, name):
    fast = run(toy, COLD, DRAFTERS[name](toy.folders['newer']), rows=rows)
    same(fast.sequences, run(toy, COLD, None).sequences)
    assert any(s.tree.size > 1 for s in fast.steps)


@pytest.mark.parametrize('name', ['tree', 'sized_tree', 'chain', 'joined'])
def test_draws_with_shared_noise(toy, name):
    drawn = dict(do_sample=True, temperature=0.8, top_k=0)
    plain = run(toy, PLAIN, None, rows=dict(seed=7), **drawn)
    fast = run(toy, PLAIN, DRAFTERS[name](toy.folders['plain']), rows=dict(seed=7), **drawn)
    same(fast.sequences, plain.sequences)
    assert len(set(plain.sequences[0].tolist())) > 5


def drafts_agree(toy, out, target, folder, lengths=(7, 3, 5, 1), top=4):
    "Compare each draft of a run with one that is made from the text alone, and return how many draft tokens were compared"
    ids, mask = prompts(lengths)
    texts = [row[m.bool()] for row, m in zip(ids, mask)]
    reference = Reference(folder, toy.model)
    compared = 0
    with toy.bank.attached([0 if target == COLD else -1]):
        for step in out.steps:
            for b, text in enumerate(texts):
                if step.tree.size > 1 and step.tokens[b]:
                    assert step.tree.tokens[b, 0] == text[-1]
                    of_text = [
                        None if x is None else x[b] for x in (step.tree.tokens, step.tree.parents, step.tree.scores)
                    ]
                    compared += check_tree(reference, text, *of_text, every=3, top=top)
                    best = int(step.tree.tokens[b, 1])
                    assert best == reference.chain(text, 1)[0][0]
            texts = [
                torch.cat([text, torch.tensor([t.id for t in tokens], dtype=torch.long)])
                for text, tokens in zip(texts, step.tokens)
            ]
    return compared


@pytest.mark.parametrize('lengths', [(5,), (7, 3, 1)], ids=str)
@pytest.mark.parametrize('target', [PLAIN, COLD], ids=str)
@pytest.mark.parametrize('kind', ['plain', 'newer'])
@pytest.mark.parametrize('name', ['chain', 'tree'])
def test_drafts_are_those_of_the_text(toy, rows, name, kind, target, lengths):
    drafter = DRAFTERS[name](toy.folders[kind])
    out = run(toy, target, drafter, lengths, rows, max_new_tokens=12)
    assert drafts_agree(toy, out, target, toy.folders[kind], lengths, top=1 if name == 'chain' else 4) > 9
    if name == 'tree' and len(lengths) > 1:
        assert count_drafted(out) > 3  # so that slots of accepted nodes were read


def test_one_layer_off_is_seen_in_drafts(toy, monkeypatch):
    "The tokens are still right, which is why nobody else would notice"
    honest = runner_module.layer_inputs
    monkeypatch.setattr(runner_module, 'layer_inputs', lambda model, layers: shifted(honest, model, layers))
    out = run(toy, PLAIN, DRAFTERS['chain'](toy.folders['plain']), max_new_tokens=12)
    same(out.sequences, run(toy, PLAIN, None, max_new_tokens=12).sequences)
    with pytest.raises(AssertionError):
        drafts_agree(toy, out, PLAIN, toy.folders['plain'])


class shifted:
    "Layer inputs under the number of the layer before"

    def __init__(self, honest, model, layers):
        self.inner = honest(model, tuple(i - 1 for i in layers))

    def __enter__(self):
        self.read = self.inner.__enter__()
        return _Renamed(self.read)

    def __exit__(self, *error):
        return self.inner.__exit__(*error)


class _Renamed:
    def __init__(self, read):
        self.read = read

    def items(self):
        return [(i + 1, x) for i, x in self.read.items()]


@pytest.mark.slow
@compiled
def test_compiled_tokens_and_drafts(toy):
    "One program for the tree's pass, one for the draft"
    drafter = HASS(toy.folders['newer'], adaptive=False, depth=3, top_k=2, nodes=6)
    out = run(toy, COLD, drafter, (7, 3), dict(compile=True), max_new_tokens=12)
    same(out.sequences, run(toy, COLD, None, (7, 3), max_new_tokens=12).sequences)
    assert drafts_agree(toy, out, COLD, toy.folders['newer'], (7, 3), top=2) > 10
    assert len(drafter._bound.programs) == 1


def test_two_kinds_of_heads_in_one_tree(toy):
    "One reads the last state, the other three layers of the same forward pass"
    drafter = JointDrafter((HASS(toy.last), HASS(toy.folders['newer']), HASS(toy.folders['plain'])), adaptive=False)
    out = run(toy, PLAIN, drafter)
    same(out.sequences, run(toy, PLAIN, None).sequences)
    assert count_drafted(out) > 9


@pytest.mark.parametrize(
    'asked, why', [(dict(draft_vocab=5), 'leave draft_vocab out'), (dict(adapter='any'), 'leave adapter out')], ids=str
)
def test_what_fused_heads_do_not_have(toy, asked, why):
    with pytest.raises(DecodingError, match=f'fuses several layers.*{why}'):
        run(toy, PLAIN, HASS(toy.folders['plain'], **asked))


def test_a_head_that_is_not_finite_stops_drafting(toy, tmp_path):
    drafter = HASS(toy.folders['plain'], adaptive=False)
    run(toy, PLAIN, drafter, max_new_tokens=3)
    drafter._bound.head.norm.weight.fill_(0)
    drafter._bound.head.fc.weight.fill_(torch.inf)
    out = run(toy, PLAIN, drafter)
    same(out.sequences, run(toy, PLAIN, None).sequences)
    assert all(s.tree.size == 1 for s in out.steps)
