"""What faults are made of

Whoever writes a file, a fault at each touch of the disk, damage to a file, and a fault in the middle of every kind of work.
"""

import ast, contextlib, errno, functools, json, os, resource, shutil, signal, sys, tempfile, traceback
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock
import matplotlib.image, torch
import npu_lora_decoding
from npu_lora_decoding.cold import expert as ft
from npu_lora_decoding.foundations import models
from npu_lora_decoding.temp_lora import perplexity as reading
from npu_lora_decoding.hass import train as th
from transformers.models.llama.modeling_llama import LlamaMLP
from npu_lora_decoding.foundations.adapters import fingerprint, load_adapter, toy_adapter
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.evaluation.plots import save_plot
from npu_lora_decoding.hass.chat_data import read_conversations
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.hass.head import HeadMLP
from npu_lora_decoding.hass.checkpoint import load_head, save_head
from npu_lora_decoding.hass.draft_adapter import DraftAdapter, DraftAdapterTraining, LowRankHead, adapter_fingerprint
from npu_lora_decoding.hass.draft_adapter import load_draft_adapter, save_draft_adapter
from npu_lora_decoding.hass.fused_checkpoint import load_fused_head, save_fused_head
from npu_lora_decoding.serving.head_export import check_export, export_head
from npu_lora_decoding.hass.features import StoredFeatures, write_features
from npu_lora_decoding.cold.expert import FinetuneConfig, finetune
from npu_lora_decoding.evaluation.benchmark import compare
from npu_lora_decoding.serving.hf_generate import Settings, read_settings, write_custom_generate
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.foundations.files import json_rows, save_rows
from npu_lora_decoding.temp_lora.perplexity import read_document
from npu_lora_decoding.evaluation.html_report import save_page
from npu_lora_decoding.hass.continuous_batching import WriteConfig
from npu_lora_decoding.speculation.head_drafter import HASS
from npu_lora_decoding.temp_lora.generation import TempLoRA
from npu_lora_decoding.temp_lora.translation import Form, translate_document
from npu_lora_decoding.serving.vllm_plugin import null_adapter
from npu_lora_decoding.hass.self_chat import write_conversations
from helpers.fused import random_fused
from helpers.heads import random_head
from helpers.heads import examples_of
from helpers.rows import row as measured
from helpers.heads import CONFIG as HEAD, TEXTS, begin, draft_adapter
from helpers.chats import chat_lm
from helpers.memories import STILL, write as write_on
from helpers.toys import toy_folder, toy_items, toy_lm, toy_tokenizer

PACKAGE = Path(npu_lora_decoding.__file__).parent
LM = toy_lm()
ITEMS = toy_items()
TEXT = torch.randint(4, 76, (90,), generator=torch.Generator().manual_seed(0))
LORA = FinetuneConfig(steps=2, batch=4, r=2, alpha=4, dropout=0.1, save_every=9, snapshots=(2,))
READING = TempLoRA(chunk=16, window=48, train_context=16, r=4, alpha=4.0, lr=3e-3)

# --- who writes


@dataclass(frozen=True)
class Writer:
    "A kind of file or folder: how it is written, and how it is read"

    # `make(folder, v)`: v = 0 for what was there before, v = 1 for the write that meets the fault; giving v = 1 again
    # goes on
    make: object
    read: object  # `read(folder)`: refuses what is not whole
    needs: str = '**/*.*'  # The files that reading needs


def _adapter(folder, v):
    lm = toy_lm()
    base = fingerprint(lm.model)
    model = ft._peft_model(lm, replace(LORA, seed=v))
    try:
        for p in ft._trainable(model).values():
            p.data.add_(0.01)
        ft.save_adapter(lm, model, folder / 'adapter', base, f'# card {v}')
    finally:
        model.unload()


def head_of(v):
    with torch.random.fork_rng():
        return random_head(LM, seed=v, vocab=20)


DEEP = toy_lm(num_hidden_layers=7)


def _fused(folder, v):
    return save_fused_head(random_fused(DEEP.model, seed=v, layers=(2, 3, 4)), folder / 'fused', DEEP.model)


@functools.cache
def _fused_of(v):
    return _fused(Path(tempfile.mkdtemp()), v)


@functools.cache
def _head_of(v):
    return save_head(head_of(v), Path(tempfile.mkdtemp()) / 'head', LM.model)


def _draft(folder, v):
    draft = DraftAdapter(draft_adapter(head_of(0), seed=v), adapter_fingerprint(load_adapter(_adapter_of(0), LM.model)))
    return save_draft_adapter(draft, folder / 'draft', head_of(0))


def _draft_training(folder, v):
    config = DraftAdapterTraining(**vars(replace(HEAD, steps=2, eval_every=1, save_every=9)), rank=2)
    learns = LowRankHead(head_of(0), adapter_fingerprint(load_adapter(_adapter_of(0), LM.model)))
    run = begin(folder, config, init=head_of(0), learns=learns)
    return run if v is None else th.train(run, TEXTS, stop_after=1 if v == 0 else None)


def _head_training(folder, v):
    th.train(begin(folder, replace(HEAD, steps=2, eval_every=1, save_every=9)), TEXTS, stop_after=1 if v == 0 else None)


@contextlib.contextmanager
def toy_embedded(seed=0, tokenizer=toy_tokenizer):
    "Let a toy stand for the embedded model"
    with contextlib.ExitStack() as stack:

        def patch(owner, name, value):
            stack.enter_context(mock.patch.object(owner, name, value))

        patch(models, 'embedded_gguf', lambda: Path('toy.gguf'))
        patch(models, 'repair_tokenizer', lambda t: t)
        patch(models.AutoModelForCausalLM, 'from_pretrained', lambda *a, **k: toy_lm(seed=seed).model)
        patch(models.AutoTokenizer, 'from_pretrained', lambda *a, **k: tokenizer())
        yield


def _embedded(folder, v):
    with toy_embedded(v):
        models._convert(folder / 'model')


def _sealed(folder):
    if not models._is_sealed(folder / 'model'):
        raise DecodingError('the cached model is damaged: it is converted again.')


def _book(folder, **options):
    with mock.patch.object(reading, 'stopwatch', lambda device: contextlib.nullcontext(dict(s=0.0))):
        return read_document(LM, TEXT, READING, folder / 'book.safetensors', 99, **options)  # the file holds times


def _page(file):
    if not file.read_text().endswith('</html>\n'):
        raise DecodingError('the page is cut short: make it again.')


def _talks(folder, v):
    write_conversations(
        chat_lm(),
        folder / 'talks',
        WriteConfig(shards=1 + v, per_shard=2, batch=2, user_tokens=60, new_tokens=4, openers=('',), min_p=0.0),
        quiet=True,
    )


def _memory(folder, v):
    return write_on(replace(STILL, lr=0.01, file=str(folder / 'story.safetensors')), 1, (21, 40)[v])


@functools.cache
def _adapter_of(v):
    folder = Path(tempfile.mkdtemp())
    _adapter(folder, v)
    return folder / 'adapter'


def _decodes(folder, v):
    return write_custom_generate(
        folder / 'decodes', Settings(beta=0.1 + v, drafter='hass_tree', head=True), _adapter_of(v), _head_of(v)
    )


def _read_decodes(folder):
    inside = folder / 'decodes' / 'custom_generate'
    return read_settings(inside), load_adapter(inside / 'adapter', LM.model), load_head(inside / 'head', LM.model)


WRITERS = {
    'LoRA adapter': Writer(_adapter, lambda f: load_adapter(f / 'adapter', LM.model)),
    'training a LoRA adapter': Writer(
        lambda f, v: finetune(toy_lm(), ITEMS, f, LORA, stop_after=1 if v == 0 else None),
        lambda f: finetune(toy_lm(), ITEMS, f, LORA, stop_after=0),
    ),
    'draft head': Writer(
        lambda f, v: save_head(head_of(v), f / 'head', LM.model), lambda f: load_head(f / 'head', LM.model)
    ),
    'adapter of zeros': Writer(
        lambda f, v: null_adapter(_adapter_of(v), f / 'zeros'), lambda f: load_adapter(f / 'zeros', LM.model)
    ),
    'folder that decodes': Writer(_decodes, _read_decodes, '**/*[ns]'),
    'exported head': Writer(
        lambda f, v: export_head(_head_of(v), f / 'out', LM, 'sglang'),
        lambda f: check_export(f / 'out', load_head(_head_of(0), LM.model), LM, 'sglang'),
    ),
    'fused head': Writer(_fused, lambda f: load_fused_head(f / 'fused', DEEP.model)),
    'exported fused head': Writer(
        lambda f, v: export_head(_fused_of(v), f / 'out', DEEP, 'vllm', verifier='a/b'),
        lambda f: load_fused_head(f / 'out', DEEP.model),
    ),
    'training a head': Writer(
        _head_training, lambda f: begin(f, replace(HEAD, steps=2, eval_every=1, save_every=9)), 'state.safetensors'
    ),
    'draft adapter': Writer(_draft, lambda f: load_draft_adapter(f / 'draft', head_of(0))),
    'training a draft adapter': Writer(_draft_training, lambda f: _draft_training(f, None), 'state.safetensors'),
    'features': Writer(
        lambda f, v: write_features(LM, examples_of()[: 3 + 5 * v], f / 'features', 3),
        lambda f: StoredFeatures(f / 'features').read([0]),
    ),
    'conversations': Writer(_talks, lambda f: (_talks(f, 0), read_conversations(f / 'talks'))),
    'reading a document': Writer(
        lambda f, v: _book(f, stop_after=2 if v == 0 else None), lambda f: _book(f, stop_after=0)
    ),
    'writing with a memory': Writer(_memory, lambda f: _memory(f, 0)),
    'result rows': Writer(
        lambda f, v: save_rows([dict(method='x', v=v)] * 9, f / 'rows.json'), lambda f: json_rows(f / 'rows.json')
    ),
    'picture': Writer(
        lambda f, v: save_plot(lambda ax: ax.plot([0, 1 + v]), f / 'a.png'),
        lambda f: matplotlib.image.imread(f / 'a.png'),
    ),
    'page of a comparison': Writer(
        lambda f, v: save_page(f / 'page.html', [measured('greedy', 30.0 + v)]), lambda f: _page(f / 'page.html')
    ),
    'cached model': Writer(_embedded, _sealed),
}

WRITES = {
    'atomic_path',
    'save_tensors',
    'save_file',
    'save_pretrained',
    'write_text',
    'write_bytes',
    'savefig',
    'to_json',
    'tofile',
    'dump',
    'touch',
    'symlink_to',
    'rename',
    'mkdir',
    'rmtree',
}


def _writes(call):
    "Whether a call puts something on the disk"
    f = call.func
    name = getattr(call.func, 'attr', getattr(call.func, 'id', None))
    if name == 'open':
        return any(
            isinstance(a, ast.Constant) and isinstance(a.value, str) and set(a.value) & set('wax+')
            for a in [*call.args[isinstance(f, ast.Name) :][:1], *(k.value for k in call.keywords if k.arg == 'mode')]
        )
    if name in ('replace', 'save') and isinstance(f, ast.Attribute):
        return isinstance(f.value, ast.Name) and f.value.id in ('os', 'torch', 'np')
    return name in WRITES


def _module(file, folder):
    return '.'.join(file.relative_to(folder).with_suffix('').parts)


TOYS = {'foundations.adapters.toy_adapter'}  # for tests only
# into a temporary folder, for the one process that asked for it
TEMPORARY = {'serving.vllm_process.merged_folder', 'serving.vllm_process.__init__'}
# made again where they are not whole, never refused: tests/foundations/test_programs.py and test_gguf.py
CACHES = {'foundations.programs._make', 'foundations.programs._kept', 'foundations.gguf.converted', 'foundations.gguf._write'}


def writers_in(folder):
    "Return `module.function` of everything in the package that writes"
    found = set()
    for file in sorted(Path(folder).rglob('*.py')):
        for f in ast.walk(ast.parse(file.read_text())):
            if isinstance(f, ast.FunctionDef) and any(isinstance(c, ast.Call) and _writes(c) for c in ast.walk(f)):
                found.add(f'{_module(file, folder)}.{f.name}')
    return found - TOYS - TEMPORARY - CACHES


def functions_called(work):
    "Return `module.function` of all functions of the package that `work` calls"
    seen = set()

    def note(frame, event, arg):
        if event == 'call' and frame.f_code.co_filename.startswith(str(PACKAGE)):
            seen.add(f'{_module(Path(frame.f_code.co_filename), PACKAGE)}.{frame.f_code.co_name}')

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


# --- the disk, touch by touch

_watch = None
# Python tells of each touch before it happens; such a hook stays for good, so it sleeps
sys.addaudithook(lambda event, args: _watch and _watch(event, args))

MAKES = {'open', 'os.mkdir', 'os.rename'}
TOUCHES = {'open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir'}


@contextlib.contextmanager
def at_touch(folder, n, act, events=TOUCHES):
    "Call `act` right before touch number `n` (from 1) of what lies below `folder`; yield the touches so far"
    global _watch
    seen = []

    def watch(event, args):
        if (
            event not in events
            or event == 'open'
            and not (set(args[1]) & set('wax+') if args[1] else args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        ):
            return
        if event in MAKES and not str(args[0]).startswith(str(folder)):
            return
        seen.append(event)
        if len(seen) == n:
            act()

    _watch = watch
    try:
        yield seen
    finally:
        _watch = None


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def full():
    raise OSError(errno.ENOSPC, 'No space left on device')


def in_child(work):
    """Run `work` in a process of its own and return how it ended

    0, 3 for a sentence that says to make room, 4 for another one, minus the signal.
    """
    pid = os.fork()
    if pid == 0:
        try:
            sys.stdout = open(os.devnull, 'w')
            work()
        except DecodingError as e:
            os._exit(3 if 'make room' in str(e) else 4)
        except BaseException:
            traceback.print_exc()
            os._exit(5)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def limited(size, action):
    "Let the system stop every file at `size` bytes: with SIG_DFL it kills the process right there, with SIG_IGN the write fails"
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def contents(folder):
    "Return what a folder shows: name -> bytes of a file, or of all files below a folder"
    inside = lambda p: (
        {str(f.relative_to(p)): f.read_bytes() for f in sorted(p.rglob('*')) if f.is_file()}
        if p.is_dir()
        else p.read_bytes()
    )
    return {str(p.relative_to(folder)): inside(p) for p in _units(folder)}


UNITS = ('features', 'talks', 'decodes')  # folders whose files, or folder, appear one by one


def _units(folder):
    return [
        q
        for p in sorted(Path(folder).iterdir())
        for q in (sorted(p.iterdir()) if p.name in UNITS else [p])
        if not q.name.startswith('.')
    ]


def hidden(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob('.*'))


# --- damage

_VALUES = ['x', -1, [], 10**9, float('nan'), '', 0, {}, 10**30, 1.5, True, ['x'], float('inf'), {'a': 1}]


def damaged_json(raw):
    "Yield (what was done, bytes) for a JSON file"
    for name, b in dict(
        empty=b'',
        half=raw[: len(raw) // 2],
        garbage=b'\xff\xfe\x00',
        list=b'[]',
        null=b'null',
        number=b'3',
        text=b'"x"',
        deep=b'[' * 100_000,
        digits=b'9' * 5000,
    ).items():
        yield name, b
    known = json.loads(raw)
    for k in known if isinstance(known, dict) else ():
        yield f'without {k}', json.dumps({a: b for a, b in known.items() if a != k}).encode()
        for v in [None, *(_VALUES[(i + len(k)) % len(_VALUES)] for i in (0, 5, 10))]:
            yield f'{k} = {v!r}', json.dumps(known | {k: v}).encode()


def damaged_lines(raw):
    "Yield (what was done, bytes) for a file of JSON lines"
    for name, b in dict(
        empty=b'',
        half=raw[: len(raw) // 2],
        garbage=b'\xff\xfe\x00\n',
        list=b'[]\n',
        deep=b'[' * 100_000,
        other=b'{"a": 1}\n',
        text=b'{"messages": "x"}\n',
        wrong=b'{"messages": [3]}\n',
    ).items():
        yield name, b


def packed(head, tail):
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, 'little') + text + tail


def damaged_tensors(raw):
    "Yield (what was done, bytes) for a safetensors file"
    n = int.from_bytes(raw[:8], 'little')
    for name, b in {
        'empty': b'',
        'seven bytes': raw[:7],
        'header only': raw[: 8 + n],
        'half': raw[: len(raw) // 2],
        'last byte gone': raw[:-1],
        'huge header': b'\xff' * 8 + raw[8:],
        'garbage': os.urandom(64),
        'pickle': b'PK\x03\x04' + raw,
    }.items():
        yield name, b
    g = torch.Generator().manual_seed(0)
    for i in torch.randint(0, 8 + n, (24,), generator=g).tolist():
        yield f'byte {i} of the header flipped', raw[:i] + bytes([raw[i] ^ 0x15]) + raw[i + 1 :]
    head = json.loads(raw[8 : 8 + n])
    for k in head.get('__metadata__', {}):
        rest = {a: b for a, b in head['__metadata__'].items() if a != k}
        yield f'without the note {k}', packed(head | dict(__metadata__=rest), raw[8 + n :])
        for v in ('', 'x', '[]', '{}', 'null', '-1', '9' * 5000, '[1, 2]', '{"a": 1}'):
            yield f'note {k} = {v[:9]!r}', packed(head | dict(__metadata__=rest | {k: v}), raw[8 + n :])
    names = [k for k in head if k != '__metadata__']
    for k in names[:2] + names[-2:]:
        yield f'{k} flattened', packed(
            head | {k: head[k] | dict(shape=[functools.reduce(lambda a, b: a * b, head[k]['shape'], 1)])}, raw[8 + n :]
        )
        yield f'{k} called otherwise', packed({('?' + a if a == k else a): b for a, b in head.items()}, raw[8 + n :])
        if head[k]['dtype'] in ('F32', 'BF16', 'I64'):
            yield f'{k} as integers', packed(
                head | {k: head[k] | dict(dtype=dict(F32='I32', BF16='I16', I64='F64')[head[k]['dtype']])}, raw[8 + n :]
            )


def damages(file):
    "Yield (what was done, bytes) for any file"
    raw = file.read_bytes()
    kinds = {'.safetensors': damaged_tensors, '.jsonl': damaged_lines, '.json': damaged_json}
    if kind := kinds.get(file.suffix):
        return kind(raw)
    return [('empty', b''), ('half', raw[: len(raw) // 2]), ('garbage', b'\xff\xfe\x00')]


# --- a fault in the middle of work


@contextlib.contextmanager
def at_forward(n, act, where='model'):
    "Call `act` in forward pass number `n` (from 1) through an MLP of the model, or of the draft head; yield the forward passes so far"
    kind = dict(model=LlamaMLP, head=HeadMLP)[where]
    calls = []
    true = kind.forward

    def forward(self, x):
        calls.append(1)
        if len(calls) == n:
            act()
        return true(self, x)

    with mock.patch.object(kind, 'forward', forward):
        yield calls


@dataclass(frozen=True)
class Work:
    "Something that takes long, to be disturbed"

    # `do(lm, folder)`: what it returns is compared; a second call goes on where there is something to go on from
    do: object
    saves: bool = False  # Whether Ctrl-C is noted, saved and answered by returning
    where: str = 'model'  # In whose forward pass it is disturbed
    n: int = 5  # In which one


def new_lm(chat=False, adapter=False):
    lm = chat_lm() if chat else toy_lm()
    if adapter:
        lm.adapter = load_adapter(toy_adapter(lm.model, Path(tempfile.mkdtemp())), lm.model)
    return lm


def _ids(out):
    return [t.id for t in out.tokens[0]]


def ask(**options):
    return lambda lm, f: _ids(lm.generate(TEXT[:21], max_new_tokens=14, eos_token_id=None, **options))


def _draft(lm, f):
    return _ids(lm.generate(TEXT[:9], drafter=HASS(_head_of(0), adaptive=False), max_new_tokens=9, eos_token_id=None))


def _remember(lm, f):
    return _ids(
        lm.generate(
            TEXT[:21],
            memory=replace(STILL, lr=0.01, file=str(f / 'story.safetensors')),
            max_new_tokens=24,
            eos_token_id=None,
            chat=False,
        )
    )


def _lora(lm, f):
    return finetune(lm, ITEMS, f, replace(LORA, snapshots=(), save_every=1))


def _head_run(lm, f):
    return [l for l in th.train(begin(f, replace(HEAD, steps=3, eval_every=9, save_every=1))).losses]


def _read(lm, f):
    r = read_document(lm, TEXT, READING, f / 'book.safetensors', 1)
    return [(c.start, c.nll, c.version) for c in r.chunks] if r.finished else None


def _compare(lm, f):
    return [r['equal_tokens'] for r in compare(lm, None, ['abc'], ['greedy'], new_tokens=4, rounds=1)[:-1]]


def _write(lm, f):
    return [
        p.read_text()
        for p in write_conversations(
            lm,
            f / 'talks',
            WriteConfig(shards=2, per_shard=2, batch=2, user_tokens=60, new_tokens=8, openers=('',), min_p=0.0),
            quiet=True,
        )
    ]


def _translate(lm, f):
    return translate_document(
        lm,
        ['ab cd', 'ef gh', 'ij'],
        replace(STILL, chunk=16, window=90, context=60, lr=0.02),
        form=Form('{source} = {target}; '),
        new_tokens=6,
    ).texts


WORKS = {
    'generate': Work(ask()),
    'generate, streamed': Work(ask(stream=True)),
    'generate with contrast': Work(ask(target=CoLD(0.1, 0.5))),
    'draft with a head': Work(_draft, where='head', n=3),
    'compare': Work(_compare),
    'train a LoRA adapter': Work(_lora, True, n=3),
    'train a head': Work(_head_run, True, 'head', 4),
    'read a document': Work(_read, True, n=9),
    'write with a memory': Work(_remember, n=25),
    'write conversations': Work(_write, n=60),
    'translate': Work(_translate, n=30),
}


def lm_for(name):
    return LM if name == 'train a head' else new_lm(name == 'write conversations', 'contrast' in name)
