"Copies and joined trees: against loops over every place and every path, and the properties a tree must keep"

from types import SimpleNamespace
import time
import pytest, torch
from hypothesis import given, strategies as st
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.decoding.loop import Decoder, Drafter
from npu_lora_decoding.hass.acceptance import Text, join_replays, replay_texts
from npu_lora_decoding.hass.checkpoint import save_head
from npu_lora_decoding.hass.features import target_features
from npu_lora_decoding.speculation.head_drafter import HASS
from npu_lora_decoding.speculation.joint import JointDrafter, LookupBeside, join_trees
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup, match_lengths, paths, replay_lookup
from npu_lora_decoding.speculation.adaptive import TreeSizing
from npu_lora_decoding.decoding.tree import Tree, root_tree
from helpers.heads import random_head
from helpers.toys import toy_lm

texts = lambda most, least=1: st.lists(st.integers(0, 2), min_size=least, max_size=most)
T = torch.tensor

# --- where the text stood before


def agree(where, i, tail):
    "How many tokens up to place `i` are the end of `tail`"
    n = 0
    while n < len(tail) and n <= i and where[i - n] == tail[-1 - n]:
        n += 1
    return n


@given(texts(14), texts(6))
def test_match_lengths_is_comparing(where, tail):
    assert match_lengths(T(where), T(tail)).tolist() == [agree(where, i, tail) for i in range(len(where) - 1)]


def naive_copy(text, corpus, draft_tokens, longest, shortest):
    "The longest agreement, the text before the corpus, of equals the last place"
    best = []
    n = shortest - 1
    for where in (text, *corpus):
        for found in [max((agree(where, i, text[-longest:]) for i in range(len(where) - 1)), default=0)]:
            if found <= n:
                continue
            last = max(i for i in range(len(where) - 1) if agree(where, i, text[-longest:]) == found)
            best = where[last + 1 : last + 1 + draft_tokens]
            n = found
    return best, n if best else 0


@given(texts(16), st.lists(texts(8, 0), max_size=2), st.integers(1, 5), st.integers(1, 3), st.integers(0, 3))
def test_copy_is_searching(text, corpus, draft_tokens, shortest, more):
    got, n = PromptLookup(draft_tokens, shortest + more, shortest, corpus).copy(T(text))
    assert (got.tolist(), n) == naive_copy(text, corpus, draft_tokens, shortest + more, shortest)


@pytest.mark.parametrize(
    'text,kw,want',
    [
        ([5], {}, ([], 0)),
        ([5, 5], {}, ([], 0)),
        ([5, 5], dict(min_ngram=1), ([5], 1)),  # one token, and one that agrees
        ([5, 6, 7, 5, 6], {}, ([7, 5, 6], 2)),
        ([5, 6, 7, 5, 6], dict(draft_tokens=2), ([7, 5], 2)),
        ([5, 6, 7, 5, 6], dict(min_ngram=3), ([], 0)),  # cut at the end of the text, or at `draft_tokens`
        ([1, 2, 3, 9, 4, 2, 3, 8, 0, 1, 2, 3], {}, ([9, 4, 2, 3, 8, 0, 1, 2], 3)),  # three tokens agree there, two here
        ([1, 2, 3, 9, 4, 2, 3, 8, 0, 1, 2, 3], dict(max_ngram=2), ([8, 0, 1, 2, 3], 2)),  # of equals the last
        ([1, 2, 3], dict(corpus=([9, 1, 2, 3, 4],)), ([4], 3)),
        ([1, 2, 3], dict(corpus=([9, 1, 2, 3],)), ([], 0)),  # nothing follows the corpus's end
        ([2, 3, 9, 1, 2, 3], dict(corpus=([1, 2, 3, 4],)), ([4], 3)),
        (
            [2, 3, 9, 2, 3],
            dict(corpus=([2, 3, 4],)),
            ([9, 2, 3], 2),
        ),  # a longer match in the corpus wins, an equal one does not
        ([1, 2], dict(corpus=([], [7], [1, 2, 8], [1, 2, 9])), ([8], 2)),
    ],
    ids=str,
)  # texts without a place, the first of equals
def test_copies_by_hand(text, kw, want):
    got, n = PromptLookup(**kw).copy(T(text))
    assert (got.tolist(), n) == want


def test_paths_of_a_batch():
    state = SimpleNamespace(text=[T([5, 6, 7, 5, 6]), T([1, 2, 3]), T([4, 1, 2, 8, 9, 9, 4, 1, 2])])
    state.last = T([6, 3, 2])
    tree = PromptLookup(draft_tokens=4).propose(state, None).checked()
    assert (
        tree.tokens.tolist()[0] == [6, 7, 5, 6, 6]
        and tree.tokens[2].tolist() == [2, 8, 9, 9, 4]
        and tree.tokens[:, 0].equal(state.last)
    )
    assert tree.parents.tolist() == [[-1, 0, 1, 2, -2], [-1, -2, -2, -2, -2], [-1, 0, 1, 2, 3]]
    torch.testing.assert_close(
        tree.scores, T([[1.0, 3 / 4, 9 / 16, 27 / 64, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.8, 0.64, 0.512, 0.4096]])
    )  # 2 and 3 tokens agree
    assert tree.proposers(0, [1]) == ['lookup']
    state.text = [T([1, 2, 3])]
    state.last = T([3])
    assert PromptLookup().propose(state, None).checked().size == 1


def test_corpora_of_every_kind():
    assert [c.tolist() for c in PromptLookup(corpus=([1, 2], T([[3, 4]]), T([5], dtype=torch.int32))).corpus] == [
        [1, 2],
        [3, 4],
        [5],
    ]


@pytest.mark.parametrize('kw', [dict(draft_tokens=0), dict(min_ngram=0), dict(min_ngram=3, max_ngram=2)], ids=str)
def test_copies_that_cannot_be(kw):
    with pytest.raises(DecodingError, match='max_ngram no smaller'):
        PromptLookup(**kw)


# --- one tree for several drafters


def tree_of(found, name, n, root=50):
    "A tree from `path -> score` for each sequence, `n` nodes and fillers"
    tokens = torch.full((len(found), n), root)
    parents = torch.full((len(found), n), -2)
    scores = torch.zeros(len(found), n)
    for b, f in enumerate(found):
        order = sorted(f, key=lambda p: (-f[p], len(p)))
        for i, p in enumerate(order):
            tokens[b, i], parents[b, i], scores[b, i] = (p[-1] if p else root), (order.index(p[:-1]) if p else -1), f[p]
    return Tree(tokens, parents, name, scores=scores).checked()


def read(tree, b):
    "Path -> score and who proposed it"
    found = [()]
    for t, p in zip(tree.tokens[b, 1:].tolist(), tree.parents[b, 1:].tolist()):
        found.append(None if p == -2 else (*found[p], t))
    who = tree.proposers(b, range(tree.size))
    return {p: (float(tree.scores[b, i]), who[i]) for i, p in enumerate(found) if p is not None}


@st.composite
def scored_paths(draw):
    "Paths with scores that fall from parent to child, ties among them"
    found = {(): 1.0}
    for _ in range(draw(st.integers(0, 7))):
        up = draw(st.sampled_from(sorted(found)))
        found.setdefault((*up, draw(st.integers(0, 2))), found[up] * draw(st.sampled_from([0.25, 0.5, 1.0])))
    return found


@given(st.lists(st.lists(scored_paths(), min_size=2, max_size=2), min_size=1, max_size=3), st.integers(1, 16))
def test_join_keeps_the_best_of_all(found, nodes):
    joined = join_trees([tree_of(f, f'd{k}', 9) for k, f in enumerate(found)], nodes).checked()
    for b in range(2):
        got = read(joined, b)
        all_of = {}
        for k, f in enumerate(found):
            for p, s in f[b].items():
                all_of[p] = max(s, all_of.get(p, (0, 0))[0]), all_of.get(p, (0, f'd{k}'))[1]
        real = int((joined.parents[b] > -2).sum())
        assert len(got) == real == min(nodes, len(all_of))  # siblings differ: a path twice would be one here
        assert all(all_of[p] == v for p, v in got.items()) and all(p[:-1] in got for p in got if p)
        scores = joined.scores[b].tolist()
        assert (
            scores == sorted(scores, reverse=True)
            and scores[:real] == sorted((s for s, _ in all_of.values()), reverse=True)[:nodes]
        )
        for n in range(1, joined.size + 1):
            first = joined.first(n).checked()
            assert read(first, b) == dict(list(got.items())[:n]) and first.size == n


def test_joined_batches_are_filled():
    a = tree_of([{(): 1.0, (3,): 0.5, (3, 4): 0.4}, {(): 1.0}], 'a', 3)
    b = tree_of([{(): 1.0, (3,): 0.6, (5,): 0.1}, {(): 1.0, (7,): 0.2}], 'b', 4)
    tree = join_trees([a, b], 16)
    assert tree.parents.tolist() == [[-1, 0, 1, 0], [-1, 0, -2, -2]] and tree.tokens.tolist() == [
        [50, 3, 4, 5],
        [50, 7, 0, 0],
    ]
    assert tree.proposers(0, [1, 2, 3]) == ['a', 'a', 'b'] and tree.proposers(1, [1]) == [
        'b'
    ]  # who is trusted most owns a draft token of several
    torch.testing.assert_close(tree.scores[0], T([1.0, 0.6, 0.4, 0.1]))  # but the higher score counts
    assert join_trees([a], 1).size == 1


def test_trees_without_scores_are_not_joined():
    with pytest.raises(DecodingError, match='without scores'):
        join_trees([paths([T([1])], T([5]), [0.5], 'a'), Tree(T([[5, 6]]), T([[-1, 0]]))], 4)


# --- drafters that share


class Stub(Drafter):
    "A drafter that notes what it is asked"

    def __init__(self, depths, reach, notes=(), reads=False, token=3):
        self.depths = depths
        self.depth = depths[-1]
        self.max_draft_depth = reach
        self.notes = notes
        self.reads_hidden = reads
        self.skipped = 0
        self.token = token

    def bind(self, rows):
        out = Stub(self.depths, self.max_draft_depth, self.notes, self.reads_hidden, self.token)
        out.rows = rows
        return out

    def skip(self, state, rows):
        self.skipped += 1

    def propose(self, state, rows):
        return paths([T([self.token])] * len(state.last), state.last, [0.5] * len(state.last), f'stub {self.token}')


def test_joined_speaks_for_all():
    deep = Stub((1, 2, 3), 3, ['a'], True)
    wide = Stub((8,), 8, ['b', 'c'], token=4)
    for both in ((deep, wide), (wide, deep)):
        j = JointDrafter(both, nodes=12)
        assert (
            j.reads_hidden
            and j.max_draft_depth == 8
            and j.depths == (1, 2, 3)
            and sorted(j.notes) == ['a', 'b', 'c']
            and j.draft_capacity == 12
            and j.depth == 3
        )
    assert (
        not JointDrafter((wide,)).reads_hidden
        and JointDrafter((deep, wide)).notes == ['a', 'b', 'c']
        and JointDrafter((wide,), nodes=1).draft_capacity == 2
    )
    j = JointDrafter((deep, wide))
    j.depth = 2
    assert (deep.depth, wide.depth, j.depth) == (2, 8, 2)
    j.depth = 8
    assert (deep.depth, wide.depth) == (2, 8)  # one that cannot go so far stays
    j.skip(None, None)
    assert deep.skipped == wide.skipped == 1


def test_joined_binds_its_drafters():
    j = JointDrafter((Stub((1, 2), 2), Stub((8,), 8, token=4)), nodes=5, adaptive=False)
    bound = j.bind('rows')
    assert (
        bound is not j
        and [d.rows for d in bound.drafters] == ['rows'] * 2
        and (bound.nodes, bound.adaptive) == (5, False)
    )
    assert not hasattr(j.drafters[0], 'rows')  # what a user holds is not changed
    state = SimpleNamespace(last=T([7, 8]))
    tree = bound.propose(state, None).checked()
    assert [read(tree, b) for b in range(2)] == [
        {(): (1.0, 'stub 3'), (3,): (0.5, 'stub 3'), (4,): (0.5, 'stub 4')}
    ] * 2
    assert JointDrafter((Stub((1,), 1), Stub((1,), 1, token=4)), nodes=2).bind(None).propose(state, None).size == 2


@pytest.mark.parametrize('adaptive', [False, True])
def test_copies_change_nothing(monkeypatch, adaptive):
    "Lookup alone, with the answer as its corpus, and two of them joined; draft tokens are accepted"
    monkeypatch.setattr(
        'npu_lora_decoding.speculation.adaptive.pass_seconds', lambda rows, sizes: {n: 1e3 + n for n in sizes}
    )  # drafting always pays
    model = toy_model(vocab=9)
    ids = torch.randint(3, 9, (3, 6))
    mask = T([[1] * 6, [0, 0, 0, 1, 1, 1], [0] + [1] * 5])
    run = lambda d: model.generate(
        input_ids=ids * mask,
        attention_mask=mask,
        custom_generate=Decoder(drafter=d),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    plain = run(None)
    corpus = tuple(plain.sequences[:, 6:])
    for d, passes in (
        (PromptLookup(adaptive=adaptive), 29),
        (PromptLookup(corpus=corpus, adaptive=adaptive), 20),
        (JointDrafter((PromptLookup(2), PromptLookup(corpus=corpus)), adaptive=adaptive), 20),
    ):
        out = run(d)
        assert (
            out.sequences.equal(plain.sequences)
            and len(out.steps) <= passes < len(plain.steps)
            and isinstance(d._last, TreeSizing) == adaptive
        )
        assert d.notes == () or list(d.notes) == []
        assert {t.proposer for s in out.steps for r in s.tokens for t in r} == {'lookup', 'target'}


# --- who does not pay rests


def passes(joined, state, rate, n, seconds):
    "Propose and judge `n` times with drafts of the given seconds; return who was asked each time"
    asked = []
    for _ in range(n):
        before = [len(w.seconds) for w in joined._contributions] or [0] * len(joined.drafters)
        joined.propose(state, None)
        asked.append([len(w.seconds) > k for w, k in zip(joined._contributions, before)])
        for w, a, s in zip(joined._contributions, asked[-1], seconds):
            if a:
                w.seconds[-1] = s
        joined.record_outcome(state, T([True] * len(state.last)), rate)
    return asked


def accepts(*tokens, b=2):
    "A state after a step that accepted `tokens` and drew one more"
    drawn = T([[*tokens, 8, 0]] * b)
    return SimpleNamespace(
        last=T([7] * b), drawn=drawn, accepted=(torch.arange(drawn.shape[1]) <= len(tokens)).expand(b, -1)
    )


def test_a_drafter_that_adds_nothing_rests():
    right = Stub((1,), 1, token=3)
    wrong = Stub((1,), 1, token=4)
    j = JointDrafter((right, wrong)).bind(None)
    asked = passes(j, accepts(3), 10.0, 100, (0.01, 0.01))
    assert all(a for a, _ in asked)
    rests = [i for i, (_, b) in enumerate(asked) if not b]
    assert rests == [*range(8, 24), *range(32, 64), *range(72, 100)]  # asked again, less and less often
    assert j.drafters[1].skipped == len(rests) and j.notes == [
        f'draft tokens of stub 4 did not pay beside the others: left out of {len(rests)} of 100 proposals'
    ]
    tree = j.propose(accepts(3), None).checked()
    assert tree.proposer == ('stub 3', 'stub 4') and tree.proposers(0, [1]) == [
        'stub 3'
    ]  # names keep their places while one rests


def test_a_drafter_that_is_right_and_dear_rests():
    "One draft token of two sequences a step, for time in which three tokens would have come"
    j = JointDrafter((Stub((1,), 1, token=3), Stub((1,), 1, token=4))).bind(None)
    asked = passes(j, accepts(4), 10.0, 12, (0.001, 0.3))
    assert asked[7] == [True, True] and asked[8:] == [[True, False]] * 4
    j = JointDrafter((Stub((1,), 1, token=3), Stub((1,), 1, token=4))).bind(None)
    assert passes(j, accepts(4), 10.0, 12, (0.0, 0.19)) == [[True, True]] * 12


def test_of_two_that_say_the_same_one_stays():
    j = JointDrafter((Stub((1,), 1), Stub((1,), 1))).bind(None)
    asked = passes(j, accepts(3), 10.0, 30, (0.02, 0.05))
    assert (
        asked[7] == [True, True] and asked[8:24] == [[True, False]] * 16
    )  # the dearer one rests, and then the other one is worth all


def test_a_resting_drafter_changes_no_token(monkeypatch):
    monkeypatch.setattr(
        'npu_lora_decoding.speculation.adaptive.pass_seconds', lambda rows, sizes: {n: 1 + n / 1e3 for n in sizes}
    )  # drafting always pays

    class Slow(Stub):
        def bind(self, rows):
            return Slow(self.depths, self.max_draft_depth, token=self.token)

        def propose(self, state, rows):
            time.sleep(0.01)
            return super().propose(state, rows)

    model = toy_model(vocab=9)
    ids = torch.randint(3, 9, (3, 6))
    run = lambda d: model.generate(
        input_ids=ids,
        custom_generate=Decoder(drafter=d),
        max_new_tokens=60,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    plain = run(None)
    monkeypatch.setattr('npu_lora_decoding.speculation.adaptive.TreeSizing._long_run', lambda self: 1e4)
    out = run(JointDrafter((PromptLookup(corpus=tuple(plain.sequences[:, 6:])), Slow((1,), 1, token=2))))
    assert out.sequences.equal(plain.sequences) and 'draft tokens of stub 2 did not pay' in ' '.join(out.notes)


# --- replayed against a text


def run_of(lm, prompts, drafter, **options):
    "The texts of a run, and the tokens and forward passes after the prefill of each sequence"
    ids = [lm.tokenizer(p).input_ids for p in prompts]
    out = lm.generate(prompts, drafter=drafter, max_new_tokens=40, record=False, **options)
    whole = [T(p + [t.id for t in ts]) for p, ts in zip(ids, out.tokens)]
    texts = [Text(x, len(p), f) for x, p, f in zip(whole, ids, target_features(lm, whole))]
    steps = [[len(s.tokens[b]) for s in out.steps[1:] if s.tokens[b]] for b in range(len(prompts))]
    return texts, [sum(x) for x in steps], [len(x) for x in steps]


@pytest.mark.parametrize('options', [dict(), dict(do_sample=True, temperature=0.3, seed=2)], ids=['greedy', 'sampled'])
def test_replayed_copies_equal_decoding(options):
    lm = toy_lm(vocab=76)
    prompts = ['abab', 'hello hello you', 'c, d. c, d. e', 'x']
    lookup = PromptLookup(draft_tokens=5, min_ngram=1, adaptive=False)
    texts, tokens, passes = run_of(lm, prompts, lookup, **options)
    counts = replay_lookup(lookup, texts)
    assert (counts.tokens.tolist(), counts.passes.tolist()) == (tokens, passes)
    assert max(n / p for n, p in zip(tokens, passes)) > 1.1
    assert (counts.accepted <= counts.tried).all() and (counts.tried[:, 1:] <= counts.accepted[:, :-1]).all()
    alone = [replay_lookup(lookup, [text]) for text in texts]
    assert torch.equal(join_replays(alone).tried, counts.tried)


def test_a_place_that_a_short_copy_did_not_reach_was_not_tried():
    # after 5 6 the copy is 9 alone: what stood behind it is the end of the text so far
    text = Text(T([5, 6, 9, 5, 6, 9, 9, 7]), 4, torch.zeros(8, 1))
    counts = replay_lookup(PromptLookup(draft_tokens=3, min_ngram=2), [text])
    # cycles: after 5 6 (copies 9 5 6: 1 right), after 9 9 (nothing)
    assert (counts.tokens.tolist(), counts.passes.tolist()) == ([3], [2])
    assert counts.tried.tolist() == [[1, 1, 0]] and counts.accepted.tolist() == [[1, 0, 0]]


def test_replayed_copies_beside_a_head_equal_decoding(tmp_path):
    lm = toy_lm(vocab=76)
    prompts = ['abab', 'hello hello you', 'c, d. c, d. e', 'x']
    head = random_head(lm, seed=3)
    folder = save_head(head, tmp_path / 'head', lm.model)
    size = dict(nodes=7, top_k=3)
    lookup = PromptLookup(draft_tokens=6, min_ngram=1, adaptive=False)
    hass = HASS(folder, depth=3, adaptive=False, **size)
    weights = head, lm.model.get_input_embeddings().weight, lm.model.lm_head.weight
    how = dict(chain=(), tree=dict(depth=2, **size), batch=3)
    joint = JointDrafter((hass, lookup), nodes=7, adaptive=False)
    joint.record_outcome = lambda *_: None
    texts, tokens, passes = run_of(lm, prompts, joint)
    found = replay_texts(*weights, texts, beside=LookupBeside(lookup, 7), **how)
    assert list(found) == ['tree 7', 'tree 7 + lookup']
    both = found['tree 7 + lookup']
    assert (both.tokens.tolist(), both.passes.tolist()) == (tokens, passes)
    assert both.passes.sum() < found['tree 7'].passes.sum() and both.tried.shape == (4, 6)
