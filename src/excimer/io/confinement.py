"""How this kernel can keep a process of PostgreSQL from opening files that are not its own.

A redo worker confines itself (`csrc/redo/sandbox.c`) and says in its greeting what is in force. Here the same
is found out without one, so that a service can say at its start, and `excimer doctor` at any time, what to
expect.

Not here: the confinement itself, and whether it is demanded (`storage.engine.redo_pool`).
"""

import ctypes
import functools
import subprocess
from enum import StrEnum

from excimer.io.processes import drop_arguments

_SYS_LANDLOCK_CREATE_RULESET = 444
"""The same number on all architectures."""
_LANDLOCK_CREATE_RULESET_VERSION = 1
_CLONE_NEWUSER = 0x10000000
_PROBE_TIMEOUT_S = 10.0

_libc = ctypes.CDLL(None, use_errno=True)


class Confinement(StrEnum):
    """What keeps a process from files that are not its own; the first that is possible is used."""

    LANDLOCK = "Landlock"
    OWN_ROOT = "a root directory of its own"
    NONE = "nothing"


def landlock_version() -> int:
    """The version of Landlock that this kernel offers; 0 when it offers none."""
    version = _libc.syscall(
        ctypes.c_long(_SYS_LANDLOCK_CREATE_RULESET),
        None,
        ctypes.c_size_t(0),
        ctypes.c_uint32(_LANDLOCK_CREATE_RULESET_VERSION),
    )
    return max(int(version), 0)


@functools.cache
def probe_confinement() -> Confinement:
    """What PostgreSQL's user can use here. Blocks some milliseconds where there is no Landlock."""
    if landlock_version() > 0:
        return Confinement.LANDLOCK
    return Confinement.OWN_ROOT if _may_make_user_namespaces() else Confinement.NONE


def _may_make_user_namespaces() -> bool:
    """Tried by a process that does nothing else, as the user as whom redo workers run."""
    try:
        done = subprocess.run(
            ["/bin/true"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            timeout=_PROBE_TIMEOUT_S,
            check=False,
            preexec_fn=_enter_user_namespace,
            **drop_arguments(),
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def _enter_user_namespace() -> None:
    """For `preexec_fn`, which runs after the change of user."""
    if _libc.unshare(_CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "no user namespace")
