#!/bin/sh
# Makes the virtual environment and builds the native parts. Called by the Makefile; safe to repeat.
set -eu
: "${PYTHON:=python3}" "${VENV:=.venv}"

fail() { printf 'setup: %s\n' "$1" >&2; exit 1; }

command -v "$PYTHON" >/dev/null || fail "$PYTHON not found: install Python 3.11 or newer"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$PYTHON" --version) is too old: Excimer needs Python 3.11 or newer (set PYTHON=...)"

missing=""
command -v cc >/dev/null || missing="$missing gcc libc6-dev"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
"$PYTHON" - <<'PY' || missing="$missing python3-dev"
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
PY
if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing$missing"
        apt-get -qq update
        # shellcheck disable=SC2086
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing >/dev/null
    else
        fail "missing$missing; run: sudo apt-get install$missing"
    fi
fi

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
echo "setup: installing Python packages and building native parts (a minute or two the first time)"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "setuptools>=77" "Cython>=3.1" wheel
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[dev,demo]"
