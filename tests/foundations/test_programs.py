"Programs of layers: what decides which one runs, what a cache folder can hold, and equality with the layers as they are"

import gc, json, time, warnings, weakref
from contextlib import nullcontext
from itertools import chain
import pytest, torch
from npu_lora_decoding.foundations import ops, programs
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.foundations.programs import (
    FAMILIES,
    bmm_of_few,
    description,
    layer_kind,
    layer_programs,
    linear_of_few,
    program_name,
    program_of,
)
from npu_lora_decoding.decoding.runner import _without_windows
from transformers import StaticCache
from helpers.loops import exported

compiled = pytest.mark.skipif(not ops.compiles(), reason='no C++ compiler')


def double(x):
    return x * 2


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache folder, a compiler that only counts, and a process that has no program yet"
    made = []

    def compile(f, inputs, file):
        made.append(f)
        file.write_text('a program')

    monkeypatch.setenv('NLD_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(programs, 'compiles', lambda: True)
    monkeypatch.setattr(programs, '_compile', compile)
    monkeypatch.setattr(programs, '_load', lambda file: programs._uncompiled(double))
    monkeypatch.setattr(programs, '_WARNED', set())
    monkeypatch.setattr(programs, '_FAILED', set())
    return made


def asked(about='double'):
    "Ask for a program as a new process does"
    programs._PROGRAMS.clear()
    x = torch.ones(2, 3)
    (out,) = program_of(double, [x], about)([x])
    assert torch.equal(out, x * 2)


def folder():
    (found,) = (programs.cache_dir() / 'programs').iterdir()
    return found


# --- the cache folder


def test_a_program_is_made_once_for_all_processes(cache):
    for _ in range(3):
        asked()
    assert len(cache) == 1


@pytest.mark.parametrize('damage', ['cut', 'other', 'no seal', 'no program', 'seal is cut', 'seal is a list'])
def test_a_damaged_program_is_made_again(cache, damage):
    asked()
    file = folder() / 'program.pt2'
    seal = folder() / 'seal.json'
    if damage == 'cut':
        file.write_text('a prog')
    elif damage == 'other':
        file.write_text('a PROGRAM')
    elif damage == 'no seal':
        seal.unlink()
    elif damage == 'no program':
        file.unlink()
    else:
        seal.write_text('[1]' if damage == 'seal is a list' else '{"sha')
    asked()
    asked()
    assert len(cache) == 2


def test_a_program_that_does_not_load_is_made_again(cache, monkeypatch):
    asked()

    def fails_once(file):
        monkeypatch.setattr(programs, '_load', lambda file: programs._uncompiled(double))
        raise RuntimeError('made for another processor')

    monkeypatch.setattr(programs, '_load', fails_once)
    with pytest.warns(UserWarning, match='cannot be loaded and is made again'):
        asked()
    assert len(cache) == 2


def test_a_killed_compilation_leaves_nothing_that_is_taken_for_a_program(cache):
    asked()
    whole = folder()
    left = whole.with_name(f'.{whole.name}.{programs.platform.node().replace(".", "_")}-999999999.part')
    whole.rename(left)
    asked()
    assert len(cache) == 2 and not left.exists()


def test_a_cache_folder_that_cannot_be_written_costs_only_the_next_process(cache, monkeypatch, tmp_path):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('NLD_CACHE', str(tmp_path / 'file' / 'cache'))
    with pytest.warns(UserWarning, match='not kept for the next process: cannot write'):
        asked()
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # once a process
        asked()
    assert len(cache) == 2


def test_a_compiler_that_fails_is_named_and_the_function_runs(cache, monkeypatch):
    def fails(*_):
        raise RuntimeError('CppCompileError: no space left')

    monkeypatch.setattr(programs, '_compile', fails)
    with pytest.warns(UserWarning, match='run uncompiled, because compiling failed .RuntimeError: CppCompileError'):
        asked()


def test_two_at_once(cache, monkeypatch):
    "Another process finished the same program meanwhile"
    compile = programs._compile

    def late(f, inputs, file):
        compile(f, inputs, file)
        monkeypatch.setattr(programs, '_compile', compile)
        programs._make(f, inputs, programs._folder(program_name('double', inputs)))

    monkeypatch.setattr(programs, '_compile', late)
    asked()
    asked()
    assert json.loads((folder() / 'seal.json').read_text()) and len(cache) == 2


# --- what a program depends on


def test_a_name_holds_all_that_a_program_depends_on(monkeypatch):
    x = torch.ones(4, 6)
    name = lambda *inputs, about='f': program_name(about, list(inputs))
    names = [name(x), name(x, about='g'), name(x, x), name(x[:2]), name(x.T.contiguous()), name(x.T), name(x.half())]
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 77)
    names.append(name(x))
    monkeypatch.setattr(programs, '_machine', lambda: 'another')
    names.append(name(x))
    assert len(set(names)) == len(names)
    assert name(x[:1]) == name(x[:1].as_strided((1, 6), (99, 1))), 'strides of one row do not matter'


def changes(layer):
    "Yield changes of a layer that its program must notice, each undone before the next"
    norm = layer.input_layernorm
    kept = norm.variance_epsilon
    norm.variance_epsilon = 0.5
    yield 'a number'
    norm.variance_epsilon = kept
    layer.mlp.act_fn, before = torch.nn.Tanh(), layer.mlp.act_fn
    yield 'a module'
    layer.mlp.act_fn = before
    config = layer.self_attn.config
    config.attention_dropout = 0.25
    yield 'the configuration'
    config.attention_dropout = 0.0
    layer.self_attn.scaling, before = 0.3, layer.self_attn.scaling
    yield 'another number'
    layer.self_attn.scaling = before


def test_a_kind_changes_with_the_layer():
    first, second = toy_model().base_model.layers
    kind = layer_kind(first)
    assert kind == layer_kind(second)
    for what in changes(first):
        assert layer_kind(first) != kind, what
    assert layer_kind(first) == kind


def replaced(model):
    "Yield changes of a model that leave every module of a layer as it was before; each undone before the next"
    layers = model.base_model.layers
    config = model.config
    before = layers[1]
    layers[1] = toy_model(hidden_act='gelu').base_model.layers[1]
    yield 'a layer'
    layers[1] = before
    layers[1].mlp.extra = [1]
    yield 'a list'
    layers[1].mlp.extra.append(2)
    yield 'the same list, longer'
    del layers[1].mlp.extra
    config.attention_dropout = 0.25
    yield 'the configuration, for all layers'
    config.attention_dropout = 0.0
    layers[0].train()
    yield 'training'
    layers[0].eval()


def texts(model):
    "Return the kind of each layer"
    return [one.text for one in layer_programs(model).layers]


def test_kinds_are_read_again_when_something_changed():
    model = toy_model()
    before = texts(model)
    last = before
    for what in chain(changes(model.base_model.layers[0]), replaced(model)):
        now = texts(model)
        assert now != last, what
        assert now == [layer_kind(layer) for layer in model.base_model.layers], what
        last = now
    assert texts(model) == before


def test_kinds_are_not_read_again_when_nothing_changed(monkeypatch):
    model = toy_model()
    before = texts(model)
    monkeypatch.setattr(programs, 'layer_kind', lambda *_: pytest.fail('read again'))
    assert texts(model) == before


def test_kept_kinds_do_not_keep_a_model():
    model = toy_model()
    layer_programs(model)
    with AdapterBank(model, []).attached([]), layer_programs(model).attached():
        layer_programs(model)
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None


def test_a_class_without_a_file_is_like_no_other():
    "Typed at a prompt, and typed again otherwise: neither this process nor the next may take one for the other"
    texts = []
    for factor in (1, 2):
        home = dict(torch=torch, __name__='typed at a prompt')
        exec(f'class Typed(torch.nn.Module):\n    def forward(self, x): return x * {factor}', home)
        texts.append(description(home['Typed']()))
        assert description(home['Typed']()) == texts[-1]
    assert texts[0] != texts[1]


def foreign(layer):
    "Yield ways in which people change a layer, of which we cannot know what they do; each undone before the next"
    handle = layer.mlp.register_forward_pre_hook(lambda *_: None)
    yield 'a hook'
    handle.remove()
    layer.mlp.forward = lambda x: x
    yield 'a forward of its own'
    del layer.mlp.forward

    layer.mlp.table = torch.ones(2)
    yield 'a tensor beside the parameters'
    del layer.mlp.table
    kind = type(layer.mlp)
    kind.forward, before = lambda self, x: x, kind.forward
    yield 'a patched class'
    kind.forward = before

    class Mine(torch.nn.SiLU):
        pass

    layer.mlp.act_fn, before = Mine(), layer.mlp.act_fn
    yield 'a module of their own'
    layer.mlp.act_fn = before


def test_a_change_of_any_module_makes_programs_again(monkeypatch):
    "A draft's program holds code of several chapters"
    from pathlib import Path

    read = Path.read_text
    names = set()
    for changed in ('', 'drafting.py', 'shared_noise.py', 'lora.py'):
        monkeypatch.setattr(Path, 'read_text', lambda p, *a: read(p, *a) + '#' * (p.name == changed))
        programs._machine.cache_clear()
        names.add(programs.program_name('x', []))
    programs._machine.cache_clear()
    assert len(names) == 4


def test_layers_that_others_changed_share_no_program():
    model = toy_model()
    assert layer_programs(model) is not None
    for what in foreign(model.base_model.layers[1]):
        assert layer_programs(model) is None, what
    assert layer_programs(toy_model('gpt2')) is None


# --- equality


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('rows', [1, 2, 4, 5, 9])
def test_a_product_of_few_rows_is_the_product(rows, dtype):
    gen = torch.Generator().manual_seed(rows)
    x, w, bias = (torch.randn(*shape, generator=gen).to(dtype) for shape in ((1, rows, 33), (21, 33), (21,)))
    close = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear_of_few(x, w, bias), torch.nn.functional.linear(x, w, bias), **close)
    torch.testing.assert_close(linear_of_few(x[0, -1], w), torch.nn.functional.linear(x[0, -1], w), **close)
    y = torch.randn(3, 33, 5, generator=gen).to(dtype)
    torch.testing.assert_close(bmm_of_few(x.expand(3, -1, -1), y), x.expand(3, -1, -1) @ y, **close)


@pytest.mark.parametrize('out', [1, 2, 3, 7, 8, 20, 21])
def test_outputs_are_in_their_order_however_many_streams_read_them(out):
    gen = torch.Generator().manual_seed(out)
    x = torch.randint(-3, 4, (2, 1, 16), generator=gen).float()
    w = (
        torch.randint(-3, 4, (16, out), generator=gen).float().t()
    )  # of whole numbers, so sums are exact; not contiguous
    assert torch.equal(linear_of_few(x, w), x @ w.t())


@pytest.mark.parametrize('rows, wide, dtype', [(1, 1, torch.bfloat16), (2, 1, torch.bfloat16), (2, 0, torch.bfloat16)])
def test_several_long_rows_are_the_librarys_product(monkeypatch, rows, wide, dtype):
    called = []
    monkeypatch.setattr(programs, 'product', lambda x, w: called.append(x.shape) or x @ w.t())
    x = torch.ones(rows, programs.LONG + wide, dtype=dtype)
    linear_of_few(x, torch.ones(4, programs.LONG + wide, dtype=dtype))
    assert bool(called) == (rows > 1 and wide > 0)


def test_a_linker_waits_for_both_objects(monkeypatch):
    from torch._inductor import cpp_builder

    done = []

    class Builder:
        def __init__(self, name, compile_only, seconds=0.0):
            self.name = name
            self._compile_only = compile_only
            self.seconds = seconds

        def build(self):
            time.sleep(self.seconds)
            if self.name == 'broken':
                raise RuntimeError('no such header')
            done.append(self.name)

    monkeypatch.setattr(cpp_builder, 'CppBuilder', Builder)
    build = Builder.build
    with programs._side_by_side():
        for builder in (Builder('caller', True, 0.3), Builder('loops', True), Builder('library', False)):
            builder.build()
    assert done == ['loops', 'caller', 'library'] and Builder.build is build
    with pytest.raises(RuntimeError, match='no such header'), programs._side_by_side():
        Builder('broken', True).build()
        Builder('library', False).build()
    assert done[-1] == 'library' and len(done) == 3 and Builder.build is build


@pytest.mark.parametrize('n', [1, 2, 5, 16, 60])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32], ids=str)
def test_the_lm_head_of_a_block_gives_its_own_logits(n, dtype):
    "In half precision it is another product inside the block; what it returns is laid out as ever"
    model = toy_model().to(dtype)
    head = model.get_output_embeddings()
    x = torch.randn(2, n, head.in_features).to(dtype)
    want = head(x)
    with torch.no_grad(), layer_programs(model).attached():
        is_ours = 'forward' in vars(head)
        for rows in (x, x[:1], x[0]):
            got = head(rows)
            assert got.dtype == dtype and got.is_contiguous()
            torch.testing.assert_close(got, torch.nn.functional.linear(rows, head.weight), rtol=1e-2, atol=1e-2)
    assert is_ours == (dtype == torch.bfloat16) and 'forward' not in vars(head)
    assert head(x).equal(want)


@pytest.mark.parametrize('what', ['bias', 'hook', 'code of other people'])
def test_an_lm_head_that_is_more_than_a_product_stays(what):
    model = toy_model().to(torch.bfloat16)
    head = model.get_output_embeddings()
    x = torch.randn(1, 1, head.in_features).bfloat16()
    if what == 'bias':
        head.bias = torch.nn.Parameter(torch.ones(head.out_features).bfloat16())
    if what == 'hook':
        head.register_forward_hook(lambda module, args, out: out + 1)
    if what == 'code of other people':
        head.forward = lambda x: torch.nn.functional.linear(x, head.weight) + 1
    want = head(x)
    with torch.no_grad(), layer_programs(model).attached():
        assert head(x).equal(want)
    assert head(x).equal(want)


def stepped(model, bank, *, run, ids=((1, 2, 3), (4, 5, 6)), n=1):
    "Return the logits of two steps of `n` tokens behind a prompt, and the cache's planes"
    cache = StaticCache(config=_without_windows(model.config), max_cache_len=16)
    out = []
    with torch.no_grad(), bank.attached([0, -1]):
        model(torch.tensor(ids), past_key_values=cache)
        for token in (7, 8):
            with run():
                out.append(model(torch.full((2, n), token), past_key_values=cache).logits)
    return [*out, *(x for layer in cache.layers for x in (layer.keys, layer.values))]


def adapted(model, tmp_path, **options):
    return AdapterBank(model, [load_adapter(toy_adapter(model, tmp_path, **options), model)], ops.lora)


def same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('n', [1, 3])
def test_layers_by_programs_are_the_layers(family, n, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, 'program_of', exported)
    model = toy_model(family)
    bank = adapted(model, tmp_path)
    want = stepped(model, bank, run=nullcontext, n=n)
    same(stepped(model, bank, run=layer_programs(model).attached, n=n), want)
    assert not any('forward' in vars(m) for m in model.modules()), 'something is left on the model'


def test_weights_and_adapters_are_inputs(tmp_path, monkeypatch):
    "A program that was made before they changed in place, or for another adapter of the shape, sees what is there now"
    made = []
    monkeypatch.setattr(programs, 'program_of', lambda *a: made.append(a) or exported(*a))
    model = toy_model()
    bank = adapted(model, tmp_path / 'one')
    layers = layer_programs(model)
    first = stepped(model, bank, run=layers.attached)
    other = adapted(model, tmp_path / 'two', seed=5)
    plain = nullcontext
    same(stepped(model, other, run=layers.attached), stepped(model, other, run=plain))
    with torch.no_grad():
        model.base_model.layers[1].mlp.up_proj.weight.mul_(-2)
    changed = stepped(model, bank, run=layers.attached)
    same(changed, stepped(model, bank, run=plain))
    assert (changed[0] - first[0]).abs().max() > 1e-2 and len(
        {program_name(about, inputs) for _, inputs, about in made}
    ) == 1


def test_without_a_compiler_no_adapter_is_taken_for_another(tmp_path, monkeypatch):
    "What runs uncompiled holds the adapters of whoever asked first, so it may not serve the next"
    monkeypatch.setenv('NLD_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(programs, 'compiles', lambda: False)
    model = toy_model()
    banks = [adapted(model, tmp_path / str(seed), seed=seed) for seed in (0, 5)]
    layers = layer_programs(model)
    for bank in (*banks, banks[0]):
        want = stepped(model, bank, run=nullcontext)
        same(stepped(model, bank, run=layers.attached), want)
        same(stepped(model, bank, run=layer_programs(model).attached), want)


def test_weights_of_another_dtype_have_another_program():
    model = toy_model().bfloat16()
    first, second = layer_programs(model).layers
    assert first.kind == second.kind
    model.base_model.layers[1].input_layernorm.float()  # as preparing a model for training does
    first, second = layer_programs(model).layers
    assert first.kind != second.kind


def test_adapters_on_other_layers_have_other_programs(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(programs, 'program_of', lambda *a: made.append(a[2]) or exported(*a))
    model = toy_model()
    plain = nullcontext
    layers = layer_programs(model)
    for target in ('o_proj', 'down_proj', 'q_proj'):
        bank = adapted(model, tmp_path / target, target_modules=[target])
        same(stepped(model, bank, run=layers.attached), stepped(model, bank, run=plain))
    assert len(set(made)) == len(made) == 3


@pytest.mark.slow
@compiled
def test_a_compiled_program_serves_all_layers_and_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setenv('NLD_CACHE', str(tmp_path / 'cache'))
    model = toy_model()
    bank = adapted(model, tmp_path / 'adapter')
    want = stepped(model, bank, run=nullcontext)
    programs._PROGRAMS.clear()
    same(stepped(model, bank, run=layer_programs(model).attached), want)
    assert len(programs._PROGRAMS) == 1
    programs._PROGRAMS.clear()
    monkeypatch.setattr(programs, '_compile', lambda *_: pytest.fail('compiled again'))
    same(stepped(model, bank, run=layer_programs(model).attached), want)
