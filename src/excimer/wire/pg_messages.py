"""PostgreSQL's protocol, version 3: messages as bytes, and a frame reader.

::

    +------+--------+------+        +--------+------+
    | kind | length | body |        | length | body |   start-up packets have no kind
    |  1   |   4    |  n   |        |   4    |  n   |   length counts itself; big-endian
    +------+--------+------+        +--------+------+

What Excimer needs of the protocol is here: start-up, trust and clear-text passwords, simple queries
with text results, errors with SQLSTATE, and COPY in both directions for WAL. The two ends that speak
it are `pg_server` and `pg_client`. Source: PostgreSQL manual, "Message Formats".

**Not here:** sockets, TLS, SCRAM, the extended query protocol; what is inside CopyData (`replication`).
"""

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from excimer.base.errors import RefusedError

PROTOCOL_VERSION = 3 << 16
SSL_REQUEST = 1234 << 16 | 5679
GSSENC_REQUEST = 1234 << 16 | 5680
CANCEL_REQUEST = 1234 << 16 | 5678

STARTUP_SIZE_BYTES_MAX = 10_000
"""PostgreSQL's own limit (MAX_STARTUP_PACKET_LENGTH)."""
MESSAGE_SIZE_BYTES_MAX = 16 << 20

TEXT_OID = 25
INT8_OID = 20
INT4_OID = 23

_HEAD = struct.Struct(">cI")
_U32 = struct.Struct(">I")
_LENGTH_SIZE_BYTES = 4
_HEAD_SIZE_BYTES = 5
_FIELD = struct.Struct(">IhIhih")


class ProtocolViolationError(RefusedError):
    """The other side sent bytes that PostgreSQL's protocol does not allow here."""


class Message(NamedTuple):
    """One framed message: its kind (a byte's value; 0 for a start-up packet) and its body."""

    kind: int
    body: bytes


class FrameReader:
    """Cuts a byte stream into messages. Messages over the limit are refused before they are buffered."""

    __slots__ = ("_buffer", "_offset", "message_size_bytes_max")

    def __init__(self, message_size_bytes_max: int = MESSAGE_SIZE_BYTES_MAX) -> None:
        self.message_size_bytes_max = message_size_bytes_max
        self._buffer = bytearray()
        self._offset = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        if self._offset:
            del self._buffer[: self._offset]
            self._offset = 0
        self._buffer += data

    @property
    def is_empty(self) -> bool:
        """Whether every byte fed has been taken; used to see bytes smuggled in before an answer."""
        return self._offset == len(self._buffer)

    def next_startup(self) -> Message | None:
        """The next packet without a kind, or None until it is whole. Raises `ProtocolViolationError`."""
        return self._take(0, STARTUP_SIZE_BYTES_MAX, _LENGTH_SIZE_BYTES + _U32.size)

    def next_message(self) -> Message | None:
        """The next message with a kind, or None until it is whole. Raises `ProtocolViolationError`."""
        return self._take(1, self.message_size_bytes_max, _LENGTH_SIZE_BYTES)

    def _take(self, kind_size_bytes: int, limit: int, minimum: int) -> Message | None:
        head_size_bytes = kind_size_bytes + _LENGTH_SIZE_BYTES
        if len(self._buffer) - self._offset < head_size_bytes:
            return None
        kind = self._buffer[self._offset] if kind_size_bytes else 0
        (length,) = _U32.unpack_from(self._buffer, self._offset + kind_size_bytes)
        if not minimum <= length <= limit:
            raise ProtocolViolationError(f"a message of length {length} is not PostgreSQL's protocol")
        end = self._offset + kind_size_bytes + length
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as view:
            body = bytes(view[self._offset + head_size_bytes : end])
        self._offset = end
        return Message(kind, body)


def encode_message(kind: bytes, body: bytes = b"") -> bytes:
    return _HEAD.pack(kind, len(body) + _LENGTH_SIZE_BYTES) + body


def encode_startup(parameters: Mapping[str, str]) -> bytes:
    pairs = b"".join(f"{name}\0{value}\0".encode() for name, value in parameters.items()) + b"\0"
    return struct.pack(">II", len(pairs) + 8, PROTOCOL_VERSION) + pairs


def decode_startup(body: bytes) -> tuple[int, bytes]:
    """The version or request code of a start-up packet, and what follows it."""
    return _U32.unpack_from(body)[0], body[_U32.size :]


def decode_startup_parameters(pairs: bytes) -> dict[str, str]:
    """Raises `ProtocolViolationError`."""
    if not pairs.endswith(b"\0"):
        raise ProtocolViolationError("the start-up packet is not terminated")
    try:
        texts = [text.decode() for text in pairs.split(b"\0")]
    except UnicodeDecodeError as error:
        raise ProtocolViolationError("the start-up packet is not UTF-8") from error
    parameters: dict[str, str] = {}
    for name, value in zip(texts[::2], texts[1::2], strict=False):
        if not name:
            break
        parameters[name] = value
    return parameters


def decode_text(body: bytes) -> str:
    """A body that is one C string (Query, PasswordMessage). Raises `ProtocolViolationError`."""
    if not body.endswith(b"\0"):
        raise ProtocolViolationError("a text message is not terminated")
    try:
        return body[:-1].decode()
    except UnicodeDecodeError as error:
        raise ProtocolViolationError("a text message is not UTF-8") from error


# Backend messages


AUTHENTICATION_OK = encode_message(b"R", _U32.pack(0))
AUTHENTICATION_CLEARTEXT = encode_message(b"R", _U32.pack(3))
READY_FOR_QUERY = encode_message(b"Z", b"I")
COPY_BOTH_RESPONSE = encode_message(b"W", b"\0\0\0")
COPY_DONE = encode_message(b"c")
TERMINATE = encode_message(b"X")
EMPTY_QUERY_RESPONSE = encode_message(b"I")


class Column(NamedTuple):
    name: str
    type_oid: int = TEXT_OID
    size_bytes: int = -1


def encode_parameter_status(name: str, value: str) -> bytes:
    return encode_message(b"S", f"{name}\0{value}\0".encode())


def encode_row_description(columns: Sequence[Column]) -> bytes:
    fields = b"".join(
        column.name.encode() + b"\0" + _FIELD.pack(0, 0, column.type_oid, column.size_bytes, -1, 0)
        for column in columns
    )
    return encode_message(b"T", struct.pack(">h", len(columns)) + fields)


def encode_data_row(values: Sequence[bytes | None]) -> bytes:
    parts = [struct.pack(">h", len(values))]
    for value in values:
        parts.append(struct.pack(">i", -1 if value is None else len(value)))
        parts.append(value or b"")
    return encode_message(b"D", b"".join(parts))


def encode_command_complete(tag: str) -> bytes:
    return encode_message(b"C", tag.encode() + b"\0")


def encode_error(message: str, sqlstate: str, *, severity: str = "ERROR") -> bytes:
    """ErrorResponse. `severity` FATAL says that the connection ends with it."""
    fields = (("S", severity), ("V", severity), ("C", sqlstate), ("M", message))
    return encode_message(b"E", b"".join(f"{code}{text}\0".encode() for code, text in fields) + b"\0")


def encode_result(columns: Sequence[Column], rows: Sequence[Sequence[bytes | None]], tag: str) -> bytes:
    """A whole answer to a simple query, up to and including ReadyForQuery."""
    body = b"".join(encode_data_row(row) for row in rows)
    return encode_row_description(columns) + body + encode_command_complete(tag) + READY_FOR_QUERY


def encode_copy_data(payload: bytes) -> bytes:
    return encode_message(b"d", payload)


def copy_data_head(payload_size_bytes: int) -> bytes:
    """The five bytes before a CopyData payload that is sent from its own buffer."""
    return _HEAD.pack(b"d", payload_size_bytes + _LENGTH_SIZE_BYTES)


# Frontend messages


def encode_password(password: str) -> bytes:
    return encode_message(b"p", password.encode() + b"\0")


def encode_query(query: str) -> bytes:
    return encode_message(b"Q", query.encode() + b"\0")


def decode_error_fields(body: bytes) -> dict[str, str]:
    """Fields of ErrorResponse and NoticeResponse by their one-letter codes."""
    texts = body.decode(errors="replace").split("\0")
    return {text[0]: text[1:] for text in texts if text}


def decode_data_row(body: bytes) -> list[bytes | None]:
    """Raises `ProtocolViolationError`."""
    try:
        (count,) = struct.unpack_from(">h", body)
        values: list[bytes | None] = []
        offset = 2
        for _ in range(count):
            (size_bytes,) = struct.unpack_from(">i", body, offset)
            offset += 4
            values.append(None if size_bytes < 0 else body[offset : offset + size_bytes])
            offset += max(size_bytes, 0)
    except struct.error as error:
        raise ProtocolViolationError("a DataRow is cut short") from error
    if offset > len(body):
        raise ProtocolViolationError("a DataRow is cut short")
    return values
