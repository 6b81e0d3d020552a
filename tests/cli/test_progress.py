"Progress on the command line: a line before torch is imported, what each command reports, nothing on stdout"

import io, json, os, subprocess, sys
from contextlib import redirect_stdout
import pytest
from npu_lora_decoding.cli.main import TABLE, run
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.foundations.adapters import toy_adapter
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.progress import watching
from npu_lora_decoding.hass.checkpoint import save_head
from npu_lora_decoding.hass.head import DraftHead, head_config
from helpers.chats import CHATML, IM, lm_of
from helpers.processes import environment
from helpers.toys import toy_folder

# Ends the process where torch would be imported
NO_TORCH = '''
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == 'torch':
            sys.stderr.write('TORCH')
            raise SystemExit(7)
sys.meta_path.insert(0, Finder())
from npu_lora_decoding.cli.main import main
main()
'''


@pytest.mark.parametrize('name', TABLE)
def test_a_line_comes_before_torch(name):
    done = subprocess.run(
        [sys.executable, '-c', NO_TORCH, name, '--help'],
        capture_output=True,
        text=True,
        env=environment(NLD_PROGRESS=''),
    )
    assert done.returncode == 7 and done.stdout == ''
    assert done.stderr == f'nld {name}: importing torch and transformers\nTORCH'


@pytest.mark.parametrize('argv', [[], ['--help'], ['--version'], ['genrate']])
def test_what_needs_no_torch_shows_no_progress(argv):
    env = environment(NLD_PROGRESS='')
    done = subprocess.run([sys.executable, '-c', NO_TORCH, *argv], capture_output=True, text=True, env=env)
    assert 'importing' not in done.stderr and 'TORCH' not in done.stderr


# --- what each command reports


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "A folder with a chat model, an adapter, a head, items, conversations and a text"
    folder = tmp_path_factory.mktemp('toy')
    lm = lm_of(CHATML, IM, '<|im_end|>')
    toy_folder(folder / 'model', lm.model, lm.tokenizer)
    toy_adapter(lm.model, folder / 'adapter')
    target = load(folder / 'model', dtype='fp32', device='cpu').model
    save_head(DraftHead(head_config(target.config)), folder / 'head', target)
    items = [dict(prompt=f'number {i}', answer=str(i)) for i in range(24)]
    (folder / 'items.jsonl').write_text('\n'.join(map(json.dumps, items)))
    turns = [[('user', f'say {i} words'), ('assistant', f'{i} words are written ' * 2)] for i in range(20)]
    talks = [dict(messages=[dict(role=role, content=text) for role, text in talk]) for talk in turns]
    (folder / 'talks.jsonl').write_text('\n'.join(map(json.dumps, talks)))
    (folder / 'text.txt').write_text('to be or not to be, that is the question. ' * 20)
    return folder


def decoding(toy, out, few):
    "Return the smallest work of each command that decodes, and what it has to report"
    data = ['--prompts', f'{toy}/items.jsonl', '--adapter', f'{toy}/adapter']
    judged = 'answering 24 of 24 items'
    memory = '--chunk 64 --window 128 --train-context 32 --epochs 1 --rank 2'.split()
    return {
        'generate': (['hello', *data[2:], *few], ['loading model', 'answering']),
        'compare': (
            [*data, *'--methods greedy,cold --rounds 2 --timed 2 --metric chrf'.split(), *few],
            ['preparing', 'warming up', 'timing', 'cold, round 2 of 2', 'counting work', 'judging', judged],
        ),
        'verify': ([*data, '--new-tokens', '2', '--batch', '12'], ['verifying', 'loop = transformers']),
        'tune': ([*data, '--betas', '0.1', '--alphas', '0.1', *few], ['trying', 'alpha 0.1, beta 0.1', judged]),
        'evaluate': (
            [*data, '--arms', 'greedy,cold:0.1:0.2', *few],
            ['evaluating', 'CoLD, alpha 0.1, beta 0.2', judged],
        ),
        'perplexity': ([f'{toy}/text.txt', '--out', f'{out}/run', *memory], ['scoring', 'reading', 'perplexity']),
    }


def training(toy, out, few):
    "Return the same of each command that trains, or measures what was trained"
    data = ['--prompts', f'{toy}/items.jsonl']
    small = '--steps 2 --tokens 256 --heldout 4 --save-every 2 --eval-every 2 --write-batch 4 --user-tokens 24'.split()
    return {
        'train-lora': (
            [f'{out}/lora', *data, *'--steps 2 --batch 4 --dtype fp32'.split()],
            ['reading the items', 'training 2 of 2 steps', 'loss'],
        ),
        'write': (
            [f'{out}/answers', *data, *'--conversations 4 --batch 4 --user-tokens 24'.split(), *few],
            ['generating 4 of 4 conversations', 'answer tokens/s'],
        ),
        'train-head': (
            [f'{out}/job', '--data', f'{toy}/talks.jsonl', *small, *few],
            ['generating', 'encoding', 'storing features', 'training 2 of 2 steps', 'replaying answers'],
        ),
        'accept': (
            [f'{toy}/head', f'{toy}/talks.jsonl', '--tree', '0', '--dtype', 'fp32'],
            ['reading answers', 'measuring', 'replaying answers'],
        ),
        'export-head': ([f'{toy}/head', f'{out}/export'], ['loading model', 'checking what was written']),
    }


def work_of(toy, name, out):
    few = ['--new-tokens', '4', '--dtype', 'fp32']
    return (decoding(toy, out, few) | training(toy, out, few))[name]


@pytest.mark.parametrize(
    'name',
    ['generate', 'compare', 'verify', 'tune', 'evaluate', 'perplexity', 'train-lora', 'write', 'train-head', 'accept']
    + ['export-head'],
)
def test_a_command_says_what_it_does(toy, tmp_path, name):
    argv, wanted = work_of(toy, name, tmp_path)
    heard = []
    with watching(heard.append), redirect_stdout(io.StringIO()):
        run([name, *argv, '--model', f'{toy}/model', '--device', 'cpu'])
    lines = [str(status) for status in heard]
    missing = [what for what in wanted if not any(what in line for line in lines)]
    assert not missing and any('loading model' in line for line in lines), lines
    assert heard[-1].stages == ()  # nothing is left open
    shares = [s.share for s in heard if s.share is not None]
    assert all(0 <= share <= 1 for share in shares)


def test_a_verification_is_over_when_all_promises_are_checked(toy):
    for more in ([], ['--adapter', f'{toy}/adapter'], ['--head', f'{toy}/head']):
        heard = []
        argv = [
            'verify',
            '--model',
            f'{toy}/model',
            '--prompts',
            f'{toy}/items.jsonl',
            '--new-tokens',
            '1',
            '--only',
            'x',
        ]
        with watching(heard.append):
            run([*argv, *more])
        last = [s.stages[0] for s in heard if s.stages and s.stages[0].doing == 'verifying'][-1]
        assert last.done == last.total > 0


def nld(argv, **env):
    code = 'from npu_lora_decoding.cli.main import main; main()'
    return subprocess.run([sys.executable, '-c', code, *argv], capture_output=True, env=environment(**env))


@pytest.mark.slow
def test_a_log_file_is_plain_and_a_pipe_gets_the_output_alone(toy, tmp_path):
    "With the bars of transformers and the hub, which would draw where these tests do not switch them off"
    argv, _ = work_of(toy, 'evaluate', tmp_path)
    given = ['evaluate', *argv, '--model', f'{toy}/model', '--device', 'cpu']
    os.environ.pop('HF_HUB_DISABLE_PROGRESS_BARS', None)
    try:
        shown = nld(given, NLD_PROGRESS='')
    finally:
        os.environ['HF_HUB_DISABLE_PROGRESS_BARS'] = '1'
    silent = nld(given, NLD_PROGRESS='none')
    assert shown.returncode == silent.returncode == 0 and shown.stdout == silent.stdout != b''
    assert b'\r' not in shown.stderr and b'\x1b' not in shown.stderr
    assert shown.stderr.startswith(b'nld evaluate: importing torch and transformers\n')
    assert shown.stderr.count(b'nld evaluate: ') == len(shown.stderr.splitlines()) >= 2


@pytest.mark.slow
def test_a_mistake_is_the_last_line():
    done = nld(['generate', 'hi', '--alpha', '0'], NLD_PROGRESS='')
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == b'nld: alpha is 0.0: choose it above 0 and up to 1.'


def test_a_refusal_leaves_nothing_open(toy):
    heard = []
    with pytest.raises(DecodingError), watching(heard.append):
        run(['generate', '', '--model', f'{toy}/model'])
    assert heard[-1].stages == ()
