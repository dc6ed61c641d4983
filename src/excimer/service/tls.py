"""TLS of a process: one certificate that its ports show, and one CA that whoever it calls must be of.

Set once, at the start (`configure_tls`); without it everything is plain. With it every port of the process
speaks TLS and nothing else, and every call to another service does, with the certificate and the host name
checked. Who the peer is, its token says; `client_ca` asks for a certificate of the peer's too.

New files are seen at the next connection that comes a second or more after they were written. If they are of
no use, the log says so, once, and the old ones stay.

Not here: making certificates (`cli.certificates`), PostgreSQL's own port.
"""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from excimer._native.channel import Channel, TlsChannel
from excimer._native.openssl import TlsConnection, TlsContext
from excimer.base.errors import RefusedError
from excimer.service.logs import get_logger
from excimer.service.settings import TlsSettings

LOOK_INTERVAL_S: Final = 1.0
"""How often the files are looked at, at most; only when there are connections."""
_ALPN: Final = ["postgresql", "http/1.1"]

log = get_logger(__name__)

_Signature: TypeAlias = tuple[tuple[int, int, int] | None, ...]


class TlsFilesError(RefusedError):
    """The files of the settings' block `tls` cannot be used."""


class _Contexts(NamedTuple):
    """The native two check what the others check."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    native_server: TlsContext
    native_client: TlsContext


class Tls:
    """The contexts made from the files as they are now. May be used from any thread.

    Raises `TlsFilesError` at construction only.
    """

    def __init__(self, settings: TlsSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._signature = self._look()
        self._looked_at = clock()
        self._contexts = _make_contexts(settings)

    def server(self) -> ssl.SSLContext:
        """For one connection that was accepted."""
        self._reload_if_changed()
        return self._contexts.server

    def client(self) -> ssl.SSLContext:
        """For one connection that we make."""
        self._reload_if_changed()
        return self._contexts.client

    def native_server(self) -> TlsContext:
        """As `server`, for native code."""
        self._reload_if_changed()
        return self._contexts.native_server

    def native_client(self) -> TlsContext:
        """As `client`, for native code."""
        self._reload_if_changed()
        return self._contexts.native_client

    def _reload_if_changed(self) -> None:
        with self._lock:
            now = self._clock()
            if now - self._looked_at < LOOK_INTERVAL_S:
                return
            self._looked_at = now
            signature = self._look()
            if signature == self._signature:
                return
            self._signature = signature
            try:
                self._contexts = _make_contexts(self._settings)
            except TlsFilesError as error:
                log.error("the new certificate is of no use, the old one stays", error=error)
                return
        log.info("the certificate was loaded anew", certificate=str(self._settings.certificate))

    def _look(self) -> _Signature:
        return look_at_files(self._settings)


def look_at_files(settings: TlsSettings) -> _Signature:
    """Something that differs when a file was replaced."""
    files = settings.certificate, settings.key, settings.ca, settings.client_ca
    return tuple(_signature_of(path) for path in files if path is not None)


def _signature_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _make_contexts(settings: TlsSettings) -> _Contexts:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    server.num_tickets = 0  # nobody of us resumes a session
    server.set_alpn_protocols(_ALPN)
    with _naming(settings.certificate, settings.key):
        server.load_cert_chain(settings.certificate, settings.key)
    with _naming(settings.ca):
        client.load_verify_locations(settings.ca)
    if settings.client_ca is not None:
        with _naming(settings.client_ca):
            server.load_verify_locations(settings.client_ca)
        server.verify_mode = ssl.CERT_REQUIRED
        client.load_cert_chain(settings.certificate, settings.key)
    with _naming(settings.certificate, settings.key, settings.ca):
        shows_own = settings.client_ca is not None
        native_server = TlsContext(
            is_server=True, certificate=settings.certificate, key=settings.key, ca=settings.client_ca
        )
        native_client = TlsContext(
            is_server=False,
            certificate=settings.certificate if shows_own else None,
            key=settings.key if shows_own else None,
            ca=settings.ca,
        )
    return _Contexts(server, client, native_server, native_client)


@contextlib.contextmanager
def _naming(*paths: Path) -> Iterator[None]:
    names = " and ".join(str(path) for path in paths)
    try:
        yield
    except ssl.SSLError as error:
        raise TlsFilesError(f"{names} cannot be used for TLS: {error.reason or error}") from error
    except OSError as error:
        raise TlsFilesError(f"cannot read {names}: {error.strerror or error}") from error


_current: Tls | None = None


def configure_tls(settings: TlsSettings | None) -> None:
    """What this process uses from now on; None: no TLS. Raises `TlsFilesError`."""
    global _current
    _current = None if settings is None else Tls(settings)


def has_tls() -> bool:
    return _current is not None


def server_tls() -> ssl.SSLContext | None:
    """For a connection that was accepted; None: it is plain."""
    return None if _current is None else _current.server()


def server_channel(accepted: socket.socket) -> Channel:
    """For a socket that was accepted and is, or will be, a blocking one. If it is a `TlsChannel`, its
    handshake comes first.
    """
    if _current is None:
        return Channel(accepted.fileno())
    return TlsChannel(accepted.fileno(), TlsConnection(_current.native_server()))


def native_server_tls() -> TlsContext | None:
    """As `server_tls`, for native code."""
    return None if _current is None else _current.native_server()


def native_client_tls() -> TlsContext | None:
    """As `client_tls`, for native code."""
    return None if _current is None else _current.native_client()


def client_tls() -> ssl.SSLContext | None:
    """For a connection to another service; None: it is plain."""
    return None if _current is None else _current.client()
