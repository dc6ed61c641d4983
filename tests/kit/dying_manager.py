"""A compute manager that kills itself at a chosen step, run in place of what a command would start."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from excimer.cli.controller_client import ControllerClient
from excimer.cli.installation import load_installation
from tests.kit.stack import Stack

ROOT: Final = Path(__file__).parent.parent.parent

_PROGRAM: Final = """
import importlib, os, signal, sys
module, _, name = sys.argv[1].rpartition(":")
is_after = sys.argv[2] == "after"
owner = importlib.import_module(module)
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
real = getattr(owner, name)
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def dying(*arguments, **named):
    if is_after:
        real(*arguments, **named)
    die()
setattr(owner, name, dying)
sys.argv = ["excimer.compute", sys.argv[3]]
from excimer.compute.__main__ import main
sys.exit(main())
"""


def start_dying(stack: Stack, endpoint: str, where: str, when: str) -> "subprocess.Popen[bytes]":
    """The manager of an endpoint that does not run. It dies `when` ("before" or "after") it calls what
    `where` ("module:function") names.
    """
    spec = ControllerClient(load_installation(stack.directory)).get("endpoints", endpoint, "spec")
    path = stack.directory / "run" / f"endpoint-{endpoint}.toml"
    assert path.exists(), "a command has started it before"
    log = (stack.directory / "logs" / f"endpoint-{endpoint}.log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, where, when, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
    )
    log.close()
    assert process.stdin is not None
    process.stdin.write(json.dumps(spec["tokens"]).encode())
    process.stdin.close()
    return process
