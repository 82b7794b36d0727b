#!/usr/bin/env bash
# Everything that pre-commit checks, over the whole tree. Needs the `lint` extra on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
sources() { git ls-files "$@" 2>/dev/null || find . -path ./build -prune -o -type f -print; }
ruff check .
ruff format --check .
sources 'cuda_src/*.h' 'cuda_src/*.cc' 'cuda_src/*.cuh' 'tests/*.cc' 'examples/*.h' 'examples/*.cc' | xargs clang-format --dry-run --Werror
codespell $(sources '*.md' '*.py' '*.h' '*.cc' '*.cuh' '*.sh' '*.toml')
mypy
echo "lint: clean"
