"""CoLD in vLLM without vLLM: rows against a table that remembers everything, faults that must be caught,
and the two classes on stand-ins for vLLM's own
"""

import enum, sys, types
import pytest, torch
from safetensors.torch import load_file
from npu_lora_decoding.serving import vllm_client as vllm_ask, vllm_plugin as vllm_cold, vllm_pairing as vllm_pairs
from npu_lora_decoding.foundations.adapters import toy_adapter, toy_model
from npu_lora_decoding.cli.registry import COMMANDS
from npu_lora_decoding.cli.main import run
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding.sampling import shared_noise
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.serving.vllm_pairing import PairRows, PairedRow, PairRequest, WaitingRoom, contrast, read_twin

REFUSAL = 7


def twin(pair, role, alpha=0.1, beta=0.5):
    return PairRequest(pair, role, alpha, beta, REFUSAL)


def seat(pair, role, output=(), like=None, **how):
    return PairedRow(twin(pair, role, **how), like, list(output))


# --- rows


class Batch:
    """A batch as vLLM keeps it, by its own rules, and what it tells a processor;
    `held[row]` is `(pair, role)`, or None for a request without contrast
    """

    def __init__(self, seed):
        self.gen = generator(seed)
        self.held = []
        self.born = 0

    def draw(self, n):
        return int(torch.randint(n, (1,), generator=self.gen))

    def step(self):
        names = sorted({h[0] for h in self.held if h})
        gone = (
            [i for i, h in enumerate(self.held) if h and names and h[0] == names[self.draw(len(names))]]
            if self.draw(3) == 0
            else []
        )
        new = [(f'p{self.born}', r) for r in ('expert', 'base')] if self.draw(2) else [None] * self.draw(2)
        self.born += 1
        added = []
        for h in new:  # into rows that were left, then at the end
            row = gone.pop(0) if gone else len(self.held)
            if row == len(self.held):
                self.held.append(h)
            else:
                self.held[row] = h
            added.append((row, h and seat(*h)))
        removed = list(gone)
        moved = []
        for i in gone:
            self.held[i] = 'gap'
        while 'gap' in self.held:
            if self.held[-1] == 'gap':
                self.held.pop()
                continue
            i = self.held.index('gap')
            self.held[i] = self.held.pop()
            moved.append((len(self.held), i, False))
        if len(self.held) > 1 and self.draw(2):
            a = self.draw(len(self.held))
            b = self.draw(len(self.held))
            if a != b:
                self.held[a], self.held[b] = self.held[b], self.held[a]
                moved.append((a, b, True))
        return removed, added, moved


def whole_pairs(held):
    at = {h: i for i, h in enumerate(held) if h}
    return {(at[n, 'expert'], at[n, 'base']) for n, r in at if r == 'expert' and (n, 'base') in at}


def follows(update, seeds=range(12), steps=40):
    for seed in seeds:
        batch = Batch(seed)
        rows = PairRows()
        for _ in range(steps):
            update(rows, *batch.step())
            whole, lost = rows.sort()
            if set(whole) != whole_pairs(batch.held):
                return False
            if set(lost) != {i for i, h in enumerate(batch.held) if h} - {r for p in whole for r in p}:
                return False
    return True


def test_rows_follow_every_change():
    assert follows(PairRows.update)


@pytest.mark.parametrize('fault', ['move as swap', 'swap as move', 'no moves', 'no removals', 'moves first'])
def test_a_tracker_that_mixes_rows_up_is_caught(fault):
    def update(rows, removed, added, moved):
        if fault == 'move as swap':
            moved = [(a, b, True) for a, b, _ in moved]
            removed = []
        if fault == 'swap as move':
            moved = [(a, b, False) for a, b, _ in moved]
        if fault == 'no moves':
            moved = []
        if fault == 'no removals':
            removed = []
        if fault == 'moves first':
            rows.update(moved=moved)
            moved = []
        rows.update(removed, added, moved)

    assert not follows(update)


# --- contrast


def logits(n=6, v=40, seed=0):
    return torch.randn(n, v, generator=generator(seed)) * 3


def refused(rows, x):
    return {r for r in rows.seats if x[r].isfinite().sum() == 1 and int(x[r].argmax()) == REFUSAL}


@pytest.mark.parametrize('how', [dict(), dict(alpha=0.3, beta=-0.7), dict(alpha=0.01, beta=2.0)])
def test_scores_are_the_librarys_own(how):
    rows = PairRows()
    x = logits()
    rows.update(added=[(4, seat('a', 'expert', **how)), (1, seat('a', 'base', **how))])
    e = x[[4]].clone()
    e[:, REFUSAL] = -torch.inf
    want = CoLD(**{k: v for k, v in dict(alpha=0.1, beta=0.5, **how).items()} if not how else how).combine(e, x[[1]])[0]
    got = x.clone()
    assert contrast(got, rows) == {}
    assert torch.equal(got[4], want) and torch.equal(got[1], want) and torch.equal(got[[0, 2, 3, 5]], x[[0, 2, 3, 5]])


def test_roles_matter():
    "The planted fault of a wrong role changes the scores, so the test above would see it"
    x = logits()
    out = []
    for roles in (('expert', 'base'), ('base', 'expert')):
        rows = PairRows()
        got = x.clone()
        rows.update(added=[(i, seat('a', r)) for i, r in zip((4, 1), roles)])
        contrast(got, rows)
        out.append(got)
    assert not torch.equal(*out)


@pytest.mark.parametrize(
    'seats,why',
    [
        ([(0, ('a', 'expert'), {})], 'its expert is in a step without the other twin'),
        ([(0, ('a', 'base'), {})], 'its base is in a step without the other twin'),
        ([(0, ('a', 'base'), {}), (3, ('a', 'base'), {})], '2 requests with the roles base, base'),
        ([(0, ('a', 'expert'), {}), (3, ('a', 'base'), {}), (5, ('a', 'base'), {})], '3 requests with the roles'),
        ([(0, ('a', 'expert'), {}), (3, ('a', 'base'), dict(beta=0.4))], 'different alpha or beta'),
        ([(0, ('a', 'expert'), {}), (3, ('a', 'base'), dict(like='other'))], 'different prompts or options'),
        ([(0, ('a', 'expert'), dict(output=[5])), (3, ('a', 'base'), dict(output=[6]))], 'different tokens'),
        ([(0, ('a', 'expert'), dict(output=[5])), (3, ('a', 'base'), {})], 'different tokens'),
    ],
)
def test_what_is_not_a_pair_never_decodes(seats, why):
    rows = PairRows()
    x = logits()
    rows.update(
        added=[(r, seat(*names, **more)) for r, names, more in seats]
        + [(1, seat('good', 'expert')), (2, seat('good', 'base'))]
    )
    errors = contrast(x, rows)
    assert list(errors) == ['a'] and why in errors['a'] and refused(rows, x) == {r for r, *_ in seats}


@pytest.mark.parametrize('row', [0, 3])
@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_broken_logits_end_their_own_pair(row, value):
    rows = PairRows()
    x = logits()
    rows.update(
        added=[(0, seat('a', 'expert')), (3, seat('a', 'base')), (1, seat('good', 'expert')), (2, seat('good', 'base'))]
    )
    x[row, 9] = value
    assert contrast(x, rows) == dict(a='its logits are NaN or infinite') and refused(rows, x) == {0, 3}


@pytest.mark.parametrize('banned', [False, True])
def test_equal_logits_are_refused_at_the_first_token_only(banned):
    for output, expected in (((), {0, 3}), ((5,), set())):
        rows = PairRows()
        x = logits()
        rows.update(added=[(0, seat('a', 'expert', output)), (3, seat('a', 'base', output))])
        x[3] = x[0] + 1e-5
        if banned:
            x[:, 11:20] = -torch.inf  # a constraint that acted on both before
        contrast(x, rows)
        assert refused(rows, x) == expected


def test_a_twin_that_goes_on_alone_is_refused():
    "One twin is set aside between two steps; both are refused, whenever they are there"
    rows = PairRows()
    rows.update(added=[(0, seat('a', 'expert')), (1, seat('a', 'base'))])
    x = logits()
    assert contrast(x, rows) == {}
    for row in (0, 1):
        rows.seats[row].output.append(int(x[0].argmax()))
    late = rows.seats[1]
    rows.update(removed=[1])
    x = logits(seed=1)
    contrast(x, rows)
    assert refused(rows, x) == {0}
    rows.seats[0].output.append(REFUSAL)
    rows.update(removed=[0], added=[(2, late)])
    x = logits(seed=2)
    contrast(x, rows)
    assert refused(rows, x) == {2}


@pytest.mark.parametrize('wrote', [([5], [6]), ([5], []), ([], [5])])
def test_twins_that_part_later_are_refused(wrote):
    rows = PairRows()
    rows.update(added=[(0, seat('a', 'expert')), (1, seat('a', 'base'))])
    x = logits()
    assert contrast(x, rows) == {}
    for row, ids in enumerate(wrote):
        rows.seats[row].output += ids
    x = logits(seed=1)
    assert 'different tokens' in contrast(x, rows)['a'] and refused(rows, x) == {0, 1}


@pytest.mark.parametrize(
    'args,message',
    [
        (dict(cold_pair=''), 'give each pair a name'),
        (dict(cold_alpha='x'), 'cold_alpha'),
        (dict(cold_beta=float('nan')), 'beta is nan'),
        (dict(cold_refusal=-1), 'cold_refusal'),
        (dict(cold_refusal=True), 'cold_refusal'),
        (dict(cold_vocab=0), 'cold_vocab'),
        (dict(cold_role=None), 'cold_role'),
        (dict(cold_pair=3), 'cold_pair'),
    ],
)
def test_arguments_from_the_network_are_checked(args, message):
    with pytest.raises(DecodingError, match=message):
        read_twin(twin('a', 'base').args | args)


# --- the waiting room


def test_nobody_enters_alone_before_patience_ends():
    room = WaitingRoom(patience=5.0)
    inside = []
    for now, name in enumerate(['a e', 'b e', 'b b', 'c b', 'a b']):
        room.add(name[0], name, now)
        inside.append(list(room.take(lambda r: True, now)))
    assert (
        inside == [[], [], ['b e', 'b b'], [], ['a e', 'a b']]
        and list(room.take(lambda r: True, 8.0)) == ['c b']
        and len(room) == 0
    )


# --- the two classes, on stand-ins


class Direction(enum.Enum):
    UNIDIRECTIONAL, SWAP = range(2)


class Processor:
    pass


class Scheduler:
    "What `PairScheduler` needs of vLLM's: the first `seats` that wait run, as long as the step's tokens allow"

    def __init__(self, rows=4, tokens=40, blocks=100):
        self.running = []
        self.waiting = []
        self.kv_holding_waiting = []
        self.max_num_active_reqs = rows
        self.max_num_scheduled_tokens = tokens
        self.max_model_len = 64
        self.block_size = 16
        self.lora_config = types.SimpleNamespace(max_loras=2)
        self.blocks = blocks
        self.kv_cache_manager = types.SimpleNamespace(
            block_pool=types.SimpleNamespace(
                get_num_free_blocks=lambda: self.blocks - sum(-(-r.num_computed_tokens // 16) for r in self.running)
            )
        )

    def add_request(self, r):
        self.waiting.append(r)

    def get_request_counts(self):
        return len(self.running), len(self.waiting) + len(self.kv_holding_waiting)

    def schedule(self):
        budget = self.max_num_scheduled_tokens - len(self.running)
        while self.waiting and len(self.running) < self.max_num_active_reqs and self.waiting[0].num_tokens <= budget:
            r = self.waiting.pop(0)
            budget -= r.num_tokens
            r.num_computed_tokens = r.num_tokens
            self.running.append(r)
        return [r.request_id for r in self.running]

    def finish_requests(self, ids, status):
        ids = {ids} if isinstance(ids, str) else ids
        gone = [r for r in self.running + self.waiting if ids is None or r.request_id in ids]
        self.running, self.waiting = ([r for r in x if r not in gone] for x in (self.running, self.waiting))
        return gone


@pytest.fixture
def vllm(monkeypatch):
    for name, more in {
        'vllm': {},
        'vllm.v1': {},
        'vllm.v1.sample': {},
        'vllm.v1.sample.logits_processor': dict(LogitsProcessor=Processor, MoveDirectionality=Direction),
        'vllm.v1.core': {},
        'vllm.v1.core.sched': {},
        'vllm.v1.core.sched.scheduler': dict(Scheduler=Scheduler),
    }.items():
        module = types.ModuleType(name)
        vars(module).update(more)
        monkeypatch.setitem(sys.modules, name, module)
    yield vllm_cold
    for name in ('ColdProcessor', 'PairScheduler'):
        vars(vllm_cold).pop(name, None)


def params(pair=None, role=None, **more):
    return types.SimpleNamespace(
        **dict(
            temperature=0.0,
            seed=None,
            n=1,
            stop_token_ids=[REFUSAL],
            max_tokens=20,
            extra_args=pair and twin(pair, role).args,
        )
        | more
    )


def request(name, pair=None, role=None, prompt=10, lora=1, **more):
    return types.SimpleNamespace(
        request_id=name,
        sampling_params=params(pair, role),
        num_tokens=prompt,
        num_prompt_tokens=prompt,
        max_tokens=20,
        num_computed_tokens=0,
        status='waiting',
        lora_request=lora and types.SimpleNamespace(lora_int_id=lora),
        **more,
    )


def twins(pair, prompt=10, loras=(1, 2)):
    return [request(f'{pair} {r}', pair, r, prompt, k) for r, k in zip(('expert', 'base'), loras)]


def test_the_classes_need_vllm_only_when_asked_for():
    assert 'ColdProcessor' not in vars(vllm_cold)
    with pytest.raises(ImportError):
        vllm_cold.ColdProcessor
    with pytest.raises(AttributeError):
        vllm_cold.ColdProcessors


def changes(removed=(), added=(), moved=()):
    "What vLLM tells a processor of a step"
    return types.SimpleNamespace(removed=list(removed), added=list(added), moved=list(moved))


def test_the_processor_reads_vllms_lists(vllm):
    config = types.SimpleNamespace(
        scheduler_config=types.SimpleNamespace(
            enable_chunked_prefill=False, long_prefill_token_threshold=0, max_num_batched_tokens=2048, max_num_seqs=8
        ),
        lora_config=types.SimpleNamespace(max_loras=2),
        model_config=types.SimpleNamespace(max_model_len=512),
    )
    p = vllm.ColdProcessor(config, None, False)
    assert (
        issubclass(vllm.ColdProcessor, Processor)
        and vllm.ColdProcessor is vllm.ColdProcessor
        and not p.is_argmax_invariant()
    )
    pair = [(0, params('a', 'expert'), [3, 4], []), (2, params('a', 'base'), [3, 4], [])]
    p.update_state(changes(added=[pair[0], (1, params(), [9], []), pair[1]]))
    p.update_state(changes(removed=[1], moved=[(2, 1, Direction.UNIDIRECTIONAL)]))
    p.update_state(None)
    p.update_state(changes(moved=[(0, 1, Direction.SWAP)]))
    x = logits(2)
    e = x[[1]].clone()
    e[:, REFUSAL] = -torch.inf
    want = CoLD(0.1, 0.5).combine(e, x[[0]])
    assert torch.equal(p.apply(x), want.repeat(2, 1))
    p.update_state(changes(added=[(3, params('b', 'expert'), [3, 4], []), (4, params('b', 'base'), [3, 5], [])]))
    x = logits(5)
    p.apply(x)
    assert refused(p.rows, x) == {3, 4}
    config.scheduler_config.enable_chunked_prefill = True
    with pytest.raises(DecodingError, match='chunked prefill is on'):
        vllm.ColdProcessor(config, None, False)


def test_twins_enter_the_same_step(vllm):
    s = vllm.PairScheduler(tokens=39)
    a = twins('a')
    b = twins('b')
    for r in (a[0], b[0]):
        s.add_request(r)
    assert s.schedule() == [] and s.get_request_counts() == (0, 2)
    for r in (b[1], a[1]):
        s.add_request(r)
    assert s.schedule() == ['b expert', 'b base'] and s.get_request_counts() == (2, 2)  # four prompts have 40 tokens
    assert s.schedule() == ['b expert', 'b base', 'a expert', 'a base']


def crowded(vllm, room=vllm_cold.room_for):
    "Return how many steps hold a pair half, over many loads of plain requests and pairs"
    half = 0
    for seed in range(40):
        gen = generator(seed)
        draw = lambda n: int(torch.randint(n, (1,), generator=gen))
        s = vllm.PairScheduler(rows=3 + draw(4), tokens=24 + draw(24), blocks=6 + draw(12))
        for step in range(12):
            if draw(2):
                s.add_request(request(f'plain {step}', prompt=3 + draw(8), lora=draw(2)))
            if draw(2):
                for r in twins(f'p{step}', 3 + draw(8), (1, 2) if draw(3) else (3, 2)):
                    s.add_request(r)
            s.schedule()
            if s.running and draw(2):  # somebody is done: a plain request, or both twins
                name = s.running[draw(len(s.running))].request_id
                s.finish_requests(
                    (
                        {name}
                        if name.startswith('plain')
                        else {r.request_id for r in s.running if r.request_id.split()[0] == name.split()[0]}
                    ),
                    'done',
                )
            names = [r.request_id.split()[0] for r in s.running if not r.request_id.startswith('plain')]
            half += any(names.count(n) != 2 for n in names)
    return half


def test_no_load_splits_a_pair(vllm):
    assert crowded(vllm) == 0


def test_without_asking_for_room_pairs_are_split(vllm, monkeypatch):
    "The planted fault that shows that the test above can fail"
    monkeypatch.setattr(vllm_cold, 'room_for', lambda scheduler, twins: True)
    assert crowded(vllm) > 0


@pytest.mark.parametrize('fault', ['rows', 'tokens', 'adapters', 'memory'])
def test_each_kind_of_room_counts(vllm, fault):
    s = vllm.PairScheduler(rows=4, tokens=40, blocks=12)
    for r in twins('a'):
        s.add_request(r)
    s.schedule()
    if fault == 'rows':
        s.max_num_active_reqs = 3
    if fault == 'tokens':
        s.max_num_scheduled_tokens = 21
    if fault == 'memory':
        s.blocks = 7
    new = twins('b', loras=(3, 2) if fault == 'adapters' else (1, 2))
    assert not vllm_cold.room_for(s, new)
    s.max_num_active_reqs = 4
    s.max_num_scheduled_tokens = 22
    s.blocks = 8
    s.lora_config.max_loras = 3
    assert vllm_cold.room_for(s, new)


def test_a_withdrawn_request_leaves_the_waiting_room(vllm):
    s = vllm.PairScheduler()
    a = twins('a')
    s.add_request(a[0])
    assert (
        s.finish_requests('a expert', 'aborted') == [a[0]]
        and a[0].status == 'aborted'
        and s.get_request_counts() == (0, 0)
    )
    s.add_request(a[1])
    assert s.finish_requests(None, 'aborted') == [a[1]]


# --- what a user calls


def test_null_adapter_command(tmp_path, capsys):
    toy_adapter(toy_model(), tmp_path / 'expert')
    run(['null-adapter', str(tmp_path / 'expert'), str(tmp_path / 'zeros')])
    ours, theirs = (load_file(tmp_path / x / 'adapter_model.safetensors') for x in ('zeros', 'expert'))
    assert ours.keys() == theirs.keys() and all(
        ours[k].shape == theirs[k].shape and ours[k].dtype == theirs[k].dtype for k in ours
    )
    assert not any(bool(x.any()) for k, x in ours.items() if 'lora_B' in k) and all(
        torch.equal(ours[k], theirs[k]) for k in ours if 'lora_A' in k
    )
    assert 'vllm serve' in capsys.readouterr().out and not list(tmp_path.glob('.*part'))
    with pytest.raises(DecodingError, match='no adapter_config.json'):
        run(['null-adapter', str(tmp_path / 'nothing'), str(tmp_path / 'x')])
    with pytest.raises(DecodingError, match='no adapter of zeros'):
        run(['null-adapter', str(tmp_path / 'zeros'), str(tmp_path / 'expert')])


def test_bodies_are_what_the_processor_takes():
    bodies = vllm_ask.server_bodies([dict(role='user', content='Why?')], REFUSAL, CoLD(0.1, 0.2), stop_token_ids=[5])
    for b in bodies:
        vllm_cold.check_params(
            types.SimpleNamespace(
                temperature=b['temperature'],
                seed=None,
                n=1,
                stop_token_ids=b['stop_token_ids'],
                extra_args=b['vllm_xargs'],
            )
        )
    assert (
        [read_twin(b['vllm_xargs']).role for b in bodies] == ['expert', 'base']
        and 'messages' in bodies[0]
        and bodies[0]['stop_token_ids'] == [5, REFUSAL]
    )
    with pytest.raises(DecodingError, match='streamed'):
        vllm_ask.server_bodies('x', REFUSAL, stream=True)


# --- draws with the noise of our loop


def noisy_twin(pair, role, **noise):
    return PairRequest(pair, role, 0.1, 0.5, REFUSAL, **noise)


def noisy_rows(output=(), prompt=(3, 4), seeds=(7, 7), temperature=0.7):
    "Rows 0 and 1 are a pair with seeds, 2 and 3 one without, as the processor seats them"
    rows = PairRows()
    for k, (role, seed) in enumerate(zip(('expert', 'base'), seeds)):
        twin_row = noisy_twin('a', role, seed=seed, temperature=temperature)
        own = vllm_cold.seat_of(params(extra_args=twin_row.args), prompt and list(prompt), list(output))
        rows.update(added=[(k, own), (k + 2, seat('b', role, output))])
    return rows


@pytest.mark.parametrize('output', [(), (5, 9)])
@pytest.mark.parametrize('temperature', [0.7, None, 2])
def test_a_seed_adds_the_noise_of_our_loop_to_its_pair_alone(output, temperature):
    x = logits()
    without = x.clone()
    contrast(without, noisy_rows(output, seeds=(None, None), temperature=None))
    got = x.clone()
    assert contrast(got, noisy_rows(output, temperature=temperature)) == {}
    noise = shared_noise(torch.tensor([[3, 4]]), torch.ones(1, 2), 7)
    g = ops.gumbel(noise.after([len(output)], 1)[0, 0], 40)
    assert torch.equal(got[0], without[0] / (temperature or 1.0) + g) and torch.equal(got[0], got[1])
    assert torch.equal(got[2:], without[2:])


def test_noise_is_a_function_of_seed_prompt_and_position():
    x = logits()
    cases = (dict(), dict(seeds=(8, 8)), dict(prompt=(3, 5)), dict(output=(5,)), dict(output=(6,)))
    written = []
    for case in cases:
        got = x.clone()
        assert contrast(got, noisy_rows(**case)) == {}
        written.append(got[0])
    equal = [[torch.equal(a, b) for b in written] for a in written]
    assert equal[3][4] and sum(map(sum, equal)) == len(cases) + 2


@pytest.mark.parametrize(
    'case,why',
    [
        (dict(seeds=(7, 8)), 'seed or temperature'),
        (dict(seeds=(7, None)), 'seed or temperature'),
        (dict(prompt=None), 'no token ids'),
    ],
)
def test_noise_that_twins_do_not_share_is_refused(case, why):
    rows = noisy_rows(**case)
    x = logits()
    errors = contrast(x, rows)
    assert list(errors) == ['a'] and why in errors['a'] and refused(rows, x) == {0, 1}


@pytest.mark.parametrize('seed', [-1, 2**63, 1.5, True, 'x', [1, 2], [], float('nan')])
def test_a_pair_s_seed_is_one_whole_number(seed):
    with pytest.raises(DecodingError, match='seed is'):
        read_twin(twin('a', 'base').args | dict(cold_seed=seed))


@pytest.mark.parametrize('temperature', [0, -1.0, float('inf'), True, 'x'])
def test_a_pair_s_temperature_is_above_0(temperature):
    with pytest.raises(DecodingError, match='temperature is'):
        read_twin(twin('a', 'base').args | dict(cold_seed=1, cold_temperature=temperature))


@pytest.mark.parametrize(
    'changes,message',
    [
        (dict(temperature=1.0, seed=3), 'give vLLM temperature 0'),
        (dict(repetition_penalty=1.1), 'repetition_penalty is 1.1'),
        (dict(presence_penalty=0.5), 'presence_penalty is 0.5'),
        (dict(frequency_penalty=-0.5), 'frequency_penalty is -0.5'),
    ],
)
def test_vllm_leaves_scores_with_noise_alone(changes, message):
    args = noisy_twin('a', 'base', seed=3, temperature=0.7).args
    vllm_cold.check_params(params(extra_args=args, repetition_penalty=1.0))
    with pytest.raises(DecodingError, match=message):
        vllm_cold.check_params(params(extra_args=args, **changes))


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(temperature=0.7, top_p=0.9, min_p=0.1), 'top_p, min_p would act'),
        (dict(temperature=0.7, seed=1), 'seed would act'),
        (dict(), 'no temperature'),
        (dict(temperature=0), 'no temperature'),
        (dict(temperature='hot'), 'temperature is'),
        (dict(temperature=0.7, noise_seed=-1), 'seed is -1'),
        (dict(temperature=0.7, noise_seed=[1, 2]), 'there are 2 seeds for 1 prompts'),
    ],
)
def test_what_cannot_go_with_a_noise_seed(options, message):
    with pytest.raises(DecodingError, match=message) as e:
        vllm_ask.server_bodies('x', REFUSAL, **dict(noise_seed=1) | options)
    assert '\n' not in str(e.value) and ': ' in str(e.value)
