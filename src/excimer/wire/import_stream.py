"""A cluster on its way into a pageserver: one stream of frames, the body of one HTTP request.

::

    +--------+------------+---------------+
    | type 1 | length u32 | body          |   little-endian, body at most FRAME_SIZE_BYTES_MAX
    +--------+------------+---------------+

    B  MessagePack of `ImportBegin`            first
    T  the next bytes of a tar file            its members are the files of a data directory
    F  MessagePack of `FilesEnd`               after the tar file
    W  u64 LSN | WAL from that LSN on          without gaps, from `start_lsn` on
    E  nothing                                 last: without it nothing is imported

The tar file is what BASE_BACKUP sends, byte for byte, so that whoever passes it on need not look into
it; a stopped data directory is sent in the same form. `global/pg_control` must be among the members.

Not here: what the members mean (`pgformat.cluster_files`), HTTP.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from excimer.base.errors import RefusedError
from excimer.base.lsn import Lsn

FORMAT_VERSION = 1
FRAME_SIZE_BYTES_MAX = 4 << 20

_HEAD = struct.Struct("<cI")
_WAL_HEAD = struct.Struct("<Q")


class ImportStreamError(RefusedError):
    """The bytes are not an import stream, or it ends too early."""


class ImportBegin(msgspec.Struct, frozen=True, kw_only=True):
    """What must be known before the first file."""

    format_version: int = FORMAT_VERSION
    pg_version: int
    system_id: int
    wal_segment_size_bytes: int
    start_lsn: Lsn
    """End of a record: the files are as of here, or newer where WAL from here on says so."""
    prev_record_lsn: Lsn
    """Start of that record; 0 when unknown."""


class FilesEnd(msgspec.Struct, frozen=True, kw_only=True):
    """All files have been sent."""

    readable_lsn: Lsn
    """Where they, with WAL up to here, are one consistent state: the end of a backup."""


class TarBytes(NamedTuple):
    data: bytes


class WalBytes(NamedTuple):
    start_lsn: Lsn
    data: bytes


class ImportEnd(msgspec.Struct, frozen=True):
    """All has been sent."""


ImportFrame = ImportBegin | TarBytes | FilesEnd | WalBytes | ImportEnd


def encode_begin(begin: ImportBegin) -> bytes:
    return _frame(b"B", msgspec.msgpack.encode(begin))


def encode_tar(data: bytes) -> bytes:
    return _frame(b"T", data)


def encode_wal(start_lsn: int, data: bytes) -> bytes:
    return _frame(b"W", _WAL_HEAD.pack(start_lsn) + data)


def encode_files_end(end: FilesEnd) -> bytes:
    return _frame(b"F", msgspec.msgpack.encode(end))


def encode_end() -> bytes:
    return _frame(b"E", b"")


def _frame(kind: bytes, body: bytes) -> bytes:
    if len(body) > FRAME_SIZE_BYTES_MAX:
        raise ValueError(f"a frame of {len(body)} bytes")
    return _HEAD.pack(kind, len(body)) + body


class ImportStreamParser:
    """Bytes in, frames out."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.is_ended = False

    def feed(self, data: bytes) -> Iterator[ImportFrame]:
        """The frames that `data` completes. Raises `ImportStreamError`."""
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= _HEAD.size:
            kind, size = _HEAD.unpack_from(self._buffer, at)
            if size > FRAME_SIZE_BYTES_MAX or kind not in _DECODERS or self.is_ended:
                raise ImportStreamError(f"frame {kind!r} of {size} bytes does not belong here")
            if len(self._buffer) - at < _HEAD.size + size:
                break
            body = bytes(self._buffer[at + _HEAD.size : at + _HEAD.size + size])
            at += _HEAD.size + size
            self.is_ended = kind == b"E"
            try:
                frame = _DECODERS[kind](body)
            except (msgspec.DecodeError, struct.error) as error:
                raise ImportStreamError(f"frame {kind!r} cannot be understood: {error}") from error
            yield frame
        del self._buffer[:at]


def _decode_begin(body: bytes) -> ImportBegin:
    begin = msgspec.msgpack.decode(body, type=ImportBegin)
    if begin.format_version != FORMAT_VERSION:
        raise ImportStreamError(f"the stream has format {begin.format_version}, not {FORMAT_VERSION}")
    return begin


def _decode_wal(body: bytes) -> WalBytes:
    return WalBytes(Lsn(_WAL_HEAD.unpack_from(body)[0]), body[_WAL_HEAD.size :])


def _decode_files_end(body: bytes) -> FilesEnd:
    return msgspec.msgpack.decode(body, type=FilesEnd)


_DECODERS: Mapping[bytes, Callable[[bytes], ImportFrame]] = {
    b"B": _decode_begin,
    b"T": TarBytes,
    b"F": _decode_files_end,
    b"W": _decode_wal,
    b"E": lambda _: ImportEnd(),
}
