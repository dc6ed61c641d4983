#!/bin/sh
# Static checks: lint, format, types, C warnings, spelling, house rules. Under half a minute.
set -eu
PATH="$(cd "${1:-.venv/bin}" && pwd):$PATH"  # cython-lint runs pycodestyle
BIN=${1:-.venv/bin}
"$BIN/ruff" check src tests tools bench setup.py
"$BIN/ruff" format --check src tests tools bench setup.py
"$BIN/mypy"
find src -name '*.pyx' | xargs -r "$BIN/cython-lint" --max-line-length 110
"$BIN/codespell" src tests docs csrc bench tools ./*.md
"$BIN/python" -m pytest -q tests/test_tidy.py
