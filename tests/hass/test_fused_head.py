"Heads with fused features: every switch against a second way of computing it, and the states of the target that they read"

import pytest, torch
from itertools import product
import npu_lora_decoding.hass.fused_checkpoint as fused_checkpoint
import npu_lora_decoding.hass.fused_head as fused_head
from npu_lora_decoding.decoding.runner import BatchRunner, CompiledRunner, layer_inputs
from npu_lora_decoding.decoding.tree import Tree
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.hass.drafting import HeadCache, draft_chain, draft_tree
from npu_lora_decoding.hass.fused_checkpoint import load_fused_head, save_fused_head
from npu_lora_decoding.hass.fused_head import (
    FusedHead,
    Fusion,
    check_fusion,
    fused_config,
    fused_layers,
    new_fused_head,
)
from npu_lora_decoding.hass.head import DraftHead, draft_embeddings, head_config, target_weights
from helpers.fused import FLAGS, LAYERS, Reference, check_tree, random_fused
from helpers.loops import rows, uncompiled  # fixtures

TEXTS = torch.tensor([[5, 17, 40, 8, 11, 3], [9, 4, 60, 22, 7, 90]])


@pytest.fixture(scope='module')
def target():
    return toy_model(num_hidden_layers=6)


def switches():
    for values in product([False, True], repeat=4):
        flags = dict(zip(FLAGS, values))
        if not (flags['norm_before_fc'] and flags['fc_norm']):
            yield flags


def named(flags):
    return '+'.join(name for name, on in flags.items() if on) or 'none'


def opened(head, target):
    "The head's cache of two texts and its outputs, and what drafting needs"
    with torch.no_grad(), layer_inputs(target, head.reads) as read:
        target(TEXTS)
    embed = draft_embeddings(head, target_weights(target))
    cache = HeadCache(2, embed.device)
    states = torch.cat([read[i] for i in head.reads], -1)[:, :-1]
    outputs = cache.extend(head, embed[TEXTS[:, 1:]], states)
    return dict(
        head=head,
        cache=cache,
        tokens=TEXTS[:, -1],
        outputs=outputs,
        embed=embed,
        lm_head=head.lm_head.weight,
        vocab=head.vocab,
    )


def chains_agree(folder, target):
    "Whether chains of 5 have the reference's tokens and scores"
    tree = draft_chain(k=5, **opened(load_fused_head(folder, target), target))
    reference = Reference(folder, target)
    for ids, tokens, scores in zip(TEXTS, tree.tokens, tree.scores):
        want, probabilities = reference.chain(ids, 5)
        if tokens[1:].tolist() != want or not torch.allclose(scores[1:], probabilities, rtol=1e-3, atol=1e-6):
            return False
    return True


@pytest.mark.parametrize('layout', ['speculators', 'eagle3'])
@pytest.mark.parametrize('flags', list(switches()), ids=named)
def test_chains_of_every_kind(target, tmp_path, flags, layout):
    save_fused_head(random_fused(target, **flags), tmp_path / 'head', target, layout)
    assert chains_agree(tmp_path / 'head', target)


@pytest.mark.parametrize(
    'kind', [dict(family='qwen3'), dict(w=None), dict(width=48), dict(layers=(0, 4)), dict(layers=(3,))], ids=str
)
def test_chains_of_other_forms(target, tmp_path, kind):
    "Norms on queries and keys; all tokens; a width and embeddings of its own; other layers"
    save_fused_head(random_fused(target, **kind), tmp_path / 'head', target)
    assert chains_agree(tmp_path / 'head', target)


@pytest.mark.parametrize('flags', [{}, dict(fc_norm=True, norm_output=True)], ids=named)
def test_every_node_of_a_tree(target, tmp_path, flags):
    save_fused_head(random_fused(target, **flags), tmp_path / 'head', target)
    head = load_fused_head(tmp_path / 'head', target)
    tree = draft_tree(depth=5, top_k=2, nodes=16, **opened(head, target))
    reference = Reference(tmp_path / 'head', target)
    found = [check_tree(reference, *of_text) for of_text in zip(TEXTS, tree.tokens, tree.parents, tree.scores)]
    assert found == [15, 15] and int(tree.depths.max()) >= 3


def state_not_normed(monkeypatch):
    monkeypatch.setattr(FusedHead, 'finish', lambda self, u, context: DraftHead.finish(self, u[..., -32:], context))


def scores_not_normed(monkeypatch):
    monkeypatch.setattr(FusedHead, 'readout', lambda self, outputs: outputs)


def state_before_embedding(monkeypatch):
    honest = FusedHead.fuse_inputs

    def swapped(self, e, g):
        a, b, c = honest(self, e, g).chunk(3, -1)
        return torch.cat([b, a, c], -1)

    monkeypatch.setattr(FusedHead, 'fuse_inputs', swapped)


def residual_of_the_other_switch(monkeypatch):
    honest = FusedHead.fuse_inputs
    monkeypatch.setattr(
        FusedHead,
        'fuse_inputs',
        lambda self, e, g: torch.cat([honest(self, e, g)[..., :64], honest(self, e, g)[..., 32:64]], -1),
    )


def wrong_layers(monkeypatch):
    honest = fused_checkpoint.read_layers
    monkeypatch.setattr(fused_checkpoint, 'read_layers', lambda *args: tuple(i - 1 for i in honest(*args)))


def layers_out_of_order(monkeypatch):
    honest = fused_checkpoint.read_layers
    monkeypatch.setattr(fused_checkpoint, 'read_layers', lambda *args: honest(*args)[::-1])
    monkeypatch.setattr(fused_checkpoint, 'check_fusion', lambda *args: None)


def distances_as_tokens(monkeypatch):
    honest = fused_checkpoint.vocab_of

    def misread(tensors, *args):
        d2t = tensors['d2t']
        honest(tensors, *args)
        return d2t

    monkeypatch.setattr(fused_checkpoint, 'vocab_of', misread)


BUGS = (
    scores_not_normed,
    state_before_embedding,
    residual_of_the_other_switch,
    wrong_layers,
    layers_out_of_order,
    distances_as_tokens,
)


@pytest.mark.parametrize('bug', BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_seen(target, tmp_path, monkeypatch, bug):
    save_fused_head(random_fused(target), tmp_path / 'head', target)
    bug(monkeypatch)
    assert not chains_agree(tmp_path / 'head', target)


def test_a_state_without_its_norm_is_seen(target, tmp_path, monkeypatch):
    save_fused_head(random_fused(target, norm_output=True), tmp_path / 'head', target)
    state_not_normed(monkeypatch)
    assert not chains_agree(tmp_path / 'head', target)


# --- what the target delivers


def check_states(bank, runner, texts, column):
    "Assert that the states of every role and sequence are those of reading its text alone"
    for role, adapter in enumerate((0, -1)):
        for b, text in enumerate(texts):
            with bank.attached([adapter]):
                want = runner.model(torch.tensor([text]), output_hidden_states=True).hidden_states
            for i in runner.watched:
                torch.testing.assert_close(runner.states[i][role][b, column], want[i][0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', ['eager', 'programs'])
@pytest.mark.parametrize('family', ['llama', 'qwen2', 'qwen3', 'mistral'])
@torch.no_grad()
def test_states_of_every_step(tmp_path, monkeypatch, family, kind):
    "Prompts of two lengths, two roles, a tree, what it kept, and a step behind it"
    if kind == 'programs':
        uncompiled(monkeypatch)
    model = toy_model(family, num_hidden_layers=4)
    bank = AdapterBank(model, [load_adapter(toy_adapter(model, tmp_path), model)])
    ids = torch.tensor([[0, 5, 6, 7], [9, 3, 4, 5]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    make = CompiledRunner if kind == 'programs' else BatchRunner
    runner = make(model, ('expert', 'base'), 2, 40, draft_capacity=8, keep_hidden=True)
    runner.watch((2, 0))
    runner.watch((3,))
    assert runner.watched == (0, 2, 3)
    both = [0, 0, -1, -1]
    next_roots = Tree(torch.tensor([[30]] * 2), torch.tensor([[-1]] * 2))
    with bank.attached(both):
        runner.prefill(ids, mask)
    check_states(bank, runner, [[5, 6, 7], [9, 3, 4, 5]], -1)
    with bank.attached(both):
        runner.forward(Tree(torch.tensor([[8, 11, 12]] * 2), torch.tensor([[-1, 0, 0]] * 2)))
    check_states(bank, runner, [[5, 6, 7, 8, 12], [9, 3, 4, 5, 8, 12]], 2)
    before = runner.states
    with bank.attached(both):
        runner.commit(torch.tensor([[True, False, True]] * 2))
        runner.time(next_roots)
        assert runner.states is before  # of the last step that counts
        runner.forward(next_roots)
    check_states(bank, runner, [[5, 6, 7, 8, 12, 30], [9, 3, 4, 5, 8, 12, 30]], 0)
    before = runner.states
    with bank.attached(both):
        runner.reset_prefix(ids)
    assert runner.states is before


def test_nobody_watches(target):
    runner = BatchRunner(target, ('expert',), 1, 20)
    runner.prefill(TEXTS[:1], torch.ones_like(TEXTS[:1]))
    assert runner.states == {} and not any(m._forward_pre_hooks for m in target.modules())


def test_hooks_are_gone_after_an_error(target):
    with pytest.raises(ZeroDivisionError), layer_inputs(target, (0, 6)):
        raise ZeroDivisionError
    assert not any(m._forward_pre_hooks for m in target.modules())


def test_a_whole_compiled_step_hides_its_layers(target, monkeypatch):
    import npu_lora_decoding.decoding.runner as module

    uncompiled(monkeypatch)
    monkeypatch.setattr(module, 'layer_programs', lambda model: None)
    runner = CompiledRunner(target, ('expert',), 1, 20, keep_hidden=True)
    runner.watch(())  # as heads do that read the last state
    with pytest.raises(DecodingError, match='hides them: decode with compile=False'):
        runner.watch((2,))


# --- forms


def test_default_layers():
    assert fused_layers(30) == (2, 15, 27)
    assert fused_layers(32) == (2, 16, 29)
    assert fused_layers(7) == (2, 3, 4)
    for n in (2, 4, 6):
        with pytest.raises(DecodingError, match='has no low, middle and high layer'):
            fused_layers(n)


@pytest.mark.parametrize('layers', [(), (2, 1), (1, 1), (-1, 3), (2, 7), (1.0, 2), (True, 2), ('1', '2')], ids=str)
def test_layers_that_are_none(layers):
    with pytest.raises(DecodingError, match='reads the layers'):
        check_fusion(Fusion(layers, 32, 20), 6)


def test_states_of_another_width(target):
    head = random_fused(target)
    with pytest.raises(DecodingError, match='are not 3 times 32 wide: give what the layers'):
        head.read(torch.zeros(1, 2, 32))


@pytest.mark.parametrize('family', ['llama', 'qwen2', 'qwen3', 'mistral'])
def test_a_new_head_begins_with_the_targets_scores(family):
    model = toy_model(family, num_hidden_layers=7)
    head = new_fused_head(model, torch.tensor([40, 3, 9]), fc_norm=True)
    assert head.reads == (2, 3, 4) and head.config.model_type == 'llama' and head.vocab.tolist() == [3, 9, 40]
    with torch.no_grad(), layer_inputs(model, (7,)) as read:
        want = model(TEXTS).logits[..., head.vocab]
    torch.testing.assert_close(head.lm_head(head.readout(read[7])), want)
    learn = {name for name, p in head.named_parameters() if p.requires_grad}
    assert 'lm_head.weight' not in learn and {'fc.weight', 'norm.weight', 'fc_norm.0.weight'} <= learn


def test_a_head_of_the_last_state_is_what_it_was(target):
    "The pieces that fused heads change do nothing in other heads"
    head = DraftHead(head_config(target.config))
    x = torch.randn(2, 3, 32)
    assert head.read(x) is x and head.readout(x) is x and head.reads == ()
    assert head.lm_head is None and head.embed_tokens is None
    assert not any('lm_head' in name or 'embed' in name for name in head.state_dict())
    assert draft_embeddings(head, target_weights(target)) is target_weights(target).embed or torch.equal(
        draft_embeddings(head, target_weights(target)), target_weights(target).embed
    )
