"""TLS in tests: a CA and certificates in a directory, and a process that uses them for a while."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from excimer.cli.certificates import make_certificates
from excimer.service import tls
from excimer.service.settings import TlsSettings


def new_tls(directory: Path, *hosts: str, asks_clients: bool = False) -> TlsSettings:
    """Settings with a CA of their own; certificates are for `hosts`, by default for this machine."""
    files = make_certificates(directory, hosts) if hosts else make_certificates(directory)
    return TlsSettings(
        certificate=files.certificate,
        key=files.key,
        ca=files.ca,
        client_ca=files.ca if asks_clients else None,
    )


@contextlib.contextmanager
def using_tls(settings: TlsSettings | None) -> Iterator[None]:
    """This process uses it while the block runs."""
    tls.configure_tls(settings)
    try:
        yield
    finally:
        tls.configure_tls(None)
