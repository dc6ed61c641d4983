"""The door through which clients log in, shared with PostgreSQL: it counts them, and can be held or shut.

::

    u64 logins    clients that were let in, or wait to be
    u32 state     0 open, 1 held, 2 shut, 3 starting
    u32 unused

The file lies beside the data directory; the endpoint module (`csrc/endpoint/admission.c`) maps it in every
process. There stands why no client goes in that the manager has not seen: a client counts itself before it
reads the state, and the manager sets the state before it reads the count. Between its two steps the manager
asks PostgreSQL something, which is a barrier to whatever processor there is.

Not here: when it is shut (`idle_policy`).
"""

import mmap
import os
import struct
from enum import IntEnum
from pathlib import Path
from typing import Final

from excimer.io.processes import give_to_user

ADMISSION_NAME: Final = "excimer_admission"
"""Given to the module, with its directory, as excimer.admission_file."""

OWN_NAMES: Final = "excimer_"
"""How the application names of our own connections begin, which do not count. Same as in admission.c."""

_LAYOUT: Final = struct.Struct("=QII")
_LOGINS: Final = struct.Struct("=Q")
_STATE: Final = struct.Struct("=I")


class Door(IntEnum):
    OPEN = 0
    HELD = 1
    """Who comes waits: the manager looks once more."""
    SHUT = 2
    """Who comes is refused with SQLSTATE 57P03."""
    STARTING = 3
    """Who comes waits, for as long as a login may take (authentication_timeout): nobody goes in yet."""


def remove_admission(directory: Path) -> None:
    """Of a PostgreSQL that is gone."""
    (directory / ADMISSION_NAME).unlink(missing_ok=True)


class Admission:
    """The manager's end. `make` it before PostgreSQL starts; `close` it when PostgreSQL is gone."""

    def __init__(self, shared: mmap.mmap) -> None:
        self._shared = shared

    @classmethod
    def make(cls, directory: Path, door: Door = Door.OPEN) -> "Admission":
        """A new file without logins, whatever an earlier PostgreSQL has left. Raises OSError."""
        path = directory / ADMISSION_NAME
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, _LAYOUT.pack(0, door, 0))
            give_to_user(path)
            return cls(mmap.mmap(descriptor, _LAYOUT.size))
        finally:
            os.close(descriptor)

    @property
    def logins(self) -> int:
        count: int = _LOGINS.unpack_from(self._shared)[0]
        return count

    @property
    def door(self) -> Door:
        return Door(_STATE.unpack_from(self._shared, _LOGINS.size)[0])

    def set(self, door: Door) -> None:
        _STATE.pack_into(self._shared, _LOGINS.size, door)

    def close(self) -> None:
        """May be called twice."""
        self._shared.close()
