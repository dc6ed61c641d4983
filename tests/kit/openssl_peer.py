"""A TLS client by OpenSSL that can change its key and ask for its peer's next, as Python's `ssl` cannot."""

import _ssl
import ctypes
from pathlib import Path

KEY_UPDATE_NOT_REQUESTED = 0
KEY_UPDATE_REQUESTED = 1
_READ_SIZE = 1 << 16


class _Library:
    """What the peer calls; pointers travel as numbers."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(_ssl.__file__)

    def call(self, name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
        function = getattr(self._library, name)
        function.restype = ctypes.c_void_p if name.endswith(("_new", "_method", "_s_mem")) else ctypes.c_int
        passed = [ctypes.c_void_p(each) if isinstance(each, int) else each for each in arguments]
        return int(function(*passed) or 0)


class OpenSslClient:
    """A connection to "localhost" whose certificate `ca` vouches for; bytes in, bytes out."""

    def __init__(self, ca: Path) -> None:
        self._call = call = _Library().call
        context = call("SSL_CTX_new", call("TLS_client_method"))
        assert call("SSL_CTX_load_verify_locations", context, str(ca).encode(), None) == 1
        self._ssl = call("SSL_new", context)
        call("SSL_CTX_free", context)  # the connection holds it
        assert call("SSL_set1_host", self._ssl, b"localhost") == 1
        self._incoming, self._outgoing = (call("BIO_new", call("BIO_s_mem")) for _ in range(2))
        call("SSL_set_bio", self._ssl, self._incoming, self._outgoing)
        call("SSL_set_connect_state", self._ssl)

    def close(self) -> None:
        self._call("SSL_free", self._ssl)

    def handshake(self, data: bytes = b"") -> bool:
        self._feed(data)
        return self._call("SSL_do_handshake", self._ssl) == 1

    def encrypt(self, data: bytes) -> bytes:
        assert self._call("SSL_write", self._ssl, data, len(data)) == len(data)
        return self.take_output()

    def decrypt(self, data: bytes) -> bytes:
        """What has come; nothing also after an error."""
        self._feed(data)
        return self._read("SSL_read", self._ssl)

    def update_key(self, request: int) -> None:
        """The peer hears of it before what is written next."""
        assert self._call("SSL_key_update", self._ssl, request) == 1

    def take_output(self) -> bytes:
        return self._read("BIO_read", self._outgoing)

    def _feed(self, data: bytes) -> None:
        assert not data or self._call("BIO_write", self._incoming, data, len(data)) == len(data)

    def _read(self, function: str, source: int) -> bytes:
        buffer = ctypes.create_string_buffer(_READ_SIZE)
        read = b""
        while (size := self._call(function, source, buffer, _READ_SIZE)) > 0:
            read += buffer.raw[:size]
        return read
