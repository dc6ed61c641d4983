"""The client's end of PostgreSQL's protocol as a machine: bytes in, events out.

::

    start-up --AuthenticationOk--> ready --Query--> QueryDone | QueryFailed --> ready
       |  AuthenticationCleartextPassword: answers the password          |
       '--ErrorResponse: QueryFailed                CopyBothStarted --> copying --> WalMessage*

The machine answers the password by itself (`take_output`). Only simple queries with text results and
CopyBoth are spoken, which is all that replication needs.

**Not here:** sockets; SCRAM and MD5 (our servers ask for none, and a local PostgreSQL trusts its
Unix socket); what is inside CopyData (`replication`).
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from excimer.base.errors import RefusedError
from excimer.wire.pg_messages import (
    FrameReader,
    Message,
    ProtocolViolationError,
    decode_data_row,
    decode_error_fields,
    encode_password,
    encode_query,
    encode_startup,
)

_UNLIMITED: Final = {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}


def unlimited_session(pg_version: int) -> dict[str, str]:
    """Start-up parameters of our own connections, whatever limits the endpoint, database or role sets.

    PostgreSQL refuses a name that it does not know, so the major version must be known.
    """
    return _UNLIMITED | ({"transaction_timeout": "0"} if pg_version >= 17 else {})


_AUTHENTICATION_OK = 0
_AUTHENTICATION_CLEARTEXT = 3


class PostgresError(RefusedError):
    """The server answered with an ErrorResponse. `sqlstate` is its five-letter code."""

    def __init__(self, message: str, sqlstate: str) -> None:
        super().__init__(f"{message} (SQLSTATE {sqlstate})")
        self.sqlstate = sqlstate


class Ready(msgspec.Struct, frozen=True):
    """The connection is authenticated and idle; comes once."""


class QueryDone(msgspec.Struct, frozen=True):
    rows: list[list[bytes | None]]


class QueryFailed(msgspec.Struct, frozen=True):
    error: PostgresError
    """The connection stays usable if the query failed; after a failed start-up the server closes it."""


class CopyBothStarted(msgspec.Struct, frozen=True):
    pass


class CopyDataReceived(msgspec.Struct, frozen=True):
    payload: bytes


class CopyEnded(msgspec.Struct, frozen=True):
    """The server sent CopyDone: it has no more to stream on this timeline, or shuts down."""


ClientEvent = Ready | QueryDone | QueryFailed | CopyBothStarted | CopyDataReceived | CopyEnded


class ClientConnection:
    """One connection to a server; one query at a time."""

    def __init__(self, parameters: Mapping[str, str], password: str | None) -> None:
        self.server_parameters: dict[str, str] = {}
        self.server_pid: int | None = None
        """Of the server's process that serves this connection, if it said so."""
        self._password = password
        self._frames = FrameReader()
        self._output = bytearray(encode_startup(parameters))
        self._is_started = False
        self._rows: list[list[bytes | None]] = []
        self._error: PostgresError | None = None

    def take_output(self) -> bytes:
        """Bytes to send; call after construction, `query` and each `next_event`."""
        output = bytes(self._output)
        self._output.clear()
        return output

    @property
    def is_between_messages(self) -> bool:
        """Whether every byte fed belonged to an event that was returned."""
        return self._frames.is_empty

    def query(self, text: str) -> None:
        """Sends a simple query. Its answer is one of QueryDone, QueryFailed, CopyBothStarted."""
        self._rows = []
        self._error = None
        self._output += encode_query(text)

    def feed(self, data: bytes) -> None:
        self._frames.feed(data)

    def next_event(self) -> ClientEvent | None:
        """The next event, or None until more bytes come. Raises `ProtocolViolationError`."""
        while (message := self._frames.next_message()) is not None:
            event = self._message(message)
            if event is not None:
                return event
        return None

    def _message(self, message: Message) -> ClientEvent | None:
        kind, body = bytes((message.kind,)), message.body
        match kind:
            case b"d":
                return CopyDataReceived(body)
            case b"D":
                self._rows.append(decode_data_row(body))
            case b"Z":
                return self._ready()
            case b"E":
                return self._failed(body)
            case b"W":
                return CopyBothStarted()
            case b"c":
                return CopyEnded()
            case b"R":
                self._authenticate(body)
            case b"S":
                name, _, value = body.decode(errors="replace").partition("\0")
                self.server_parameters[name] = value.rstrip("\0")
            case b"K":
                self.server_pid = int.from_bytes(body[:4], "big")
            case b"T" | b"C" | b"I" | b"N" | b"v":
                pass  # descriptions we do not need: results are text, in the order asked for
            case _:
                raise ProtocolViolationError(f"message {kind!r} is not expected from a server")
        return None

    def _ready(self) -> ClientEvent:
        if not self._is_started:
            self._is_started = True
            return Ready()
        error, self._error = self._error, None
        return QueryDone(self._rows) if error is None else QueryFailed(error)

    def _failed(self, body: bytes) -> ClientEvent | None:
        fields = decode_error_fields(body)
        error = PostgresError(fields.get("M", "unknown error"), fields.get("C", "XX000"))
        if not self._is_started or fields.get("V", fields.get("S")) in ("FATAL", "PANIC"):
            return QueryFailed(error)
        self._error = error  # told when ReadyForQuery follows
        return None

    def _authenticate(self, body: bytes) -> None:
        method = int.from_bytes(body[:4], "big")
        if method == _AUTHENTICATION_OK:
            return
        if method != _AUTHENTICATION_CLEARTEXT:
            raise ProtocolViolationError(
                f"the server asks for authentication method {method}: "
                "only trust and clear-text passwords are spoken"
            )
        if self._password is None:
            raise ProtocolViolationError("the server asks for a password and none was given")
        self._output += encode_password(self._password)
