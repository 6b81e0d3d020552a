"""Every fault that the library survives, and what happens then; `python tests/test_faults.py` prints the table, made of the cases below

Faults that belong to one module are tested beside it and stand in the table by the name of their test."""

import ast, io, json, math, os, re, shutil, signal, sys, time, zipfile
from contextlib import redirect_stdout
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock
import pytest, torch
from safetensors.torch import load_file
from helpers.faults import *
from npu_lora_decoding.cli import main as cli, registry as commands
from npu_lora_decoding.foundations import files as core
from npu_lora_decoding.hass import continuous_batching as ring, training_step
from npu_lora_decoding.decoding import loop as decode_module
from npu_lora_decoding.foundations import models
from npu_lora_decoding.temp_lora import adapter as temp_lora
from npu_lora_decoding.decoding.baseline import beam_search
from npu_lora_decoding.foundations.timing import peak_memory
from npu_lora_decoding.decoding.loop import Result, Token
from npu_lora_decoding.hass.features import OnlineFeatures
from npu_lora_decoding.foundations.models import embedded_folder, encode, load_model
from npu_lora_decoding.evaluation.plots import token_ansi, token_html
from npu_lora_decoding.evaluation.draft_plots import proposer_html
from helpers.memories import traces

ROWS = []  # Of the table: fault, where, what happens


def fault(name, cases, what=None):
    "Parametrise a test, and note a row of the table for each case; where `what` is None, `cases` says it, and the test checks it"
    ROWS.extend((name, case, what or cases[case]) for case in cases)
    return (
        pytest.mark.parametrize('case', list(cases))
        if what
        else pytest.mark.parametrize('case, message', list(cases.items()), ids=list(cases))
    )


# a fork, and what broken files make libraries say
pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),
    pytest.mark.filterwarnings('ignore::UserWarning'),
]

# --- 1. killed while it writes


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "For each writer: the folder before and after, and the functions that were called"
    out = {}
    for name, w in WRITERS.items():
        folder = tmp_path_factory.mktemp('w')
        called = functions_called(lambda: w.make(folder / 'x', 0))
        before = shutil.copytree(folder / 'x', folder / 'before')
        called |= functions_called(lambda: w.make(folder / 'x', 1))
        w.make(folder / 'x', 1)  # the same command again changes nothing
        out[name] = before, contents(before), contents(folder / 'x'), called
    return out


def test_the_list_is_complete(written):
    "Whoever writes a file is called by one of the writers above"
    found = writers_in(PACKAGE)
    assert len(found) > 12 and found - set.union(*(called for *_, called in written.values())) == set()


def test_a_new_writer_is_noticed(tmp_path):
    for i, line in enumerate(
        (
            "Path('x').write_text('')",
            "open('x', 'w')",
            "open('x', mode='ab')",
            "torch.save(1, 'x')",
            "os.replace('a', 'b')",
            "fig.savefig('x')",
        )
    ):
        (tmp_path / f'm{i}.py').write_text(f'def f():\n    {line}\n')
    (tmp_path / 'n.py').write_text("def f(): return open('x').read().replace('a', 'b')")
    assert writers_in(tmp_path) == {f'm{i}.f' for i in range(6)}


def old_or_new(folder, before, after):
    "Whether every file is whole: what it was, or what it shall be"
    now = contents(folder)
    for k in before.keys() | now.keys():
        assert k in now and now[k] in (before.get(k), after.get(k)) or k not in now and k not in before, k
    return now


def try_everywhere(name, written, tmp_path, attempt):
    "Meet the fault at each touch of the disk in turn; `attempt(folder, n)` returns whether it was met"
    start, before, after, _ = written[name]
    w = WRITERS[name]
    seen = []
    for n in range(1, 200):
        folder = shutil.copytree(start, tmp_path / str(n))
        met = attempt(folder, n)
        now = old_or_new(folder, before, after)
        if (now, len(hidden(folder))) not in seen:  # the same call goes on
            seen.append((now, len(hidden(folder))))
            w.make(folder, 1)
            assert contents(folder) == after and hidden(folder) == []
        shutil.rmtree(folder)
        if not met:
            break
    assert n > 2 and len(seen) > 1
    return n


WHOLE = 'the old file or the new one, whole; the same command goes on to the same bytes'


@pytest.mark.slow
@fault('killed (kill -9) at each touch of the disk', WRITERS, WHOLE)
def test_killed(case, written, tmp_path):
    w = WRITERS[case]
    name = case

    def attempt(folder, n):
        def work():
            with at_touch(folder, n, kill):
                w.make(folder, 1)

        end = in_child(work)
        assert end in (0, -signal.SIGKILL)
        return end != 0

    try_everywhere(name, written, tmp_path, attempt)


def part(before, after):
    "Two thirds of the largest file that is written"
    return (
        max(
            len(b)
            for k, u in after.items()
            if u != before.get(k)
            for b in ([u] if isinstance(u, bytes) else u.values())
        )
        * 2
        // 3
    )


@fault('killed in the middle of a file', WRITERS, WHOLE)
def test_killed_in_the_middle_of_a_file(case, written, tmp_path):
    "By the system, which stops a file at a size: what libraries write without Python's knowledge is torn as well"
    start, before, after, _ = written[case]
    w = WRITERS[case]
    folder = shutil.copytree(start, tmp_path / 'x')
    assert in_child(lambda: (limited(part(before, after), signal.SIG_DFL), w.make(folder, 1))) == -signal.SIGXFSZ
    old_or_new(folder, before, after)
    w.make(folder, 1)
    assert contents(folder) == after and hidden(folder) == []


# --- 2. the disk is full


def sentence(work):
    "Return what `work` is refused with: one sentence of ours"
    with pytest.raises(DecodingError) as e:
        work()
    message = str(e.value)
    assert len(message) < 900 and '\n' not in message and message.endswith('.') and 'Traceback' not in message, message
    return message


FULL = 'one sentence says to make room; the old file stays, nothing else is left; the same command goes on'


@fault('disk full at each touch of the disk', WRITERS, FULL)
def test_disk_full(case, written, tmp_path):
    w = WRITERS[case]
    name = case

    def attempt(folder, n):
        with at_touch(folder, n, full, MAKES) as seen:
            try:
                w.make(folder, 1)
            except DecodingError as e:
                assert 'No space left on device' in str(e) and 'make room' in str(e) and len(seen) >= n
        assert hidden(folder) == []
        return len(seen) >= n

    try_everywhere(name, written, tmp_path, attempt)


@fault('disk full in the middle of a file', WRITERS, FULL)
def test_disk_full_in_the_middle_of_a_file(case, written, tmp_path):
    start, before, after, _ = written[case]
    w = WRITERS[case]
    folder = shutil.copytree(start, tmp_path / 'x')
    assert in_child(lambda: (limited(part(before, after), signal.SIG_IGN), w.make(folder, 1))) == 3
    old_or_new(folder, before, after)
    assert hidden(folder) == []


# --- 3. damaged files


@pytest.fixture(scope='module')
def model_folder(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp('model') / 'm')


def files_of(folder, needs):
    return sorted(
        f
        for f in folder.glob(needs)
        if f.suffix in ('.json', '.safetensors', '.jsonl', '.pt')
        and f.name not in ('generation_config.json', 'tokenizer_config.json', 'adapter_model.json')
    )


# nothing that could be read
BROKEN = ('empty', 'half', 'seven bytes', 'header only', 'last byte gone', 'garbage', 'deep', 'digits')


@fault(
    'damaged file: cut off, flipped bytes, wrong JSON, a missing or misshapen part',
    [n for n in WRITERS if n not in ('picture', 'page of a comparison')] + ['model and tokenizer'],
    'refused in one sentence that says what to do, or read where it does not matter',
)
def test_damaged(case, written, model_folder, tmp_path):
    start, w = (
        (model_folder, Writer(None, load)) if case == 'model and tokenizer' else (written[case][0], WRITERS[case])
    )
    refused = tried = 0
    for rel in (f.relative_to(start) for f in files_of(start, w.needs)):
        for what, raw in damages(start / rel):
            folder = tmp_path / 'x'
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(start, folder)
            (folder / rel).write_bytes(raw)
            tried += 1
            try:
                with redirect_stdout(io.StringIO()):
                    w.read(folder)
            except DecodingError as e:
                refused += 1
                assert '\n' not in str(e) and len(str(e)) < 900, str(e)
            except Exception as e:
                raise AssertionError(f'{rel}, {what}: {type(e).__name__} {e}') from e
            else:
                assert (
                    what not in BROKEN or rel.suffix == '.jsonl' and what == 'empty'
                ), f'{rel}, {what}: read all the same'
    assert tried > 2 and refused > 2, (tried, refused)


# --- 4. numbers that are none


def nan_lm(chat=False, adapter=False):
    lm = new_lm(chat, adapter)
    lm.model.model.norm.weight.data[0] = math.nan
    return lm


def _beams(lm, f):
    ids, mask = encode(lm, TEXT[:9])
    return beam_search(lm.model, ids, mask, 2, 4)


def _on_nan_features(lm, f):
    store = OnlineFeatures(lm, examples_of((12, 12)))
    return th.train(th.start_run(lm, store, f, replace(HEAD, steps=2, scaled=False, noise=0.0), data='nan'))


NAN = 'the model gave NaN or infinite logits'


@fault(
    'base weights are NaN',
    {
        'generate': NAN,
        'generate by drawing': NAN,
        'generate with contrast': 'NaN or infinite logits in rows',
        'beam search': NAN,
        'compare': NAN,
        'read a document': 'NaN or infinite logits in the chunk before token 16',
        'write with a memory': NAN,
        'write conversations': NAN,
        'translate': NAN,
        'train a LoRA adapter': 'the loss is nan at step 0: train again with a lower learning rate',
        'train a head': 'not finite|no number',
    },
)
def test_nan_in_the_base(case, message, tmp_path):
    more = {'generate by drawing': ask(do_sample=True, seed=0), 'beam search': _beams, 'train a head': _on_nan_features}
    lm = nan_lm(case == 'write conversations', 'contrast' in case)
    assert re.search(message, sentence(lambda: more.get(case, WORKS[case].do if case in WORKS else None)(lm, tmp_path)))
    assert not list(tmp_path.rglob('adapter*'))
    for file in tmp_path.rglob('*.safetensors'):
        assert all(x.isfinite().all() for x in load_file(file).values())


class NoNumber(torch.autograd.Function):
    "The same value, whose gradient is NaN"

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * math.nan


@fault(
    'a gradient is NaN though the loss is a number',
    {
        'train a LoRA adapter': 'its gradient is NaN or infinite: train again with a lower learning rate',
        'train a head': 'its gradient is not finite at step 2',
        'read a document': 'it was not learned',
    },
)
def test_nan_in_a_gradient(case, message, tmp_path):
    "At the last step, where what is wrong would be saved"
    calls = []
    last = dict(zip(('train a LoRA adapter', 'train a head', 'read a document'), (2, 5, 3)))[case]

    def poisoned(f):
        def g(*args, **kwargs):
            calls.append(1)
            out = f(*args, **kwargs)
            return NoNumber.apply(out) if len(calls) == last else out

        return g

    lm = lm_for(case)
    with mock.patch.object(
        *{
            'train a LoRA adapter': (ft, 'answer_loss', poisoned(ft.answer_loss)),
            'train a head': (training_step.AlignedLoss, 'forward', poisoned_tuple(calls, last)),
            'read a document': (temp_lora.F, 'cross_entropy', poisoned(temp_lora.F.cross_entropy)),
        }[case]
    ):
        if case == 'read a document':
            assert message in ' '.join(read_document(lm, TEXT, READING).notes)
        else:
            assert re.search(message, sentence(lambda: WORKS[case].do(lm, tmp_path)))
    assert len(calls) >= last and not (tmp_path / 'adapter').exists()
    for file in tmp_path.rglob('*.safetensors'):
        assert all(x.isfinite().all() for x in load_file(file).values())


def poisoned_tuple(calls, last):
    true = training_step.AlignedLoss.forward

    def forward(self, *args):
        calls.append(1)
        predicted, loss, more = true(self, *args)
        return predicted, NoNumber.apply(loss) if len(calls) == last else loss, more

    return forward


# --- 5. and 6. memory runs out, or somebody presses Ctrl-C, in the middle of a forward pass


def undisturbed(name, tmp_path, _kept={}):
    if name not in _kept:
        _kept[name] = WORKS[name].do(lm_for(name), tmp_path / 'whole')
    return _kept[name]


def disturb(name, tmp_path, act):
    "Do a work, disturbed; return how it ended, after the model and what was saved were looked at"
    w = WORKS[name]
    lm = lm_for(name)
    ended = None
    want = undisturbed(name, tmp_path)
    before = traces(lm.model)
    with at_forward(w.n, act, w.where) as calls, redirect_stdout(io.StringIO()):
        try:
            w.do(lm, tmp_path / 'x')
        except (KeyboardInterrupt, RuntimeError, MemoryError) as e:
            ended = e
    assert len(calls) >= w.n and traces(lm.model) == before
    assert not hidden(tmp_path / 'x') if (tmp_path / 'x').exists() else True
    if name == 'write with a memory' and (tmp_path / 'x').exists():
        # what was learned stays for the text that was written, which nobody gives again here
        shutil.rmtree(tmp_path / 'x')
    assert w.do(lm, tmp_path / 'x') == want and traces(lm.model) == before
    return ended


def raising(e):
    def act():
        raise e

    return act


OOM = dict(
    device=torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'),
    cpu=RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    ),
    python=MemoryError(),
)


@fault(
    'memory runs out in a forward pass',
    WORKS,
    'the error is raised; base, hooks and flags are what they were; what was saved is kept, and the same call goes on '
    'to the same result',
)
def test_out_of_memory(case, tmp_path):
    error = list(OOM.values())[list(WORKS).index(case) % 3]
    assert disturb(case, tmp_path, raising(error)) is error


@fault(
    'Ctrl-C in a forward pass',
    {
        n: 'saved, and the same call goes on' if w.saves else 'left at once; base, hooks and flags are what they were'
        for n, w in WORKS.items()
    },
)
def test_ctrl_c(case, message, tmp_path):
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ended = disturb(case, tmp_path, lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, old)
    assert isinstance(ended, KeyboardInterrupt) == ('at once' in message)


ROWS.append(('Ctrl-C between two forward passes', 'generate', 'left at once; base, hooks and flags are what they were'))


def test_ctrl_c_between_passes(tmp_path):
    "The loop is a generator: what it put on the model must not stay there until somebody collects it"
    lm = new_lm(adapter=True)
    calls = []
    before = traces(lm.model)

    def then(steps):
        calls.append(1)
        out = next(steps)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return out

    with mock.patch.object(decode_module, 'next', then, create=True), pytest.raises(KeyboardInterrupt) as kept:
        ask(target=CoLD(0.1, 0.5))(lm, tmp_path)
    assert kept.tb is not None and traces(lm.model) == before  # though the traceback holds every frame


@pytest.fixture(scope='module')
def shell(tmp_path_factory):
    "A model folder and files for the command line"
    folder = tmp_path_factory.mktemp('shell')
    toy_folder(folder / 'm')
    (folder / 'text.txt').write_text('a little text ' * 30)
    (folder / 'items.jsonl').write_text(
        '\n'.join(json.dumps(dict(prompt=f'say {i}', answer='a' * (1 + i % 3))) for i in range(24))
    )
    return folder


COMMANDS_THAT_FILL_MEMORY = {
    'nld generate': 'smaller --new-tokens',
    'nld perplexity': r'smaller --window \(it is 48\) or --chunk',
    'nld train-lora': r'smaller --batch \(it is 4\)',
    'nld evaluate': r'smaller --batch \(it is 32\)',
}


@fault('memory runs out in a command', COMMANDS_THAT_FILL_MEMORY)
def test_out_of_memory_in_a_command(case, message, shell, tmp_path, capsys):
    argv = {
        'nld generate': ['generate', 'hi', '--method', 'greedy'],
        'nld perplexity': [
            'perplexity',
            str(shell / 'text.txt'),
            '--out',
            str(tmp_path / 'run'),
            '--chunk',
            '16',
            '--window',
            '48',
            '--train-context',
            '16',
            '--rank',
            '2',
        ],
        'nld train-lora': [
            'train-lora',
            str(tmp_path / 'run'),
            '--prompts',
            str(shell / 'items.jsonl'),
            '--batch',
            '4',
            '--dtype',
            'fp32',
        ],
        'nld evaluate': ['evaluate', '--prompts', str(shell / 'items.jsonl'), '--arms', 'greedy', '--dtype', 'fp32'],
    }[case]
    with mock.patch.object(sys, 'argv', ['nld', *argv, '--model', str(shell / 'm')]), at_forward(
        3, raising(OOM['device'])
    ), pytest.raises(SystemExit) as left:
        cli.main()
    error = capsys.readouterr().err
    assert (
        left.value.code == 2
        and error.startswith('nld: memory ran out')
        and re.search(message, error)
        and error.count('\n') == 1
    ), error


# --- 7. hostile input


class Evil:
    "Unpickled, it leaves a mark"

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def plant(folder, mark, names):
    for n in names:
        torch.save(dict(x=Evil(mark)), folder / n)


def _index(folder, name):
    (folder / 'model.safetensors').rename(folder / 'other.safetensors')
    (folder / 'model.safetensors.index.json').write_text(
        json.dumps(dict(metadata={}, weight_map={k: name for k in load_file(folder / 'other.safetensors')}))
    )


PICKLES = {
    'beside an adapter': ('LoRA adapter', 'adapter', ['adapter_model.bin', 'optimizer.pt', 'training_args.bin'], None),
    'instead of an adapter': ('LoRA adapter', 'adapter', ['adapter_model.bin'], 'adapter_model.safetensors'),
    'called adapter_model.safetensors': ('LoRA adapter', 'adapter', ['adapter_model.safetensors'], None),
    'beside a head': ('draft head', 'head', ['pytorch_model.bin', 'x.pt'], None),
    'instead of a head': ('draft head', 'head', ['pytorch_model.bin'], 'model.safetensors'),
    'called model.safetensors': ('draft head', 'head', ['model.safetensors'], None),
    'as a draft vocabulary': ('draft head', 'head', ['draft_vocab.safetensors'], None),
    'beside a model': ('model', '.', ['pytorch_model.bin', 'x.pt'], None),
    'instead of a model': ('model', '.', ['pytorch_model.bin'], 'model.safetensors'),
    'as state of a LoRA training': ('training a LoRA adapter', '.', ['state.safetensors'], None),
    'as state of a head\'s training': ('training a head', '.', ['state.safetensors'], None),
    'as a document': ('reading a document', '.', ['book.safetensors'], None),
    'as features': ('features', 'features', ['features-0000.safetensors'], None),
    'as a token map': ('exported head', 'out', ['hot_tokens.pt'], None),
}


@fault('a pickle', PICKLES, 'never unpickled')
def test_pickles(case, written, model_folder, tmp_path):
    name, sub, names, lost = PICKLES[case]
    folder = shutil.copytree(model_folder if name == 'model' else written[name][0], tmp_path / 'x')
    if lost:
        (folder / sub / lost).unlink()
    plant(folder / sub, tmp_path / 'mark', names)
    try:
        (load if name == 'model' else WRITERS[name].read)(folder)
    except DecodingError as e:
        assert '\n' not in str(e)
    else:
        assert 'beside' in case
    assert not (tmp_path / 'mark').exists()
    with pytest.raises(Exception):
        # it would have worked
        (
            torch.load(io.BytesIO((folder / sub / names[0]).read_bytes()), weights_only=False),
            os.mkdir(tmp_path / 'mark'),
        )
    assert (tmp_path / 'mark').exists()


CALLS = {'eval', 'exec', '__import__', 'pickle', 'marshal', 'dill', 'shelve', 'system', 'popen'}


def test_nothing_unpickles_or_evaluates():
    found = set()
    for file in PACKAGE.glob('*.py'):
        for c in ast.walk(ast.parse(file.read_text())):
            if isinstance(c, ast.Call) and (
                isinstance(c.func, ast.Name)
                and c.func.id in CALLS
                or isinstance(c.func, ast.Attribute)
                and isinstance(c.func.value, ast.Name)
                and (
                    c.func.value.id in CALLS
                    or (c.func.value.id, c.func.attr) in {('torch', 'load'), ('os', 'system'), ('yaml', 'load')}
                )
            ):
                found.add(f'{file.name}:{c.lineno}')
    assert not found


@fault(
    'code in a model\'s folder',
    {
        'auto_map in config.json': 'never run',
        'auto_map in tokenizer_config.json': 'never run',
        'auto_map of an unknown family': 'never run',
    },
)
def test_code_in_a_folder(case, message, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / 'x')
    (folder / 'evil.py').write_text(
        f'import os; os.mkdir({str(tmp_path/"mark")!r})\nfrom transformers import LlamaConfig as C, LlamaForCausalLM '
        'as M, PreTrainedTokenizerFast as T'
    )
    file = folder / ('tokenizer_config.json' if 'tokenizer' in case else 'config.json')
    known = json.loads(file.read_text()) | dict(
        auto_map=dict(AutoConfig='evil.C', AutoModelForCausalLM='evil.M', AutoTokenizer=['evil.T', 'evil.T'])
    )
    if 'unknown' in case:
        known['model_type'] = 'evil'
    file.write_text(json.dumps(known))
    with mock.patch('builtins.input', side_effect=AssertionError('it asked')):
        try:
            load(folder)
        except DecodingError:
            pass
        else:
            assert 'unknown' not in case
    assert not (tmp_path / 'mark').exists()


OUTSIDE = ('../other.safetensors', '/etc/passwd', 'sub/../../x.safetensors', '..', '', 7)


@fault(
    'a file name that leads out of the folder',
    {'index of a model': 'names no safetensors files beside it', 'index of a head': 'names no files beside it'},
)
def test_path_traversal(case, message, written, model_folder, tmp_path):
    folder = shutil.copytree(model_folder if 'model' in case else written['draft head'][0] / 'head', tmp_path / 'x')
    _index(folder, 'other.safetensors')
    read = load if 'model' in case else lambda f: load_head(f, LM.model)
    read(folder)
    for name in OUTSIDE:
        shutil.copy(folder / 'other.safetensors', tmp_path / 'other.safetensors')  # it would have worked
        (folder / 'model.safetensors.index.json').write_text(
            json.dumps(dict(metadata={}, weight_map={k: name for k in load_file(folder / 'other.safetensors')}))
        )
        assert message in sentence(lambda: read(folder))


def _edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


HUGE = {
    'rank of an adapter': ('LoRA adapter', 'adapter/adapter_config.json', dict(r=10**9)),
    'rank_pattern of an adapter': ('LoRA adapter', 'adapter/adapter_config.json', dict(rank_pattern={'q_proj': 10**9})),
    'lora_alpha of an adapter': ('LoRA adapter', 'adapter/adapter_config.json', dict(lora_alpha=10**400)),
    **{
        f'{k} of a head': ('draft head', 'head/config.json', {k: 10**9})
        for k in (
            'intermediate_size',
            'num_attention_heads',
            'num_key_value_heads',
            'head_dim',
            'vocab_size',
            'hidden_size',
            'num_hidden_layers',
        )
    },
    **{
        f'{k} of a model': ('model', 'config.json', {k: 10**9})
        for k in ('num_hidden_layers', 'hidden_size', 'vocab_size', 'intermediate_size')
    },
}


@fault('a huge number in a configuration', HUGE, 'refused before memory is taken')
def test_huge_numbers(case, written, model_folder, tmp_path):
    name, file, changes = HUGE[case]
    folder = shutil.copytree(model_folder if name == 'model' else written[name][0], tmp_path / 'x')
    _edit(folder / file, **changes)
    start = time.process_time()
    with peak_memory() as m:
        before = m['mb']
        sentence(lambda: (load if name == 'model' else WRITERS[name].read)(folder))
    assert m['mb'] < before + 100 and time.process_time() < start + 1.5


@fault('a prompt of 10 MB', {'letters': '', 'words': '', 'messages': '', 'half a character': 'half a character'}, None)
def test_huge_prompts(case, message):
    lm = new_lm(chat=case == 'messages')
    n = 10_000_000
    prompt = dict(letters='a' * n, words='word ' * (n // 5), messages=[dict(role='user', content='a' * n)]).get(
        case, '\ud800' + 'a' * n
    )
    start = time.process_time()
    with mock.patch.object(type(lm.model), 'forward', side_effect=AssertionError('a forward pass')):
        refusal = sentence(lambda: lm.generate(prompt))
    assert time.process_time() < start + 1.5
    assert re.search(message or r'more than \d+ tokens but the context holds \d+: shorten it', refusal)


NASTY = [
    '<script>alert(1)</script>',
    '" onmouseover="alert(1)',
    '&lt;',
    '\u202egnp.exe',
    '\x1b[2J\x1b]0;title\x07',
    '\r',
    '\x00',
    '\x9b31m',
    "';--",
    '$\\frac{$',
    'a\n',
]


class Nasty:
    "A tokenizer of hostile tokens"

    def decode(self, ids, **_):
        return ''.join(NASTY[i] for i in ids)


def nasty():
    lm = toy_lm()
    lm.tokenizer = Nasty()
    tokens = [Token(i, NASTY[i] if i % 2 else 'target', -1.0, -2.0, (i + 1) % len(NASTY), 3) for i in range(len(NASTY))]
    return Result([''.join(NASTY)], [tokens], [], lm, notes=['<b>note</b>'])


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []
        self.text = ''

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {a for a, _ in attrs}))

    def handle_data(self, data):
        self.text += data


CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]')
VIEWS = {'token_html': token_html, 'proposer_html': proposer_html, 'a result in a notebook': lambda r: r._repr_html_()}


@fault('HTML, scripts and control characters in tokens', VIEWS, 'shown as text')
def test_html(case):
    html = VIEWS[case](nasty())
    seen = Tags()
    seen.feed(html)
    assert {t for t, _ in seen.tags} <= {'div', 'span', 'br', 'hr'}
    assert set.union(*(a for _, a in seen.tags)) <= {'style', 'title'}
    assert '<script>alert(1)</script>' in seen.text and not CONTROL.search(html)


@fault(
    'escape sequences for a terminal',
    {
        'tokens of a coloured text': 'written out',
        'tokens of a plain text': 'written out',
        'a text while it is written': 'written out',
        'an error message': 'written out',
    },
)
def test_terminal(case, message, tmp_path, capsys, shell):
    if 'tokens' in case:
        text = token_ansi(nasty(), colour='coloured' in case)
        ours = re.sub(r'\x1b\[(48;2;\d+;\d+;\d+;30(;1;4)?|0)m', '', text)
        assert not CONTROL.search(ours) and '\\x1b[2J' in ours
    elif 'message' in case:
        with mock.patch.object(
            sys,
            'argv',
            ['nld', 'evaluate', '--model', str(shell / 'm'), '--prompts', '\x1b[2Jx.jsonl', '--arms', 'greedy'],
        ), pytest.raises(SystemExit):
            cli.main()
        error = capsys.readouterr().err
        assert not CONTROL.search(error.replace('\n', '')) and 'no file \\x1b[2Jx.jsonl' in error
    else:
        s = decode_module._Printed(Nasty(), skip_prompt=False)
        for tty in (True, False):
            with mock.patch.object(sys.stdout, 'isatty', lambda: tty, create=True):
                s.on_finalized_text(NASTY[4], stream_end=True)
            # what goes to a file stays as it is
            assert bool(CONTROL.search(capsys.readouterr().out.replace('\n', ''))) != tty


def test_a_picture_of_hostile_tokens(tmp_path):
    "matplotlib would read dollars as mathematics, and fail"
    from types import SimpleNamespace
    from npu_lora_decoding.evaluation.draft_plots import plot_draft
    from npu_lora_decoding.decoding.tree import Tree

    n = len(NASTY)
    step = SimpleNamespace(
        tree=Tree(torch.arange(n)[None], torch.tensor([[-1] + [0] * (n - 1)]), 'head'),
        accepted=torch.tensor([[True] * 2 + [False] * (n - 2)]),
        tokens=[[Token(9, 'target')]],
    )
    save_plot(lambda ax: plot_draft(step, nasty().lm, ax=ax), tmp_path / 'a.png')


@fault(
    'a symlink where something is written',
    {'a file': 'the link is replaced', 'a folder': 'the link is replaced', 'the temporary name': 'the link is removed'},
)
def test_symlinks(case, message, tmp_path):
    victim = tmp_path / 'victim'
    victim.mkdir()
    (victim / 'mine').write_text('mine')
    (tmp_path / 'file').write_text('mine')
    out = tmp_path / 'out'
    out.mkdir()
    if case == 'a file':
        (out / 'rows.json').symlink_to(tmp_path / 'file')
    elif case == 'a folder':
        (out / 'head').symlink_to(victim)
    else:
        for n, to in (('rows.json', tmp_path / 'file'), ('head', victim)):
            (out / f'.{n}.{core._HOST}-{os.getpid()}.part').symlink_to(to)
    (victim / 'mine').rename(victim / 'README.md')  # a folder of something else than a head is refused before
    for name in ('result rows', 'draft head'):
        WRITERS[name].make(out, 0)
    assert not (out / 'rows.json').is_symlink()
    assert not (out / 'head').is_symlink()
    assert json_rows(out / 'rows.json')
    assert load_head(out / 'head', LM.model)
    assert (tmp_path / 'file').read_text() == 'mine'
    assert [f.read_text() for f in victim.iterdir()] == ['mine']
    assert hidden(out) == []


# --- 8. several processes at once


def fused_projections(work, n):
    "Run `work(i)` in n processes at once; return how they ended"
    pids = []
    for i in range(n):
        pid = os.fork()
        if pid == 0:
            try:
                sys.stdout = open(os.devnull, 'w')
                work(i)
            except BaseException:
                traceback.print_exc()
                os._exit(5)
            os._exit(0)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]


def meet(folder, i, n):
    "Wait until n processes are here"
    (folder / str(i)).touch()
    until = time.monotonic() + 60
    while len(list(folder.iterdir())) < n and time.monotonic() < until:
        time.sleep(0.001)


ROWS += [
    (
        'several processes at once',
        'first use of the embedded model, with an empty cache',
        'each loads it; there is one cache, whole',
    ),
    (
        'several processes at once',
        'one head written again and again while others read it',
        'every reader finds a whole head',
    ),
]


@pytest.mark.parametrize('round', range(3))
def test_first_runs_race_for_the_cache(round, tmp_path, monkeypatch):
    monkeypatch.setenv('NLD_CACHE', str(tmp_path / 'cache'))
    (tmp_path / 'here').mkdir()
    want = toy_lm().model.state_dict()

    def work(i):
        def late():
            meet(tmp_path / 'here', i, 4)
            return toy_tokenizer()  # all convert, and rename at one time

        with toy_embedded(tokenizer=late):
            folder = embedded_folder()
        got = load(folder).model.state_dict()
        assert all(torch.equal(got[k], x) for k, x in want.items())

    assert fused_projections(work, 4) == [0] * 4
    (folder,) = (tmp_path / 'cache').iterdir()
    assert models._is_sealed(folder) and hidden(tmp_path / 'cache') == []


def test_writers_race_for_a_folder(tmp_path):
    heads = [head_of(i) for i in range(2)]
    names = ('config.json', 'model.safetensors', 'draft_vocab.safetensors')
    known = [contents(save_head(h, tmp_path / f'k{i}' / 'head', LM.model).parent)['head'] for i, h in enumerate(heads)]
    save_head(heads[0], tmp_path / 'head', LM.model)

    def work(i):
        for k in range(25 if i < 2 else 800):
            if i < 2:
                save_head(heads[i], tmp_path / 'head', LM.model)
            else:
                assert (tmp_path / 'head' / names[k % 3]).read_bytes() in [
                    known[0][names[k % 3]],
                    known[1][names[k % 3]],
                ]

    assert fused_projections(work, 3) == [0] * 3
    load_head(tmp_path / 'head', LM.model)
    assert hidden(tmp_path) == []


# --- faults that are tested beside their module

ELSEWHERE = {
    ('a draft head gives NaN', 'draft with a head'): (
        'decoded without draft tokens from there on, and a note says so',
        'speculation/test_head_drafter.py::test_a_head_that_fails_on_the_way',
    ),
    ('an adapter holds NaN', 'load_adapter'): (
        'refused, the layer named',
        'foundations/test_models.py::test_broken_adapter',
    ),
    ('a head holds NaN', 'load_head'): ('refused, the tensor named', 'hass/test_head.py::test_every_fault_is_named'),
    ('logits of the expert or the amateur are NaN', 'contrast'): (
        'refused, the row and the side named',
        'cold/test_rule.py::test_nan_is_named',
    ),
    ('features are NaN', 'train a head'): (
        'refused, the examples named',
        'hass/test_train.py::test_nan_is_named_and_nothing_is_spoilt',
    ),
    ('memory runs out while a chunk is learned', 'Temp-LoRA'): (
        'the chunk is not learned; no trace in the model',
        'temp_lora/test_adapter.py::test_no_trace',
    ),
    ('Ctrl-C while a chunk is learned', 'Temp-LoRA'): (
        'the adapter is what it was before the chunk',
        'temp_lora/test_adapter.py::test_an_interrupted_chunk_is_not_learned',
    ),
    ('killed (kill -9) at every rename', 'train a head'): (
        'the next call finishes with the same files',
        'hass/test_train.py::test_death_at_every_write',
    ),
    ('the cached model is damaged', 'first use'): (
        'converted again, and a note says so',
        'foundations/test_models.py::test_damaged_cache_is_converted_again',
    ),
    ('a compiled program in the cache is damaged', 'compiled steps'): (
        'compiled again',
        'foundations/test_programs.py::test_a_damaged_program_is_made_again',
    ),
    ('the cache folder cannot be written', 'compiled steps'): (
        'compiled for this process, and a warning says so',
        'foundations/test_programs.py::test_a_cache_folder_that_cannot_be_written_costs_only_the_next_process',
    ),
    ('there is no C++ compiler, or it fails', 'compiled steps'): (
        'steps run uncompiled, with the same tokens, and a warning says so',
        'decoding/test_loop.py::test_without_a_compiler_steps_run_as_they_are',
    ),
}


def test_references_exist():
    for _, where in ELSEWHERE.values():
        file, name = where.split('::')
        assert re.search(rf'^def {name}\(', (Path(__file__).parent / file).read_text(), re.M), where


def table():
    "Return every fault as a markdown table, the places with the same end in one line"
    lines = {}
    for f, where, what in [*ROWS, *((f, w, what) for (f, w), (what, _) in ELSEWHERE.items())]:
        lines.setdefault(
            (f, what.replace('\\', '').replace('|', ' or ') or 'refused by its beginning, before a forward pass'), []
        ).append(where)
    return '\n'.join(
        [
            '| fault | where | what happens |',
            '|---|---|---|',
            *(f'| {f} | {", ".join(where)} | {what} |' for (f, what), where in lines.items()),
        ]
    )


def test_the_table_is_whole():
    assert table().count('\n') > 30 and all(len(l.split(' | ')) == 3 for l in table().split('\n')[2:])


if __name__ == '__main__':
    print(table())
