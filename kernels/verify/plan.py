"""Compile lowered text with Huawei's bishengir-compile as far as it goes without CANN

That is fusion, cube/vector split, memory plan and synchronisation. The last step needs `hivmc`, which only CANN has, so the
exit code is a failure even when everything before it passed. What counts is the file written after planning and
synchronisation.
"""

import subprocess
import tempfile
from pathlib import Path
import ascendnpuir

COMPILE = Path(ascendnpuir.__file__).parent / 'bin/bishengir-compile'
ARCHS = 'Ascend910B1', 'Ascend910B3', 'Ascend910B4', 'Ascend910_9382'
PASSES = '''--enable-auto-multi-buffer=True --enable-auto-bind-sub-block=True --enable-hfusion-compile=true
    --enable-hivm-compile=true --enable-triton-kernel-compile=true'''


class PlanError(RuntimeError):
    "bishengir-compile refused the kernel; the message is its sentence"


def plan(text, arch):
    "Return the HIVM of lowered `text`, memory-planned and synchronised for `arch`"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / 'kernel.mlir').write_text(text)
        options = [f'--target={arch}', *PASSES.split(), f'--save-temps={folder}', '-o', folder / 'kernel.o']
        done = subprocess.run([COMPILE, folder / 'kernel.mlir', *options], capture_output=True, text=True)
        return planned(folder, done.stdout + done.stderr)


def planned(folder, log):
    "Return the HIVM that a compilation left in `folder`, or raise what its `log` complains about"
    hivm = folder / 'module.hivm.opt.mlir'
    if hivm.is_file() and hivm.stat().st_size and 'Failed to run BiShengHIR pipeline' not in log:
        return hivm.read_text()
    raise PlanError(complaint(log))


def complaint(log):
    "Return the line of `log` that says what is wrong, without the file's name"
    lines = [line for line in log.splitlines() if 'hivmc' not in line]
    errors = [line for word in ('overflow, requires', 'error:') for line in lines if word in line]
    if not errors:
        return 'no HIVM file and no error message'
    return errors[0].partition('error: ')[2] or errors[0]
