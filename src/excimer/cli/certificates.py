"""Certificates of an installation: a CA of its own, and one certificate for all its services.

Endpoints that have no certificate of their own show another one, of another CA, in `tls/endpoints/`: the
superuser of an endpoint can read its key, and must not be able to pose as a service with it.

::

    tls/ca.pem       what clients believe; to be given to who connects from elsewhere
    tls/ca.key       signs the installation's certificates
    tls/server.pem   shown by every port, and by our services when a port asks for one
    tls/server.key

The services' certificate is made anew by the start that finds it within `RENEW_BEFORE` of its end; running
services load it by themselves.

Not here: using them (`service.tls`).
"""

import datetime
import ipaddress
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from excimer.io.private_files import make_private_dir, write_private

HOSTS: Final = ("localhost", "127.0.0.1", "::1")
CA_LIFE: Final = datetime.timedelta(days=3650)
LIFE: Final = datetime.timedelta(days=397)
RENEW_BEFORE: Final = datetime.timedelta(days=60)
_CLOCKS_DIFFER: Final = datetime.timedelta(hours=1)
_CURVE: Final = ec.SECP256R1


class CertificateFiles(NamedTuple):
    ca: Path
    ca_key: Path
    certificate: Path
    key: Path


def certificate_files(directory: Path) -> CertificateFiles:
    names = "ca.pem", "ca.key", "server.pem", "server.key"
    return CertificateFiles(*(directory / name for name in names))


def make_certificates(directory: Path, hosts: tuple[str, ...] = HOSTS) -> CertificateFiles:
    """Makes the CA if there is none, and the services' certificate if it is missing or near its end.

    Raises OSError.
    """
    files = certificate_files(make_private_dir(directory))
    if not files.ca.exists() or not files.ca_key.exists():
        _make_ca(files)
        files.certificate.unlink(missing_ok=True)
    if not _is_good(files, hosts):
        _make_certificate(files, hosts)
    return files


def _make_ca(files: CertificateFiles) -> None:
    key = ec.generate_private_key(_CURVE())
    name = _name("Excimer installation")
    builder = _builder(name, name, key, _now() + CA_LIFE)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_private(files.ca_key, _pem_of(key))
    write_private(files.ca, certificate.public_bytes(serialization.Encoding.PEM))


def _make_certificate(files: CertificateFiles, hosts: tuple[str, ...]) -> None:
    """The key is written first; until the certificate follows the pair does not match, and is not loaded."""
    ca = x509.load_pem_x509_certificate(files.ca.read_bytes())
    ca_key = serialization.load_pem_private_key(files.ca_key.read_bytes(), password=None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(_CURVE())
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    names = [_general_name(host) for host in hosts]
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = _builder(_name("Excimer service"), ca.subject, key, min(_now() + LIFE, ca.not_valid_after_utc))
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    write_private(files.key, _pem_of(key))
    write_private(files.certificate, certificate.public_bytes(serialization.Encoding.PEM))


def end_of_certificate(path: Path) -> datetime.datetime | None:
    """When a certificate ends; None: it cannot be read."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return None


def _is_good(files: CertificateFiles, hosts: tuple[str, ...]) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return False
    is_lasting = certificate.not_valid_after_utc - _now() > RENEW_BEFORE
    return is_lasting and files.key.exists() and set(hosts) <= {str(name.value) for name in names}


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, end: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _CLOCKS_DIFFER)
        .not_valid_after(end)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
