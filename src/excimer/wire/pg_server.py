"""The server's end of PostgreSQL's protocol as a machine: bytes in, events out.

::

    start-up --SSLRequest/GSSENCRequest: answer N--> start-up
       |  StartupMessage -> StartupReceived; the host answers AUTHENTICATION_CLEARTEXT
    password -> PasswordReceived; the host calls `authenticated`
    ready    -> QueryReceived; the host answers with messages of `pg_messages`
       |  the host calls `begin_copy` when it answers CopyBothResponse
    copying  -> CopyDataReceived*, CopyDoneReceived; the host calls `end_copy`

The host sends what `take_output` returns before its own answer. TLS is refused with ``N``: that is
the protocol's own way, and clients that insist on TLS then close.

**Not here:** sockets, what queries mean, who may connect.
"""

from enum import Enum, auto

import msgspec

from excimer.wire.pg_messages import (
    CANCEL_REQUEST,
    GSSENC_REQUEST,
    PROTOCOL_VERSION,
    SSL_REQUEST,
    FrameReader,
    Message,
    ProtocolViolationError,
    decode_startup,
    decode_startup_parameters,
    decode_text,
    encode_message,
)

CLIENT_MESSAGE_SIZE_BYTES_MAX = 1 << 20
PASSWORD_SIZE_BYTES_MAX = 1 << 16
_ENCRYPTION_REQUESTS_MAX = 2
_ANY_MINOR = PROTOCOL_VERSION >> 16


class StartupReceived(msgspec.Struct, frozen=True):
    parameters: dict[str, str]


class PasswordReceived(msgspec.Struct, frozen=True):
    password: str


class QueryReceived(msgspec.Struct, frozen=True):
    query: str


class CopyDataReceived(msgspec.Struct, frozen=True):
    payload: bytes


class CopyDoneReceived(msgspec.Struct, frozen=True):
    pass


class Terminated(msgspec.Struct, frozen=True):
    """The client wants the connection closed: Terminate, or a CancelRequest, which we ignore."""


ServerEvent = (
    StartupReceived | PasswordReceived | QueryReceived | CopyDataReceived | CopyDoneReceived | Terminated
)


class _Phase(Enum):
    STARTUP = auto()
    PASSWORD = auto()
    READY = auto()
    COPYING = auto()
    CLOSED = auto()


class ServerConnection:
    """One client's connection."""

    def __init__(self) -> None:
        self._frames = FrameReader(PASSWORD_SIZE_BYTES_MAX)
        self._phase = _Phase.STARTUP
        self._encryption_requests_count = 0
        self._output = bytearray()

    def take_output(self) -> bytes:
        """Bytes the machine itself has to say; call after each `next_event`."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def authenticated(self) -> None:
        self._phase = _Phase.READY
        self._frames.message_size_bytes_max = CLIENT_MESSAGE_SIZE_BYTES_MAX

    def begin_copy(self) -> None:
        self._phase = _Phase.COPYING

    def end_copy(self) -> None:
        self._phase = _Phase.READY

    def feed(self, data: bytes) -> None:
        self._frames.feed(data)

    def next_event(self) -> ServerEvent | None:
        """The next event, or None until more bytes come. Raises `ProtocolViolationError`.

        Finish with an event before asking for the next: what is allowed next depends on the answer.
        """
        while self._phase is not _Phase.CLOSED:
            if self._phase is _Phase.STARTUP:
                message = self._frames.next_startup()
                event = None if message is None else self._startup(message)
            else:
                message = self._frames.next_message()
                event = None if message is None else self._message(message)
            if message is None or event is not None:
                return event
        return None

    def _startup(self, message: Message) -> ServerEvent | None:
        code, rest = decode_startup(message.body)
        if code in (SSL_REQUEST, GSSENC_REQUEST):
            self._encryption_requests_count += 1
            if self._encryption_requests_count > _ENCRYPTION_REQUESTS_MAX:
                raise ProtocolViolationError("too many requests for encryption")
            if not self._frames.is_empty:
                raise ProtocolViolationError("data was sent before the answer to a request for encryption")
            self._output += b"N"
            return None
        if code == CANCEL_REQUEST:
            self._phase = _Phase.CLOSED
            return Terminated()
        if code >> 16 != _ANY_MINOR:
            raise ProtocolViolationError(f"unsupported protocol version {code >> 16}.{code & 0xFFFF}")
        parameters = decode_startup_parameters(rest)
        extensions = [name for name in parameters if name.startswith("_pq_.")]
        if code != PROTOCOL_VERSION or extensions:
            self._output += _negotiate(extensions)
        self._phase = _Phase.PASSWORD
        return StartupReceived({name: parameters[name] for name in parameters if name not in extensions})

    def _message(self, message: Message) -> ServerEvent | None:
        kind = bytes((message.kind,))
        if kind == b"X":
            self._phase = _Phase.CLOSED
            return Terminated()
        match self._phase, kind:
            case _Phase.PASSWORD, b"p":
                return PasswordReceived(decode_text(message.body))
            case _Phase.READY, b"Q":
                return QueryReceived(decode_text(message.body))
            case _Phase.COPYING, b"d":
                return CopyDataReceived(message.body)
            case _Phase.COPYING, b"c" | b"f":
                return CopyDoneReceived()
            case _Phase.READY, b"d" | b"c" | b"f" | b"H" | b"S":
                return None  # sent before the client saw that the copy had ended
        raise ProtocolViolationError(f"message {kind!r} is not expected here")


def _negotiate(extensions: list[str]) -> bytes:
    """NegotiateProtocolVersion: we speak 3.0 and none of these extensions."""
    names = b"".join(name.encode() + b"\0" for name in extensions)
    counts = PROTOCOL_VERSION.to_bytes(4, "big") + len(extensions).to_bytes(4, "big")
    return encode_message(b"v", counts + names)
