"""Local files as an interface, so that tests can make any operation fail or a crash fall between two.

A file is written whole under a temporary name, synced, renamed, and its directory synced: after a
crash it is there completely or not at all. All calls may block.

Bodies: `LocalFilesystem`, and `FaultyFilesystem`, which asks a callable before each step.

A sparse file is a cache that is filled piece by piece; what of it survives a crash nobody may rely upon.

Not here: locks, memory maps; those who need them use the system directly.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

TEMPORARY_SUFFIX = ".temporary"


class RandomReader(Protocol):
    """An open file that any thread may read from."""

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes; fewer only at the end of the file. Raises OSError."""

    def close(self) -> None: ...


class SparseFile(RandomReader, Protocol):
    """A file that is written here and there while others read it. Any thread."""

    def write(self, offset: int, data: bytes) -> None:
        """Raises OSError; what was written of the piece is then unknown."""

    def sync(self) -> None:
        """Makes it durable. Raises OSError."""


class Filesystem(Protocol):
    """Every call raises OSError when it fails."""

    def write_atomically(self, path: Path, parts: Iterable[bytes]) -> int:
        """Writes the parts as one durable file and returns its size. Parent directories are made."""

    def rename(self, source: Path, target: Path) -> None:
        """Within one directory; durable on return."""

    def open_reader(self, path: Path) -> RandomReader: ...

    def create_sparse(self, path: Path, size_bytes: int) -> SparseFile:
        """An empty file of that size, in place of one that may be there. Parent directories are made."""

    def read(self, path: Path) -> bytes: ...

    def size_bytes(self, path: Path) -> int | None:
        """None when there is no such file."""

    def remove(self, path: Path) -> None:
        """Removing what is not there is fine."""

    def remove_tree(self, path: Path) -> None: ...

    def list_files(self, directory: Path) -> list[str]:
        """Names of the files in it, sorted; none when the directory does not exist."""


class LocalReader:
    """`pread` on one descriptor, closed with the object at the latest."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self._descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


class LocalSparseFile(LocalReader):
    """The same, made empty, and `pwrite`."""

    def __init__(self, path: Path, size_bytes: int, step: Callable[[str, Path], None]) -> None:
        super().__init__(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.ftruncate(self._descriptor, size_bytes)
        self._path = path
        self._step = step

    def write(self, offset: int, data: bytes) -> None:
        self._step("write", self._path)
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written

    def sync(self) -> None:
        self._step("sync", self._path)
        os.fsync(self._descriptor)


class LocalFilesystem:
    """The real one. `step` is called before each operation on the disk; it may raise (see below)."""

    def __init__(self, step: Callable[[str, Path], None] | None = None) -> None:
        self._step = step or _no_fault

    def write_atomically(self, path: Path, parts: Iterable[bytes]) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        size = 0
        try:
            with temporary.open("wb", buffering=0) as file:
                for part in parts:
                    self._step("write", temporary)
                    _write_all(file.fileno(), part)
                    size += len(part)
                self._step("sync", temporary)
                os.fsync(file.fileno())
            self._step("rename", path)
            temporary.rename(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.filename is None:  # a write knows only its descriptor
                error.filename = str(path)
            raise
        self._step("sync", path.parent)
        sync_directory(path.parent)
        return size

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target)
        source.rename(target)
        self._step("sync", target.parent)
        sync_directory(target.parent)

    def open_reader(self, path: Path) -> RandomReader:
        self._step("open", path)
        return LocalReader(path)

    def create_sparse(self, path: Path, size_bytes: int) -> SparseFile:
        self._step("open", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return LocalSparseFile(path, size_bytes, self._step)

    def read(self, path: Path) -> bytes:
        self._step("read", path)
        return path.read_bytes()

    def size_bytes(self, path: Path) -> int | None:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None

    def remove(self, path: Path) -> None:
        self._step("remove", path)
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        self._step("remove", path)
        if path.exists():
            shutil.rmtree(path)

    def list_files(self, directory: Path) -> list[str]:
        if not directory.is_dir():
            return []
        return sorted(entry.name for entry in directory.iterdir() if entry.is_file())


class FaultyFilesystem(LocalFilesystem):
    """The real file system, except that `fault` is asked before each step and may raise instead.

    An OSError is a failing disk. Anything else stands for a crash: what was done stays as it is,
    temporary files included.
    """

    def __init__(self, fault: Callable[[str, Path], None]) -> None:
        super().__init__(fault)


def sync_directory(directory: Path) -> None:
    """Makes renames and removals in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _no_fault(operation: str, path: Path) -> None:
    return None
