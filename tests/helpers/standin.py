"The stand-in device called npu: built once, and loaded into processes of its own"

import hashlib, os, shutil, subprocess, sys, sysconfig, tempfile
from functools import cache
from pathlib import Path
import pytest, torch
from torch.utils import cpp_extension
from helpers.processes import TESTS, environment

FOLDER = TESTS / 'standin' / 'device'
SOURCE = FOLDER / 'device.cpp'


def _compiler():
    "Return a C++ compiler, or skip the test"
    compiler = shutil.which(os.environ.get('CXX', 'g++'))
    if compiler is None:
        pytest.skip('the stand-in device is built by a C++ compiler, and there is none (g++, or CXX)')
    if not Path(sysconfig.get_paths()['include'], 'Python.h').exists():
        pytest.skip("the stand-in device is built with Python's headers, which are not installed (python3-dev)")
    return compiler


def _command(compiler, file):
    flags = ['-O0', '-std=c++20', '-shared', '-fPIC', f'-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}']
    include = [f'-I{path}' for path in (*cpp_extension.include_paths(), sysconfig.get_paths()['include'])]
    libraries = [f'-L{path}' for path in cpp_extension.library_paths()]
    names = ['-ltorch', '-ltorch_cpu', '-lc10', '-ltorch_python']
    return [compiler, *flags, *include, str(SOURCE), '-o', str(file), *libraries, *names]


@cache
def built():
    "Return the folder of the extension, compiled for this source, torch and Python where it is not there yet"
    compiler = _compiler()
    key = hashlib.sha256(SOURCE.read_bytes() + f'{torch.__version__} {sys.version}'.encode()).hexdigest()[:16]
    parent = Path(os.environ.get('TORCH_EXTENSIONS_DIR') or Path.home() / '.cache' / 'torch_extensions')
    folder = parent / f'npu_standin_{key}'
    file = folder / 'npu_standin.so'
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:  # whole, or not there: several processes may build
            part = Path(made, file.name)
            ended = subprocess.run(_command(compiler, part), capture_output=True, text=True)
            assert ended.returncode == 0, ended.stderr[-4000:]
            os.replace(part, file)
    return folder


def run(program, *args):
    "Return what a Python file prints in a process whose torch has the device npu; raise where it fails"
    path = os.pathsep.join([str(FOLDER), environment()['PYTHONPATH']])
    env = environment(NPU_STANDIN=str(built()), OMP_NUM_THREADS='1') | dict(PYTHONPATH=path)
    ended = subprocess.run([sys.executable, str(program), *args], env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout
