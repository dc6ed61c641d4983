"""TLS in tests: a CA and certificates in a directory, and a process that uses them for a while."""

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from excimer.cli.certificates import make_certificates
from excimer.io.private_files import write_private
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


def let_expire(settings: TlsSettings, ended_before: datetime.timedelta = datetime.timedelta(hours=1)) -> None:
    """Signs the certificate of `new_tls` again, with an end that lies in the past (or, negative, ahead)."""
    authority = settings.ca.with_name("ca.key").read_bytes()
    ca_key = serialization.load_pem_private_key(authority, password=None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    old = x509.load_pem_x509_certificate(settings.certificate.read_bytes())
    end = datetime.datetime.now(datetime.UTC) - ended_before
    builder = x509.CertificateBuilder(
        issuer_name=old.issuer,
        subject_name=old.subject,
        public_key=old.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=min(old.not_valid_before_utc, end - datetime.timedelta(days=1)),
        not_valid_after=end,
        extensions=list(old.extensions),
    )
    signed = builder.sign(ca_key, hashes.SHA256())
    write_private(settings.certificate, signed.public_bytes(serialization.Encoding.PEM))


@contextlib.contextmanager
def using_tls(settings: TlsSettings | None) -> Iterator[None]:
    """This process uses it while the block runs."""
    tls.configure_tls(settings)
    try:
        yield
    finally:
        tls.configure_tls(None)
