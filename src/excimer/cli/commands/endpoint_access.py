"""`excimer endpoint url | listen`: how clients reach an endpoint.

Not here: roles (`role`).
"""

import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from excimer.base.address import Address, InvalidAddressError, parse_address
from excimer.cli.branch_options import OptionalEndpointArgument
from excimer.cli.controller_client import ControllerClient
from excimer.cli.credentials import DATABASE, address_of, find_credentials, planned_certificate, url_of
from excimer.cli.endpoint_choice import choose_endpoint
from excimer.cli.errors import UsageError
from excimer.cli.installation import Installation, load_installation
from excimer.cli.session import session_of
from excimer.compute.local_access import read_local_access
from excimer.compute.places import LOCAL_ACCESS_NAME

CertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert", metavar="FILE", help="PEM file of the certificate, with its chain.", show_default=False
    ),
]
KeyOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-key", metavar="FILE", help="PEM file of its key, without passphrase.", show_default=False
    ),
]


def url(
    context: typer.Context,
    name: OptionalEndpointArgument = None,
    role: Annotated[
        str | None,
        typer.Option("--role", "-U", metavar="ROLE", help="Default: the superuser.", show_default=False),
    ] = None,
    database: Annotated[
        str, typer.Option("--database", "-d", metavar="DATABASE", help="Which database.")
    ] = DATABASE,
    without_password: Annotated[
        bool, typer.Option("--no-password", help="For where others may see it.")
    ] = False,
) -> None:
    """Print the URL of an endpoint, with the role's password: psql "$(excimer endpoint url main)"."""
    session = session_of(context)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    endpoint = choose_endpoint(client, name)
    found = find_credentials(installation, client, endpoint, role)
    if without_password:
        found = found._replace(password=None, problem=None)
    if found.problem is not None:
        session.note(found.problem)
    text = url_of(installation, endpoint, found, database)
    address = address_of(endpoint)
    value = {"url": text, "role": found.role, "password": found.password, "problem": found.problem}
    session.say(text, value | {"host": address.host, "port": address.port, "database": database})


def listen(
    context: typer.Context,
    name: OptionalEndpointArgument = None,
    address: Annotated[
        str | None, typer.Argument(metavar="[ADDR[:PORT]]", help="Default: as it is.", show_default=False)
    ] = None,
    tls_cert: CertificateOption = None,
    tls_key: KeyOption = None,
    no_tls: Annotated[bool, typer.Option("--no-tls", help="Use no certificate of its own any more.")] = False,
) -> None:
    """Change where an endpoint listens, or its certificate; in force from its next start on."""
    session = session_of(context)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    if address is None and name is not None and is_address(name):
        name, address = None, name
    endpoint = choose_endpoint(client, name)
    name = str(endpoint["name"])
    changes = listen_changes(address, tls_cert, tls_key)
    if not changes and not no_tls:
        raise UsageError("nothing to change: give an address, a certificate, or --no-tls")
    after = endpoint | changes
    if no_tls:
        after |= {"tls_certificate_path": None, "tls_key_path": None}
        changes["without_tls"] = True
    check_listen_here(installation, after)
    changed = client.patch("endpoints", name, "listen", body=changes)
    running = read_local_access(installation.endpoint_dir(name) / LOCAL_ACCESS_NAME) is not None
    when = f"; in force after excimer endpoint restart {name}" if running else ""
    at = Address(changed["listen_host"], changed["postgres_port"])
    tls = "without TLS" if planned_certificate(installation, changed) is None else "with TLS"
    session.say(f"endpoint {name} listens on {at}, {tls}{when}", changed)


def listen_changes(address: str | None, tls_cert: Path | None, tls_key: Path | None) -> dict[str, Any]:
    """The fields that options change. Raises `UsageError`."""
    if (tls_cert is None) != (tls_key is None):
        raise UsageError("--tls-cert and --tls-key belong together")
    changes: dict[str, Any] = {}
    if address is not None:
        host, port = parse_listen(address)
        changes["listen_host"] = host
        if port is not None:
            changes["postgres_port"] = port
    if tls_cert is not None and tls_key is not None:
        changes["tls_certificate_path"] = str(tls_cert.absolute())
        changes["tls_key_path"] = str(tls_key.absolute())
    return changes


def parse_listen(text: str) -> tuple[str, int | None]:
    """``ADDR`` or ``ADDR:PORT``; an IPv6 address with a port stands in brackets. Raises `UsageError`."""
    has_port = "]:" in text or text.count(":") == 1
    try:
        parsed = parse_address(text if has_port else f"[{text.strip('[]')}]:1")
    except InvalidAddressError as error:
        raise UsageError(f"{text!r} is not an address to listen on: write ADDR or ADDR:PORT") from error
    if not text or parsed.port == 0:
        raise UsageError(f"{text!r} is not an address to listen on: write ADDR or ADDR:PORT")
    return parsed.host, parsed.port if has_port else None


def is_address(text: str) -> bool:
    """Whether a word is an IP address, with or without a port, rather than the name of an endpoint."""
    try:
        ipaddress.ip_address(parse_listen(text)[0])
    except (UsageError, ValueError):
        return False
    return True


def check_listen_here(installation: Installation, endpoint: dict[str, Any]) -> None:
    """Raises `ListenRefusedError`, `CertificateError`: what the endpoint's next start would end with."""
    from excimer.compute.server_certificate import check_listen, read_pair
    from excimer.postgres import find_build

    files = planned_certificate(installation, endpoint)
    at = Address(endpoint["listen_host"], endpoint["postgres_port"])
    if files is None and at.is_loopback:
        return
    check_listen(at, find_build(endpoint["pg_version"]), files)
    if files is not None:
        read_pair(files)


COMMANDS: Final[dict[str, Callable[..., None]]] = {"url": url, "listen": listen}
