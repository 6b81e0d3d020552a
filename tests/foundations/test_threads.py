"How threads wait is decided before torch is loaded, never against the user, and shown"

import os, subprocess, sys
import pytest
from npu_lora_decoding.foundations.threads import SPINS, VARIABLES, waiting

SHOW = 'import os; print(os.environ.get("GOMP_SPINCOUNT"), "torch" in __import__("sys").modules)'
TELL = 'from npu_lora_decoding.foundations.threads import waiting; print(waiting())'


def python(program, **variables):
    "Return what a fresh process prints, with these variables and no others about waiting"
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, '-c', program]
    return subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=True, timeout=600).stdout


def test_importing_the_package_sets_a_short_spin_and_loads_no_torch():
    assert python(f'import npu_lora_decoding; {SHOW}').split() == [str(SPINS), 'False']


@pytest.mark.parametrize('name', VARIABLES)
def test_what_the_user_set_is_left_alone(name):
    own = {name: '7'}
    shown = python(f'import npu_lora_decoding, os; print(*(os.environ.get(n) for n in {VARIABLES})); {TELL}', **own)
    values, answer = shown.splitlines()
    assert values.split() == [own.get(n, 'None') for n in VARIABLES]
    assert answer == f'as the environment asks ({name}=7)'


def test_too_late_is_reported_and_nothing_is_set():
    "A variable that is set too late would act on other programs alone"
    shown = python(f'import torch, npu_lora_decoding; {SHOW}; {TELL}').splitlines()
    assert shown[0] == 'None True'
    assert shown[1] == (
        'torch was imported before npu_lora_decoding, so its threads spin, which is slow on a busy machine: '
        f'import npu_lora_decoding first, or set GOMP_SPINCOUNT={SPINS} before Python starts'
    )


def test_openmp_obeys():
    "GNU's OpenMP shows what it has read when it is loaded with torch"
    program = 'import npu_lora_decoding, torch; print("libgomp" in open("/proc/self/maps").read())'
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES} | dict(
        OMP_DISPLAY_ENV='verbose'
    )
    done = subprocess.run([sys.executable, '-c', program], env=kept, capture_output=True, text=True, timeout=600)
    if 'True' not in done.stdout:
        pytest.skip('this torch has another OpenMP')
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in done.stderr


def test_the_doctor_says_it():
    doctor = 'from npu_lora_decoding.cli.main import run; run(["doctor"])'
    line = next(line for line in python(doctor, OMP_NUM_THREADS='2').splitlines() if line.startswith('threads'))
    assert line == f'threads     2, short spin (GOMP_SPINCOUNT={SPINS}, set by npu_lora_decoding)'
    assert waiting('kept', dict(OMP_WAIT_POLICY='ACTIVE')) == 'as the environment asks (OMP_WAIT_POLICY=ACTIVE)'


@pytest.mark.parametrize('first, threads, warns', [('torch', 2, True), ('torch', 1, False), ('npu_lora_decoding', 2, False)])
def test_loading_to_a_cpu_warns_where_torch_came_first(first, threads, warns):
    program = f'import {first}, torch; torch.set_num_threads({threads}); from npu_lora_decoding import load'
    command = [sys.executable, '-c', f'{program}; load()']
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=True, timeout=600)
    assert ('import npu_lora_decoding first' in done.stderr) == warns
