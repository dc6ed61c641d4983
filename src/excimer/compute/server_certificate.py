"""An endpoint's TLS: where it may listen, and its certificate, put in place and renewed while it runs.

An endpoint shows its own certificate, or else the installation's if its build of PostgreSQL has TLS.

The files belong to whoever made them (an operator, an ACME client) and often cannot be read by PostgreSQL's
user; PostgreSQL in turn insists on who owns its key. So they are copied, as a pair that has been checked, and
again when they change: beside the data directory, all of which a base backup has.

Not here: who may connect (`client_authentication`).
"""

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from excimer.base.address import Address
from excimer.base.errors import RefusedError
from excimer.compute.data_directory import write_private
from excimer.postgres import PostgresBuild
from excimer.service.logs import get_logger

CERTIFICATE_NAME: Final = "server.crt"
KEY_NAME: Final = "server.key"
POLL_INTERVAL_S: Final = 5.0

log = get_logger(__name__)


class ListenRefusedError(RefusedError):
    """An endpoint would listen where its PostgreSQL cannot protect what is said."""


class CertificateError(RefusedError):
    """A certificate or its key is missing, unreadable, or they do not belong together."""


class CertificateFiles(NamedTuple):
    """Both PEM; the certificate may be followed by the chain up to its root. The key has no passphrase."""

    certificate: Path
    key: Path


class CertificatePair(NamedTuple):
    certificate: bytes
    key: bytes


def choose_certificate(
    build: PostgresBuild, *, own: CertificateFiles | None, default: CertificateFiles | None
) -> CertificateFiles | None:
    """What an endpoint shows; None: it speaks plainly. `default` is the installation's."""
    if own is not None:
        return own
    return default if build.features.tls else None


def check_listen(listen: Address, build: PostgresBuild, files: CertificateFiles | None) -> None:
    """Raises `ListenRefusedError` when clients would have to send passwords and data in the clear."""
    if files is None and listen.is_loopback:
        return
    if not build.features.tls:
        wish = f"cannot listen on {listen}" if not listen.is_loopback else "cannot use a certificate"
        raise ListenRefusedError(
            f"the endpoint {wish}: PostgreSQL {build.full_version} in {build.bin_dir} was built without TLS, "
            "so passwords and data would cross the network in the clear; listen on 127.0.0.1 and let others "
            "in through an SSH tunnel or a proxy that terminates TLS, or use a build with TLS "
            f"(excimer pg install {build.version})"
        )
    if files is None:
        raise ListenRefusedError(
            f"the endpoint cannot listen on {listen} without TLS: "
            "give it a certificate (--tls-cert, --tls-key)"
        )


def read_pair(files: CertificateFiles) -> CertificatePair:
    """What is in the files now. Raises `CertificateError` unless the key is the certificate's."""
    try:
        pair = CertificatePair(files.certificate.read_bytes(), files.key.read_bytes())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.certificate, files.key, _no_passphrase)
    except ssl.SSLError as error:
        problem = error.reason or "not PEM"
        raise CertificateError(
            f"{files.certificate} and {files.key} are no certificate and its key: {problem.lower()}"
        ) from error
    except OSError as error:
        name = error.filename or files.certificate
        raise CertificateError(f"cannot read {name}: {error.strerror}") from error
    return pair


def _no_passphrase() -> str:
    raise CertificateError("the key has a passphrase, which nobody could enter: write it without one")


def installed_files(directory: Path) -> CertificateFiles:
    """Where `install_pair` puts it."""
    return CertificateFiles(directory / CERTIFICATE_NAME, directory / KEY_NAME)


def install_pair(pair: CertificatePair, directory: Path) -> None:
    """The key first: if we die between the two, the pair in the files does not fit, and none is loaded."""
    files = installed_files(directory)
    write_private(files.key, pair.key)
    write_private(files.certificate, pair.certificate)


def remove_pair(directory: Path) -> None:
    """Of an endpoint that no longer shows one."""
    for path in installed_files(directory):
        path.unlink(missing_ok=True)


async def follow_files(
    files: CertificateFiles, installed: CertificatePair, directory: Path, reload: Callable[[], None]
) -> None:
    """Until cancelled: installs what the files become, and calls `reload`. What is wrong is logged."""
    reported = ""
    while True:
        await asyncio.sleep(POLL_INTERVAL_S)
        try:
            found = await asyncio.to_thread(read_pair, files)
        except CertificateError as error:
            if str(error) != reported:
                log.error("the old certificate stays in use", error=error)
                reported = str(error)
            continue
        reported = ""
        if found != installed:
            await asyncio.to_thread(install_pair, found, directory)
            installed = found
            reload()
            log.info("certificate renewed", certificate=str(files.certificate))
