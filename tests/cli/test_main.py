"The command line: one sentence and status 2 for what a user should mend, result files that continue"

import io, json, subprocess, sys
import pytest
from npu_lora_decoding.cli import main as cli
from npu_lora_decoding.evaluation import judging
from npu_lora_decoding.cli.registry import COMMANDS, parser_of
from npu_lora_decoding.cli.main import GROUPS, TABLE, run, usage
from npu_lora_decoding.evaluation.plots import save_plot
from npu_lora_decoding.foundations.files import json_rows
from npu_lora_decoding.evaluation.judging import parse_arm
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding import CoLD, Plain, Result
from npu_lora_decoding.decoding.loop import LM
from npu_lora_decoding.foundations.models import embedded_folder, load_tokenizer


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "A toy model with the embedded tokenizer, saved as a user would have it: (model folder, adapter folder)"
    folder = tmp_path_factory.mktemp('toy')
    model = toy_model(vocab=49152, context=512, eos_token_id=2)
    model.save_pretrained(folder / 'model')
    load_tokenizer(embedded_folder()).save_pretrained(folder / 'model')
    toy_adapter(model, folder / 'adapter')
    return folder / 'model', folder / 'adapter'


@pytest.fixture
def data(tmp_path):
    file = tmp_path / 'dev.jsonl'
    file.write_text('\n'.join(json.dumps(dict(prompt=f'number {i}', answer=str(i))) for i in range(24)))
    return file


def nld(*argv):
    return subprocess.run(
        [sys.executable, '-c', 'from npu_lora_decoding.cli.main import main; main()', *map(str, argv)],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    'argv,message',
    [
        (['decode'], "nld: unknown command 'decode'"),
        (['generate', ''], 'nld: the prompt is empty: give at least one word.'),
        (['generate', 'hi', '--alpha', '1.5'], 'nld: alpha is 1.5: choose it above 0 and up to 1.'),
        (['generate', 'hi', '--beta', 'nan'], 'nld: beta is nan: choose a finite number'),
        (['generate', 'hi', '--device', 'tpu'], "nld: unknown device 'tpu': use one of cpu, cuda, npu."),
        (['generate', 'hi', '--dtype', 'int4'], "nld: unknown dtype 'int4'"),
        (['generate', 'word ' * 9000], 'tokens but the context holds 8192: shorten it.'),
        (['generate', 'hi', '--adapter', '/no/such'], 'has no adapter_config.json'),
        (['generate', 'hi', '--method', 'best'], "nld: unknown method 'best'"),
        (['evaluate', '--arms', 'cold:x'], 'has a setting that is not a number'),
        (['tune', '--prompts', '/no/such.jsonl'], 'nld: no file /no/such.jsonl'),
        (['compare', '--methods', 'magic'], "nld: unknown method 'magic'"),
        (['train-lora', 'x', '--task', 'gsm8k'], 'give their folder with --data.'),
    ],
)
def test_a_mistake_is_one_sentence(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['nld', *argv])
    with pytest.raises(SystemExit) as left:
        cli.main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and len(error.strip().split('\n')) == 1


@pytest.mark.slow
def test_a_mistake_in_a_process_of_its_own():
    done = nld('generate', 'hi', '--alpha', '0')
    assert done.returncode == 2 and done.stderr == 'nld: alpha is 0.0: choose it above 0 and up to 1.\n'


def test_help_names_every_command():
    printed = nld('--help').stdout
    assert all(name in printed for name in COMMANDS)
    for name in COMMANDS:
        assert '_' not in ''.join(s for a in parser_of(name)._actions for s in a.option_strings)


def test_compare_writes_the_contract(toy, tmp_path):
    out = tmp_path / 'rows.json'
    run(
        [
            'compare',
            '--model',
            str(toy[0]),
            '--adapter',
            str(toy[1]),
            '--methods',
            'greedy,cold,transformers_greedy',
            '--prompts',
            '1',
            '--new-tokens',
            '4',
            '--rounds',
            '1',
            '--dtype',
            'fp32',
            '--json',
            str(out),
        ]
    )
    *rows, environment = json_rows(out)
    wanted = (
        'method peer model device dtype batch new_tokens ms_per_token ms_spread tokens_per_s tau quality '
        'quality_interval peak_mb equal_tokens'
    ).split()
    assert (
        all(set(wanted) <= set(r) for r in rows)
        and environment['method'] == 'environment'
        and environment['cores'] >= 1
    )
    assert {r['method']: r['peer'] for r in rows} == dict(greedy=False, cold=False, transformers_greedy=True)
    assert all(r['equal_tokens'] == 1 for r in rows if r['method'] != 'cold')


@pytest.mark.slow
def test_verify_passes_and_fails(toy, data, tmp_path, capsys, monkeypatch):
    from npu_lora_decoding.evaluation import equivalence as verify

    argv = [
        'verify',
        '--model',
        str(toy[0]),
        '--adapter',
        str(toy[1]),
        '--prompts',
        str(data),
        '--new-tokens',
        '3',
        '--batch',
        '12',
        '--json',
        str(tmp_path / 'v.json'),
    ]
    run(argv)
    rows = json_rows(tmp_path / 'v.json')
    assert (
        len(rows) == 21
        and all(r['equal'] == r['prompts'] == 24 and r['unexplained'] == [] for r in rows[:-1])
        and '24/24 prompts equal' in capsys.readouterr().out
    )
    monkeypatch.setattr(
        verify,
        'first_difference',
        lambda lm, target, prompt, fast, slow, number, temperature: (
            verify.Difference(number, 0, 0.5) if number == 3 else None
        ),
    )
    with pytest.raises(DecodingError, match='not equal: loop = transformers'):
        run(argv)
    assert json_rows(tmp_path / 'v.json')[0]['unexplained'] == [
        dict(prompt=3, step=0, lead=0.5)
    ]  # written before it refuses


@pytest.mark.slow
def test_a_verification_continues(toy, data, tmp_path, monkeypatch):
    from npu_lora_decoding.evaluation import equivalence as verify

    argv = [
        'verify',
        '--model',
        str(toy[0]),
        '--adapter',
        str(toy[1]),
        '--prompts',
        str(data),
        '--new-tokens',
        '3',
        '--json',
        str(tmp_path / 'v.json'),
    ]
    made = []
    check = verify.check

    def counted(lm, name, *args, **kwargs):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(name)
        return check(lm, name, *args, **kwargs)

    monkeypatch.setattr(verify, 'check', counted)
    with pytest.raises(KeyboardInterrupt):
        run(argv)
    monkeypatch.setattr(
        verify, 'check', lambda lm, name, *args, **kwargs: made.append(name) or check(lm, name, *args, **kwargs)
    )
    run(argv + ['--resume'])
    assert len(made) == len(set(made)) == 20 and [r['check'] for r in json_rows(tmp_path / 'v.json')[:-1]] == made
    run(argv + ['--resume', '--new-tokens', '2'])  # other options: everything again
    assert len(made) == 40
    with pytest.raises(DecodingError, match='nothing to resume'):
        run(argv[:-2] + ['--resume'])


def test_an_evaluation_continues(toy, data, tmp_path, monkeypatch):
    out = tmp_path / 'rows.json'
    asked = []
    monkeypatch.setattr(
        judging, 'answers', lambda lm, items, arm, n, batch: asked.append(arm) or [i.answer for i in items]
    )
    argv = [
        'evaluate',
        '--model',
        str(toy[0]),
        '--adapter',
        str(toy[1]),
        '--prompts',
        str(data),
        '--new-tokens',
        '4',
        '--dtype',
        'fp32',
        '--json',
        str(out),
    ]
    run(argv + ['--arms', 'greedy'])
    run(argv + ['--arms', 'greedy,cold:0.1:0.2'])
    assert (
        len(asked) == 2
        and [r['arm'] for r in json_rows(out)[:-1]] == ['greedy', 'cold:0.1:0.2']
        and json_rows(out)[0]['scores'] == [1.0] * 24
    )


def test_tune_advises(toy, data, tmp_path, capsys, monkeypatch):
    better = lambda lm, items, arm, n, batch: [
        i.answer if getattr(arm.target, 'beta', 0) == 0.2 or k % 3 == 0 else 'no' for k, i in enumerate(items)
    ]
    monkeypatch.setattr(judging, 'answers', better)
    argv = [
        'tune',
        '--model',
        str(toy[0]),
        '--adapter',
        str(toy[1]),
        '--prompts',
        str(data),
        '--betas',
        '0.1,0.2',
        '--alphas',
        '0.1',
        '--dtype',
        'fp32',
        '--plot',
        str(tmp_path / 'a.png'),
    ]
    run(argv)
    assert 'Use CoLD(alpha=0.1, beta=0.2)' in capsys.readouterr().out and (tmp_path / 'a.png').stat().st_size > 1000
    monkeypatch.setattr(judging, 'answers', lambda lm, items, *_, **__: [i.answer for i in items])
    run(argv)
    assert 'Do not use CoLD here' in capsys.readouterr().out


@pytest.mark.slow
def test_a_loaded_model_can_generate_at_once(toy):
    "`load` is all a user imports"
    code = (
        f'from npu_lora_decoding import load; print(len(load({str(toy[0])!r}, '
        f'{str(toy[1])!r}).generate("hello", max_new_tokens=3, eos_token_id=None).tokens[0]))'
    )
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '3'


@pytest.fixture
def asks(toy, monkeypatch):
    "What `nld generate` asks of a model, without generating"
    asked = []

    def generate(lm, prompts, target=None, drafter=None, **options):
        asked.append(dict(options, prompts=prompts, target=target))
        return Result(['an answer'], [[]], [], lm)

    monkeypatch.setattr(LM, 'generate', generate)
    return asked


def answer(toy, *more, adapter=True):
    run(['generate', '--model', str(toy[0]), '--adapter', str(toy[1]) if adapter else 'none', '--new-tokens', '3', *more])


def test_generate_prints_the_text_once_streamed_or_not(toy, capsys, monkeypatch):
    answer(toy, 'hello')
    whole = capsys.readouterr().out
    answer(toy, 'hello', '--stream')
    assert whole.strip() and capsys.readouterr().out == whole


@pytest.mark.parametrize('terminal, more, streamed', [(True, [], True), (False, [], False), (False, ['--stream'], True)])
def test_generate_streams_on_a_terminal(terminal, more, streamed, toy, asks, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal, raising=False)
    answer(toy, 'hello', *more)
    assert asks[0]['stream'] is streamed
    assert ('an answer' in capsys.readouterr().out) is not streamed


def test_a_prompt_may_be_a_file_or_standard_input(toy, asks, tmp_path, monkeypatch):
    file = tmp_path / 'question.txt'
    file.write_text('from a file\n')
    monkeypatch.setattr(sys, 'stdin', io.StringIO('from a pipe\n'))
    for prompt in (f'@{file}', '-', '@anna how are you', 'plain'):
        answer(toy, prompt)
    texts = [one['prompts'] if isinstance(one['prompts'], str) else one['prompts'][-1]['content'] for one in asks]
    assert texts == ['from a file', 'from a pipe', '@anna how are you', 'plain']
    with pytest.raises(DecodingError, match='no file .*missing.txt: check the name after the @'):
        answer(toy, f'@{tmp_path}/missing.txt')


def test_the_method_goes_with_the_adapter(toy, asks):
    answer(toy, 'hello')
    answer(toy, 'hello', adapter=False)
    answer(toy, 'hello', '--method', 'sample', '--temperature', '0.5')
    assert [type(one['target']) for one in asks] == [CoLD, Plain, Plain]
    assert asks[2]['temperature'] == 0.5 and asks[2]['seed'] == 0 and 'do_sample' not in asks[1]
    with pytest.raises(DecodingError, match='contrast needs an adapter: give --adapter FOLDER, or --method greedy'):
        answer(toy, 'hello', '--method', 'cold', adapter=False)


@pytest.mark.parametrize('option, value, method, own', [
    ('alpha', '0.2', 'greedy', 'cold'), ('beta', '0.2', 'sample', 'cold'), ('temperature', '0.5', 'cold', 'sample'),
    ('temperature', '0.5', 'greedy', 'sample'), ('seed', '3', 'cold', 'sample')])
def test_an_option_that_the_method_ignores_is_refused(option, value, method, own, toy, asks):
    with pytest.raises(DecodingError, match=f'--{option} is for --method {own}, and the method is {method}: leave'):
        answer(toy, 'hello', f'--{option}', value, '--method', method)
    assert not asks


@pytest.mark.parametrize('given, near', [
    (['--methd', 'cold'], "'--methd': did you mean --method"), (['--adaptor=x'], "'--adaptor': did you mean --adapter"),
    (['--xyzzy'], "'--xyzzy': `nld generate --help` lists"), (['again'], "'again': `nld generate --help` lists")])
def test_an_unknown_option_is_named_with_the_nearest(given, near):
    with pytest.raises(DecodingError, match=f'nld generate does not take {near}'):
        run(['generate', 'hello', *given])


def test_every_command_is_in_one_group():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(TABLE)
    assert all(f'  {name} ' in usage() for name in TABLE)


def test_a_picture_of_an_unknown_kind_is_refused(tmp_path):
    draw = lambda ax: ax.plot([0, 1])
    with pytest.raises(DecodingError, match=r'\.png'):
        save_plot(draw, tmp_path / 'a.xyz')
    save_plot(draw, tmp_path / 'a.svg')
    save_plot(draw, tmp_path / 'a.png')
    assert [f.name for f in sorted(tmp_path.iterdir())] == ['a.png', 'a.svg']
