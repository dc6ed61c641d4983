#!/bin/sh
# Called by the Makefile; safe to repeat.
#   packages   makes the virtual environment, with everything that pyproject.toml names
#   native     builds the Cython modules and libhydrate; needs no network
set -eu
: "${PYTHON:=python3}" "${VENV:=.venv}"

fail() { printf 'setup: %s\n' "$1" >&2; exit 1; }

install_missing_programs() {
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
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing$missing"
        apt-get -qq update
        # shellcheck disable=SC2086
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing >/dev/null
    else
        fail "missing$missing; run: sudo apt-get install$missing"
    fi
}

place() { (cd "$VENV" && pwd); }

packages() {
    install_missing_programs
    if [ -d "$VENV" ] && { [ ! -f "$VENV/pyvenv.cfg" ] || [ "$(cat "$VENV/.place" 2>/dev/null)" != "$(place)" ]; }
    then  # somebody else's, or moved: its programs name the old folder
        [ -f "$VENV/pyvenv.cfg" ] || fail "$VENV is not a virtual environment: remove it, or set VENV=..."
        rm -rf "$VENV"
    fi
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    echo "setup: installing Python packages (a minute or so the first time)"
    pip="$VENV/bin/python -m pip --quiet --disable-pip-version-check"
    $pip install --upgrade "setuptools>=77" "Cython>=3.1" wheel
    EXCIMER_NATIVE=later $pip install --no-build-isolation --editable ".[dev,demo]"
    place > "$VENV/.place"
    touch "$VENV/.packages"
}

native() {
    echo "setup: building native parts"
    force=""
    [ ! -f "$VENV/.ready" ] || [ "$VENV/.ready" -nt setup.py ] || force=--force  # other flags, perhaps
    log="$VENV/build.log"
    "$VENV/bin/python" setup.py --quiet build_ext --inplace --parallel "$(nproc)" $force > "$log" 2>&1 ||
        { cat "$log" >&2; fail "the native parts do not build"; }
    touch "$VENV/.ready"
}

"$1"
