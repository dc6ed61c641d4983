"""A tar of a data directory: a file, perhaps compressed, or a stream.

Paths are relative to the data directory, as in `pg_basebackup --format=tar`: unpack it in a directory
of mode 0700. The file grows under another name and gets its own when it is whole. Tar has no holes
that every program understands; long zeros are for the compression to swallow.
"""

import contextlib
import gzip
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

import zstandard

from excimer.export.directory_sink import DIRECTORY_MODE, FILE_MODE
from excimer.export.ownership import SUDO_UID_VARIABLE, Owner
from excimer.export.sink import OutputRefusedError
from excimer.pgformat.cluster_paths import check_relative_path

PARTIAL_SUFFIX = ".partial"
GZIP_LEVEL = 3
ZSTD_LEVEL = 3
_ZEROS = bytes(1 << 20)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class _Writable(Protocol):
    def write(self, data: bytes, /) -> int: ...
    def flush(self) -> object: ...
    def close(self) -> None: ...


Compress = Callable[[IO[bytes]], _Writable]


def tar_compression(name: str) -> Compress | None:
    """How a file of this name is compressed; None if the name is not a tar's."""
    if name.endswith(".tar"):
        return lambda file: file
    if name.endswith((".tar.gz", ".tgz")):
        return lambda file: gzip.GzipFile(fileobj=file, mode="wb", compresslevel=GZIP_LEVEL)
    if name.endswith(".tar.zst"):
        return lambda file: zstandard.ZstdCompressor(ZSTD_LEVEL).stream_writer(file, closefd=False)
    return None


class TarSink:
    """See `ExportSink`. `place` is the file to make; None: `stream` is written and nothing removed."""

    def __init__(
        self, owner: Owner, now_s: int, *, place: Path | None = None, stream: IO[bytes] | None = None
    ) -> None:
        self._owner = owner
        self._now_s = now_s
        self._place = place
        self._file = stream
        self._tar: _Writable | None = stream
        self._size_bytes = 0
        self._position = 0
        self._is_in_place = False

    @property
    def _partial(self) -> Path:
        assert self._place is not None
        return self._place.with_name(self._place.name + PARTIAL_SUFFIX)

    def begin(self) -> None:
        if self._place is not None:
            if self._place.exists():
                raise OutputRefusedError(f"{self._place} exists already: name another file")
            try:
                descriptor = os.open(
                    self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE
                )
            except FileExistsError:
                raise OutputRefusedError(
                    f"{self._partial} is there: another export writes it, or one that was killed left it; "
                    "in that case remove it"
                ) from None
            except OSError as error:
                raise OutputRefusedError(f"{self._place} cannot be made: {error.strerror}") from error
            compress = tar_compression(self._place.name)
            assert compress is not None, "the caller asked for a tar by its name"
            self._file = os.fdopen(descriptor, "wb")
            self._tar = compress(self._file)
        self._header("./", tarfile.DIRTYPE, 0, DIRECTORY_MODE)

    def add_directory(self, path: str) -> None:
        self._header(f"./{check_relative_path(path)}/", tarfile.DIRTYPE, 0, DIRECTORY_MODE)

    def add_file(self, path: str, content: bytes) -> None:
        self.open_file(path, len(content))
        self.write(content)
        self.close_file()

    def open_file(self, path: str, size_bytes: int) -> None:
        self._header(f"./{check_relative_path(path)}", tarfile.REGTYPE, size_bytes, FILE_MODE)
        self._size_bytes, self._position = size_bytes, 0

    def write(self, data: bytes) -> None:
        self._out.write(data)
        self._position += len(data)

    def skip(self, size_bytes: int) -> None:
        for start in range(0, size_bytes, len(_ZEROS)):
            self.write(_ZEROS[: size_bytes - start])

    def close_file(self) -> None:
        self.skip(self._size_bytes - self._position)
        self._out.write(bytes(-self._size_bytes % tarfile.BLOCKSIZE))

    def finish(self) -> None:
        self._out.write(bytes(2 * tarfile.BLOCKSIZE))
        self._out.flush()
        if self._place is None or self._file is None:
            return
        if self._out is not self._file:
            self._out.close()
        self._file.flush()
        if SUDO_UID_VARIABLE in os.environ:
            self._owner.take(self._file.fileno())
        os.fsync(self._file.fileno())
        self._file.close()
        os.rename(self._partial, self._place)
        self._is_in_place = True
        directory = os.open(self._place.absolute().parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def abandon(self) -> None:
        if self._place is not None and self._file is not None:
            with contextlib.suppress(OSError):  # the end of a compressed stream finds no room either
                self._out.close()
            with contextlib.suppress(OSError):
                self._file.close()
            (self._place if self._is_in_place else self._partial).unlink(missing_ok=True)

    @property
    def _out(self) -> _Writable:
        assert self._tar is not None, "begin comes first"
        return self._tar

    def _header(self, name: str, kind: bytes, size_bytes: int, mode: int) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.mode, info.mtime = kind, size_bytes, mode, self._now_s
        info.uid, info.gid, info.uname, info.gname = self._owner.uid, self._owner.gid, self._owner.name, ""
        self._out.write(info.tobuf(tarfile.GNU_FORMAT))
