"""With which role and password an endpoint can be connected to, and the URL that says so.

What is in force stands in the branch's data. Of an endpoint that runs it is read there, and the controller
finds the password that belongs to it, whether the branch was branched, restored or reset; of one that does
not run the controller says what it last knew. A bootstrap superuser without any password (as an imported
Debian cluster has it) gets one.

Not here: other changes of roles (`commands.role`).
"""

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote

from excimer.base.address import Address
from excimer.base.errors import NotFoundError, RefusedError
from excimer.cli.controller_client import ControllerClient
from excimer.cli.errors import NotRunningError
from excimer.cli.installation import Installation
from excimer.cli.local_server import LocalServer, connected, quote_name, quote_text
from excimer.compute.local_access import LocalAccess, read_local_access
from excimer.compute.places import LOCAL_ACCESS_NAME
from excimer.wire.scram import (
    PASSWORD_SIZE_BYTES,
    SALT_SIZE_BYTES,
    is_verifier,
    make_verifier,
    password_from,
)

if TYPE_CHECKING:
    from excimer.compute.server_certificate import CertificateFiles

DATABASE: Final = "postgres"
SUPERUSER: Final = "postgres"
_WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}

_ROLE_SQL: Final = """
select rolname, coalesce(rolpassword, ''), oid = 10,
    case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end
from pg_authid where
"""


class Credentials(NamedTuple):
    role: str
    password: str | None
    problem: str | None = None
    """Why there is no password although one is asked for; a sentence."""


class ReadOnlyEndpointError(RefusedError):
    """Roles are data, and a static endpoint shows data as they were."""


def local_access(installation: Installation, name: str) -> LocalAccess:
    """Raises `NotRunningError`."""
    found = read_local_access(installation.endpoint_dir(name) / LOCAL_ACCESS_NAME)
    if found is None:
        raise NotRunningError(f"endpoint {name} does not serve: excimer endpoint start {name}")
    return found


def address_of(endpoint: dict[str, Any]) -> Address:
    """Where clients on this machine connect."""
    host = endpoint["listen_host"]
    return Address(_WILDCARDS.get(host, host), endpoint["postgres_port"])


def url_of(
    installation: Installation,
    endpoint: dict[str, Any],
    credentials: Credentials | None = None,
    database: str = DATABASE,
) -> str:
    """A URL that every driver understands; without `credentials`, one without password."""
    role, password, _ = credentials or Credentials(SUPERUSER, None)
    user = quote(role, safe="") + (f":{quote(password, safe='')}" if password else "")
    sslmode = "require" if has_tls(installation, endpoint) else "disable"
    return f"postgresql://{user}@{address_of(endpoint)}/{quote(database, safe='')}?sslmode={sslmode}"


def has_tls(installation: Installation, endpoint: dict[str, Any]) -> bool:
    """Whether clients may ask for TLS: of an endpoint that runs, now; of another, when it is started."""
    access = read_local_access(installation.endpoint_dir(endpoint["name"]) / LOCAL_ACCESS_NAME)
    if access is not None and access.has_tls is not None:
        return access.has_tls
    return planned_certificate(installation, endpoint) is not None


def planned_certificate(installation: Installation, endpoint: dict[str, Any]) -> "CertificateFiles | None":
    """What the endpoint shows from its next start on; None: nothing, or it has no build to start with."""
    from excimer.compute.server_certificate import CertificateFiles, choose_certificate
    from excimer.postgres import find_build

    certificate, key = endpoint["tls_certificate_path"], endpoint["tls_key_path"]
    if certificate is not None and key is not None:
        return CertificateFiles(Path(certificate), Path(key))
    tls = installation.endpoint_tls
    if tls is None:
        return None
    try:
        build = find_build(endpoint["pg_version"])
    except RefusedError:
        return None
    return choose_certificate(build, own=None, default=CertificateFiles(tls.certificate, tls.key))


def public_url(installation: Installation, endpoint: dict[str, Any]) -> str:
    """Without the password, for lists; as the superuser that the endpoint has while it runs."""
    access = read_local_access(installation.endpoint_dir(endpoint["name"]) / LOCAL_ACCESS_NAME)
    return url_of(
        installation, endpoint, Credentials(SUPERUSER if access is None else access.superuser, None)
    )


def find_credentials(
    installation: Installation,
    client: ControllerClient,
    endpoint: dict[str, Any],
    role: str | None = None,
) -> Credentials:
    """Of a role, by default the bootstrap superuser. Raises NotFoundError where no such role is."""
    access = read_local_access(installation.endpoint_dir(endpoint["name"]) / LOCAL_ACCESS_NAME)
    if installation.config.trust_local and endpoint_is_local(endpoint):
        return Credentials(role or (access.superuser if access is not None else SUPERUSER), None)
    if access is not None:
        try:
            with connected(access) as server:
                return _read_credentials(server, client, endpoint, role)
        except NotRunningError:
            pass  # it has just ended
    return _known_credentials(client, endpoint, role)


def endpoint_is_local(endpoint: dict[str, Any]) -> bool:
    return Address(endpoint["listen_host"], endpoint["postgres_port"]).is_loopback


def _known_credentials(client: ControllerClient, endpoint: dict[str, Any], role: str | None) -> Credentials:
    query = {"branch": endpoint["timeline_id"]}
    query |= {} if role is None else {"role": role}
    query |= {} if endpoint["lsn"] is None else {"at_lsn": endpoint["lsn"]}
    found = client.get("tenants", endpoint["tenant_id"], "role_passwords", query=query)
    problem = None
    if found["password"] is None:
        problem = f"the password of role {found['role']} is not known while the endpoint does not run"
    return Credentials(found["role"], found["password"], problem)


def _read_credentials(
    server: LocalServer, client: ControllerClient, endpoint: dict[str, Any], role: str | None
) -> Credentials:
    condition = "oid = 10" if role is None else f"rolname = {quote_text(role)}"
    rows = server.rows(_ROLE_SQL + condition)
    if not rows:
        raise NotFoundError(f"there is no role {role!r} on branch {endpoint['branch']}")
    name, verifier, is_bootstrap, lsn = rows[0]
    assert name is not None
    if not verifier:
        if is_bootstrap != "t" or endpoint["mode"] != "primary":
            problem = f"role {name} has no password: excimer role password {name} gives it one"
            return Credentials(name, None, problem)
        return Credentials(name, set_password(server, client, endpoint, name, is_bootstrap=True))
    found = client.post(
        "tenants",
        endpoint["tenant_id"],
        "role_passwords/look_up",
        body={
            "branch": endpoint["timeline_id"],
            "role": name,
            "is_bootstrap": is_bootstrap == "t",
            "verifier": verifier,
            "lsn": lsn or endpoint["lsn"],
        },
    )
    password: str | None = found["password"]
    return Credentials(name, password, None if password is not None else _why_unknown(name, verifier))


def _why_unknown(role: str, verifier: str) -> str:
    if not is_verifier(verifier):
        return f"the password of role {role} is an md5 one, which cannot log in: excimer role password {role}"
    return (
        f"the password of role {role} was chosen by its owner and is not kept: give it yourself, "
        f"or excimer role password {role} makes a new one"
    )


def set_password(
    server: LocalServer,
    client: ControllerClient,
    endpoint: dict[str, Any],
    role: str,
    *,
    is_bootstrap: bool,
    chosen: str | None = None,
    statement: str | None = None,
) -> str:
    """Gives a role the password `chosen`, or a generated one, which is kept; answers it.

    `statement` is ALTER ROLE unless given, up to the place of the verifier. The controller hears of the
    password before and after: if we die between, it is found by its verifier. Raises `PostgresError`.
    """
    password = chosen or password_from(secrets.token_bytes(PASSWORD_SIZE_BYTES))
    verifier = make_verifier(password, secrets.token_bytes(SALT_SIZE_BYTES))
    body = {
        "branch": endpoint["timeline_id"],
        "role": role,
        "is_bootstrap": is_bootstrap,
        "verifier": verifier,
        "password": None if chosen else password,
    }
    place = ("tenants", endpoint["tenant_id"], "role_passwords")
    client.post(*place, body=body)
    server.rows(f"{statement or f'alter role {quote_name(role)} password'} {quote_text(verifier)}")
    ((lsn,),) = server.rows("select pg_current_wal_lsn()")
    client.post(*place, body=body | {"lsn": lsn})
    return password
