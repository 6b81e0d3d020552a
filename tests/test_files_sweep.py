"""Every text encoding and data format, times every command that reads files

What reaches the command's work is the right text, or the command is refused in one sentence.
"""

import bz2, csv, gzip, io, json, lzma, pickle, zipfile
from dataclasses import dataclass
from pathlib import Path
import pyarrow, pyarrow.parquet, pytest
from npu_lora_decoding.cli import adapter, compare, decoding, head, memory
from npu_lora_decoding.cli.main import run
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.hass import pipeline
from helpers.chats import CHATML, lm_of

LM = lm_of(CHATML, ['<|im_start|>', '<|im_end|>'], '<|im_end|>')


class Reached(Exception):
    "A command came to its work; `args[0]` is what it would work on"


def reached(position, of=lambda x: x):
    "Stand for the work of a command: its argument at `position` is what was read"

    def work(*args, **kwargs):
        raise Reached(of(args[position]))

    return work


def pairs(items):
    return [(i.prompt, i.answer) for i in items]


def turns(conversations):
    return [tuple(m['content'] for m in c['messages']) for c in conversations]


def asked(prompts):
    return [(p, '') if isinstance(p, str) else tuple(m['content'] for m in p) for p in prompts]


@dataclass(frozen=True)
class Command:
    "A command that reads a file: where its work begins, and what of a table it reads"

    argv: tuple  # FILE stands for the file
    work: tuple  # Module and name of what is stopped
    position: int = 1  # Of what was read among its arguments
    of: object = pairs  # Makes it comparable
    answers: bool = True  # Whether answers are read


TABLES = {
    'compare': Command(('compare', '--prompts', 'FILE', '--metric', 'chrf'), (compare, 'measure'), 2),
    'verify': Command(('verify', '--prompts', 'FILE'), (decoding, 'verify_ways'), 2, answers=False),
    'tune': Command(('tune', '--prompts', 'FILE'), (decoding, 'scorer')),
    'evaluate': Command(('evaluate', '--prompts', 'FILE'), (decoding, 'score_arms')),
    'train-lora': Command(('train-lora', 'OUT', '--prompts', 'FILE'), (adapter, 'finetune')),
    'train-head --data': Command(('train-head', 'OUT', '--data', 'FILE'), (pipeline, '_check_enough'), 0, turns),
    'train-head --prompts': Command(
        ('train-head', 'OUT', '--prompts', 'FILE'), (pipeline, '_check_enough'), 0, asked, answers=False
    ),
    'write': Command(('write', 'OUT', '--prompts', 'FILE'), (head, 'write_conversations'), 3, asked, answers=False),
    'accept': Command(('accept', 'HEAD', 'FILE'), (head, 'texts_of'), 1, turns),
}
TEXTS = {
    'perplexity': Command(('perplexity', 'FILE', '--out', 'OUT'), (memory, 'document_ids'), 1, str),
    'compare --text': Command(
        ('compare', '--prompts', '1', '--adapter', 'none', '--methods', 'greedy', '--text', 'FILE'),
        (compare, 'checked_ids'),
        1,
        str,
    ),
}


@pytest.fixture
def outcome(tmp_path, monkeypatch):
    "What becomes of a command and a file: ('read', what) or ('refused', sentence)"
    for module in (compare, decoding, adapter, head, memory):
        monkeypatch.setattr(module, 'load_target', lambda *a, **k: (LM, None))
    monkeypatch.setattr(compare, 'table', lambda *a, **k: '')

    def of(command, file):
        module, name = command.work
        with monkeypatch.context() as patch:
            if command is TEXTS['compare --text']:
                patch.setattr(compare, 'measure', lambda *a, **k: [])
                patch.setattr(compare, 'prompts_of', lambda *a, **k: [])
            patch.setattr(module, name, reached(command.position, command.of))
            places = dict(FILE=str(file), OUT=str(tmp_path / 'out'), HEAD=str(tmp_path / 'head'))
            try:
                run([places.get(word, word) for word in command.argv])
            except Reached as e:
                return 'read', e.args[0]
            except DecodingError as e:
                return 'refused', str(e)
        raise AssertionError(f'{command.argv} did not come to its work')

    return of


def check(found, right, wanted, where):
    "The outcome is the right text or one sentence, and it is the one we want: True, or what the sentence says"
    kind, what = found
    if kind == 'read':
        assert wanted is True and what == right, (where, wanted, what)
        return
    is_sentence = '\n' not in what and what.endswith('.') and ': ' in what
    assert is_sentence and wanted is not True and wanted in what, (where, wanted, what)


# --- encodings: text -> what it should come to

WEST = 'The café costs 3 euros, naïvely. '
CHINA = '床前明月光,疑是地上霜。'
JAPAN = '日本語の文章です。'
KOREA = '한국어 문장입니다. '
RUSSIA = 'Съешь же ещё этих мягких булок. '
NUL = 'NUL characters'
BYTE = 'is not UTF-8 text (byte '
ENCODINGS = [  # Text, encoding, a mark before it, outcome
    *((text, 'utf-8', b'', True) for text in (WEST, CHINA, JAPAN, KOREA, RUSSIA, 'plain words. ', 'a\U0001f600b')),
    (CHINA, 'utf-8-sig', b'', True),
    (WEST, 'utf-16', b'', True),
    (CHINA, 'utf-16-be', b'\xfe\xff', True),
    (RUSSIA, 'utf-32', b'', True),
    (WEST, 'utf-32-be', b'\0\0\xfe\xff', True),
    (WEST, 'utf-16-le', b'', BYTE),
    ('plain words. ', 'utf-16-le', b'', 'iconv -f utf-16-le'),
    ('plain words. ', 'utf-16-be', b'', 'iconv -f utf-16-be'),
    ('plain words. ', 'utf-32-le', b'', 'iconv -f utf-32-le'),
    ('plain words. ', 'utf-32-be', b'', 'iconv -f utf-32-be'),
    (CHINA, 'utf-16-le', b'', BYTE),
    (WEST, 'latin-1', b'', 'cp1252'),
    (WEST, 'cp1252', b'', BYTE),
    (WEST, 'cp437', b'', BYTE),
    (WEST, 'mac-roman', b'', BYTE),
    (RUSSIA, 'cp1251', b'', 'cp1251'),
    (RUSSIA, 'koi8-r', b'', BYTE),
    (CHINA, 'gb18030', b'', 'gb18030'),
    (CHINA, 'big5hkscs', b'', BYTE),
    (JAPAN, 'shift_jis', b'', 'shift_jis'),
    (JAPAN, 'euc-jp', b'', 'euc-jp'),
    (JAPAN, 'iso-2022-jp', b'', 'iso-2022-jp'),
    (KOREA, 'euc-kr', b'', 'euc-kr'),
]


def damaged(raw):
    return {
        'half a character': (raw + '語'.encode()[:2], BYTE),
        'a mark and half a unit': (b'\xff\xfea\0b', 'not UTF-8 text, and damaged'),
        'a surrogate': (raw + b'\xed\xa0\x80', BYTE),
        'a NUL': (raw + b'\0' + raw, NUL),
        'bzip2': (bz2.compress(raw), 'bzip2'),
        'xz': (lzma.compress(raw), 'xz'),
        'zip': (zipped(raw), 'zip'),
        'pdf': (b'%PDF-1.7\n' + raw, 'PDF'),
        'rtf': (b'{\\rtf1 ' + raw + b'}', 'RTF'),
        'pickle': (pickle.dumps(raw, 4), 'pickle'),
        'cut gzip': (gzip.compress(raw, mtime=0)[:-9], 'cannot read'),
        'empty': (b'', 'empty'),
        'a mark alone': (b'\xef\xbb\xbf', 'empty'),
        'spaces': (b' \r\n\t\r\n', 'empty'),
    }


def zipped(raw):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        z.writestr('x.txt', raw)
    return out.getvalue()


@pytest.mark.parametrize('name', TEXTS)
def test_texts(name, outcome, tmp_path):
    command = TEXTS[name]
    file = tmp_path / 'text.txt'
    for text, encoding, mark, wanted in ENCODINGS:
        file.write_bytes(mark + (text * 3).encode(encoding))
        check(outcome(command, file), text * 3, wanted, (name, encoding, text))
    for what, (raw, wanted) in damaged(WEST.encode()).items():
        file.write_bytes(raw)
        check(outcome(command, file), None, wanted, (name, what))
    for end in ('\r\n', '\r', '\n'):
        file.write_bytes(f'one{end}two{end}'.encode())
        check(outcome(command, file), 'one\ntwo\n', True, (name, end))
    packed = tmp_path / 'text.txt.gz'
    packed.write_bytes(gzip.compress(WEST.encode()))
    check(outcome(command, packed), WEST, True, (name, 'gzip'))
    packed.write_bytes(WEST.encode())
    check(outcome(command, packed), None, 'Not a gzipped file', (name, 'not packed'))


@pytest.mark.parametrize('name', [*TEXTS, *TABLES])
def test_what_cannot_be_opened(name, outcome, tmp_path):
    "A missing file, a whole text in the place of a path, and an empty folder"
    command = (TEXTS | TABLES)[name]
    for file in (tmp_path / 'none.jsonl', 'Once upon a time. ' * 400, 'a\0b', tmp_path):
        kind, sentence = outcome(command, file)
        assert kind == 'refused' and '\n' not in sentence and sentence.endswith('.') and len(sentence) < 700, (
            name,
            sentence,
        )


# --- tables


def rows_of(text):
    return [dict(prompt=f'{text} {i}', answer=f'{text}, "{i}"; 00{i}') for i in range(3)]


def as_csv(rows, **how):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), **how)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def lines(rows, end='\n'):
    return end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def array(rows, **how):
    return json.dumps(rows, ensure_ascii=False, **how).encode()


ROWS = rows_of('Größe 大')
FORMATS = {  # Name of the file, bytes, outcome
    'lines': ('x.jsonl', lines(ROWS), True),
    'lines by another name': ('x.txt', lines(ROWS), True),
    'lines with CRLF': ('x.jsonl', lines(ROWS, '\r\n') + b'\r\n\r\n', True),
    'lines with a mark': ('x.jsonl', b'\xef\xbb\xbf' + lines(ROWS), True),
    'lines with a line separator inside': ('x.jsonl', lines(ROWS).replace('大'.encode(), '大\u2028'.encode()), True),
    'packed lines': ('x.jsonl.gz', gzip.compress(lines(ROWS)), True),
    'packed lines without the ending': ('x.jsonl', gzip.compress(lines(ROWS)), True),
    'an array': ('x.json', array(ROWS), True),
    'an array of several lines': ('x.json', array(ROWS, indent=2), True),
    'an array with a mark': ('x.json', b'\xef\xbb\xbf' + array(ROWS), True),
    'an array named as lines': ('x.jsonl', b'\n ' + array(ROWS), True),
    'csv': ('x.csv', as_csv(ROWS), True),
    'csv with a mark': ('x.csv', b'\xef\xbb\xbf' + as_csv(ROWS), True),
    'packed csv': ('x.csv.gz', gzip.compress(as_csv(ROWS)), True),
    'CSV': ('X.CSV', as_csv(ROWS), True),
    'tsv': ('x.tsv', as_csv(ROWS, delimiter='\t'), True),
    'parquet': ('x.parquet', as_parquet(ROWS), True),
    'parquet named as lines': ('x.jsonl', as_parquet(ROWS), True),
    'a comma after a line': ('x.jsonl', lines(ROWS, ',\n'), 'line 1 of FILE is not valid JSON (Extra data'),
    'a comma at the end': ('x.json', array(ROWS)[:-1] + b',]', 'begins as a JSON array but is not valid JSON'),
    'single quotes': ('x.jsonl', str(ROWS[0]).encode(), 'line 1 of FILE is not valid JSON'),
    'an array a line': ('x.jsonl', b'["a", "b"]\n["c", "d"]', 'not valid JSON (Extra data'),
    'an array of texts': ('x.json', b'["a", "b"]', 'item 1 of FILE is not a JSON object'),
    'plain text': ('x.txt', WEST.encode(), 'line 1 of FILE is not valid JSON'),
    'csv named as lines': ('x.jsonl', as_csv(ROWS), 'line 1 of FILE is not valid JSON'),
    'csv with semicolons': ('x.csv', b'prompt;answer\na;b\n', 'prompt;answer'),
    'csv with too many fields': ('x.csv', b'prompt,answer\na,b,c\n', 'line 2 of FILE has 3 fields'),
    'csv with an open quote': ('x.csv', b'prompt,answer\n"a,b\n', 'of FILE is damaged'),
    'csv of two columns of one name': ('x.csv', b'prompt,prompt\na,b\n', 'two columns of one name'),
    'no parquet': ('x.parquet', lines(ROWS), 'not a parquet file'),
    'cut parquet': ('x.parquet', as_parquet(ROWS)[:-20], 'not a parquet file'),
    'not packed': ('x.jsonl.gz', lines(ROWS), 'Not a gzipped file'),
    'an empty array': ('x.json', b'[]', ''),
    'a table without rows': ('x.csv', b'prompt,answer\n', ''),
}
LONG = [dict(prompt='ä' * 200_000, answer='b')]


def wanted_of(command, rows, text=None):
    "What a command should read of a table: without what it does not ask for"
    rows = [(row['prompt'], row['answer'] if command.answers else '') for row in rows]
    return [(p.replace('大', text), a.replace('大', text) if a else a) for p, a in rows] if text else rows


@pytest.mark.slow
@pytest.mark.parametrize('name', TABLES)
def test_formats(name, outcome, tmp_path):
    command = TABLES[name]
    for what, (file, raw, wanted) in FORMATS.items():
        path = tmp_path / file
        path.write_bytes(raw)
        sentence = wanted if wanted is True else wanted.replace('FILE', str(path))
        right = wanted_of(command, ROWS, '大\u2028' if 'separator' in what else None)
        check(outcome(command, path), right, sentence, (name, what))
        path.unlink()
    for file, raw in (('x.csv', as_csv(LONG)), ('x.jsonl', lines(LONG))):
        (tmp_path / file).write_bytes(raw)
        check(outcome(command, tmp_path / file), wanted_of(command, LONG), True, (name, 'long', file))


@pytest.mark.parametrize('name', TABLES)
def test_encodings_of_tables(name, outcome, tmp_path):
    command = TABLES[name]
    for text, encoding, mark, wanted in ENCODINGS:
        rows = rows_of(text)
        raws = {'x.jsonl': lines(rows), 'x.csv': as_csv(rows)}
        for file, raw in raws.items():
            (tmp_path / file).write_bytes(mark + raw.decode().encode(encoding))
            right = [(p.strip(), a) for p, a in wanted_of(command, rows)]
            check(outcome(command, tmp_path / file), right, wanted, (name, encoding, file))
    for what, (raw, wanted) in damaged(lines(ROWS)).items():
        (tmp_path / 'x.jsonl').write_bytes(raw)
        is_empty = wanted == 'empty'
        check(outcome(command, tmp_path / 'x.jsonl'), None, '' if is_empty else wanted, (name, what))


def test_results_in_any_encoding(tmp_path):
    "`nld pareto` reads result files: a mark or gzip does not matter, and what else they hold is named"
    rows = json.dumps([dict(method='greedy', task='Größe', quality=None)])
    for encoding in ('utf-8', 'utf-8-sig', 'utf-16', 'utf-32'):
        (tmp_path / 'x.json').write_bytes(rows.encode(encoding))
        assert decoding.read_rows(tmp_path / 'x.json') is not None
    for raw in (
        b'',
        b'{}',
        b'[1]',
        b'\xff',
        rows.encode('utf-16-le'),
        rows.encode()[:-2],
        b'PAR1',
        Path(__file__).read_bytes(),
    ):
        (tmp_path / 'x.json').write_bytes(raw)
        with pytest.raises(DecodingError):
            run(['pareto', str(tmp_path / 'x.json')])
