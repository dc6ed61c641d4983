"""The page service's messages: how a compute asks for pages and basebackups over TCP.

A frame is a length, a type and a body; all integers are little-endian::

    +---------------------------+---------+----------------------+
    | u32 length of what follows | u8 type | body (length - 1 B)  |
    +---------------------------+---------+----------------------+

    client                              server
      H  version, ids, token   ---->
                               <----      h  version, most blocks      (or e, then close)
      G  id, LSNs, key, count  ---->
                               <----      g  id, count, pages          (or e)
      B  id, LSN               ---->
                               <----      b  id, zstd(MessagePack)     (or e)
      P  id                    ---->
                               <----      p  id, LSN                   (or e)

The C client in libhydrate speaks the same bytes (docs/architecture/interfaces.md). A parser is fed
what arrived and returns the whole messages in it; anything it does not understand is a
`PageProtocolError`, found as soon as the length and type are there, so a bad peer makes nobody buffer.

Not here: sockets, time limits, what a request means (`excimer.pageserver`).
"""

import struct
from enum import IntEnum
from typing import Final, TypeAlias

import msgspec

from excimer.base.errors import CorruptionError, ExcimerError, FencedError, RefusedError, RetryableError
from excimer.base.ids import ID_SIZE_BYTES, TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES, KeyKind, make_key

PROTOCOL_VERSION = 1
FRAME_SIZE_BYTES_MAX = 16 << 20
BLOCKS_MAX = 256
"""Most blocks in one GetPages that this implementation allows (2 MiB of answer)."""
NEWEST_LSN: Final = (1 << 64) - 1
"""GetPages' `lsn` for "the newest there is, at least `not_modified_since`"."""
CONNECTION_REQUEST_ID: Final = 0
"""Request id of errors that concern the connection."""

_HEAD = struct.Struct("<IB")
_HELLO = struct.Struct(f"<HH{ID_SIZE_BYTES}s{ID_SIZE_BYTES}s")
_HELLO_OK = struct.Struct("<HHI")
_GET_PAGES = struct.Struct("<QQQBBHIIIII")
_PAGES = struct.Struct("<QI")
_GET_BASEBACKUP = struct.Struct("<QQ")
_BASEBACKUP = struct.Struct("<Q")
_GET_POSITION = struct.Struct("<Q")
_POSITION = struct.Struct("<QQ")
_ERROR = struct.Struct("<QHH")
_ERROR_TEXT_BYTES_MAX = 16_384

_KEY_KINDS = (KeyKind.RELATION_BLOCK, KeyKind.SLRU_BLOCK)


class PageProtocolError(RefusedError):
    """The peer sent bytes that are not this protocol: the connection must be closed."""


class ErrorCode(IntEnum):
    """The error families on the wire: what the receiver does next."""

    RETRYABLE = 1
    REFUSED = 2
    FENCED = 3
    CORRUPTION = 4


_CODE_OF_FAMILY: tuple[tuple[type[ExcimerError], ErrorCode], ...] = (
    (RetryableError, ErrorCode.RETRYABLE),
    (RefusedError, ErrorCode.REFUSED),
    (FencedError, ErrorCode.FENCED),
    (CorruptionError, ErrorCode.CORRUPTION),
)


class Hello(msgspec.Struct, frozen=True, tag=True):
    tenant_id: TenantId
    timeline_id: TimelineId
    token: str
    version: int = PROTOCOL_VERSION


class HelloOk(msgspec.Struct, frozen=True, tag=True):
    blocks_max: int
    version: int = PROTOCOL_VERSION


class GetPages(msgspec.Struct, frozen=True, tag=True):
    """`count` adjacent blocks from one key on, at `lsn` exactly or, if that is `NEWEST_LSN`, newest."""

    request_id: int
    lsn: int
    not_modified_since: int
    kind: int
    fork: int
    spc: int
    """For an SLRU block its `Slru`."""
    db: int
    rel: int
    """For an SLRU block its segment number."""
    block: int
    count: int

    def key(self) -> bytes:
        """The first block's storage key."""
        return make_key(self.kind, self.spc, self.db, self.rel, self.fork, self.block)


class Pages(msgspec.Struct, frozen=True, tag=True):
    request_id: int
    pages: bytes
    """A whole number of pages, adjacent, first block first."""


class GetBasebackup(msgspec.Struct, frozen=True, tag=True):
    request_id: int
    lsn: int


class BasebackupAnswer(msgspec.Struct, frozen=True, tag=True):
    request_id: int
    compressed: bytes
    """A zstd frame around `excimer.pgformat.basebackup`'s MessagePack."""


class GetPosition(msgspec.Struct, frozen=True, tag=True):
    """How far is the timeline ingested? Answered at once."""

    request_id: int


class PositionAnswer(msgspec.Struct, frozen=True, tag=True):
    request_id: int
    lsn: int
    """The newest that can be read; 0 while an ancestor's WAL has to come again first."""


class ErrorAnswer(msgspec.Struct, frozen=True, tag=True):
    request_id: int
    code: ErrorCode
    text: str


ClientMessage: TypeAlias = Hello | GetPages | GetBasebackup | GetPosition
ServerMessage: TypeAlias = HelloOk | Pages | BasebackupAnswer | PositionAnswer | ErrorAnswer


def error_code(error: ExcimerError) -> ErrorCode:
    """The wire code of an error's family; an error of no family is retryable."""
    return next((code for family, code in _CODE_OF_FAMILY if isinstance(error, family)), ErrorCode.RETRYABLE)


def error_from_answer(answer: ErrorAnswer) -> ExcimerError:
    """The family's exception that a client raises for an error answer."""
    family = next(family for family, code in _CODE_OF_FAMILY if code is answer.code)
    return family(answer.text)


def encode_client_message(message: ClientMessage) -> bytes:
    """One frame. Raises ValueError for a token that is too long for its length field."""
    match message:
        case Hello(tenant_id, timeline_id, token, version):
            text = token.encode()
            if len(text) > 0xFFFF:
                raise ValueError("the token is longer than 65535 bytes")
            ids = bytes.fromhex(tenant_id), bytes.fromhex(timeline_id)
            return _frame(b"H", _HELLO.pack(version, len(text), *ids) + text)
        case GetPages():
            return _frame(b"G", _pack_get_pages(message))
        case GetBasebackup(request_id, lsn):
            return _frame(b"B", _GET_BASEBACKUP.pack(request_id, lsn))
        case GetPosition(request_id):
            return _frame(b"P", _GET_POSITION.pack(request_id))


def encode_server_message(message: ServerMessage) -> bytes:
    """One frame. For many pages, `pages_head` spares the copy that this makes."""
    match message:
        case HelloOk(blocks_max, version):
            return _frame(b"h", _HELLO_OK.pack(version, 0, blocks_max))
        case Pages(request_id, pages):
            return pages_head(request_id, len(pages) // BLOCK_SIZE_BYTES) + pages
        case BasebackupAnswer(request_id, compressed):
            return basebackup_head(request_id, len(compressed)) + compressed
        case PositionAnswer(request_id, lsn):
            return _frame(b"p", _POSITION.pack(request_id, lsn))
        case ErrorAnswer(request_id, code, text):
            encoded = text.encode()[:_ERROR_TEXT_BYTES_MAX].decode(errors="ignore").encode()
            return _frame(b"e", _ERROR.pack(request_id, code, 0) + encoded)


def pages_head(request_id: int, count: int) -> bytes:
    """What precedes `count` pages in a Pages frame, so that pages can be sent without copying."""
    return _HEAD.pack(1 + _PAGES.size + count * BLOCK_SIZE_BYTES, 0x67) + _PAGES.pack(request_id, count)


def basebackup_head(request_id: int, size_bytes: int) -> bytes:
    """What precedes a compressed basebackup. Raises `PageProtocolError` if it is too large for a frame."""
    length = 1 + _BASEBACKUP.size + size_bytes
    if length > FRAME_SIZE_BYTES_MAX:
        raise PageProtocolError(f"a basebackup of {size_bytes} bytes does not fit a frame of 16 MiB")
    return _HEAD.pack(length, 0x62) + _BASEBACKUP.pack(request_id)


class _FrameBuffer:
    """Cuts a byte stream into frames; checks each length against its type's bounds at once."""

    def __init__(self, bounds: dict[int, tuple[int, int]]) -> None:
        self._bounds = bounds
        self._buffer = bytearray()

    @property
    def buffered_bytes(self) -> int:
        return len(self._buffer)

    def cut(self, data: bytes | bytearray | memoryview) -> list[tuple[int, bytes]]:
        frames: list[tuple[int, bytes]] = []
        if self._buffer:
            self._buffer += data
            del self._buffer[: self._cut_whole(self._buffer, frames)]
        else:  # as a rule: whole frames, of which nothing is kept
            end = self._cut_whole(data, frames)
            if end < len(data):
                self._buffer += data[end:]
        return frames

    def _cut_whole(self, data: bytes | bytearray | memoryview, frames: list[tuple[int, bytes]]) -> int:
        """Appends the whole frames at the beginning; where they end."""
        start, size = 0, len(data)
        with memoryview(data) as view:
            while size - start >= _HEAD.size:
                length, kind = _HEAD.unpack_from(view, start)
                self._check(length - 1, kind)
                end = start + 4 + length
                if size < end:
                    break
                frames.append((kind, bytes(view[start + _HEAD.size : end])))
                start = end
        return start

    def _check(self, size: int, kind: int) -> None:
        bounds = self._bounds.get(kind)
        if bounds is None:
            raise PageProtocolError(f"unknown frame type {kind:#04x}")
        if not bounds[0] <= size <= bounds[1]:
            raise PageProtocolError(f"a frame of type {chr(kind)!r} cannot have a body of {size} bytes")


class ClientMessageParser:
    """The server's side: bytes of a client in, its messages out."""

    def __init__(self) -> None:
        self._frames = _FrameBuffer(
            {
                0x48: (_HELLO.size, _HELLO.size + 0xFFFF),
                0x47: (_GET_PAGES.size, _GET_PAGES.size),
                0x42: (_GET_BASEBACKUP.size, _GET_BASEBACKUP.size),
                0x50: (_GET_POSITION.size, _GET_POSITION.size),
            }
        )

    @property
    def buffered_bytes(self) -> int:
        """Bytes of a message that is not complete yet."""
        return self._frames.buffered_bytes

    def feed(self, data: bytes | bytearray | memoryview) -> list[ClientMessage]:
        """The messages completed by `data`. Raises `PageProtocolError`; the parser is then unusable."""
        return [
            _parse_get_pages(body)
            if kind == 0x47
            else _parse_hello(body)
            if kind == 0x48
            else GetBasebackup(*_GET_BASEBACKUP.unpack(body))
            if kind == 0x42
            else GetPosition(*_GET_POSITION.unpack(body))
            for kind, body in self._frames.cut(data)
        ]


class ServerMessageParser:
    """The client's side: bytes of a server in, its messages out."""

    def __init__(self) -> None:
        whole = FRAME_SIZE_BYTES_MAX - 1
        self._frames = _FrameBuffer(
            {
                0x68: (_HELLO_OK.size, _HELLO_OK.size),
                0x67: (_PAGES.size, whole),
                0x62: (_BASEBACKUP.size, whole),
                0x70: (_POSITION.size, _POSITION.size),
                0x65: (_ERROR.size, _ERROR.size + _ERROR_TEXT_BYTES_MAX),
            }
        )

    def feed(self, data: bytes | bytearray | memoryview) -> list[ServerMessage]:
        """The messages completed by `data`. Raises `PageProtocolError`; the parser is then unusable."""
        return [_parse_server_message(kind, body) for kind, body in self._frames.cut(data)]


def _frame(kind: bytes, body: bytes) -> bytes:
    return _HEAD.pack(1 + len(body), kind[0]) + body


def _pack_get_pages(message: GetPages) -> bytes:
    return _GET_PAGES.pack(
        message.request_id,
        message.lsn,
        message.not_modified_since,
        message.kind,
        message.fork,
        0,
        message.spc,
        message.db,
        message.rel,
        message.block,
        message.count,
    )


def _parse_hello(body: bytes) -> Hello:
    version, token_size, tenant, timeline = _HELLO.unpack_from(body)
    if len(body) != _HELLO.size + token_size:
        raise PageProtocolError("Hello's token length does not match its frame")
    try:
        token = body[_HELLO.size :].decode("ascii")
    except UnicodeDecodeError as error:
        raise PageProtocolError("Hello's token is not ASCII") from error
    return Hello(TenantId(tenant.hex()), TimelineId(timeline.hex()), token, version)


def _parse_get_pages(body: bytes) -> GetPages:
    request_id, lsn, since, kind, fork, _, spc, db, rel, block, count = _GET_PAGES.unpack(body)
    if kind not in _KEY_KINDS:
        raise PageProtocolError(f"GetPages for the unknown key kind {kind:#04x}")
    return GetPages(request_id, lsn, since, kind, fork, spc, db, rel, block, count)


def _parse_server_message(kind: int, body: bytes) -> ServerMessage:
    if kind == 0x67:
        request_id, count = _PAGES.unpack_from(body)
        if len(body) != _PAGES.size + count * BLOCK_SIZE_BYTES:
            raise PageProtocolError("the number of pages does not match the frame")
        return Pages(request_id, body[_PAGES.size :])
    if kind == 0x62:
        (request_id,) = _BASEBACKUP.unpack_from(body)
        return BasebackupAnswer(request_id, body[_BASEBACKUP.size :])
    if kind == 0x70:
        return PositionAnswer(*_POSITION.unpack(body))
    if kind == 0x68:
        version, _, blocks_max = _HELLO_OK.unpack(body)
        return HelloOk(blocks_max, version)
    request_id, code, _ = _ERROR.unpack_from(body)
    try:
        return ErrorAnswer(request_id, ErrorCode(code), body[_ERROR.size :].decode())
    except ValueError as error:
        raise PageProtocolError(f"an error answer cannot be read: {error}") from error
