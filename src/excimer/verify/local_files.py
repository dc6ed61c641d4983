"""The files of an endpoint's relations and SLRUs as they lie on its disk, read from outside PostgreSQL.

A file may change, grow, shrink or vanish while it is read, and a block may be half old and half new: whoever
compares looks again. A block that the endpoint has not fetched is told apart from one of zeros by the arena.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from excimer.base.keys import BLOCK_SIZE_BYTES, SLRU_DIRECTORIES
from excimer.compute.arena import Arena
from excimer.pgformat.cluster_files import ClusterFileError, FileKind, identify_file

_SMALL_KINDS: Final = (FileKind.RELATION_MAP, FileKind.DATABASE, FileKind.TWO_PHASE)


class LocalListing(NamedTuple):
    page_files: dict[str, int]
    """Blocks of each file of pages, by its path in the data directory."""
    small_files: set[str]
    """Relation maps, versions of databases, states of prepared transactions."""


class LocalFiles:
    """Of one running endpoint."""

    def __init__(self, data_dir: Path, arena: Arena) -> None:
        self._data_dir = data_dir
        self._arena = arena

    def listing(self) -> LocalListing:
        """What is on the disk, and what the endpoint would make of the arena when it is first used."""
        found = LocalListing(dict(self._arena.unmade_files()), set())
        for directory in self._directories():
            with suppress(FileNotFoundError), os.scandir(self._data_dir / directory) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        _add(found, f"{directory}/{entry.name}", entry)
        return found

    def _directories(self) -> Iterator[str]:
        yield from ("global", *SLRU_DIRECTORIES, "pg_twophase")
        for database in sorted(os.listdir(self._data_dir / "base")):
            yield f"base/{database}"

    def blocks(self, path: str) -> int | None:
        """Of a file of pages now; None if there is none."""
        try:
            return (self._data_dir / path).stat().st_size // BLOCK_SIZE_BYTES
        except FileNotFoundError:
            return self._arena.unmade_blocks(path)

    def read(self, path: str, block: int, count: int) -> list[bytes | None]:
        """Blocks of a file, as far as it has them now; None for those that are not here."""
        before = self._arena.presence(path, block, count)
        data = self._read(path, block * BLOCK_SIZE_BYTES, count * BLOCK_SIZE_BYTES)
        after = self._arena.presence(path, block, count)
        starts = range(0, len(data) - len(data) % BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
        return [
            data[start : start + BLOCK_SIZE_BYTES] if is_here and is_still else None
            for start, is_here, is_still in zip(starts, before, after, strict=False)
        ]

    def small_file(self, path: str) -> bytes | None:
        try:
            return (self._data_dir / path).read_bytes()
        except FileNotFoundError:
            return None

    def _read(self, path: str, offset: int, size: int) -> bytes:
        """Less at the file's end. Nothing of a file that is not there."""
        try:
            descriptor = os.open(self._data_dir / path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)


def _add(listing: LocalListing, path: str, entry: "os.DirEntry[str]") -> None:
    try:
        file = identify_file(path)
    except ClusterFileError:
        return
    if file is None:
        return
    if file.kind in (FileKind.RELATION, FileKind.SLRU):
        listing.page_files[path] = entry.stat().st_size // BLOCK_SIZE_BYTES
    elif file.kind in _SMALL_KINDS:
        listing.small_files.add(path)
