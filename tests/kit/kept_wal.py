"""Keeps what a safekeeper would remove: a hard link to each WAL segment, made as soon as it is there."""

import contextlib
import os
import threading
from pathlib import Path

POLL_INTERVAL_S = 0.05
_SEGMENT_NAME_LENGTH = 24


class KeptWal:
    """Segments of `wal_dir` by name, in a directory on the same file system."""

    def __init__(self, wal_dir: Path, directory: Path) -> None:
        self.directory = directory
        self._wal_dir = wal_dir
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kept WAL", daemon=True)

    def read(self, name: str) -> bytes:
        """The segment as it is, or was when it was removed."""
        self._link_all()
        return (self.directory / name).read_bytes()

    def _run(self) -> None:
        while not self._stopping.wait(POLL_INTERVAL_S):
            self._link_all()

    def _link_all(self) -> None:
        for path in self._wal_dir.iterdir():
            if len(path.name) == _SEGMENT_NAME_LENGTH:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile: then it is linked
                    self._link(path, self.directory / path.name)

    @staticmethod
    def _link(path: Path, link: Path) -> None:
        """A segment that was cut after an election may be another file than before."""
        if link.exists() and link.stat().st_ino == path.stat().st_ino:
            return
        new = link.with_suffix(f".{threading.get_ident()}")
        os.link(path, new)
        new.replace(link)

    def __enter__(self) -> "KeptWal":
        self.directory.mkdir()
        self._link_all()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
