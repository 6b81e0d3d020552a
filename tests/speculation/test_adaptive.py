"""Sizes: what a forward pass costs, what draft tokens are worth, and when not to draft;
counts and rates against loops, passes whose time the test decides
"""

import bisect, contextlib
from types import SimpleNamespace
import pytest, torch
from torch.nn.functional import pad
from hypothesis import given, strategies as st
import npu_lora_decoding.speculation.adaptive as sizing
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.decoding.loop import Decoder, Drafter
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup
from npu_lora_decoding.decoding.runner import BatchRunner, CompiledRunner
from npu_lora_decoding.decoding.shared_noise import DraftNoise
from npu_lora_decoding.hass.drafting import _children
from helpers.loops import uncompiled
from npu_lora_decoding.speculation.adaptive import (
    Calibration,
    AcceptanceByDepth,
    AdaptiveDrafter,
    PLAIN_SHARE,
    TreeSizing,
    best_size,
    first_seconds,
    pass_seconds,
    tree_sizes,
)
from npu_lora_decoding.decoding.tree import Tree, root_tree

CPU = torch.device('cpu')
CUDA = torch.device('cuda')

# --- sizes


@pytest.mark.parametrize('few', [False, True])
@pytest.mark.parametrize('device', [CPU, CUDA], ids=str)
def test_sizes_rise_and_fit(device, few):
    widest = 32 if device == CPU else 128
    for b in range(1, 65):
        for nodes in (2, 3, 5, 8, 9, 16, 24, 33, 60, 64, 100):
            sizes = tree_sizes(b, nodes, device, few)
            assert sizes[0] == 1 and list(sizes) == sorted(set(sizes)) and 2 <= len(sizes) <= (2 if few else 8)
            assert (
                sizes[-1] <= nodes
                and all(n * b <= widest for n in sizes[2:])
                and (sizes[-1] * b <= widest or sizes[-1] == 2)
            )
            assert sizes[-1] == nodes or (sizes[-1] + 1) * b > widest  # no larger one fits
            if few:
                assert sizes == (1, tree_sizes(b, nodes, device)[-1])


@pytest.mark.parametrize(
    'b,nodes,device,sizes',
    [
        (1, 16, CPU, (1, 2, 4, 8, 16)),
        (1, 24, CPU, (1, 2, 4, 8, 16, 24)),
        (2, 24, CPU, (1, 2, 4, 8, 16)),
        (8, 64, CPU, (1, 2, 4)),
        (64, 64, CPU, (1, 2)),
        (1, 2, CPU, (1, 2)),
        (1, 3, CPU, (1, 2, 3)),
        (1, 100, CUDA, (1, 2, 4, 8, 16, 32, 64, 100)),
        (2, 64, CUDA, (1, 2, 4, 8, 16, 32, 64)),
    ],
)
def test_sizes_by_hand(b, nodes, device, sizes):
    assert tree_sizes(b, nodes, device) == sizes


def test_a_tree_of_one_node_is_refused():
    with pytest.raises(DecodingError, match='has no draft token'):
        tree_sizes(1, 1, CPU)


# --- what a forward pass costs


class Clock(torch.nn.Module):
    "A model whose passes take what the test says"

    device = CPU


def clocked(model, seconds, b=2, keep_hidden=False, roles=('expert',)):
    asked = []

    def time(tree):
        asked.append(tree.checked())
        return seconds[tree.size].pop(0)

    return SimpleNamespace(model=model, b=b, roles=roles, keep_hidden=keep_hidden, time=time, asked=asked)


def test_the_median_without_the_first_forward_pass():
    rows = clocked(Clock(), {1: [100.0, 1.0, 9.0, 2.0], 4: [100.0, 5.0, 3.0, 8.0]})  # the first may compile
    assert pass_seconds(rows, (1, 4)) == {1: 2.0, 4: 5.0}
    assert [t.size for t in rows.asked] == [1, 4] * 4  # in turn: a machine that slows down slows all sizes
    assert rows.asked[1].parents.tolist() == [[-1, 0, 1, 2]] * 2


def test_measured_once_for_each_model_and_kind_of_rows():
    model = Clock()
    again = lambda: {1: [1.0] * 4, 2: [2.0] * 4, 3: [3.0] * 4}
    first = pass_seconds(clocked(model, again()), (1, 2))
    nothing = clocked(model, {})
    assert pass_seconds(nothing, (1, 2)) == first and not nothing.asked
    for other in (dict(b=3), dict(keep_hidden=True), dict(roles=('expert', 'base'))):
        rows = clocked(model, again(), **other)
        assert pass_seconds(rows, (1, 2)) and rows.asked
    rows = clocked(model, again())
    assert pass_seconds(rows, (1, 3)) == {1: 1.0, 3: 3.0}
    rows = clocked(Clock(), again())
    pass_seconds(rows, (1, 2))
    assert rows.asked

    class Other(SimpleNamespace):
        pass

    rows = Other(**vars(clocked(model, again())))
    pass_seconds(rows, (1, 2))
    assert rows.asked


def compiled(seconds):
    "A clocked runner whose sizes are programs to compile"
    runner = object.__new__(CompiledRunner)
    vars(runner).update(vars(clocked(Clock(), seconds)), columns=256)
    return runner


def test_one_node_is_estimated_where_it_is_a_program_to_compile():
    runner = compiled({1: [1.0] * 4, 8: [3.0] * 8})
    costs, is_estimate = first_seconds(runner, (1, 8))
    assert is_estimate and costs == {1: 3.0 * PLAIN_SHARE, 8: 3.0} and {t.size for t in runner.asked} == {8}
    assert pass_seconds(runner, (1, 8)) == {1: 1.0, 8: 3.0}
    assert first_seconds(runner, (1, 8)) == ({1: 1.0, 8: 3.0}, False)  # measured: estimated no more


@pytest.mark.parametrize('right, plain, sizes', [(3, 1.9, {4}), (0, 1.9, {4, 1}), (0, 3.9, {4})])
def test_one_node_is_measured_where_plain_decoding_seems_to_win(monkeypatch, right, plain, sizes):
    runner = compiled({1: [plain] * 4, 4: [2.0] * 8})
    sizer = TreeSizing(Inner(), (1, 4))
    fake_seconds(monkeypatch, lambda: sizer, 0.1)
    state = SimpleNamespace(done=torch.zeros(2, dtype=torch.bool), last=torch.arange(2), accepted=None)
    chosen = set()
    for _ in range(12):
        tree = sizer.propose(state, runner)
        chosen.add(tree.size)
        state.accepted = (torch.arange(tree.size) <= right).repeat(2, 1)
    measured = right == 0
    assert chosen == sizes and sizer.estimates_plain == (not measured)
    assert ('estimate' in sizer.explain()) == (not measured)
    assert sizer.costs[1] == (plain if measured else 2 * PLAIN_SHARE)


def runner_on(model, cached):
    "A runner of one sequence whose cache holds these keys and values of every layer"
    runner = BatchRunner(model, ('expert',), 1, 30, draft_capacity=8)
    for layer, (keys, values) in enumerate(zip(cached[::2], cached[1::2])):
        runner.cache.update(keys, values, layer)
    runner.valid = torch.ones(1, cached[0].shape[2], dtype=torch.bool)
    return runner


@pytest.mark.parametrize('static', [False, True])
@pytest.mark.parametrize('keeps', [False, True])
def test_measuring_leaves_no_trace(monkeypatch, static, keeps):
    "Cache, valid columns, hidden states and pending nodes stay; and the next forward pass gives the same logits"
    uncompiled(monkeypatch)
    model = toy_model(vocab=11)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    rows = (CompiledRunner if static else BatchRunner)(
        model, ('expert',), 2, 30, draft_capacity=8, keep_hidden=keeps, max_draft_depth=3
    )
    tree = Tree(torch.tensor([[4, 5, 6, 7], [8, 9, 3, 4]]), torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, -2]]))
    with torch.no_grad():
        rows.prefill(torch.randint(3, 11, (2, 5)) * mask, mask)
        rows.forward(tree)
        rows.commit(torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]]).bool())  # sequences of different lengths
        held = lambda: [x[:, :, : rows.valid.shape[1]].clone() for l in rows.cache.layers for x in (l.keys, l.values)]
        before = held()
        valid = rows.valid.clone()
        hidden = rows.hidden
        length = int(rows.cache.get_seq_length())
        for n in (1, 2, 8):
            assert rows.time(sizing._path(2, n, CPU)) > 0
        assert (
            rows.valid.equal(valid)
            and rows.hidden is hidden
            and (hidden is not None) == keeps
            and rows.pending == 0
            and int(rows.cache.get_seq_length()) == length
        )
        for a, b in zip(before, held(), strict=True):
            assert torch.equal(a, b)
        got = rows.forward(tree)[0]
        for b in range(2):
            twin = runner_on(model, [x[b : b + 1, :, valid[b]] for x in held()])
            real = tree.parents[b] >= -1
            torch.testing.assert_close(
                got[b, real],
                twin.forward(Tree(tree.tokens[b : b + 1], tree.parents[b : b + 1]))[0][0, real],
                rtol=1e-4,
                atol=1e-4,
            )  # fp32; sums in another order


# --- what draft tokens are worth


def random_tree(g, b=3, n=7, kinds=1):
    "Random trees with fillers at the end; scores fall along every path"
    tokens = torch.randint(0, 50, (b, n), generator=g)
    parents = torch.full((b, n), -2)
    scores = torch.zeros(b, n)
    for row in range(b):
        real = int(torch.randint(1, n + 1, (), generator=g))
        for i in range(real):
            up = int(torch.randint(0, i, (), generator=g)) if i else -1
            parents[row, i], scores[row, i] = up, (
                float(scores[row, up]) * float(torch.rand((), generator=g)) if i else 1.0
            )
    return Tree(
        tokens,
        parents,
        tuple('abc'[:kinds]),
        torch.randint(0, kinds, (b, n), generator=g) if kinds > 1 else None,
        scores,
    )


def random_walk(g, tree):
    "Accepted nodes: the root and one path below it"
    accepted = tree.parents == -1
    for row in range(len(accepted)):
        at = 0
        while (below := (tree.parents[row] == at).nonzero().flatten().tolist()) and float(
            torch.rand((), generator=g)
        ) < 0.7:
            at = below[int(torch.randint(0, len(below), (), generator=g))]
            accepted[row, at] = True
    return accepted


class Naive:
    "Calibration, one node after the other"

    def __init__(self):
        self.counts = {}

    def _step(self, tree, b, i):
        q = min(1.0, float(tree.scores[b, i]) / max(1e-12, float(tree.scores[b, tree.parents[b, i]])))
        return q, (0 if tree.source is None else int(tree.source[b, i]), bisect.bisect_left(Calibration.edges, q))

    def observe(self, tree, accepted, live):
        for b in range(len(accepted)):
            for i in range(1, tree.size):
                up = int(tree.parents[b, i])
                if up < 0 or not accepted[b, up] or not live[b]:
                    continue
                tried, right = self.counts.get(self._step(tree, b, i)[1], (0, 0))
                self.counts[self._step(tree, b, i)[1]] = tried + 1, right + int(accepted[b, i])

    def rates(self, tree):
        out = torch.zeros(tree.parents.shape, dtype=torch.float64)
        for b in range(len(out)):
            for i in range(tree.size):
                up = int(tree.parents[b, i])
                if up < 0:
                    out[b, i] = float(up == -1)
                    continue
                q, key = self._step(tree, b, i)
                tried, right = self.counts.get(key, (0, 0))
                out[b, i] = out[b, up] * (right + 8 * q) / (tried + 8)
        return out


@pytest.mark.parametrize('kinds', [1, 3])
def test_calibration_is_counting(kinds):
    g = generator(3)
    ours = Calibration(CPU, kinds)
    naive = Naive()
    observed = 0
    for _ in range(60):
        tree = random_tree(g, kinds=kinds)
        torch.testing.assert_close(ours.rates(tree), naive.rates(tree), rtol=1e-5, atol=1e-9)
        accepted = random_walk(g, tree)
        live = torch.rand(3, generator=g) < 0.7
        ours.observe(tree, accepted, live)
        naive.observe(tree, accepted, live)
    assert sum(t for t, _ in naive.counts.values()) == int(ours.tried.sum()) > 100 and len(naive.counts) > 10 * kinds


def node(*scores, parents=None, source=None, names='a'):
    n = len(scores)
    return Tree(
        torch.arange(n)[None],
        torch.tensor([parents or list(range(-1, n - 1))]),
        names,
        None if source is None else torch.tensor([source]),
        torch.tensor([scores]),
    )


def test_unseen_draft_tokens_are_worth_their_scores():
    tree = node(1.0, 0.6, 0.5, 0.3, 0.06, 0.0, parents=[-1, 0, 0, 1, 3, -2])
    torch.testing.assert_close(
        Calibration(CPU).rates(tree)[0],
        torch.tensor([1.0, 0.6, 0.5, 0.3, 0.06, 0.0], dtype=torch.float64),
        rtol=1e-6,
        atol=1e-9,
    )


def test_a_wrong_draft_token_counts_once_and_those_below_it_not():
    c = Calibration(CPU)
    c.observe(node(1.0, 0.5, 0.25, 0.1), torch.tensor([[True, False, False, False]]), torch.tensor([True]))
    assert int(c.tried.sum()) == 1 and int(c.right.sum()) == 0
    assert float(c.rates(node(1.0, 0.5))[0, 1]) == pytest.approx(8 * 0.5 / 9)


def test_siblings_count_both():
    c = Calibration(CPU)
    c.observe(node(1.0, 0.6, 0.35, parents=[-1, 0, 0]), torch.tensor([[True, False, True]]), torch.tensor([True]))
    assert int(c.tried.sum()) == 2 and int(c.right.sum()) == 1
    assert float(c.rates(node(1.0, 0.6))[0, 1]) < 0.6 and float(c.rates(node(1.0, 0.35))[0, 1]) > 0.35


def test_proposers_are_counted_apart():
    c = Calibration(CPU, 2)
    for _ in range(50):
        c.observe(
            node(1.0, 0.55, 0.55, parents=[-1, 0, 0], source=[0, 0, 1], names=('a', 'b')),
            torch.tensor([[True, False, True]]),
            torch.tensor([True]),
        )
    a, b = (float(c.rates(node(1.0, 0.55, source=[0, k], names=('a', 'b')))[0, 1]) for k in (0, 1))
    assert a < 0.1 and b > 0.9


def test_ended_sequences_do_not_count():
    c = Calibration(CPU)
    c.observe(node(1.0, 0.5), torch.tensor([[True, True]]), torch.tensor([False]))
    assert not c.tried.any()


# --- how many pay


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=20),
    st.lists(st.floats(0.01, 9), min_size=6, max_size=6),
    st.floats(0, 5),
)
def test_best_size_is_the_best(rates, seconds, rate):
    gains = torch.tensor([1.0, *rates], dtype=torch.float64).cumsum(0)
    costs = dict(zip((1, 2, 4, 8, 16, 32), seconds))
    value = {n: float(gains[min(n, len(gains)) - 1]) - rate * costs[n] for n in costs}  # a smaller tree is filled up
    n = best_size(gains, costs, rate)
    assert n in value and value[n] == max(value.values())


def test_best_size_by_hand():
    gains = torch.tensor([1.0, 1.9, 2.7, 3.4])
    costs = {1: 1.0, 2: 1.1, 4: 3.0, 8: 9.0}
    assert (
        best_size(gains, costs, 1.0) == 2 and best_size(gains, costs, 0.0) == 4 and best_size(gains, costs, 100.0) == 1
    )
    assert (
        best_size(torch.tensor([1.0, 2.0, 3.0]), costs, 0.1) == 4
        and best_size(torch.tensor([1.0, 2.0]), costs, 0.1) == 2
    )  # three nodes fill a size of 4


@given(st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 5), min_size=1, max_size=3)), max_size=12))
def test_acceptance_by_depth_is_an_average_that_forgets(passes):
    r = AcceptanceByDepth(5)
    for depth, right in passes:
        r.observe(right, depth)
    for j in range(5):
        tried = 4.0
        hits = 4 * 0.7 ** (j + 1)
        for depth, right in passes:
            if j < depth:
                tried = 0.96 * tried + len(right)
                hits = 0.96 * hits + sum(g >= j + 1 for g in right)
        assert r.tokens(j + 1) - r.tokens(j) == pytest.approx(hits / tried)
    assert r.tokens(0) == 0


# --- when not to draft


class Inner(Drafter):
    "Paths of the depth that was asked for"

    def __init__(self, depth=3, score=0.8):
        self.depths = tuple(range(1, depth + 1))
        self.depth = depth
        self.score = score
        self.skipped = 0
        self.asked = []

    def skip(self, state, rows):
        self.skipped += 1

    def propose(self, state, rows):
        self.asked.append(self.depth)
        n = self.depth + 1
        b = len(state.done)
        return Tree(
            state.last[:, None].repeat(1, n),
            torch.arange(-1, n - 1).repeat(b, 1),
            'inner',
            scores=(self.score ** torch.arange(n)).repeat(b, 1),
        )


def fake_seconds(monkeypatch, sizer, a_node):
    "Let a draft take `a_node` seconds for each of its levels"

    @contextlib.contextmanager
    def clock(device):
        yield {'s': a_node * sizer().inner.depth}

    monkeypatch.setattr(sizing, 'stopwatch', clock)


def run(sizer, right, passes, b=2, done=()):
    "Play `passes` passes, of which the target accepts `right(i)` draft tokens; return the sizes and whether each was a pause"
    state = SimpleNamespace(done=torch.tensor([i in done for i in range(b)]), last=torch.arange(b), accepted=None)
    sizes = []
    for i in range(passes):
        before = sizer.inner.skipped
        tree = sizer.propose(state, None).checked()
        assert tree.tokens[:, 0].equal(state.last) and (sizer.inner.skipped == before or tree.size == 1)
        sizes.append((tree.size, sizer.inner.skipped > before))
        state.accepted = (torch.arange(tree.size) <= right(i)).repeat(b, 1)
    return sizes


def naps(sizes):
    "Lengths of the pauses, and of the drafting between them"
    out = []
    for _, nap in sizes:
        if out and out[-1][0] == nap:
            out[-1][1] += 1
        else:
            out.append([nap, 1])
    return out


@pytest.fixture
def make(monkeypatch):
    def make(costs, a_node=0.01, **kw):
        s = TreeSizing(Inner(**kw), tuple(costs), costs)
        fake_seconds(monkeypatch, lambda: s, a_node)
        return s

    return make


def test_drafting_that_loses_is_given_up_for_longer_and_longer(make):
    s = make({1: 1.0, 2: 1.2, 4: 1.5})
    sizes = run(s, lambda i: 0, 160)
    assert naps(sizes) == [
        [False, 8],
        [True, 16],
        [False, 8],
        [True, 32],
        [False, 8],
        [True, 64],
        [False, 8],
        [True, 16],
    ]
    assert sizes[0] == (4, False)  # tried first
    assert s.inner.skipped == 128 and s.notes == [
        'drafting did not pay: 128 of 160 forward passes were plain decoding (drafter.explain() shows why)'
    ]
    assert sum(s.chosen.values()) == 32 == len(s.inner.asked)


def test_drafting_that_pays_never_stops(make):
    s = make({1: 1.0, 2: 1.05, 4: 1.1})
    assert run(s, lambda i: 3, 60) == [(4, False)] * 60 and s.notes == [] and s.inner.skipped == 0


def test_drafting_resumes_when_it_pays_again(make):
    s = make({1: 1.0, 2: 1.2, 4: 1.5})
    sizes = run(s, lambda i: 0 if i < 20 else 3, 80)
    assert naps(sizes) == [[False, 8], [True, 16], [False, 56]] and sizes[-1] == (4, False)
    assert '16 of 80' in s.notes[0]  # it did not pay, for a while


def test_passes_that_cost_too_much_are_plain_at_once(make):
    assert run(make({1: 1.0, 2: 90.0, 4: 91.0}), lambda i: 3, 3) == [(1, False)] * 3


def test_a_draft_costs_too(make):
    "All draft tokens right, forward passes free: but three times as long a draft as a forward pass"
    assert naps(run(make({1: 1.0, 2: 1.0, 4: 1.0}, a_node=2.0), lambda i: 3, 30))[:2] == [[False, 8], [True, 16]]


def test_depth_follows_what_is_accepted(make):
    cheap = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}
    deep = make(cheap, a_node=0.1, depth=7)
    run(deep, lambda i: 7, 40)
    assert deep.inner.asked[20:] == [7] * 20
    flat = make(cheap, a_node=0.2, depth=7)
    run(flat, lambda i: 1, 40)
    asked = flat.inner.asked
    assert (
        asked[0] == asked[16] == asked[32] == 7 and max(asked[34:]) <= 2
    )  # every 16th is as deep as can be, to hear of better times


def test_ended_sequences_have_no_say(make):
    class Two(Inner):
        def propose(self, state, rows):
            tree = super().propose(state, rows)
            return Tree(
                tree.tokens, tree.parents, 'inner', scores=torch.tensor([[0.99], [0.01]]) ** torch.arange(tree.size)
            )

    for done, size in ((0, 1), (1, 4)):
        s = TreeSizing(Two(), (1, 2, 4), {1: 1.0, 2: 1.3, 4: 1.9})
        assert run(s, lambda i: 0, 1, done=(done,)) == [(size, False)]


def test_rates_count_what_is_emitted_while_alive(make):
    s = make({1: 1.0, 2: 1.05, 4: 1.1}, a_node=0.0)
    run(s, lambda i: 3, 5, done=(1,))
    assert float(s.rate) == pytest.approx(4 / 1.1) and s._plain() == 1.0


def paced(monkeypatch, s, overhead, passes=200):
    "Return which steps were plain where each takes `overhead` beside its draft and its forward pass; 3 of 4 trees give 3 tokens"
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(sizing, 'time', SimpleNamespace(perf_counter=lambda: clock.now))
    state = SimpleNamespace(done=torch.zeros(1, dtype=torch.bool), last=torch.zeros(1, dtype=torch.long), accepted=None)
    plain = []
    for i in range(passes):
        tree = s.propose(state, None)
        state.accepted = (torch.arange(tree.size) < (3 if i % 4 else 2))[None]
        plain.append(tree.size == 1)
        clock.now += s.costs[tree.size] + overhead + 11.0 * (tree.size > 1)
    return plain


@pytest.mark.parametrize('overhead, low, high', [(0.0, 0.6, 1.0), (5.0, 0.0, 0.2)])
def test_what_a_step_takes_beside_its_forward_pass_counts_for_plain_decoding_too(monkeypatch, overhead, low, high):
    inner = Inner()
    inner.depths = (3,)
    s = TreeSizing(inner, (1, 4), {1: 20.0, 4: 45.0})
    fake_seconds(monkeypatch, lambda: s, 11.0 / 3)
    plain = paced(monkeypatch, s, overhead)
    # 56 for 2.75 tokens are more than 20 for one, and 61 are less than 25
    assert low < sum(plain) / len(plain) < high
    assert [s.overheads.median(n) for n in (1, 4)] == [overhead, overhead]


def test_what_steps_take_is_known_from_text_to_text():
    runner = compiled({})
    sizing.overheads_of(runner, (1, 4)).add(4, 2.0)
    assert sizing.overheads_of(runner, (1, 4)).median(4) == 2.0
    assert sizing.overheads_of(runner, (1, 8)).median(4) == 0.0


def test_costs_are_measured_once_after_the_prefill(monkeypatch):
    asked = []
    monkeypatch.setattr(
        sizing, 'pass_seconds', lambda rows, sizes: asked.append((rows, sizes)) or {n: 1.0 for n in sizes}
    )
    monkeypatch.setattr(sizing, 'overheads_of', lambda rows, sizes: sizing.Overheads())
    s = TreeSizing(Inner(), (1, 2, 4))
    run(s, lambda i: 3, 4)
    assert asked == [(None, (1, 2, 4))]


def test_inner_notes_come_first(make):
    s = make({1: 1.0, 2: 1.2, 4: 1.5})
    s.inner.notes = ['tired']
    assert s.notes == ['tired']
    run(s, lambda i: 0, 10)
    assert s.notes[0] == 'tired' and len(s.notes) == 2


def test_a_root_alone_is_nothing_to_size(make):
    class Silent(Inner):
        def propose(self, state, rows):
            return root_tree(state.last)

    s = TreeSizing(Silent(), (1, 2), {1: 1.0, 2: 1.1})
    assert run(s, lambda i: 0, 5) == [(1, False)] * 5 and not s.calibration.tried.any()


def test_explain_says_what_was_seen(make):
    s = make({1: 2.0, 2: 3.0, 4: 5.0}, a_node=1.0, score=0.75)
    run(s, lambda i: 1, 6)
    text = s.explain()
    assert (
        '1: 1.00, 2: 1.50, 4: 2.50' in text
        and 'Forward passes: 6, plain without a draft: 0' in text
        and f'by size of the tree: 1: {s.chosen[1]}, 2: {s.chosen[2]}, 4: {s.chosen[4]}' in text
    )
    assert 'depth 3: 1.50' in text and '  0.70 and above: ' in text and '0.80 and above' not in text
    assert f'of {int(s.calibration.tried.sum())}\n' in text


# --- drafts that know the noise of the draws


class WithNoise(Drafter):
    "One level of children of a drafter whose logits are the target's and an error; the target draws with the same noise"

    depths = (1,)
    depth = 1

    def __init__(self, passes, score, v=60):
        g = generator(11)
        target = torch.randn(passes, 1, v, generator=g) * 3
        logits = target + torch.randn(passes, 1, v, generator=g)
        keys = torch.randint(2**31, (passes, 1, 2), generator=g, dtype=torch.int32)
        noise = DraftNoise(keys, torch.ones(()))
        self.drawn = noise.added(target, 0)[:, 0].argmax(-1)
        zero = torch.zeros(passes, 1)
        self.tokens, self.scores = _children(logits, zero, torch.eye(v), None, k=8, noise=noise)
        if score == 'without':
            self.scores = logits.log_softmax(-1)[:, 0].gather(1, self.tokens)
        self.played = 0

    def propose(self, state, runner):
        row = slice(self.played, self.played + 1)
        order = self.scores[row].argsort(descending=True)
        tokens, scores = (x[row].gather(1, order) for x in (self.tokens, self.scores.exp()))
        parents = torch.tensor([[-1] + [0] * 8])
        return Tree(pad(tokens, (1, 0)), parents, 'head', scores=pad(scores, (1, 0), value=1.0))

    def right(self, tree):
        "Return which nodes the target accepts"
        accepted = tree.tokens == self.drawn[self.played]
        accepted[:, 0] = True
        self.played += 1
        return accepted


def noisy_rate(costs, passes=400, size=None, score='with'):
    "Return tokens a second of trees that are sized, or all of one size"
    drafter = WithNoise(passes, score)
    sizer = TreeSizing(drafter, tuple(costs), costs)
    state = SimpleNamespace(done=torch.tensor([False]), last=torch.tensor([0]), accepted=None)
    tokens = 0
    seconds = 0.0
    for _ in range(passes):
        before = sizer.plain_passes
        tree = drafter.propose(state, None).first(size) if size else sizer.propose(state, None)
        state.accepted = drafter.right(tree)
        tokens += int(state.accepted.sum())
        seconds += costs[tree.size] + 0.1 * (sizer.plain_passes == before)
    return tokens / seconds


@pytest.mark.parametrize(
    'costs',
    [{1: 1.0, 2: 1.1, 4: 1.3, 9: 1.9}, {1: 1.0, 2: 1.05, 4: 1.1, 9: 1.2}, {1: 1.0, 2: 1.3, 4: 1.9, 9: 3.4}],
    ids=['middling', 'cheap', 'dear'],
)
def test_the_chance_of_a_child_counts_the_noise(monkeypatch, costs):
    "With it trees of many sizes beat those of any one size; a drafter's probability without the noise is a poor score"
    fake_seconds(monkeypatch, lambda: SimpleNamespace(inner=SimpleNamespace(depth=1)), 0.1)
    best = max(noisy_rate(costs, size=n) for n in list(costs)[1:])
    sized = noisy_rate(costs)
    assert sized > 1.0 and sized > 0.99 * best and sized > 1.01 * noisy_rate(costs, score='without')


# --- drafters of a user


def answer(model, drafter, n=12, **kw):
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5]])
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=Decoder(drafter=drafter),
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **kw,
    )


def test_nothing_to_explain():
    model = toy_model(vocab=11)
    for d in (PromptLookup(), PromptLookup(adaptive=False)):
        with pytest.raises(DecodingError, match='nothing to explain yet'):
            d.explain()
        plain = answer(model, None)
        assert answer(model, d).equal(plain)
        if d.adaptive:
            assert d.explain().startswith('A forward pass costs, relative to one node: 1: 1.00')
        else:
            with pytest.raises(DecodingError, match='adaptive=True'):
                d.explain()


def test_explaining_a_text_that_ended_at_once():
    "One token: it comes with the prefill, and nothing was proposed or measured"
    d = PromptLookup()
    answer(toy_model(vocab=11), d, n=1)
    assert 'Nothing was proposed' in d.explain()


def test_each_batch_starts_from_scratch():
    model = toy_model(vocab=11)
    d = PromptLookup()
    answer(model, d)
    first = d._last
    answer(model, d)
    assert (
        d._last is not first and isinstance(first, TreeSizing) and d._last.sizes == first.sizes == tree_sizes(1, 9, CPU)
    )
    assert PromptLookup(draft_tokens=1).draft_capacity == 2 and PromptLookup(draft_tokens=20).draft_capacity == 21
    assert isinstance(d, AdaptiveDrafter) and isinstance(d, Drafter)
