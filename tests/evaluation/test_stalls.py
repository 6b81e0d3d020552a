"A run that the machine held up is measured again or marked; a step is a multiple of reading the weights once"

from types import SimpleNamespace
import pytest, torch
from npu_lora_decoding.evaluation import benchmark
from npu_lora_decoding.evaluation.benchmark import compare, stall_notes, stalls, step_bytes, table, take_again
from npu_lora_decoding.evaluation.html_report import page
from npu_lora_decoding.evaluation.methods import Method, compiled_too, methods
from npu_lora_decoding.evaluation.recommend import verdicts
from npu_lora_decoding.foundations import timing
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.foundations.timing import read_bandwidth
from helpers.rows import row
from helpers.toys import toy_items, toy_lm

N = 5  # Tokens of a run: a step takes a second, so does the prefill


class Clock:
    "Each method's calls, in the order in which they are made; `slow` is how often an undisturbed time the rest take"

    def __init__(self, monkeypatch, slow):
        self.slow = slow
        self.calls = {}
        self.order = []
        monkeypatch.setattr(benchmark, 'step_seconds', self.step_seconds)

    def step_seconds(self, run, ids, mask, n):
        name = run.name
        self.calls[name] = self.calls.get(name, 0) + 1
        self.order.append(name)
        times = self.slow(name, self.calls[name])
        prefill, step = times if isinstance(times, tuple) else (1.0, times)
        run.taus.append(2.0)
        return step, prefill, torch.zeros(1, n, dtype=torch.long)


class Run:
    def __init__(self, name):
        self.name = name
        self.taus = []

    def __call__(self, ids, mask, n, eos=()):
        return torch.zeros(len(ids), n, dtype=torch.long)


def measured(monkeypatch, slow, rounds=3, batches=2):
    "Return clocks and what was replaced, of two methods; `slow(name, call)` is the time of a step, or (prefill, step)"
    clock = Clock(monkeypatch, slow)
    runs = dict(a=Run('a'), b=Run('b'))
    pairs = [(torch.zeros(1, 3), None)] * batches
    clocks, _ = benchmark._turns(runs, pairs, rounds, N)
    replaced = take_again(runs, pairs, clocks, N)
    return clocks, replaced, clock, runs


def test_nothing_is_measured_again_without_a_stall(monkeypatch):
    "Methods and prompts may differ as they like: only the same prompts in another round count"
    clocks, replaced, clock, _ = measured(
        monkeypatch, lambda name, call: (1 if name == 'a' else 50) * (1 + 30 * (call % 2))
    )
    assert replaced == dict(a=[], b=[]) and len(clock.order) == 12


@pytest.mark.parametrize('call, place', [(1, (0, 0)), (4, (1, 1)), (6, (2, 1))])
@pytest.mark.parametrize('where', ['step', 'prefill'])
def test_a_turn_with_a_stall_is_taken_again_by_every_method(monkeypatch, call, place, where):
    stalled = (1.0, 45.0) if where == 'step' else (45.0, 1.0)
    clocks, replaced, clock, runs = measured(monkeypatch, lambda name, i: stalled if (name, i) == ('b', call) else 1.0)
    assert all(run == (1.0, 1.0) for own in clocks.values() for run in own)
    assert [len(old) for old in replaced.values()] == [1, 1] and clock.order[12:] == ['a', 'b']
    old = replaced['b'][0]
    assert (old['round'], old['batch']) == place
    assert old['ms' if where == 'step' else 'ms_to_first'] == 45_000 and replaced['a'][0]['ms'] == 1000
    assert all(len(run.taus) == 6 for run in runs.values())  # tokens per forward pass are counted once


def test_a_first_round_that_stalls_is_measured_again(monkeypatch):
    "As where something is compiled for the first prompt of each length"
    clocks, replaced, *_ = measured(monkeypatch, lambda name, i: 30.0 if name == 'a' and i <= 2 else 1.0)
    assert [(old['round'], old['batch']) for old in replaced['a']] == [(0, 0), (0, 1)]
    assert not stalls(clocks['a'], 2, N)


def test_what_stalls_each_time_is_bounded_and_counted(monkeypatch):
    clocks, replaced, clock, _ = measured(
        monkeypatch, lambda name, i: 45.0 if name == 'b' and i != 1 and i != 2 else 1.0
    )
    assert len(stalls(clocks['b'], 2, N)) == 4 and not stalls(clocks['a'], 2, N)
    assert len(replaced['b']) == 2 * 4 and len(clock.order) == 12 + 2 * 2 * 4


def test_a_fluke_is_not_a_stall(monkeypatch):
    "Three times as long is what a shared machine does"
    _, replaced, *_ = measured(monkeypatch, lambda name, i: 3.0 if i % 3 == 0 else 1.0)
    assert replaced == dict(a=[], b=[])


def test_one_round_is_held_against_the_other_prompts(monkeypatch):
    slow = lambda name, i: 45.0 if (name, i) == ('a', 3) else 1.0
    clocks, replaced, *_ = measured(monkeypatch, slow, rounds=1, batches=5)
    assert [old['batch'] for old in replaced['a']] == [2] and not stalls(clocks['a'], 5, N)
    assert measured(monkeypatch, lambda name, i: 5.0 if i == 3 else 1.0, rounds=1, batches=5)[1]['a'] == []


def compared(monkeypatch, slow, **more):
    Clock(monkeypatch, slow)
    monkeypatch.setattr(benchmark, 'memory_mb', lambda run, device: 0.0)
    others = {name: Method(lambda lm, adapter, name=name: Run(name), third_party=True) for name in 'ab'}
    return compare(toy_lm(), None, toy_items(2), ['a', 'b'], new_tokens=N, others=others, **more)


def test_rows_table_and_page_name_a_stall(monkeypatch):
    rows = compared(monkeypatch, lambda name, i: 45.0 if name == 'b' and i > 2 else 1.0)
    a, b, environment = rows
    assert (a['stalled'], b['stalled']) == (0, 4) and a['measured_again'] == b['measured_again'] == 8
    assert len(b['ms_replaced']) == 8 and environment['read_gb_per_s'] > 0
    text = table(rows, full=True)
    assert '(stalled)' in text and 'b stalled: 4 of 6 runs took that long each time' in text
    assert '8 turns were measured again, by every method' in text
    html = page(rows)
    assert 'stalled: 4 of 6 runs' in html and 'measured again' in html and 'times the floor' in html


def test_a_stall_that_was_mended_is_recorded_and_the_row_counts(monkeypatch):
    rows = compared(monkeypatch, lambda name, i: 45.0 if (name, i) == ('b', 3) else 1.0)
    assert rows[1]['stalled'] == 0 and rows[1]['ms_spread'] == [1000.0, 1000.0]
    assert '1 turn was measured again' in table(rows) and 'stalled' not in table(rows)


def test_quiet_rows_have_no_notes(monkeypatch):
    rows = compared(monkeypatch, lambda name, i: 1.0)
    assert stall_notes(rows[:2]) == []
    assert 'measured again' not in table(rows) and 'measured again' not in page(rows)
    assert stall_notes([row('greedy')]) == []  # a row of an earlier version


def test_nothing_is_recommended_from_a_row_that_stalled():
    rows = [row('greedy'), row('hass_tree', ms=10.0, same_as='greedy'), dict(method='environment')]
    rows[1]['ms_runs'] = [[ms / 3 for ms in turn] for turn in rows[0]['ms_runs']]
    found = {v.idea: v for v in verdicts(rows)}
    assert found['HASS'].helps is True
    for stalled in (0, 1):
        marked = [r | (dict(stalled=2) if i == stalled else {}) for i, r in enumerate(rows)]
        found = {v.idea: v for v in verdicts(marked)}
        assert found['HASS'].helps is None and 'stalled while it was timed' in found['HASS'].reason


# --- the floor


def test_a_step_reads_what_it_multiplies_with(tmp_path):
    tied = toy_model(tie_word_embeddings=True)
    loose = toy_model(tie_word_embeddings=False)

    def sizes(model):
        return sum(p.numel() * p.element_size() for p in model.parameters())

    table_size = loose.get_input_embeddings().weight.nbytes
    assert step_bytes(tied) == sizes(tied) and step_bytes(loose) == sizes(loose) - table_size
    adapter = load_adapter(toy_adapter(tied, tmp_path), tied)
    weights = sum(w.A.numel() + w.B.numel() for w in adapter.layers.values())
    assert step_bytes(tied, adapter) == step_bytes(tied) + 4 * weights
    assert step_bytes(tied.bfloat16(), adapter) == (step_bytes(toy_model(tie_word_embeddings=True)) + 4 * weights) // 2


def test_a_floor_is_of_one_forward_pass(tmp_path, monkeypatch):
    "A step of drafting makes several tokens of one; merged weights are read without an adapter; of vLLM nothing is known"
    lm = toy_lm()
    lm.adapter = load_adapter(toy_adapter(lm.model, tmp_path), lm.model)
    speed = step_bytes(lm.model) * 100.0  # 10 ms a reading
    known = methods(head='any')
    floor = benchmark._floor
    merged = floor(lm, known['transformers_greedy'], 20.0, 1.0, speed)
    assert merged['floor_ms'] == pytest.approx(10) and merged['floor'] == pytest.approx(2)
    with_adapter = floor(lm, known['cold'], 20.0, 1.0, speed)
    assert with_adapter['floor_ms'] == pytest.approx(10 * step_bytes(lm.model, lm.adapter) / step_bytes(lm.model))
    drafted = floor(lm, known['hass_tree'], 20.0, 3.0, speed)
    assert drafted['floor'] == pytest.approx(3 * floor(lm, known['greedy'], 20.0, 1.0, speed)['floor'])
    unseen = Method(None, other_process=True)
    assert (
        floor(lm, unseen, 20.0, 1.0, speed)['floor'] is None
        and floor(lm, known['greedy'], 20.0, None, speed)['floor'] is None
    )


def test_bandwidth_is_bytes_over_the_faster_median(monkeypatch):
    def timed(methods, rounds, device):
        return {name: timing.summarise([s] * rounds) for name, s in zip(methods, (0.5, 0.25))}

    monkeypatch.setattr(timing, 'time_interleaved', timed)
    assert read_bandwidth(mb=8) == 8 * 2**20 / 0.25


def test_a_score_is_that_of_the_last_method_with_the_same_tokens():
    known = methods(head='any') | compiled_too(['greedy', 'hass_tree'], head='any')
    names = ['hass_tree_compiled', 'greedy', 'greedy_compiled', 'hass_tree', 'cold']
    found = {name: SimpleNamespace(tokens=[[1, 2]]) for name in names}
    alike = dict.fromkeys(['hass_tree_compiled', 'greedy_compiled', 'hass_tree'], 'greedy')
    assert benchmark._judged_as(names, known, found) == alike
    found['greedy_compiled'].tokens = [[1, 3]]
    assert benchmark._judged_as(names, known, found) == dict(hass_tree='greedy')


def test_compiled_methods_are_compared_with_each_other():
    found = compiled_too(['greedy', 'hass_tree', 'transformers_greedy'], head='any')
    assert set(found) == {'greedy_compiled', 'hass_tree_compiled'}
    assert found['hass_tree_compiled'].same_as == 'greedy_compiled' and found['greedy_compiled'].same_as == 'greedy'
    assert compiled_too(['lookup'])['lookup_compiled'].same_as == 'greedy'
    assert all(method.compiled for method in found.values()) and not methods()['greedy'].compiled
