"""vLLM as a method, without vLLM: a stand-in on the path of the engine's process counts on from the last
token of a prompt, and fails as a test asks
"""

import os, signal, subprocess, sys, textwrap, time
from pathlib import Path
import pytest, torch
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.cli.main import run
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.evaluation.benchmark import compare, table
from npu_lora_decoding.decoding.loop import LM, load
from npu_lora_decoding.foundations.models import encode
from npu_lora_decoding.foundations.files import json_rows
from npu_lora_decoding.serving.vllm_process import Engine, find_vllm, merged_folder, vllm_methods
from helpers.toys import toy_folder, toy_items, toy_lm

FAKE = '''
import json, os, pathlib, signal, subprocess, sys, time, types
HERE = pathlib.Path(__file__).parent
MODE = (HERE/'mode').read_text()
(HERE/'pids').open('a').write(f'{os.getpid()}\\n')
print('vLLM says hello'); os.write(1, b'{"ids": "noise"}\\n'); os.system('echo noise of a child')
__version__ = '0.0.fake'
SamplingParams = types.SimpleNamespace
class LoRARequest:
    def __init__(self, name, number, path): self.path = path
lora = types.ModuleType('vllm.lora'); request = types.ModuleType('vllm.lora.request'); request.LoRARequest = LoRARequest
sys.modules |= {'vllm.lora': lora, 'vllm.lora.request': request}
class LLM:
    def __init__(self, **options):
        (HERE/'seen').open('a').write(json.dumps(dict(options=options, env=dict(os.environ), path=sys.path, cwd=os.getcwd())) + '\\n')
        self.options = options
        if MODE == 'child': (HERE/'pids').open('a').write(f'{subprocess.Popen(["sleep", "600"]).pid}\\n')
        if MODE == 'fails at start': raise ValueError('LoRA rank 64 is greater than\\nmax_lora_rank 16.')
        if MODE == 'dies at start': print('no memory for keys', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGKILL)
        if MODE == 'sleeps at start': time.sleep(600)
        if MODE == 'threads': import torch; torch.set_num_threads(7)
        if MODE == 'deaf': signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
    def generate(self, prompts, params, lora_request=None, use_tqdm=True):
        print('working'); os.write(1, b'{"ids": [[1]]}\\n')
        if MODE == 'dies': os.write(2, b'\\x1b[31mout of everything\\x1b[0m\\n'); os.kill(os.getpid(), signal.SIGKILL)
        if MODE in ('sleeps', 'deaf'): (HERE/'busy').touch(); time.sleep(600)
        if MODE == 'fails': raise RuntimeError('a kernel fell over')
        n = params.max_tokens - (MODE == 'short')
        rows = [[(p['prompt_token_ids'][-1] + 1 + k) % 76 for k in range(n)] for p in prompts]
        ends = [next((i + 1 for i, t in enumerate(r) if t in params.stop_token_ids), len(r)) for r in rows]
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=r[:e])]) for r, e in zip(rows, ends)]
'''

TORCH = """
import os
threads = int(os.environ['OMP_NUM_THREADS'])
def get_num_threads(): return threads
def set_num_threads(n): global threads; threads = n
"""


class Stand:
    """An environment with a stand-in for vLLM: its Python, and what the stand-in saw;
    a stand-in for torch too, which would need seconds, where no contrast needs the real one
    """

    def __init__(self, folder, torch=False):
        self.folder = folder / 'site' / 'vllm'
        self.folder.mkdir(parents=True)
        (self.folder / '__init__.py').write_text(FAKE)
        self.mode('')
        if not torch:
            (folder / 'site' / 'torch.py').write_text(TORCH)
        self.python = folder / 'python'
        self.python.write_text(
            f'#!/bin/sh\nexport PYTHONPATH="{folder}/site:$PYTHONPATH"\nexec {sys.executable} "$@"\n'
        )
        self.python.chmod(0o755)

    def mode(self, text):
        (self.folder / 'mode').write_text(text)

    def pids(self):
        return [int(p) for p in (self.folder / 'pids').read_text().split()]

    def seen(self):
        import json

        return [json.loads(l) for l in (self.folder / 'seen').read_text().splitlines()]

    def running(self):
        return [p for p in self.pids() if alive(p)]


def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


def gone(stand, seconds=20):
    until = time.monotonic() + seconds
    while stand.running() and time.monotonic() < until:
        time.sleep(0.05)
    return not stand.running()


@pytest.fixture
def stand(tmp_path):
    return Stand(tmp_path)


@pytest.fixture
def stand_with_torch(tmp_path):
    return Stand(tmp_path, True)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    work = tmp_path_factory.mktemp('toys')
    toy_folder(work / 'model')
    toy_adapter(toy_model(), work / 'adapter')
    return work


@pytest.fixture
def lm(folders):
    return load(folders / 'model', folders / 'adapter', 'cpu')


# --- the answers


def test_a_method_writes_what_the_engine_writes(stand, lm, folders):
    ids, mask = encode(lm, ['one', 'one two'])
    with vllm_methods(stand.python, lm, ['one', 'one two'], 8) as (known, about):
        assert (
            list(known) == ['vllm_greedy', 'vllm_lora', 'vllm_cold']
            and all(m.third_party and m.other_process for m in known.values())
            and about == {}
        )
        run = known['vllm_greedy'].build(lm, None)
        first = [int(r[-1]) + 1 for r in ids]
        assert run(ids, mask, 4).tolist() == [[(f + k) % 76 for k in range(4)] for f in first]
        assert run(ids, mask, 4, (first[0] + 1,)).tolist() == [
            [first[0], first[0] + 1, lm.pad_id, lm.pad_id],
            [(first[1] + k) % 76 for k in range(4)],
        ]
        assert about == dict(vllm='0.0.fake')
    assert gone(stand)


def test_prompts_travel_without_their_padding(stand, lm, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Engine,
        'ask',
        lambda self, **q: asked.append(q) or dict(ids=[[3], [3]], threads=torch.get_num_threads(), vllm='x'),
    )
    with vllm_methods(stand.python, lm, ['one'], 8) as (known, _):
        known['vllm_greedy'].build(lm, None)(*encode(lm, [[5], [6, 7]]), 1)
    assert asked[-1] == dict(ids=[[5], [6, 7]], n=1, eos=[])


@pytest.mark.slow
def test_settings_of_the_engines(stand_with_torch, lm, folders, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', '/elsewhere')
    monkeypatch.delenv('VLLM_CPU_KVCACHE_SPACE', raising=False)
    with vllm_methods(stand_with_torch.python, lm, ['one', [5] * 40], 8, 3, CoLD(0.2, 0.3)) as (known, _):
        for m in known.values():
            m.build(lm, folders / 'adapter')
        greedy, lora, cold = stand_with_torch.seen()
        merged = Path(greedy['options']['model'])
        zeros = Path(greedy['options']['model']).parent / 'zeros'
        assert merged.name == 'merged' and zeros.is_dir()
        want = load(folders / 'model', folders / 'adapter', 'cpu')
        got = LM(load(folders / 'model', None, 'cpu').model.from_pretrained(merged), want.tokenizer)
        assert [t.id for t in want.generate('one', max_new_tokens=6, eos_token_id=None).tokens[0]] == [
            t.id for t in got.generate('one', max_new_tokens=6, eos_token_id=None).tokens[0]
        ]
    for s in (greedy, lora, cold):
        o = s['options']
        assert (o['dtype'], o['max_model_len'], o['enable_prefix_caching'], o['seed']) == ('float32', 48, False, 0)
        assert (
            s['env']['OMP_NUM_THREADS'],
            s['env']['VLLM_CPU_OMP_THREADS_BIND'],
            s['env']['VLLM_ENABLE_V1_MULTIPROCESSING'],
            s['env']['VLLM_CPU_KVCACHE_SPACE'],
        ) == (str(torch.get_num_threads()), 'nobind', '0', '1')
        ours = [p for p in s['path'] if (Path(p) / 'torch').is_dir() and not p.endswith('-packages')]
        assert '/elsewhere' not in s['path'] and s['cwd'].endswith('/path') and not ours
    assert [
        (s['options']['max_num_seqs'], s['options'].get('max_loras'), s['options'].get('max_lora_rank'))
        for s in (greedy, lora, cold)
    ] == [(8, None, None), (8, 1, 8), (16, 2, 8)]
    assert (
        lora['options']['model'] == cold['options']['model'] == str((folders / 'model').resolve())
        and cold['options']['enable_chunked_prefill'] is False
    )
    assert not merged.exists()


@pytest.mark.slow
def test_keys_and_values_have_room(stand_with_torch, lm, folders):
    lm.model.config.num_hidden_layers = 2**16  # as far as the cache is concerned
    with vllm_methods(stand_with_torch.python, lm, ['one'], 100) as (known, _):
        for name in ('vllm_lora', 'vllm_cold'):
            known[name].build(lm, folders / 'adapter')
    a, b = (int(s['env']['VLLM_CPU_KVCACHE_SPACE']) for s in stand_with_torch.seen())
    assert a > 1 and 2 * a - 1 <= b <= 2 * a


def test_compare_takes_turns_with_it(stand, lm, folders):
    items = toy_items(2)
    with vllm_methods(stand.python, lm, items, 6) as (known, about):
        rows = compare(
            lm, folders / 'adapter', items, ['greedy', 'vllm_lora'], new_tokens=6, rounds=2, metric='chrf', others=known
        )
    ours, theirs, _ = rows
    assert (
        set(ours) == set(theirs)
        and theirs['peer']
        and theirs['peak_mb'] is None
        and theirs['flops_per_token'] is None
        and theirs['tau'] == 1
        and ours['peak_mb'] is not None
    )
    assert (
        theirs['speedup_over'] == 'greedy'
        and len(theirs['ms_runs']) == 2
        and theirs['equal_tokens'] == 0
        and len(theirs['scores']) == 2
    )
    assert 'vllm_lora (third party)' in table(rows, full=True) and gone(stand)


@pytest.mark.slow
def test_the_command(stand, folders, tmp_path, capsys):
    (tmp_path / 'mine.jsonl').write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    run(
        [
            'compare',
            '--vllm',
            str(stand.python),
            '--model',
            str(folders / 'model'),
            '--adapter',
            str(folders / 'adapter'),
            '--prompts',
            str(tmp_path / 'mine.jsonl'),
            '--methods',
            'greedy,vllm_greedy',
            '--new-tokens',
            '4',
            '--rounds',
            '1',
            '--dtype',
            'fp32',
            '--device',
            'cpu',
            '--json',
            str(tmp_path / 'rows.json'),
            '--html',
            str(tmp_path / 'page.html'),
            '--plot',
            str(tmp_path / 'p.png'),
        ]
    )
    rows = json_rows(tmp_path / 'rows.json')
    assert (
        rows[1]['method'] == 'vllm_greedy'
        and rows[-1]['vllm'] == '0.0.fake'
        and 'vllm' not in rows[1]
        and 'vllm_greedy' in (tmp_path / 'page.html').read_text()
    )
    assert 'vllm_greedy (third party)' in capsys.readouterr().out and gone(stand)


# --- what is refused before an engine starts


@pytest.mark.parametrize('name', ['vllm_greedy', 'vllm_lora', 'vllm_cold'])
def test_vllm_needs_its_python(lm, folders, name):
    with pytest.raises(DecodingError, match=f'{name} needs vLLM.*--vllm'):
        compare(lm, folders / 'adapter', ['one'], ['greedy', name], new_tokens=4)


def test_unknown_names_and_a_missing_adapter(stand, lm):
    with vllm_methods(stand.python, lm, ['one'], 4) as (known, _):
        with pytest.raises(DecodingError, match='unknown method .*vllm_lora'):
            compare(lm, None, ['one'], ['vllm_fast'], new_tokens=4, others=known)
        for name in ('vllm_lora', 'vllm_cold'):
            with pytest.raises(DecodingError, match=f'{name} needs an adapter'):
                compare(lm, None, ['one'], [name], new_tokens=4, others=known)
    assert not (stand.folder / 'seen').exists()


@pytest.mark.parametrize(
    'script,message',
    [
        (None, 'is not a program'),
        ('#!/bin/sh\necho Python 3.12\n', 'is not a Python:'),
        ('not a program', 'is not a Python that answers'),
        ('#!/bin/sh\nsleep 60\n', 'is not a Python that answers'),
        (f'#!/bin/sh\nexec {sys.executable} "$@"\n', 'has no vLLM'),
    ],
)
def test_what_is_not_a_python_with_vllm(tmp_path, script, message):
    path = tmp_path / 'python'
    if script:
        path.write_text(script)
        path.chmod(0o755)
    with pytest.raises(DecodingError, match=f'{message}.*bin/python'):
        find_vllm(path, 5)


def test_a_model_from_memory_and_a_rank_beyond_vllms(stand, folders, lm, tmp_path):
    with vllm_methods(stand.python, lm, ['one'], 4) as (known, _):
        with pytest.raises(DecodingError, match='loaded from no folder'):
            known['vllm_greedy'].build(toy_lm(), None)
        toy_adapter(lm.model, tmp_path / 'big', r=513)
        lm.adapter = load_adapter(tmp_path / 'big', lm.model)
        for name in ('vllm_lora', 'vllm_cold'):
            with pytest.raises(DecodingError, match='rank 513: vLLM serves ranks up to 512'):
                known[name].build(lm, tmp_path / 'big')


def test_without_a_python_there_is_nothing():
    with vllm_methods(None, None, None, 4) as found:
        assert found == ({}, {})


# --- engines that fail


@pytest.mark.parametrize(
    'mode,message',
    [
        (
            'fails at start',
            r'vllm_greedy: ValueError: LoRA rank 64 is greater than max_lora_rank 16\.: correct what it names, or leave vllm_greedy out',
        ),
        ('dies at start', 'engine of vllm_greedy ended .*no memory for keys.*leave vllm_greedy out'),
        ('threads', 'computes with 7 threads and this process with'),
        ('sleeps at start', 'has not answered for 4 seconds.*fewer tokens'),
    ],
)
@pytest.mark.slow
def test_an_engine_that_does_not_start(stand, lm, mode, message):
    stand.mode(mode)
    with pytest.raises(DecodingError, match=message):
        with vllm_methods(stand.python, lm, ['one'], 4, patience=4.0 if 'sleeps' in mode else 60.0) as (known, _):
            known['vllm_greedy'].build(lm, None)
    assert gone(stand)


@pytest.mark.slow
@pytest.mark.parametrize(
    'mode,message',
    [
        ('fails', 'vllm_greedy: RuntimeError: a kernel fell over'),
        ('dies', r'engine of vllm_greedy ended \(it last wrote: .*working \| .* \| out of everything\)'),
        ('sleeps', 'has not answered for 8 seconds'),
        ('short', r'vllm_greedy wrote \[3\] tokens instead of 4'),
    ],
)
def test_an_engine_that_fails_in_the_middle(stand, lm, mode, message):
    stand.mode(mode)
    with pytest.raises(DecodingError, match=message) as e:
        with vllm_methods(stand.python, lm, ['one'], 4, patience=8.0) as (known, _):
            known['vllm_greedy'].build(lm, None)(*encode(lm, ['one']), 4)
    assert gone(stand) and '\n' not in str(e.value) and '\x1b' not in str(e.value)


# --- nothing is left behind


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_engines_and_their_children_end_with_the_block(stand, lm, folders, error):
    stand.mode('child')
    with pytest.raises(error):
        with vllm_methods(stand.python, lm, ['one'], 4) as (known, _):
            for name in ('vllm_greedy', 'vllm_lora'):
                known[name].build(lm, folders / 'adapter')
            assert len(stand.running()) == 4
            raise error
    assert gone(stand, 3) and not Path(stand.seen()[0]['cwd']).exists()  # a killed process is gone a moment later


COMMAND = '''
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
from npu_lora_decoding.cli.main import main
sys.argv = ['nld', 'compare', '--vllm', {python!r}, '--model', {model!r}]
sys.argv += '--adapter none --prompts 1 --methods greedy,vllm_greedy'.split()
sys.argv += '--new-tokens 4 --rounds 1 --dtype fp32 --device cpu'.split()
main()
'''


@pytest.mark.slow
@pytest.mark.parametrize('mode,signal_', [('sleeps', signal.SIGINT), ('deaf', signal.SIGINT), ('deaf', signal.SIGKILL)])
def test_a_stopped_command_leaves_no_process(stand, folders, tmp_path, mode, signal_):
    "Ctrl-C, and deaths that no Python code sees"
    stand.mode(mode)
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
    command = subprocess.Popen(
        [sys.executable, '-c', COMMAND.format(python=str(stand.python), model=str(folders / 'model'))],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not (stand.folder / 'busy').exists() and command.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert (stand.folder / 'busy').exists() and stand.running()
    os.killpg(command.pid, signal_)
    assert command.wait(60) != 0 and gone(stand)
