"""Decoding with a head: the tokens and the distribution of plain decoding whatever is drafted,
and a head's cache that equals one forward pass over the text
"""

import copy, math
from dataclasses import dataclass
from itertools import product
import pytest, torch
from tokenizers.decoders import Fuse
from transformers import StoppingCriteriaList
import npu_lora_decoding.decoding.loop as decode_module
import npu_lora_decoding.decoding.runner as rows_module
import npu_lora_decoding.speculation.adaptive as sizing
import npu_lora_decoding.speculation.head_drafter as speculate
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding.sampling import Plain
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.decoding.loop import Decoder, Drafter
from npu_lora_decoding.hass.head import DraftHead, target_weights, head_config
from npu_lora_decoding.hass.checkpoint import save_head
from npu_lora_decoding.speculation.compiled_draft import DraftProgram, CompiledDraft, static_head_cache
from npu_lora_decoding.speculation.joint import JointDrafter
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup, paths
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.decoding.loop import LM
from npu_lora_decoding.decoding.runner import CompiledRunner
from npu_lora_decoding.speculation.adaptive import TreeSizing
from npu_lora_decoding.speculation.head_drafter import HASS, committed_slots
from npu_lora_decoding.decoding.tree import root_tree
from helpers.loops import COLD, Collects, EndsOn, PLAIN, Pair, Toy
from helpers.loops import chi_square, count_drafted, generate, same, sampled, toy
from helpers.loops import llama, paying, rows, small  # fixtures
from helpers.toys import toy_tokenizer

compiled = pytest.mark.skipif(not ops.compiles(), reason='torch.compile finds no C++ compiler')


@pytest.fixture(scope='module')
def qwen3(tmp_path_factory):
    return toy(tmp_path_factory.mktemp('qwen3'), 'qwen3', seed=4)


def prompts(lengths=(7, 3, 5, 1), v=23, seed=0):
    t = max(lengths)
    mask = torch.stack([(torch.arange(t) >= t - n).long() for n in lengths])
    return torch.randint(3, v, mask.shape, generator=generator(seed)) * mask, mask


def run(t, target=PLAIN, drafter=None, lengths=(7, 3, 5, 1), rows={}, bank=None, **kw):
    bank = bank if target == PLAIN else t.bank
    return generate(
        t.model,
        *prompts(lengths),
        Decoder(target, drafter, bank=bank, **rows),
        **dict(return_dict_in_generate=True, max_new_tokens=24) | kw
    )


def equals_plain(t, drafter, target=PLAIN, lengths=(7, 3, 5, 1), rows={}, least=1, **kw):
    plain = run(t, target, None, lengths, **kw)
    fast = run(t, target, drafter, lengths, rows, **kw)
    same(fast.sequences, plain.sequences)
    assert count_drafted(fast) >= least and len(fast.steps) <= len(plain.steps)
    return plain, fast


DRAFTERS = dict(
    chain=lambda f: HASS(f, chain=True),
    tree=lambda f: HASS(f),
    fixed=lambda f: HASS(f, adaptive=False),
    lookup=lambda f: PromptLookup(min_ngram=1),
    joined=lambda f: JointDrafter((HASS(f), PromptLookup(min_ngram=1)), adaptive=False),
    sized=lambda f: JointDrafter((PromptLookup(min_ngram=1), HASS(f, chain=True)), nodes=9),
)

# --- greedy: the same tokens


@pytest.mark.parametrize('lengths', [(5,), (7, 3, 5, 1)], ids=str)
@pytest.mark.parametrize('target', [PLAIN, COLD], ids=str)
@pytest.mark.parametrize('name', DRAFTERS)
@pytest.mark.parametrize('family', ['llama', 'qwen3'])
def test_drafting_changes_nothing(request, family, name, target, lengths):
    t = request.getfixturevalue(family)
    more = (
        dict(max_new_tokens=60) if name == 'lookup' or name == 'chain' and len(lengths) == 1 else {}
    )  # until the text repeats itself, or one of few draft tokens is right
    _, fast = equals_plain(t, DRAFTERS[name](t.folder), target, lengths, least=2, **more)
    if name in ('tree', 'fixed', 'joined'):
        assert count_drafted(fast) >= 6 * len(lengths)
    assert {x.proposer for s in fast.steps for r in s.tokens for x in r} <= {'target', 'head', 'lookup'}


@pytest.mark.parametrize('name', ['chain', 'tree', 'fixed', 'joined'])
def test_drafting_changes_nothing_on_a_static_cache(llama, rows, name):
    equals_plain(llama, DRAFTERS[name](llama.folder), COLD, rows=rows, least=8)


def test_an_adapter_without_contrast(llama):
    plain, fast = (run(llama, PLAIN, d, bank=llama.bank) for d in (None, HASS(llama.folder)))
    same(fast.sequences, plain.sequences)
    assert count_drafted(fast) > 9
    assert not torch.equal(plain.sequences, run(llama).sequences)


def test_on_a_peft_model(llama, tmp_path):
    from peft import PeftModel

    peft = PeftModel.from_pretrained(
        copy.deepcopy(llama.model), toy_adapter(llama.model, tmp_path, lora_alpha=1)
    ).eval()
    ids, mask = prompts()
    out = generate(peft, ids, mask, Decoder(COLD, HASS(llama.folder)), max_new_tokens=24, return_dict_in_generate=True)
    same(out.sequences, run(llama, COLD).sequences)
    assert count_drafted(out) > 9


def test_several_settings_of_a_tree(llama):
    for kw in (
        dict(depth=1, nodes=2),
        dict(depth=1, top_k=3, nodes=4),
        dict(depth=7, top_k=2, nodes=40),
        dict(depth=2, top_k=99, nodes=3),
        dict(chain=True, depth=1),
        dict(top_k=1, nodes=3),
    ):
        equals_plain(llama, HASS(llama.folder, adaptive=False, **kw))


@pytest.mark.parametrize('kw', [dict(), dict(chain=True)], ids=['tree', 'chain'])
def test_a_large_batch_drafts_no_more_than_it_checks(llama, rows, kw):
    drafter = HASS(llama.folder, **kw)
    lengths = tuple(3 + i % 5 for i in range(17))
    _, fast = equals_plain(llama, drafter, PLAIN, lengths, rows)
    bound = drafter._last.inner
    assert (bound.depths, bound.hass.nodes, bound.hass.top_k if not kw else 1) == ((1,), 2, 1) and drafter.nodes == (
        6 if kw else 16
    )  # what a user holds is not changed
    assert drafter._last.sizes == (1, 2)


@pytest.mark.slow
@compiled
def test_compiled_tokens_are_eager_tokens(llama):
    "One program for the tree's pass, one for the draft: the prefill is eager, and a fixed tree has one size"
    torch._dynamo.reset()
    drafter = HASS(llama.folder, adaptive=False, depth=1, top_k=5, nodes=6)
    _, fast = equals_plain(llama, drafter, COLD, (7, 3), dict(compile=True), least=6)
    again = run(llama, COLD, drafter, (4, 6), dict(compile=True))  # nothing of the first text is left
    same(again.sequences, run(llama, COLD, None, (4, 6)).sequences)
    assert count_drafted(again) > 5
    assert len(drafter._bound.programs) == 1


# --- what the head has read


def naive_cache(t, text, bank=None):
    "The head's keys and values of a whole text, in one forward pass"
    ids = text[None]
    with torch.no_grad(), (bank or AdapterBank(t.model, [])).attached([0 if bank else -1]):
        f = t.model.model(ids).last_hidden_state
    n = len(text) - 1
    return t.head(
        t.model.get_input_embeddings()(ids[:, 1:]),
        f[:, :-1],
        torch.arange(n)[None],
        torch.ones(1, n, n, dtype=torch.bool).tril(),
    )[1]


def inner(drafter):
    "The head at work"
    d = drafter._last if hasattr(drafter, '_last') else drafter
    while hasattr(d, 'inner'):
        d = d.inner
    return d.drafters[0] if isinstance(d, JointDrafter) else d


def cache_is_right(t, drafter, out, mask, bank=None):
    "Every committed slot is the one of a single forward pass; sequences that went on to the last step lack that one only"
    cache = drafter.cache
    first = mask.shape[1]
    for b, n in enumerate(cache.length.tolist()):
        text = out.sequences[b][first - int(mask[b].sum()) :]
        committed = int(mask[b].sum()) + sum(len(s.tokens[b]) for s in out.steps[:-1])
        assert n == committed - 1 if out.steps[-1].tokens[b] else 0 < n < committed
        for ours, want in zip((cache.keys, cache.values), naive_cache(t, text[: n + 1], bank)):
            torch.testing.assert_close(ours[b, :, :n], want[0], rtol=1e-3, atol=1e-3)  # fp32; sums in another order


@pytest.mark.parametrize('name', ['chain', 'tree', 'fixed', 'joined'])
@pytest.mark.parametrize('target', [PLAIN, COLD], ids=str)
def test_the_head_has_read_the_text(llama, rows, name, target):
    drafter = DRAFTERS[name](llama.folder)
    out = run(llama, target, drafter, rows=rows)
    cache_is_right(llama, inner(drafter), out, prompts()[1], llama.bank if target == COLD else None)


class Naps(Drafter):
    "A head that is asked only in some passes"

    reads_hidden = True

    def __init__(self, hass, naps):
        self.hass = hass
        self.naps = naps
        self.draft_capacity = hass.draft_capacity
        self.max_draft_depth = hass.max_draft_depth
        self.i = 0

    def start(self, rows):
        self.inner = self.hass.start(rows)
        self.i = 0
        return self

    def propose(self, state, rows):
        self.i += 1
        if self.i not in self.naps:
            return self.inner.propose(state, rows)
        self.inner.skip(state, rows)
        return root_tree(state.last)


@pytest.mark.parametrize('naps', [{3}, {2, 3, 4, 7}, {1}, {1, 2, 3, 6, 8}], ids=str)
def test_pauses_leave_no_gap(llama, rows, naps):
    drafter = Naps(HASS(llama.folder, adaptive=False), naps)
    plain = run(llama, COLD)
    fast = run(llama, COLD, drafter, rows=rows)
    same(fast.sequences, plain.sequences)
    assert count_drafted(fast) > 9 and max(naps) < drafter.i  # awake at the end
    cache_is_right(llama, inner(drafter.inner), fast, prompts()[1], llama.bank)


def test_drafts_after_a_pause_are_those_without(llama, rows):
    "The same text, so the same tree, however the slots before it came"
    trees = []

    class Seen(Naps):
        def propose(self, state, rows):
            tree = super().propose(state, rows)
            if len(state.text[0]) == 12:
                trees.append(tree)
            return tree

    for naps in ({1, 2, 3, 4}, {1, 4}, {2, 4}, {2, 3}):
        run(llama, drafter=Seen(HASS(llama.folder, adaptive=False, chain=True), naps), lengths=(7,), rows=rows)
    trees = [t for t in trees if t.size > 1]
    assert len(trees) > 1
    for t in trees[1:]:
        assert t.tokens.equal(trees[0].tokens)
        torch.testing.assert_close(t.scores, trees[0].scores, rtol=1e-3, atol=1e-4)  # fp32; sums in another order


def test_drafting_that_loses_pauses_and_catches_up(llama, rows, monkeypatch):
    "Passes over trees are dear until the first pause"
    costs = {}
    skip = speculate._HeadDrafter.skip
    monkeypatch.setattr(
        sizing, 'pass_seconds', lambda rows, sizes: costs.update({n: 1e3 if n == 1 else 9e3 for n in sizes}) or costs
    )

    def cheaper(self, *a):
        costs.update({n: 1e3 for n in costs})
        skip(self, *a)

    monkeypatch.setattr(speculate._HeadDrafter, 'skip', cheaper)
    monkeypatch.setattr(sizing, 'first_seconds', lambda rows, sizes: (sizing.pass_seconds(rows, sizes), False))
    drafter = HASS(llama.folder)
    _, fast = equals_plain(llama, drafter, COLD, (7, 3), rows, least=3, max_new_tokens=46)
    sizer = drafter._last
    assert (
        '16 of' in sizer.notes[0]
        and 'plain without a draft: 16' in drafter.explain()
        and not sizer.backoff.left
        and fast.notes == sizer.notes
    )
    cache_is_right(llama, inner(drafter), fast, prompts((7, 3))[1], llama.bank)


def test_ended_sequences_keep_what_they_had(llama, rows):
    free = run(llama, max_new_tokens=40)
    eos = [free.sequences[0, 7 + 3].item(), free.sequences[2, 7 + 9].item()]
    drafter = HASS(llama.folder)
    plain, fast = equals_plain(llama, drafter, rows=rows, eos_token_id=eos, max_new_tokens=40, least=3)
    lengths = [sum(len(s.tokens[b]) for s in fast.steps) for b in range(4)]
    assert len(set(lengths)) > 1
    cache_is_right(llama, inner(drafter), fast, prompts()[1])


def test_committed_slots_are_a_loop():
    g = generator(1)
    for width in (None, 4, 9):
        h = torch.randn(3, 6, 2, generator=g)
        follows = torch.randint(0, 99, (3, 6), generator=g)
        committed = torch.rand(3, 6, generator=g) < 0.5
        f, t, count = committed_slots(h, follows, committed, width)
        assert (
            f.shape[1] == t.shape[1] == (width or int(committed.sum(-1).max()))
            and count.tolist() == committed.sum(-1).tolist()
        )
        for b in range(3):
            n = min(int(count[b]), t.shape[1])
            assert t[b, :n].equal(follows[b, committed[b]][:n]) and f[b, :n].equal(h[b, committed[b]][:n])


# --- one drafter, several texts


def test_a_drafter_is_used_again(llama, rows):
    drafter = HASS(llama.folder)
    for lengths in ((7, 3, 5, 1), (5,), (2, 9), (5,)):
        equals_plain(llama, drafter, lengths=lengths, rows=rows, least=3)
        bound = drafter._bound
    assert bound is drafter._bound  # read once
    both = copy.deepcopy(llama.model)
    other = Toy(both, llama.head, llama.folder, None)
    equals_plain(other, drafter, rows=rows, least=9)
    assert drafter._bound is not bound and drafter._bound.model is both


def test_a_head_for_another_model_is_named(llama, qwen3):
    drafter = HASS(llama.folder)
    equals_plain(llama, drafter)
    with pytest.raises(DecodingError, match='head for another model'):
        run(Toy(toy_model(vocab=23, seed=1), None, None, None), drafter=drafter)
    with pytest.raises(DecodingError, match='another model|no place|lacks'):
        run(qwen3, drafter=drafter)
    equals_plain(llama, drafter)  # and still serves its own


def test_a_draft_vocabulary(tmp_path):
    few = [5, 7, 3, 20, 11, 2, 9, 13, 4, 22]
    t = toy(tmp_path, vocab=few)
    for n in (None, 4):
        drafter = HASS(t.folder, draft_vocab=n, adaptive=False)
        seen = set()
        equals_plain(t, drafter, COLD, least=3 if n is None else 0)
        assert drafter._bound.lm_head.shape == (n or 10, 32)
        fast = run(t, COLD, drafter, max_new_tokens=40)
        seen = {x.id for s in fast.steps for r in s.tokens for x in r if x.proposer == 'head'}
        assert seen and seen <= set(few[:n])


def test_a_part_of_it_needs_a_draft_vocabulary(llama):
    with pytest.raises(DecodingError, match='no draft vocabulary'):
        run(llama, drafter=HASS(llama.folder, draft_vocab=9))


@pytest.mark.parametrize('kw', [dict(depth=0), dict(top_k=0), dict(nodes=1)], ids=str)
def test_drafts_that_cannot_be(kw):
    with pytest.raises(DecodingError, match='give a depth and top_k'):
        HASS('head', **kw)


def test_a_chain_has_its_own_size():
    d = HASS('head', chain=True, depth=4)
    assert (d.nodes, d.draft_capacity, d.max_draft_depth) == (5, 5, 4) and HASS('head').draft_capacity == 16


# --- a head that fails


@pytest.mark.parametrize('name', ['chain', 'tree', 'fixed'])
def test_a_head_without_numbers_drafts_nothing(llama, rows, name):
    drafter = DRAFTERS[name](llama.folder)
    run(llama, drafter=drafter, rows=rows)
    drafter._bound.head.fc.weight[0, 0] = torch.nan
    plain, fast = equals_plain(llama, drafter, rows=rows, least=0)
    assert count_drafted(fast) == 0 and len([n for n in drafter._last.notes if 'NaN' in n]) == 1


def test_a_head_that_fails_on_the_way(llama, rows, monkeypatch):
    "What was drafted before stays; the note comes once, and nobody asks the head again"
    broken = []
    extend = speculate.HeadCache.extend

    def breaks(self, *a, **k):
        out = extend(self, *a, **k)
        if self.length.max() < 12:
            return out
        broken.append(1)
        return out * torch.nan

    monkeypatch.setattr(speculate.HeadCache, 'extend', breaks)
    drafter = HASS(llama.folder, adaptive=False)
    plain, fast = equals_plain(llama, drafter, rows=rows, least=3)
    assert len(broken) == 1 and len(drafter._last.notes) == 1 and fast.notes == drafter._last.notes
    last = max(i for i, s in enumerate(fast.steps) if any(x.proposer == 'head' for r in s.tokens for x in r))
    assert last < len(fast.steps) - 5


# --- what ends a text


def runs_of(out, b, n):
    "Runs of `n` accepted draft tokens of sequence `b` that stand nowhere before, as ids"
    x = [x for s in out.steps for x in s.tokens[b]]
    ids = [t.id for t in x]
    return [
        ids[i : i + n]
        for i in range(len(x) - n)
        if all(t.proposer == 'head' for t in x[i : i + n + 1 if n == 1 else i + n])
        and not any(ids[j : j + n] == ids[i : i + n] for j in range(i))
    ]


@pytest.mark.parametrize('target', [PLAIN, COLD], ids=str)
def test_an_end_inside_an_accepted_run(llama, rows, target):
    "The step accepted more than it may keep"
    free = run(llama, target, HASS(llama.folder))
    inside = 0
    for b in range(4):
        for end in runs_of(free, b, 1)[:1]:
            _, fast = equals_plain(llama, HASS(llama.folder), target, rows=rows, eos_token_id=end)
            last = [x for s in fast.steps for x in s.tokens[b]][-1]
            inside += last.id == end[0] and last.proposer == 'head'
    assert inside > 0


def test_the_length_limit_inside_a_tree(llama, rows):
    for n in (1, 2, 3, 5, 9):
        _, fast = equals_plain(llama, HASS(llama.folder), COLD, rows=rows, least=n > 2, max_new_tokens=n)
        assert fast.sequences.shape[1] == 7 + n


def test_a_criterion_across_accepted_tokens(llama, rows):
    "Alone, where a path is not cut to that of others; in a batch the tokens are the same too"
    inside = 0
    for n in (7, 3, 5, 1):
        free = run(llama, COLD, HASS(llama.folder, adaptive=False), (n,))
        for pair in runs_of(free, 0, 2):
            stop = dict(stopping_criteria=StoppingCriteriaList([Pair({tuple(pair)})]))
            _, fast = equals_plain(llama, HASS(llama.folder, adaptive=False), COLD, (n,), rows, least=0, **stop)
            inside += [x.proposer for s in fast.steps for x in s.tokens[0]][-2:] == ['head', 'head']
            equals_plain(llama, HASS(llama.folder, adaptive=False), COLD, rows=rows, least=0, **stop)
    assert inside > 0


def test_a_prompt_of_one_token(llama, rows):
    drafter = HASS(llama.folder)
    _, fast = equals_plain(llama, drafter, COLD, (1,), rows, least=5)
    cache_is_right(llama, inner(drafter), fast, prompts((1,))[1], llama.bank)


@pytest.mark.parametrize(
    'kw',
    [
        dict(repetition_penalty=1.3),
        dict(min_new_tokens=9, eos_token_id=[5, 8, 20, 13, 11]),
        dict(bad_words_ids='seen'),
        dict(no_repeat_ngram_size=2),
    ],
    ids=str,
)
@pytest.mark.parametrize('target', [PLAIN, COLD], ids=str)
def test_processors_that_read_the_text(llama, rows, target, kw):
    free = run(llama, target).sequences
    if 'bad_words_ids' in kw:
        kw = dict(bad_words_ids=[[int(x)] for x in free[0, 9:12].unique()] + [free[1, 9:11].tolist()])
    plain, _ = equals_plain(llama, HASS(llama.folder), target, rows=rows, **kw)
    assert plain.sequences.shape != free.shape or not torch.equal(plain.sequences, free)


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
    t = toy(tmp_path_factory.mktemp('lm'), v=76, context=64)
    tokenizer = toy_tokenizer()
    tokenizer.backend_tokenizer.decoder = Fuse()  # stop strings want text without spaces between its tokens
    return LM(t.model, tokenizer, None, 'toy'), t.folder


def ids_of(out):
    return [x.id for x in out.tokens[0]]


def test_stop_strings_across_accepted_tokens(lm):
    lm, folder = lm
    free = lm.generate([5, 6, 7], drafter=HASS(folder), max_new_tokens=60, eos_token_id=96)
    inside = 0
    for pair in [p for p in runs_of(free, 0, 2) if min(p) > 3][:3]:
        word = lm.tokenizer.decode(pair)
        plain, fast = (
            lm.generate([5, 6, 7], drafter=d, max_new_tokens=60, stop_strings=[word], eos_token_id=96)
            for d in (None, HASS(folder))
        )
        assert ids_of(fast) == ids_of(plain) and fast.text.endswith(word) and len(ids_of(plain)) < 60
        inside += [x.proposer for x in fast.tokens[0]][-2:] == ['head', 'head']
    assert inside > 0


@pytest.mark.parametrize('n', [5, 50, 61, 63])
def test_a_full_context(lm, rows, n):
    lm, folder = lm
    for d in (HASS(folder), HASS(folder, chain=True, adaptive=False)):
        plain, fast = (
            lm.generate(torch.arange(3, 3 + n), drafter=x, eos_token_id=96, **r) for x, r in ((None, {}), (d, rows))
        )
        assert ids_of(fast) == ids_of(plain) and len(ids_of(fast)) == 64 - n


def test_streamed_tokens_are_the_answer(llama):
    ids, mask = prompts((5,))
    stream = Collects()
    out = generate(
        llama.model,
        ids,
        mask,
        Decoder(drafter=HASS(llama.folder), streamer=stream),
        max_new_tokens=24,
        return_dict_in_generate=True,
    )
    assert stream.got[0] == ids[0].tolist() and stream.got[-1] == 'end' and count_drafted(out) > 3
    assert sum(stream.got[1:-1], []) == out.sequences[0, 5:].tolist()


def test_records_survive_drafting(llama):
    plain, fast = equals_plain(llama, HASS(llama.folder), COLD, least=9)
    for b in range(4):
        for x, y in zip(*([x for s in o.steps for x in s.tokens[b]] for o in (fast, plain)), strict=True):
            assert (x.id, x.expert_top1, x.plausible) == (y.id, y.expert_top1, y.plausible) and x.logp == pytest.approx(
                y.logp, abs=1e-3
            )


# --- near the end of a static cache


@pytest.mark.parametrize('rows', ['static'], indirect=True)
@pytest.mark.parametrize('name', ['fixed', 'chain', 'tree'])
def test_trees_near_the_end_of_a_static_cache(llama, rows, name):
    drafter = DRAFTERS[name](llama.folder)
    for lengths in ((200,), (200, 198, 3)):
        _, fast = equals_plain(
            llama, drafter, lengths=lengths, rows=rows, max_new_tokens=256 - drafter.draft_capacity - 200, least=9
        )
        assert fast.sequences.shape[1] == 256 - drafter.draft_capacity
        cache_is_right(llama, inner(drafter), fast, prompts(lengths)[1])


@pytest.mark.parametrize('rows', ['static'], indirect=True)
@pytest.mark.parametrize('naps', [set(), set(range(25, 60))], ids=['awake', 'asleep'])
def test_one_sequence_ends_long_before_the_others(llama, rows, naps):
    "All tokens of the first sequence are drafted, none of the second; then nothing is drafted, and the head catches up"
    kw = dict(lengths=(100, 3), max_new_tokens=256 - 16 - 100)
    plain = run(llama, **kw)

    class Sure(Naps):
        def propose(self, state, rows):
            if super().propose(state, rows).size == 1:
                return root_tree(state.last)
            at = len(state.text[0])
            right = plain.sequences[0, at : at if state.done[0] else at + 5]
            return paths([right, right[:0]], state.last, [0.9, 0.9], 'sure')

    drafter = Sure(HASS(llama.folder, adaptive=False), naps)
    fast = run(llama, drafter=drafter, rows=rows, **kw)
    same(fast.sequences, plain.sequences)
    assert count_drafted(fast) > 90
    cache_is_right(llama, inner(drafter.inner), fast, prompts((100, 3))[1])


@pytest.mark.parametrize('rows', ['static'], indirect=True)
@pytest.mark.parametrize('ended', [100, 239])
def test_many_slots_beside_an_ended_sequence(llama, rows, ended):
    "The head's cache alone: 40 new slots of one sequence, none of another that has ended"
    drafter = HASS(llama.folder).bind(
        CompiledRunner(llama.model, ('expert',), 2, 240, draft_capacity=16, keep_hidden=True, max_draft_depth=5)
    )
    drafter.cache.length.copy_(torch.tensor([ended, 60]))
    f, follows, count = drafter._catch_up(
        torch.randn(2, 40, 32), torch.arange(80).view(2, 40) % 23, torch.tensor([0, 40])
    )
    assert (
        drafter.cache.length.tolist() == [ended, 99]
        and follows[1].tolist() == [79 % 23]
        and count.tolist() == [[False], [True]]
    )


# --- sampling: the distribution of the target


TREE = dict(nodes=8, depth=2, top_k=3)
CHAIN = dict(chain=True, depth=2)


@pytest.mark.parametrize('target', [PLAIN, CoLD(0.05, 0.5)], ids=str)
@pytest.mark.parametrize('kw', [TREE, CHAIN], ids=['tree', 'chain'])
def test_sampled_draft_tokens_follow_the_distribution(small, target, kw):
    "Joint distribution of the first three tokens: the last two may be draft tokens"
    counts, p, hits = sampled(small, target, HASS(small.folder, **kw), 1500)
    got, limit = chi_square(counts, p, 1500)
    assert got < limit and hits > 300 and (p > 5 / 1500).sum() > 12


def test_a_rule_that_prefers_draft_tokens_is_found_out(small, monkeypatch):
    "A bug that the test above must see: the first draft token is drawn twice as often as it should be"
    choose = decode_module.choose_tokens

    def leaning(target, tree, logits, state, rules):
        if tree.size > 1:
            logits = (logits[0].clone(), *logits[1:])
            logits[0][:, 0].scatter_add_(1, tree.tokens[:, 1:2], torch.full_like(logits[0][:, 0, :1], math.log(2)))
        return choose(target, tree, logits, state, rules)

    monkeypatch.setattr(decode_module, 'choose_tokens', leaning)
    counts, p, _ = sampled(small, PLAIN, HASS(small.folder, **TREE), 1500)
    got, limit = chi_square(counts, p, 1500)
    assert got > limit


@pytest.mark.slow
@compiled
def test_compiled_drafts_of_equal_shapes_stay_apart():
    "Once seen, programs run without guards: neither another depth nor another head may answer"
    model = toy_model()
    frozen = target_weights(model)
    d = model.config.hidden_size

    def head(seed):
        h = DraftHead(head_config(model.config)).requires_grad_(False)
        g = generator(seed)
        for p in h.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
        return h

    programs = [
        DraftProgram(head(seed), frozen.embed, frozen.lm_head, depth, 4, 8) for seed, depth in ((0, 3), (0, 5), (1, 3))
    ]
    fast = [CompiledDraft(p) for p in programs]
    g = generator(3)
    slots = (
        torch.randn(1, 4, d, generator=g),
        torch.randint(3, 97, (1, 4), generator=g),
        torch.tensor([4]),
        torch.tensor([5]),
    )
    given = lambda p: (*static_head_cache(p.head, 1, 64).tensors, *slots)
    with torch.no_grad():
        want = [p(*given(p)) for p in programs]
    assert not all(torch.equal(want[0][0], w[0]) for w in want[1:])
    for turn in range(2):
        for f, p, w in zip(fast, programs, want):
            assert f.ready(*given(p)) == (turn > 0)
            got = f(*given(p))
            assert torch.equal(got[0], w[0]) and torch.equal(got[1], w[1])
            torch.testing.assert_close(got[2], w[2], rtol=1e-4, atol=1e-6)
