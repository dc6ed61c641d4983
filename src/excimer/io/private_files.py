"""Files and directories that nobody but their owner may read, from their first moment on.

A secret goes into a new file that is made with mode 0600 and then takes the old one's name, so that neither a
umask nor the mode of an older file decides who may read it.

As root, PostgreSQL runs as an unprivileged user, which must pass through the directories above its own. A
*passable* directory has that user's group and mode 0710: who is in the group may go through it, not list it.
When we are not root it is 0700, as all others are.

Whoever mistypes a directory's name, or takes a file system's root, must not find it closed to everybody else:
what somebody names is claimed first (`claim_private_dir`).

Not here: directories that PostgreSQL owns (`processes.make_owned_dir`).
"""

import contextlib
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Final

from excimer.base.errors import RefusedError
from excimer.io.processes import unprivileged_user

PRIVATE_FILE: Final = 0o600
PRIVATE_DIRECTORY: Final = 0o700
PASSABLE_DIRECTORY: Final = 0o710
PRIVATE_UMASK: Final = 0o077
"""Of every service, so that what libraries make (SQLite, object stores) is private too."""


class ForeignDirectoryError(RefusedError):
    """A directory was named that holds something, and nothing by which we would know it as ours."""


def write_private(path: Path, content: bytes) -> None:
    """Puts `content` in the place of the whole file, for its owner only. Raises OSError that names it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    with contextlib.suppress(FileNotFoundError):  # of a process that had our number and died
        temporary.unlink()
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        os.fchmod(descriptor, PRIVATE_FILE)  # a umask may have taken even the owner's rights
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def touch_private(path: Path) -> None:
    """Makes an empty file if there is none, and takes the rights of others from one that is there.

    For files that a library opens by name. Raises OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        os.fchmod(descriptor, PRIVATE_FILE)
    finally:
        os.close(descriptor)


def claim_private_dir(path: Path, marks: Collection[str], *, passable: bool = False) -> Path:
    """`make_private_dir` for a directory that was named by somebody: it must be missing, empty, or ours.

    `marks` are names of entries; one that has any of them is ours. Raises `ForeignDirectoryError` before
    anything is changed, OSError.
    """
    with contextlib.suppress(FileNotFoundError):
        entries = os.listdir(path)
        if entries and not any(mark in entries for mark in marks):
            raise ForeignDirectoryError(
                f"{path} is not empty, and what it holds is not Excimer's: name another directory"
            )
    return make_private_dir(path, passable=passable)


def make_private_dir(path: Path, *, passable: bool = False) -> Path:
    """Makes a directory of ours, or takes the rights of others from one that is there; `path`.

    For names within a directory that is ours already, see `claim_private_dir`. Missing parents are made like
    it. Raises OSError.
    """
    if not path.parent.exists():
        make_private_dir(path.parent, passable=passable)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=PRIVATE_DIRECTORY)
    user = unprivileged_user() if passable else None
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            return path  # somebody else's, who decides about it
        if user is not None and found.st_gid != user.gid:
            os.fchown(descriptor, -1, user.gid)
        wanted = PRIVATE_DIRECTORY if user is None else PASSABLE_DIRECTORY
        if stat.S_IMODE(found.st_mode) != wanted:
            os.fchmod(descriptor, wanted)
    finally:
        os.close(descriptor)
    return path
