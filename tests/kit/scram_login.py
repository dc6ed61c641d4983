"""A login with a wrong password, spoken by hand: libpq tells nobody the SQLSTATE of a failed one."""

import base64
import re
import socket

from excimer.wire.pg_messages import FrameReader, Message, decode_error_fields, encode_startup

_SASL, _SASL_CONTINUE = 10, 11


def failed_login(host: str, port: int, role: str) -> dict[str, str]:
    """The fields of the server's error after a proof that fits no password."""
    with socket.create_connection((host, port), timeout=30) as connection:
        reader = FrameReader()
        connection.sendall(encode_startup({"user": role, "database": "postgres"}))
        message = _next(connection, reader)
        if message.kind == ord("E"):
            return decode_error_fields(message.body)
        assert (message.kind, message.body[:4]) == (ord("R"), _SASL.to_bytes(4, "big")), message
        first = b"n,,n=,r=nonce"
        mechanism = b"SCRAM-SHA-256\0"
        connection.sendall(_frame(mechanism + len(first).to_bytes(4, "big") + first))
        message = _next(connection, reader)
        assert message.body[:4] == _SASL_CONTINUE.to_bytes(4, "big"), message
        nonce = re.search(rb"r=([^,]+)", message.body)
        assert nonce is not None
        proof = base64.b64encode(bytes(32))
        connection.sendall(_frame(b"c=biws,r=" + nonce[1] + b",p=" + proof))
        message = _next(connection, reader)
        assert message.kind == ord("E"), message
        return decode_error_fields(message.body)


def _frame(body: bytes) -> bytes:
    return b"p" + (len(body) + 4).to_bytes(4, "big") + body


def _next(connection: socket.socket, reader: FrameReader) -> Message:
    while (message := reader.next_message()) is None:
        data = connection.recv(4096)
        assert data, "the server closed the connection without an error"
        reader.feed(data)
    return message
