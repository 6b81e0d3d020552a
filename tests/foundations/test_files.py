"Files appear whole or not at all; one place reaches for torch_npu; clocks take turns"

import mmap, os, re, subprocess, sys, time
from pathlib import Path
import pytest, torch
import npu_lora_decoding
from safetensors import safe_open
from safetensors.torch import load_file
from npu_lora_decoding.foundations import files as core
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.files import atomic_path, cache_dir, save_tensors
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.foundations.timing import peak_memory, stopwatch, summarise, time_interleaved

PACKAGE = Path(npu_lora_decoding.__file__).parent


def fill(tmp, kind, text):
    if kind == 'folder':
        tmp.mkdir()
        tmp = tmp / 'inside'
    tmp.write_text(text)


def text_of(path, kind):
    return (path / 'inside' if kind == 'folder' else path).read_text()


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_atomic_path_replaces(tmp_path, kind):
    path = tmp_path / 'deep/er/x'
    for text in ('one', 'two'):
        with atomic_path(path) as tmp:
            fill(tmp, kind, text)
            assert tmp.parent == path.parent and (
                not path.exists() if text == 'one' else text_of(path, kind) == 'one'
            )  # the old one stays to the last
        assert text_of(path, kind) == text and os.listdir(path.parent) == ['x']


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('kind', ['file', 'folder'])
@pytest.mark.parametrize('old', [False, True])
def test_atomic_path_on_exceptions(tmp_path, kind, error, old):
    if old:
        fill(tmp_path / 'x', kind, 'old')
    with pytest.raises(error):
        with atomic_path(tmp_path / 'x') as tmp:
            fill(tmp, kind, 'half')
            raise error
    assert os.listdir(tmp_path) == ['x'] * old
    if old:
        assert text_of(tmp_path / 'x', kind) == 'old'


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_atomic_path_clears_what_a_killed_process_left(tmp_path, kind):
    "Its own number, or one that no process of this machine has; what a living process, or one of another machine, is writing stays"
    gone = subprocess.Popen([sys.executable, '-c', ''])
    gone.wait()
    stays = [
        f'.x.{core._HOST}-{os.getppid()}.part',
        f'.x.elsewhere-{gone.pid}.part',
        '.x.y.part',
        f'.xy.{core._HOST}-{gone.pid}.part',
    ]
    for name in (f'.x.{core._HOST}-{os.getpid()}.part', f'.x.{core._HOST}-{gone.pid}.part', *stays):
        fill(tmp_path / name, kind, 'half')
    with atomic_path(tmp_path / 'x') as tmp:
        assert not tmp.exists()
        fill(tmp, kind, 'new')
    assert text_of(tmp_path / 'x', kind) == 'new' and sorted(os.listdir(tmp_path)) == sorted(['x', *stays])


def test_tensors_on_a_full_disk():
    with pytest.raises(DecodingError, match='cannot write full .*No space left.*: make room or choose another folder'):
        save_tensors(dict(x=torch.ones(3)), '/dev/full', {})


def test_tensors_that_share_memory_or_are_views(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    save_tensors(dict(a=x, b=x.T, c=x[:, 1]), tmp_path / 'x.safetensors', dict(b='2', a='1'))
    back = load_file(tmp_path / 'x.safetensors')
    assert torch.equal(back['a'], x) and torch.equal(back['b'], x.T) and torch.equal(back['c'], x[:, 1])


def test_tensors_with_metadata_in_any_script(tmp_path):
    meta = dict(z='\u2603 \U0001f600 \u00e9"\\', a='x' * 300)
    save_tensors(dict(x=torch.arange(5)), tmp_path / 'x.safetensors', meta)
    save_tensors(dict(x=torch.arange(5)), tmp_path / 'y.safetensors', dict(reversed(meta.items())))
    with safe_open(tmp_path / 'x.safetensors', 'pt') as f:
        assert f.metadata() == meta and torch.equal(f.get_tensor('x'), torch.arange(5))
    assert (tmp_path / 'x.safetensors').read_bytes() == (tmp_path / 'y.safetensors').read_bytes()


def test_cache_dir(monkeypatch):
    for name in ('NLD_CACHE', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', '/home/x')
    assert cache_dir() == Path('/home/x/.cache/npu_lora_decoding')
    for empty in ('', '/xdg'):
        monkeypatch.setenv('XDG_CACHE_HOME', empty)
        assert cache_dir() == Path(empty or '/home/x/.cache') / 'npu_lora_decoding'
    monkeypatch.setenv('NLD_CACHE', '/mine')
    assert cache_dir() == Path('/mine')
    monkeypatch.setenv('NLD_CACHE', '')
    assert cache_dir() == Path('/xdg/npu_lora_decoding')


@pytest.mark.slow
def test_importing_the_package_leaves_torch_npu_alone():
    code = (
        'import importlib, pkgutil, sys, npu_lora_decoding as p\n'
        'names = [m.name for m in pkgutil.walk_packages(p.__path__, "npu_lora_decoding.")]\n'
        'for n in names: importlib.import_module(n)\n'
        'print(len(names), [m for m in sys.modules if m.split(".")[0] == "torch_npu"])'
    )
    # torch itself imports torch_npu where one is installed, unless this variable forbids it
    env = {**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0', 'PYTHONPATH': str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    n, found = done.stdout.strip().split('\n')[-1].split(' ', 1)
    assert int(n) == len(list(PACKAGE.rglob('*.py'))) - 1 and found == '[]'


IMPORTS = re.compile(r'''(import|from)\s+torch_npu|(__import__|import_module)\(\s*['"]torch_npu''')


def test_only_core_imports_torch_npu():
    for line in (
        'import torch_npu',
        'from torch_npu import npu',
        '__import__("torch_npu")',
        "import_module('torch_npu')",
    ):
        assert IMPORTS.search(line)
    found = {f.relative_to(PACKAGE).as_posix(): len(IMPORTS.findall(f.read_text())) for f in PACKAGE.rglob('*.py')}
    assert {n: k for n, k in found.items() if k} == {'foundations/devices.py': 1}


def test_timing_takes_turns():
    order = []
    times = time_interleaved(
        dict(a=lambda: order.append('a'), b=lambda: (order.append('b'), time.sleep(0.01))), rounds=3, warmup=2
    )
    assert order == ['a', 'b'] * 5 and [len(t.runs) for t in times.values()] == [3, 3]
    assert all(t.low <= t.median <= t.high and t.low == min(t.runs) for t in times.values())
    assert times['b'].low >= 0.01 > times['a'].median


def test_summarise():
    t = summarise([3.0, 1.0, 2.0])
    assert (t.median, t.low, t.high, t.runs) == (2.0, 1.0, 3.0, (3.0, 1.0, 2.0))


def test_stopwatch_stops_on_exceptions():
    with pytest.raises(RuntimeError):
        with stopwatch() as t:
            raise RuntimeError
    assert 0 <= t['s'] < 1


def test_peak_memory_sees_what_is_gone_again():
    with peak_memory() as before:
        pass
    with peak_memory() as m, mmap.mmap(-1, 2**26) as x:  # 64 MiB that no allocator has in stock
        for i in range(0, 2**26, mmap.PAGESIZE):
            x[i] = 1
        time.sleep(0.1)
    with peak_memory() as after:
        pass
    assert m['mb'] >= before['mb'] + 60 and m['mb'] >= after['mb'] + 60


def test_generator_is_our_own():
    before = torch.get_rng_state()
    draws = [torch.rand(4, generator=generator(s)).tolist() for s in (0, 0, 1, None, None)]
    assert draws[0] == draws[1] != draws[2] and draws[3] != draws[4] and torch.equal(torch.get_rng_state(), before)
