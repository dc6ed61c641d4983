"""The user's cache directory: things made once, kept under the identity of what they were made from.

::

    <cache>/<kind>/<key>/...     one entry, complete from the moment it has this name
    <cache>/<kind>/.<key>.lock   held while the entry is being made
    <cache>/<kind>/.<key>.new    the entry being made; a leftover of a crash is removed by the next maker

An entry is made by whoever takes the lock first and appears by one rename, so any number of processes
may ask at once. Entries never change afterwards; removing the cache directory is always safe.

As root the directory is ``/var/cache/excimer``, because the unprivileged user must read it; otherwise
``~/.cache/excimer`` (or under ``XDG_CACHE_HOME``). ``EXCIMER_CACHE_DIR`` overrides both.

Not here: anything that must survive the removal of a cache.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from excimer.base.errors import RefusedError
from excimer.io.processes import is_reachable, make_owned_dir, require_reachable, unprivileged_user

DIRECTORY_VARIABLE = "EXCIMER_CACHE_DIR"
ROOT_DIRECTORY = Path("/var/cache/excimer")


class CacheUnusableError(RefusedError):
    """The cache directory cannot be written, or PostgreSQL's user cannot read it."""


def cache_directory() -> Path:
    """The cache directory, made if missing. Raises `CacheUnusableError`, `UnreachableError`."""
    directory = _directory_name()
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise CacheUnusableError(
            f"cannot make the cache directory {directory}: {error.strerror}; "
            f"name another in {DIRECTORY_VARIABLE}"
        ) from error
    if unprivileged_user() is not None and not is_reachable(directory):
        if not any(directory.iterdir()):  # somebody's own place stays as closed as it is
            _open_to_others(directory)
        require_reachable(directory)
    return directory


def _directory_name() -> Path:
    override = os.environ.get(DIRECTORY_VARIABLE)
    if override:
        return Path(override).expanduser().absolute()
    if os.geteuid() == 0:
        return ROOT_DIRECTORY
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "excimer"


def cache_entry(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The directory of an entry; if it does not exist yet, `make` fills an empty directory first.

    Blocks while another process makes the same entry. What `make` raises is passed on, and nothing stays
    behind. All files of an entry can be read by everyone, whatever the umask.
    """
    parent = cache_directory() / kind
    entry = parent / key
    if entry.is_dir():
        return entry
    try:
        parent.mkdir(mode=0o755, exist_ok=True)
        _open_to_others(parent)
        lock = os.open(parent / f".{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CacheUnusableError(
            f"cannot write to the cache directory {parent}: {error.strerror}; "
            f"name another in {DIRECTORY_VARIABLE}"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not entry.is_dir():
            _make_entry(entry, parent / f".{key}.new", make)
    finally:
        os.close(lock)
    return entry


def _make_entry(entry: Path, unfinished: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o755)
    _open_to_others(unfinished)  # for programs that `make` runs as PostgreSQL's user
    try:
        make(unfinished)
        _open_tree(unfinished)
        unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _open_tree(directory: Path) -> None:
    for root, _directories, files in os.walk(directory):
        _open_to_others(Path(root))
        for name in files:
            _open_to_others(Path(root, name))


def _open_to_others(path: Path) -> None:
    """chmod go=rX, as far as the file is ours and not a symbolic link."""
    status = path.lstat()
    if path.is_symlink() or status.st_uid != os.geteuid():
        return
    wanted = 0o755 if status.st_mode & 0o100 else 0o644
    if status.st_mode & 0o777 != wanted:
        path.chmod(wanted)


def reachable_file(path: Path) -> Path:
    """`path` itself if PostgreSQL's user can read it, else a copy in the cache, by content."""
    if is_reachable(path):
        return path
    content = path.read_bytes()

    def make(directory: Path) -> None:
        copy = directory / path.name
        copy.write_bytes(content)
        copy.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)

    return cache_entry("files", hashlib.sha256(content).hexdigest()[:32], make) / path.name


def reachable_tree(base: Path, members: tuple[str, ...]) -> Path:
    """`base` itself if PostgreSQL's user can read it, else a directory of the cache with a copy of `members`.

    The copy is known by the names, sizes and change times of all files: reading tens of megabytes on
    each start to hash them would cost more than the programs in them.
    """
    present = [base / member for member in members if (base / member).exists()]
    if all(is_reachable(path) for path in present):
        return base

    def make(directory: Path) -> None:
        for path in present:
            copy = directory / path.relative_to(base)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(path, copy, symlinks=True)

    return cache_entry("trees", _tree_identity(base, present), make)


def _tree_identity(base: Path, paths: list[Path]) -> str:
    digest = hashlib.sha256(os.fsencode(base))
    for path in paths:
        for root, directories, files in os.walk(path):
            directories.sort()
            for name in sorted(files):
                status = os.lstat(os.path.join(root, name))
                digest.update(f"{root}/{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def make_reachable_dir(path: Path) -> Path:
    """`make_owned_dir(path)` where PostgreSQL's user can get to it; else a directory elsewhere.

    For directories that PostgreSQL works in and that may be lost, such as a compute's data directory, when
    `path` lies in root's closed home. It is made under the cache then, `path` becomes a symbolic link to
    it, and the answer is the place to give to PostgreSQL. Safe to repeat.
    """
    parent = path.absolute().parent
    parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if is_reachable(parent) and not path.is_symlink():
        return make_owned_dir(path)
    place = cache_directory() / "moved" / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:24]
    make_owned_dir(place)
    if not path.is_symlink():
        path.symlink_to(place)
    return place


def remove_reachable_dir(path: Path, place: Path) -> None:
    """Removes what `make_reachable_dir(path)` made at `place`, with all it holds."""
    shutil.rmtree(place, ignore_errors=True)
    if path.is_symlink():
        path.unlink()
