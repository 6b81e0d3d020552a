"Numbers that mean nothing are named before a model is loaded"

import pytest
from npu_lora_decoding.cli import adapter, compare, decoding, head, memory
from npu_lora_decoding.cli.main import TABLE, load_command, run
from npu_lora_decoding.cli.registry import _MAY_BE_ZERO, numbers_of, parser_of
from npu_lora_decoding.foundations.errors import DecodingError

COUNTS = [
    (name, action.option_strings[0], action.dest)
    for name in TABLE
    for _ in [load_command(name)]
    for action in parser_of(name)._actions
    if action.type is int and action.dest != 'seed' and action.option_strings
]
RATES = [
    (name, action.option_strings[0])
    for name in TABLE
    for action in parser_of(name)._actions
    if action.type is float and action.option_strings
]


def argv(name):
    "The arguments that a command cannot do without"
    return [name, *('x' for a in parser_of(name)._actions if not a.option_strings)]


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('a model was loaded')

    for module in (compare, decoding, adapter, head, memory):
        monkeypatch.setattr(module, 'load_target', refuse)


@pytest.mark.parametrize('name,option,dest', COUNTS, ids=lambda x: str(x))
def test_counts(name, option, dest):
    for value in ('-1', '0'):
        may_be = value == '0' and (dest in _MAY_BE_ZERO or (name, dest) == ('evaluate', 'steps'))
        if may_be:
            continue
        with pytest.raises(DecodingError, match=f'{option} is {value}: give at least'):
            run([*argv(name), option, value])


@pytest.mark.parametrize('name,option', RATES, ids=lambda x: str(x))
def test_rates(name, option):
    if option in ('--alpha', '--beta', '--temperature'):
        return
    for value in ('nan', 'inf', '-0.5'):
        with pytest.raises(DecodingError, match=f'{option} is {value}: give at least 0'):
            run([*argv(name), option, value])


@pytest.mark.parametrize('value', ['0', '-1', 'nan', 'inf'])
def test_temperatures(value):
    with pytest.raises(DecodingError, match='--method greedy'):
        run(['generate', 'hi', '--method', 'sample', '--temperature', value])


@pytest.mark.parametrize(
    'words,sentence',
    [
        (['tune', '--betas', '0.1,x'], "expected numbers for --betas, got '0.1,x'"),
        (['tune', '--alphas', 'nan'], 'expected numbers for --alphas'),
        (['train-lora', 'x', '--snapshots', '1,2.5'], 'expected whole numbers for --snapshots'),
        (['train-head', 'x', '--step-weights', 'a'], 'expected numbers for --step-weights'),
        (['write', 'x', '--temperatures', '0,inf'], 'expected numbers for --temperatures'),
        (['accept', 'x', 'y', '--chain', '3,five'], 'expected whole numbers for --chain'),
    ],
)
def test_lists_of_numbers(words, sentence):
    with pytest.raises(DecodingError, match=sentence):
        run(words)


def test_numbers_of():
    assert (
        numbers_of('1, 2,', '--x', int) == (1, 2) and numbers_of('', '--x') == () and numbers_of('.5', '--x') == (0.5,)
    )
