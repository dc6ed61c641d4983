"""PostgreSQL's protocol: our client and server machines against each other, and what must be refused."""

import struct

import pytest

from excimer.wire import pg_client, pg_server
from excimer.wire.pg_messages import (
    AUTHENTICATION_CLEARTEXT,
    AUTHENTICATION_OK,
    COPY_BOTH_RESPONSE,
    READY_FOR_QUERY,
    Column,
    ProtocolViolationError,
    encode_copy_data,
    encode_error,
    encode_message,
    encode_parameter_status,
    encode_password,
    encode_query,
    encode_result,
    encode_startup,
)

SSL_REQUEST_PACKET = struct.pack(">II", 8, 80877103)
GSSENC_REQUEST_PACKET = struct.pack(">II", 8, 80877104)
CANCEL_REQUEST_PACKET = struct.pack(">IIII", 16, 80877102, 1, 2)


def test_client_and_server_machines_understand_each_other() -> None:
    client = pg_client.ClientConnection({"user": "u", "options": "-c a.b=1"}, "secret")
    server = pg_server.ServerConnection()
    server.feed(client.take_output())
    assert server.next_event() == pg_server.StartupReceived({"user": "u", "options": "-c a.b=1"})
    client.feed(AUTHENTICATION_CLEARTEXT)
    assert client.next_event() is None
    server.feed(client.take_output())
    assert server.next_event() == pg_server.PasswordReceived("secret")
    server.authenticated()
    client.feed(AUTHENTICATION_OK + encode_parameter_status("server_version", "18.0") + READY_FOR_QUERY)
    assert client.next_event() == pg_client.Ready()
    assert client.server_parameters == {"server_version": "18.0"}
    client.query("SHOW x")
    server.feed(client.take_output())
    assert server.next_event() == pg_server.QueryReceived("SHOW x")
    client.feed(encode_result([Column("x"), Column("y")], [[b"1", None]], "SHOW"))
    assert client.next_event() == pg_client.QueryDone([[b"1", None]])
    server.begin_copy()
    client.feed(COPY_BOTH_RESPONSE + encode_copy_data(b"wal"))
    assert client.next_event() == pg_client.CopyBothStarted()
    assert client.next_event() == pg_client.CopyDataReceived(b"wal")


def test_a_failed_query_leaves_the_connection_usable() -> None:
    client = pg_client.ClientConnection({"user": "u"}, None)
    client.feed(AUTHENTICATION_OK + READY_FOR_QUERY)
    assert client.next_event() == pg_client.Ready()
    client.query("nonsense")
    client.feed(encode_error("no such thing", "42601"))
    assert client.next_event() is None
    client.feed(READY_FOR_QUERY)
    event = client.next_event()
    assert isinstance(event, pg_client.QueryFailed)
    assert event.error.sqlstate == "42601"
    assert "no such thing" in str(event.error)


def test_bytes_may_arrive_one_at_a_time() -> None:
    server = pg_server.ServerConnection()
    events = []
    for byte in SSL_REQUEST_PACKET + encode_startup({"user": "u"}):
        server.feed(bytes((byte,)))
        events.append(server.next_event())
    assert [event for event in events if event] == [pg_server.StartupReceived({"user": "u"})]
    assert server.take_output() == b"N"


def test_encryption_is_refused_and_cancel_ignored() -> None:
    server = pg_server.ServerConnection()
    server.feed(GSSENC_REQUEST_PACKET)
    assert server.next_event() is None
    assert server.take_output() == b"N"
    server.feed(CANCEL_REQUEST_PACKET)
    assert server.next_event() == pg_server.Terminated()


def test_newer_minor_versions_and_extensions_are_negotiated_down() -> None:
    server = pg_server.ServerConnection()
    pairs = b"user\0u\0_pq_.thing\0on\0\0"
    server.feed(struct.pack(">II", len(pairs) + 8, 3 << 16 | 2) + pairs)
    assert server.next_event() == pg_server.StartupReceived({"user": "u"})
    assert server.take_output() == encode_message(b"v", struct.pack(">II", 3 << 16, 1) + b"_pq_.thing\0")


@pytest.mark.parametrize(
    "data",
    [
        SSL_REQUEST_PACKET + b"x" * 8,  # bytes smuggled in before the answer
        struct.pack(">II", 7, 3 << 16),
        struct.pack(">II", 10_001, 3 << 16),
        struct.pack(">II", 8, 2 << 16),
        struct.pack(">II", 10, 3 << 16) + b"ab",
        encode_startup({"user": "u"}) + encode_query("too early"),
        encode_startup({"user": "u"}) + b"p\xff\xff\xff\xff",
        encode_startup({"user": "u"}) + encode_message(b"p", b"unterminated"),
        encode_startup({"user": "u"}) + encode_message(b"p", b"\xff\xfe\0"),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_not_the_protocol_is_refused(data: bytes) -> None:
    server = pg_server.ServerConnection()
    server.feed(data)
    with pytest.raises(ProtocolViolationError):
        list(iter(server.next_event, None))


def test_a_password_larger_than_a_token_can_be_is_refused_before_it_is_buffered() -> None:
    server = pg_server.ServerConnection()
    server.feed(encode_startup({"user": "u"}))
    server.next_event()
    server.feed(encode_password("x" * 70_000)[:5])
    with pytest.raises(ProtocolViolationError):
        server.next_event()


def test_a_client_says_which_authentication_it_does_not_speak() -> None:
    client = pg_client.ClientConnection({"user": "u"}, "secret")
    client.feed(encode_message(b"R", struct.pack(">I", 10) + b"SCRAM-SHA-256\0\0"))
    with pytest.raises(ProtocolViolationError, match="method 10"):
        client.next_event()
