"Answers of every arm are those of the adapted model, and an equality check finds what differs"

import math, time
import pytest, torch
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter
from npu_lora_decoding.decoding.baseline import beam_search
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding.sampling import Plain
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.evaluation.methods import EVAL_BATCH_SIZE, SAMPLING, Method, merged_model, methods, speculative
from npu_lora_decoding.evaluation.benchmark import _width, memory_mb, speed_ratio
from npu_lora_decoding.evaluation.judging import ARMS, answers
from npu_lora_decoding.foundations.models import encode
from npu_lora_decoding.evaluation.equivalence import (
    TIE,
    Difference,
    check,
    first_difference,
    gap,
    noisy,
    scores_at,
    verify,
)
from helpers.intervals import ERROR, N, SCORES, is_95
from helpers.toys import toy_items, toy_lm


@pytest.fixture
def folder(tmp_path):
    return toy_adapter(toy_lm().model, tmp_path)


@pytest.fixture
def lm(folder):
    made = toy_lm()
    made.adapter = load_adapter(folder, made.model)
    return made


def batch_of(lm, n=3):
    return encode(lm, [i.prompt for i in toy_items(n)] + ['a longer prompt than the others'])


# --- answers


def test_beams_use_the_adapter_on_every_row(lm, folder):
    "A batch of several prompts, against PEFT's merged model"
    items = toy_items(5)
    merged = merged_model(lm, folder)
    ids, mask = encode(lm, [i.prompt for i in items])
    want = lm.tokenizer.batch_decode(
        beam_search(merged, ids, mask, num_beams=4, new_tokens=8, eos_ids=lm.eos_ids, pad_id=lm.pad_id)[
            :, ids.shape[1] :
        ],
        skip_special_tokens=True,
    )
    assert answers(lm, items, ARMS['beam'], 8, batch=5) == want
    plain = lm.tokenizer.batch_decode(
        beam_search(lm.model, ids, mask, num_beams=4, new_tokens=8, eos_ids=lm.eos_ids, pad_id=lm.pad_id)[
            :, ids.shape[1] :
        ],
        skip_special_tokens=True,
    )
    assert all(a != b for a, b in zip(want, plain))


@pytest.mark.parametrize('arm', ['greedy', 'beam', 'cold'])
def test_answers_do_not_depend_on_the_batch(lm, arm):
    items = toy_items(7)
    assert (
        answers(lm, items, ARMS[arm], 8, batch=7)
        == answers(lm, items, ARMS[arm], 8, batch=1)
        == answers(lm, items, ARMS[arm], 8, batch=3)
    )


@pytest.mark.parametrize('name', [n for n, m in methods().items() if not m.single and 'sample' not in n])
def test_every_method_writes_its_reference(lm, folder, name):
    "Methods of one target write one text: a benchmark of a broken method would mean nothing"
    ids, mask = batch_of(lm)
    reference = dict(
        beam='transformers_beam',
        transformers_beam='beam',
        cold='cold_naive',
        cold_lookup='cold_naive',
        peft_mixed='cold_naive',
        cold_naive='cold',
        transformers_greedy='greedy',
    ).get(name, 'transformers_greedy')
    if name == 'peft_mixed':
        ids = ids[:1, -4:]
        mask = mask[:1, -4:]  # PEFT's own mixed batch, without padding
    known = methods(CoLD(0.1, 1.0))
    assert torch.equal(known[name].build(lm, folder)(ids, mask, 8), known[reference].build(lm, folder)(ids, mask, 8))


def test_sampling_methods_draw(lm, folder):
    "Draft tokens take draws of their own, so texts differ; a seed gives the same text again"
    ids, mask = batch_of(lm)
    for name in ('sample', 'sample_lookup'):
        run = methods()[name].build(lm, folder)
        assert torch.equal(run(ids, mask, 8), run(ids, mask, 8)) and not torch.equal(
            run(ids, mask, 8), methods()['greedy'].build(lm, folder)(ids, mask, 8)
        )


COOLED = dict(sample='greedy', transformers_sample='transformers_greedy', sample_cold='cold', sample_cold_lookup='cold')


@pytest.mark.parametrize('name', COOLED)
def test_methods_that_sample_do_so_at_the_temperature(lm, folder, name):
    "Near 0 only the best token is left; at 5 hardly ever all of the best"
    ids, mask = batch_of(lm)
    target = CoLD(0.1, 1.0)
    best = methods(target)[COOLED[name]].build(lm, folder)(ids, mask, 8)
    drawn = [methods(target, temperature=t)[name].build(lm, folder)(ids, mask, 8) for t in (1e-4, 5.0)]
    assert torch.equal(drawn[0], best) and not torch.equal(drawn[1], best)


# --- memory


def test_memory_counts_what_is_held_and_what_is_added():
    held = []

    def run():
        if not held:
            held.append(torch.ones(40, 2**18))  # over 32 MB, so that no freed memory of the process holds it
        added = torch.ones(64, 2**18)
        time.sleep(
            0.3
        )  # resident memory is looked at every few milliseconds: a shorter peak may be missed on a busy machine
        return added.sum()

    assert 95 < memory_mb(run, torch.device('cpu')) < 125


# --- verify


def test_verify_finds_all_ways_equal(lm, folder):
    logged = []
    checks = verify(lm, folder, toy_items(5), 8, 2, CoLD(0.05, 1.0), log=logged.append)
    assert (
        logged == checks
        and [c.prompts for c in checks] == [5] * 20
        and all(c.equal == 5 and c.tokens == 40 for c in checks)
    )
    assert (
        len(verify(toy_lm(), None, toy_items(2), 4, log=logged.append)) == 10
    )  # without an adapter nothing is contrasted


def of_seed(seed):
    return speculative(Plain(), lambda: None, **SAMPLING | dict(seed=seed))


def test_sampled_texts_are_compared_with_their_noise(lm):
    "Each token is the best of its scores with the noise; with that of another seed or place it is not"
    run = of_seed(0).build(lm, None)
    ids, mask = batch_of(lm)
    prompt = ids[0][mask[0].bool()]
    written = run(ids, mask, 6)[0].tolist()
    for step in range(6):
        text = torch.cat([prompt, torch.tensor(written[:step], dtype=torch.long)])
        assert noisy(scores_at(lm, Plain(), text), prompt, step, 1.0).argmax() == written[step]
    how = dict(batches=[(ids, mask)], new_tokens=8, temperature=1.0)
    assert not check(lm, 'sound', Plain(), run, run, **how).differences
    found = check(lm, 'another seed', Plain(), of_seed(1).build(lm, None), run, **how)
    assert found.equal == 0 and len(found.unexplained) == 4


def forgets_adapter(lm, run):
    adapter = lm.adapter
    lm.adapter = None
    try:
        return lambda ids, mask, n: methods()['greedy'].build(type(lm)(lm.model, lm.tokenizer), None)(ids, mask, n)
    finally:
        lm.adapter = adapter


def last_token_wrong(lm, run):
    def wrong(ids, mask, n):
        out = run(ids, mask, n)
        out[-1, -1] = (out[-1, -1] + 1) % 76
        return out

    return wrong


def adapter_on_the_first_row_only(lm, run):
    def wrong(ids, mask, n):
        with AdapterBank(lm.model, [lm.adapter]).attached([0] + [-1] * (len(ids) - 1)):
            return lm.model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, eos_token_id=None)[
                :, ids.shape[1] :
            ]

    return wrong


@pytest.mark.parametrize(
    'bug, equal', [(forgets_adapter, 0), (last_token_wrong, 3), (adapter_on_the_first_row_only, 1)]
)
def test_check_finds_planted_bugs(lm, bug, equal):
    run = methods()['greedy'].build(lm, None)
    assert not check(lm, 'sound', Plain(), run, run, batches=[batch_of(lm)], new_tokens=8).differences
    found = check(lm, 'bug', Plain(), bug(lm, run), run, batches=[batch_of(lm)], new_tokens=8)
    assert found.equal == equal and len(found.unexplained) == 4 - equal and 'NOT a tie' in str(found)
    assert [d.prompt for d in found.differences] == list(range(4))[-(4 - equal) :]


@pytest.mark.parametrize('target', [Plain(), CoLD(0.05, 1.0)])
def test_scores_decide_the_output(lm, target):
    "The scores that judge a difference are those greedy decoding maximises, and a lead is measured in them"
    ids, mask = batch_of(lm)
    prompt = ids[0][mask[0].bool()]
    written = [t.id for t in lm.generate(prompt, target, max_new_tokens=6, eos_token_id=None).tokens[0]]
    for step in range(6):
        assert (
            scores_at(lm, target, torch.cat([prompt, torch.tensor(written[:step], dtype=torch.long)])).argmax()
            == written[step]
        )
    scores = scores_at(lm, target, torch.cat([prompt, torch.tensor(written[:3])]))
    second = scores.topk(2).indices[1].item()
    d = first_difference(lm, target, prompt, written[:3] + [second] + written[4:], written, 7)
    assert (d.prompt, d.step) == (7, 3) and d.lead == pytest.approx(gap(scores)) and d.lead > TIE and not d.tie


def test_only_a_close_race_is_excused():
    assert Difference(0, 0, TIE).tie and not Difference(0, 0, 1.01 * TIE).tie


def test_equality_is_promised_for_fp32_only(lm, folder):
    lm.model.bfloat16()
    with pytest.raises(DecodingError, match='use --dtype fp32'):
        verify(lm, folder, toy_items(2))


# --- judging once


def test_a_few_answers_are_judged_by_the_programs_that_were_timed():
    eager, compiled, single = (Method(None, **kind) for kind in ({}, dict(compiled=True), dict(single=True)))
    assert [_width(m, batch=2, once=True) for m in (eager, compiled, single)] == [EVAL_BATCH_SIZE, 2, 1]
    assert [_width(m, batch=2, once=False) for m in (eager, compiled, single)] == [EVAL_BATCH_SIZE, EVAL_BATCH_SIZE, 1]
    assert _width(eager, batch=32, once=True) == 32


@pytest.mark.slow
def test_a_method_that_drafts_is_judged_once_with_the_one_it_equals(lm, folder, monkeypatch):
    "...unless what it wrote differs: then it is judged for itself"
    import npu_lora_decoding.evaluation.benchmark as measure

    judged = []
    monkeypatch.setattr(
        measure, 'judge', lambda answers, *_: judged.append(answers) or [float(len(a)) for a in answers]
    )
    rows = measure.compare(
        lm, folder, toy_items(2), ['greedy', 'lookup', 'cold'], new_tokens=6, rounds=1, metric='chrf', once=True
    )
    assert (
        len(judged) == 2
        and [r['judged_as'] for r in rows[:-1]] == [None, 'greedy', None]
        and rows[1]['scores'] == rows[0]['scores']
    )
    other = {'other': methods(CoLD(0.1, 5.0))['cold_lookup']}  # says that it writes what `cold` writes, and does not
    judged.clear()
    rows = measure.compare(
        lm, folder, toy_items(2), ['cold', 'other'], new_tokens=6, rounds=1, metric='chrf', once=True, others=other
    )
    assert len(judged) == 2 and rows[1]['judged_as'] is None


def test_the_interval_of_a_speed_is_that_of_95_percent():
    "Of small differences, so that the logarithm is a straight line"
    by = (0.01 * SCORES).exp()
    ratio = speed_ratio([by.reciprocal().tolist()], [[1.0] * N])
    assert is_95(math.log(ratio.low), math.log(ratio.high), math.log(ratio.mean), 0.01 * ERROR)
