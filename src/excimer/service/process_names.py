"""How a process shows in `ps` and `top`: a fork has the arguments of the process that it came from.

The arguments are a piece of the process's own memory (/proc/PID/stat, fields 48 and 49), which is written
over, as PostgreSQL does. What does not fit is cut off; `PADDING` makes room.
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

PADDING: Final = "." * 255
"""An argument of the supervisor that is nothing but room for the names of services and endpoints."""

_PR_SET_NAME: Final = 15
_ARGUMENTS_START: Final = 45
"""Index of field 48 of /proc/PID/stat after the program's name; the end is the next."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


def show_as(name: str, arguments: Sequence[str]) -> None:
    """This process shows as `name` (15 bytes of it), and with `arguments` after the interpreter's name.

    Without /proc nothing happens: it is for people, and one of two ways to find a process.
    """
    _libc.prctl(_PR_SET_NAME, name.encode()[:15])
    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = int(fields[_ARGUMENTS_START]), int(fields[_ARGUMENTS_START + 1])
    except (OSError, IndexError, ValueError):
        return
    size = end - start
    if start <= 0 or size <= 1:
        return
    text = b"".join(os.fsencode(each) + b"\0" for each in [sys.executable, *arguments])
    ctypes.memmove(start, text[: size - 1].ljust(size, b"\0"), size)
