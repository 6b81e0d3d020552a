"""The page of a comparison: what a model says stays text, nothing is loaded, nothing is left out;
and what is recommended follows from intervals
"""

import json, re
from html.parser import HTMLParser
import pytest, torch
from npu_lora_decoding.cli import compare as cli_compare
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.evaluation.recommend import Verdict, recommendation, verdicts
from npu_lora_decoding.cli.main import run
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.hass.head import DraftHead, head_config
from npu_lora_decoding.hass.checkpoint import save_head
from npu_lora_decoding.evaluation.methods import methods
from npu_lora_decoding.evaluation.benchmark import BATCHES, compare, speed_ratio, table
from npu_lora_decoding.foundations.files import json_rows
from npu_lora_decoding.evaluation.html_report import Looks, acceptance_svg, frontier, page, pareto_svg
from npu_lora_decoding.foundations.tasks import Item
from helpers.toys import toy_folder, toy_items, toy_lm
import npu_lora_decoding.cli.main  # registers every command
from helpers.rows import row

HOSTILE = (
    '</td></title></style>"\'><script src="https://evil.example/x.js">alert(1)</script><img src=x '
    'onerror=alert(2)>&amp;\x00\x1b\u202e'
)
OLD = (
    'method peer model device dtype batch new_tokens ms_per_token ms_spread tokens_per_s tau quality '
    'quality_interval peak_mb equal_tokens'
).split()
NEW = (
    'ms_to_first ms_runs speedup speedup_interval speedup_over flops_per_token metric items gain gain_interval '
    'gain_over scores same_as judged_as compiled temperature floor floor_ms measured_again ms_replaced stalled'
).split()


class Strict(HTMLParser):
    "Every tag is closed in order; attributes are quoted and known; what could run or load is noted"

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.wrong = []
        self.seen = {}
        self.active = []
        self.text = ''
        self.feed(text)
        self.close()
        self.wrong += self.open

    def handle_starttag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.active += [
            (tag, k, v)
            for k, v in attrs
            if k.startswith('on')
            or k in ('src', 'href', 'xlink:href', 'action', 'srcset', 'srcdoc', 'data', 'background', 'formaction')
        ]
        if tag in ('script', 'iframe', 'object', 'embed', 'link', 'base', 'form', 'img'):
            self.active.append((tag,))
        if tag not in ('meta', 'br', 'hr'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text += data


def noise(n, by=1.0, seed=0):
    return [by * x for x in torch.randn(n, generator=generator(seed)).tolist()]


def shifted(by, n=40, wobble=1.0):
    return [50 + 8 * a + by + wobble * (-1) ** i for i, a in enumerate(noise(n))]


def long_text(gain, n=30):
    made = lambda name, chunks: dict(
        method=name,
        third_party=False,
        chunks=chunks,
        text='book',
        quality=12.0,
        quality_interval=None,
        tokens=100 * n,
        tokens_per_s=9.0,
        ms_per_token=1.0,
        ms_spread=[1.0, 2.0],
    )
    base = [[100 * i, 250.0 + 20 * x, 100] for i, x in enumerate(noise(n))]
    return [
        made('base', base),
        made('temp_lora', [[i, nll - gain + (-1) ** k, t] for k, (i, nll, t) in enumerate(base)]),
    ]


def everything(gain=2.0, tree=1.6, memory=20.0):
    return [
        row('greedy', scores=shifted(0)),
        row('cold', 35.0, shifted(gain)),
        row('hass_tree', 30 / tree, shifted(0), 'greedy'),
        *long_text(memory),
        dict(method='environment', python='3', commit=None),
    ]


# --- the page


def test_hostile_text_stays_text():
    "Wherever a name, a prompt, an answer, a version or a title comes from"
    rows = everything()
    hostile = [
        r
        | dict(method=HOSTILE if r['method'] == 'hass_tree' else r['method'])
        | {
            k: HOSTILE
            for k in ('model', 'device', 'metric', 'text', 'speedup_over', 'python')
            if k in r and r[k] is not None
        }
        for r in rows
    ]
    looks = Looks(None, [Item(HOSTILE, HOSTILE)], shown=1)

    class Run:
        def __call__(self, ids, mask, n, eos):
            return torch.tensor([[5, 6]])

    lm = toy_lm()
    looks.lm = lm
    lm.tokenizer.decode = lambda ids, **_: HOSTILE  # every token is hostile
    looks.add(HOSTILE, Run())
    ours = lambda ids, mask, n, eos, record: lm.generate([ids[0]], max_new_tokens=3, eos_token_id=None, record=record)
    run_ = Run()
    run_.write = ours
    looks.add('greedy', run_)
    looks.counts[HOSTILE] = [(9, 5), (5, 2)]
    whole = page(hostile, looks, HOSTILE, HOSTILE)
    tags = Strict(whole)
    assert tags.wrong == [] and tags.active == [] and 'script' not in tags.seen and 'img' not in tags.seen
    assert tags.text.count('alert(1)') >= 12 and '&lt;script' in whole  # it is all there, as text
    assert not re.search('[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]', whole)


def test_a_page_closes_what_it_opens_and_loads_nothing():
    whole = page(everything(), about='made up')
    tags = Strict(whole)
    assert tags.wrong == [] and tags.active == [] and whole.startswith('<!DOCTYPE html>') and tags.seen['svg'] == 1
    assert not re.search(r'https?:|//|url\(|@import|javascript:', whole)
    assert "default-src 'none'" in whole and 'prefers-color-scheme: dark' in whole and 'width=device-width' in whole
    whole.encode('utf-8')


def test_every_row_is_on_the_page():
    rows = everything() + [row(f'method {i}', 20.0 + i, shifted(i / 9), third_party=i % 2 == 0) for i in range(9)]
    whole = page(rows)
    table = re.findall(r'<tr><td[^>]*>(.*?)(?: <small>.*?</small>)?</td>', whole)
    compared = [r['method'] for r in rows if r['method'] not in ('environment', 'base', 'temp_lora')]
    assert table == compared + compared + ['base', 'temp_lora']  # quality and speed, then the cost, then the long text
    svg = pareto_svg(rows)
    assert all(f'>{r["method"]}<' in svg for r in rows if r.get('scores'))
    assert svg.count('<circle') == len([r for r in rows if r.get('scores')])


def test_a_page_without_answers_draft_tokens_or_methods_has_notes():
    bare = page([row('cold', same_as=None, over=None), dict(method='environment')])
    assert (
        'No answers were judged' in bare
        and 'Nothing can be recommended yet.' in bare
        and '<svg' not in bare
        and Strict(bare).wrong == []
    )
    assert acceptance_svg(dict(a=[(4, 4)])) == '' and acceptance_svg({}) == ''
    assert '80% of 5' in acceptance_svg(dict(a=[(5, 4)]))


def test_the_frontier():
    assert frontier([(1, 60), (1, 59), (0.5, 60), (2, 50), (2, 50)]) == [
        0,
        3,
        4,
    ]  # a tie in one number is lost in the other; equals stay
    points = [(x, y) for x, y in zip(noise(30), noise(30, seed=1))]
    on = frontier(points)
    beats = lambda p, q: p[0] >= q[0] and p[1] >= q[1] and p != q
    assert on and all(any(beats(p, q) for p in points) == (i not in on) for i, q in enumerate(points))


# --- the recommendation


def test_what_helps_is_recommended():
    found = verdicts(everything())
    assert [(v.idea, v.helps) for v in found] == [('CoLD', True), ('HASS', True), ('Temp-LoRA', True)]
    advice = recommendation(found)
    assert advice.startswith('Use CoLD, HASS and Temp-LoRA: ') and '+2.00' in advice and 'hass_tree is 1.60' in advice
    assert advice == recommendation(verdicts(everything()))  # intervals are seeded


def test_none_is_an_answer():
    advice = recommendation(verdicts(everything(0, 0.95, 0)))
    assert (
        advice.startswith('Plain greedy decoding is enough here: CoLD, HASS and Temp-LoRA were not shown to help.')
        and advice.count('not shown') == 3
        and '0.95 (0.95 to 0.95) times as fast' in advice
    )


@pytest.mark.parametrize('by, wobble, helps', [(3, 1, True), (0.2, 4, False), (-3, 1, False)])
def test_contrast_is_judged_by_its_interval(by, wobble, helps):
    v = verdicts([row('greedy', scores=shifted(0, wobble=0)), row('cold', scores=shifted(by, wobble=wobble))])[0]
    assert (
        v.helps is helps
        and (v.effect.low > 0) is helps
        and ('not shown' in v.reason) is (v.effect.low <= 0 <= v.effect.high)
    )


def test_too_little_is_not_judged():
    few = [
        row('greedy', scores=shifted(0, 19)),
        row('cold', scores=shifted(9, 19)),
        row('hass_tree', 9.0, same_as='greedy', ms_runs=[[9.0] * 5]),
    ] + long_text(50, 19)
    assert [v.helps for v in verdicts(few)] == [None] * 3 and recommendation(verdicts(few)).startswith(
        'Nothing can be recommended yet.'
    )
    assert verdicts([row('greedy', scores=shifted(0, 20)), row('cold', scores=shifted(9, 20))])[0].helps
    narrow = [row('greedy', ms_runs=[[30.0] * 3] * 3), row('hass_tree', same_as='greedy', ms_runs=[[10.0] * 3] * 3)]
    assert verdicts(narrow)[1].helps is None and '3 rounds on 3 batches' in verdicts(narrow)[1].reason


@pytest.mark.parametrize('rounds, judged', [(1, None), (2, True)])
def test_one_round_chooses_and_the_other_judges(rounds, judged):
    slow = row('greedy', ms_runs=[[30.0] * BATCHES] * rounds)
    fast = row('hass_tree', same_as='greedy', ms_runs=[[10.0] * BATCHES] * rounds)
    assert verdicts([slow, fast])[1].helps is judged


def test_a_reason_begins_with_one_capital_and_a_method_keeps_its_name():
    helps = Verdict('CoLD', True, 'CoLD changes it by +2.00')
    unjudged = Verdict('HASS', None, 'the clock ran for 1 round')
    fails = Verdict('HASS', False, 'hass_tree is 0.90 times as fast')
    assert recommendation([helps, unjudged]) == 'Use CoLD: CoLD changes it by +2.00. The clock ran for 1 round.'
    assert recommendation([helps, fails]) == 'Use CoLD: CoLD changes it by +2.00. hass_tree is 0.90 times as fast.'


def test_a_row_is_judged_on_turns_that_did_not_choose_it():
    "A chain that is fast in the first round only is chosen, and then found out"
    lucky = row('hass_chain', same_as='greedy', ms_runs=[[10.0] * 5, [40.0] * 5, [40.0] * 5])
    steady = row('hass_tree', same_as='greedy', ms_runs=[[20.0] * 5] * 3)
    v = verdicts([row('greedy', ms_runs=[[30.0] * 5] * 3), lucky, steady])[1]
    assert v.method == 'hass_chain' and v.helps is False and v.effect.mean == pytest.approx(0.75)


def test_drafters_are_compared_with_their_own_target():
    rows = [
        row('greedy', 10.0),
        row('cold', 30.0, scores=None),
        row('cold_hass_tree', 15.0, same_as='cold', over='cold'),
    ]
    v = verdicts(rows)[1]
    assert v.helps and v.effect.mean == pytest.approx(2) and 'as fast as cold' in v.reason
    assert verdicts([rows[0], rows[2]])[1].helps is None  # without it there is nothing to say
    theirs = [
        row('greedy'),
        row('transformers_greedy', third_party=True),
        row('transformers_lookup', 9.0, same_as='transformers_greedy', third_party=True, over='transformers_greedy'),
    ]
    assert [v.idea for v in verdicts(theirs)] == ['CoLD', 'HASS', 'Temp-LoRA']  # a third party is not an idea of ours


def test_the_faster_of_two_drafters_is_recommended():
    advice = recommendation(
        verdicts([row('greedy'), row('hass_tree', 15.0, same_as='greedy'), row('lookup', 10.0, same_as='greedy')])
    )
    assert (
        advice.startswith('Use lookup: lookup is 3.00')
        and ' hass_tree is 2.00 (2.00 to 2.00) times as fast as greedy too' in advice
    )


def test_few_items_are_not_emphasised():
    "An interval of two items excludes zero easily"
    gain = lambda n: row(
        'cold',
        60.0,
        scores=shifted(5, n),
        gain=5.0,
        gain_interval=[4.0, 6.0],
        gain_over='greedy',
        ms_runs=[[60.0] * (n // 5 or 1)] * 2,
    )
    for n, shown in ((2, False), (20, True)):
        rows = [row('greedy', scores=shifted(0, n)), gain(n)]
        assert (
            ('class="better"' in page(rows)) is shown
            and ('class="worse"' in page(rows)) is shown
            and ('**+5.00' in table(rows, full=True)) is shown
        )


def test_a_ratio_resamples_prompts_not_turns():
    "Sixty turns on two prompts are two prompts"
    plain = [[10.0, 20.0]] * 30
    half = [[5.0, 40.0]] * 30
    r = speed_ratio(half, plain)
    assert r.low == pytest.approx(0.5) and r.high == pytest.approx(2) and r.mean == pytest.approx(1)


# --- rows


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "Model, adapter, head and a smaller assistant as folders"
    folder = tmp_path_factory.mktemp('toy')
    model = toy_model(vocab=97)
    small = toy_model(vocab=97, num_hidden_layers=1, seed=3)
    toy_folder(folder / 'model', model)
    toy_folder(folder / 'small', small)
    toy_adapter(model, folder / 'adapter')
    save_head(DraftHead(head_config(model.config)), folder / 'head', model)
    return folder


@pytest.fixture(scope='module')
def compared(toy):
    lm = toy_lm()
    lm.adapter = load_adapter(toy / 'adapter', lm.model)
    items = toy_items(6)
    names = [
        'greedy',
        'beam',
        'cold',
        'cold_naive',
        'lookup',
        'hass_tree',
        'cold_hass_chain',
        'sample',
        'transformers_greedy',
        'transformers_lookup',
        'transformers_assisted',
        'peft_greedy',
    ]
    looks = Looks(lm, items, 6, shown=2, counted=3)
    return (
        compare(
            lm,
            toy / 'adapter',
            items,
            names,
            new_tokens=5,
            rounds=2,
            metric='chrf',
            head=toy / 'head',
            timed=2,
            answer_tokens=7,
            assistant=toy / 'small',
            look=looks.add,
        ),
        looks,
        names,
    )


@pytest.mark.slow
def test_rows_are_complete(compared):
    rows, _, names = compared
    *rows, environment = json.loads(json.dumps(rows))
    assert [r['method'] for r in rows] == names and environment['method'] == 'environment'
    for r in rows:
        assert set(OLD) | set(NEW) == set(r), set(OLD) | set(NEW) ^ set(r)
        assert (
            r['ms_to_first'] > 0
            and r['flops_per_token'] > 0
            and r['tau'] > 0
            and r['items'] == len(r['scores']) == 6
            and len(r['ms_runs']) == 2
            and len(r['ms_runs'][0]) == 2
        )
        assert (r['gain'] is None) == (r['speedup'] is None) == (r['method'] == 'greedy') == (r['speedup_over'] is None)
        if r['gain'] is not None:
            assert r['gain_interval'][0] <= r['gain'] <= r['gain_interval'][1] and r['gain_over'] == 'greedy'
    over = {r['method']: r['speedup_over'] for r in rows}
    assert (over['hass_tree'], over['cold_hass_chain'], over['transformers_lookup'], over['peft_greedy']) == (
        'greedy',
        'cold',
        'transformers_greedy',
        'greedy',
    )
    assert all(
        r['equal_tokens'] == 1
        for r in rows
        if r['method']
        in ('lookup', 'hass_tree', 'transformers_greedy', 'transformers_lookup', 'transformers_assisted', 'peft_greedy')
    )


@pytest.mark.slow
def test_equal_answers_score_equally(compared):
    "Whoever writes the same gets the same score on every item, batched or not, ours or not"
    scores = {r['method']: r['scores'] for r in compared[0] if 'scores' in r}
    for name in (
        'lookup',
        'hass_tree',
        'transformers_greedy',
        'transformers_lookup',
        'transformers_assisted',
        'peft_greedy',
    ):
        assert scores[name] == scores['greedy'], name
    assert scores['cold'] == scores['cold_naive'] == scores['cold_hass_chain']


@pytest.mark.slow
def test_work_is_counted(compared):
    work = {r['method']: r['flops_per_token'] for r in compared[0] if 'flops_per_token' in r}
    assert (
        work['cold'] == pytest.approx(work['cold_naive'])
        and work['peft_greedy'] == work['greedy'] > work['transformers_greedy']
    )
    assert (
        1.7 < work['cold'] / work['greedy'] < 2
        and work['beam'] > 3.5 * work['greedy']
        and work['transformers_assisted'] > work['transformers_greedy']
    )


@pytest.mark.slow
def test_a_page_of_a_real_comparison(compared):
    rows, looks, names = compared
    tags = Strict(whole := page(rows, looks))
    assert (
        tags.wrong == []
        and tags.active == []
        and tags.seen['details'] == 2
        and set(looks.answers) == set(names)
        and all(len(a) == 2 for a in looks.answers.values())
    )
    assert tags.seen['dd'] == 2 * (len(names) + 1) and 'title="contrast' not in whole and 'contrast ' in whole


@pytest.mark.slow
def test_the_full_table(compared):
    rows, *_ = compared
    rows = [row | dict(measured_again=0, stalled=0) for row in rows]  # a busy machine adds notes
    plain = table(rows).split('\n')
    full = table(rows, full=True).split('\n')
    assert (
        all(f.startswith(p) for p, f in zip(plain[2:], full[2:]))
        and len({l.count('|') for l in full}) == 1
        and len(full) == len(rows) + 1
    )
    with pytest.raises(DecodingError, match="'best' is not among the methods: name one of greedy"):
        table(rows, 'best')


def test_an_assistant_of_another_family_is_refused(toy, tmp_path):
    from helpers.toys import toy_tokenizer

    lm = toy_lm()
    other = toy_folder(tmp_path / 'other', toy_model(vocab=97), toy_tokenizer(extra=5))
    with pytest.raises(
        DecodingError, match='the assistant other has other tokens than toy: give a smaller model of the same family'
    ):
        methods(assistant=other)['transformers_assisted'].build(lm, None)


# --- the command


@pytest.mark.slow
def test_compare_writes_table_page_and_rows(toy, tmp_path, capsys):
    (tmp_path / 'mine.csv').write_text('ask,want\n' + ''.join(f'say {i},{i}\n' for i in range(20)))
    (tmp_path / 'long.txt').write_text('the same again and again, ' * 60)
    argv = ['compare', '--model', toy / 'model', '--adapter', toy / 'adapter', '--prompts', tmp_path / 'mine.csv']
    argv += '--fields ask,want --metric exact_match --methods greedy,cold --timed 1 --new-tokens 4 --rounds 1'.split()
    argv += ['--dtype', 'fp32', '--text', tmp_path / 'long.txt', *'--text-tokens 700 --chunk 32 --window 96'.split()]
    argv += ['--html', tmp_path / 'page.html', '--json', tmp_path / 'rows.json']
    run(list(map(str, argv)))
    *rows, last = json_rows(tmp_path / 'rows.json')
    printed = capsys.readouterr().out
    whole = (tmp_path / 'page.html').read_text()
    assert [r['method'] for r in rows] == ['greedy', 'cold', 'base', 'temp_lora'] and all(
        set(OLD) | set(NEW) <= set(r) for r in rows
    )
    assert (
        rows[0]['items'] == 20
        and [v['idea'] for v in last['verdicts']] == ['CoLD', 'HASS', 'Temp-LoRA']
        and last['verdicts'][2]['helps'] is not None
    )
    assert (
        last['recommendation'] in printed
        and 'wrote page.html' in printed
        and '| cold |' in printed
        and Strict(whole).wrong == []
        and '20 prompts of mine.csv, 1 of them timed' in whole
    )
    assert whole.count('<dd class="tokens">') == 2 * 2  # what both methods write to the first two prompts


@pytest.mark.parametrize(
    'more, message',
    [
        (['--prompts', '/no/such.csv'], 'no file /no/such.csv'),
        (['--fields', 'a'], 'pass e.g. --fields question,answer'),
        (['--methods', 'transformers_assisted'], 'give one with --assistant'),
        (['--text', 'x', '--chunk', '64', '--window', '64'], 'choose a smaller chunk'),
        (['--prompts', '0'], 'there is no prompt'),
    ],
)
def test_compare_refuses(toy, more, message):
    with pytest.raises(DecodingError, match=re.escape(message)):
        run(
            [
                'compare',
                '--model',
                str(toy / 'model'),
                '--adapter',
                str(toy / 'adapter'),
                '--prompts',
                '1',
                '--rounds',
                '1',
                '--new-tokens',
                '2',
                *more,
            ]
        )
