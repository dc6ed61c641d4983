"""A local installation: its state directory, its configuration, and the parts that follow from it.

::

    .excimer/
      config.toml               versions, ports, the broker's password
      keys/                     private.pem, public.pem, admin.token, pageserver-1.token, compute_node-1.token
      tls/                      with `init --tls`: ca.pem, ca.key, server.pem, server.key
      tls/endpoints/            the same of another CA, for endpoints without a certificate of their own
      broker/ controller/ pageserver/ object_store/ safekeepers/N/ compute-node/ endpoints/NAME/
      run/                      PART.toml (settings), PART.pid, cli.lock; those of endpoints are the node's
      logs/                     PART.log

Not here: starting anything (`local_processes`).
"""

import re
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import SystemRandom
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec

from excimer.base.ids import NodeId
from excimer.cli.errors import StateDirectoryError
from excimer.cli.session import CONFIG_NAME as CONFIG_NAME
from excimer.io.private_files import make_private_dir, touch_private, write_private
from excimer.service.settings import SettingsError, TlsSettings, load_settings, save_settings
from excimer.service.tls import TlsFilesError, configure_tls

CONFIG_VERSION: Final = 1
TLS_NAME: Final = "tls"
ENDPOINT_TLS_NAME: Final = "endpoints"
"""Within the former."""
OWN_ENTRIES: Final = (
    *(CONFIG_NAME, "keys", "broker", "controller", "pageserver", "object_store"),
    *("safekeepers", "compute-node", "endpoints", "run", "logs", TLS_NAME),
)
"""All that an installation puts in its directory, and all that `init --force` removes."""

ADMIN_TOKEN_NAME: Final = "admin.token"
PAGESERVER_TOKEN_NAME: Final = "pageserver-1.token"
COMPUTE_NODE_TOKEN_NAME: Final = "compute_node-1.token"
COMPUTE_NODE: Final = "compute-node"
HOST: Final = "127.0.0.1"
PORTS: Final = range(15000, 30000)
"""Below the range from which Linux takes ports of outgoing connections, so that ours stay free."""

PORT_ATTEMPTS: Final = 2000
_NATS_URL: Final = re.compile(r"(nats|tls)://\S+:\d{1,5}\Z")
SAFEKEEPERS_MAX: Final = 9


class SafekeeperPorts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: int
    proposer: int
    replication: int
    http: int


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`config.toml`: what `init` chose."""

    version: int = CONFIG_VERSION
    pg_version: int
    broker_port: int
    broker_http_port: int
    broker_password: str
    broker_url: str | None = None
    """Of a NATS server that somebody else runs; None: our own broker."""
    controller_port: int
    page_service_port: int
    pageserver_http_port: int
    compute_node_http_port: int | None = None
    """None: an older Excimer has made this; the next start chooses one."""
    compute_node_capacity: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """How many endpoints may be awake on this machine; None: as many as its memory holds."""
    cgroup_parent: str | None = None
    """The group of cgroup v2 below which endpoints have theirs; None: it is found."""
    unenforced_limits: Literal["tell", "refuse"] | None = None
    """What happens to an endpoint with limits that this machine cannot keep to; None: it is told."""
    safekeepers: tuple[SafekeeperPorts, ...]
    object_store_url: str | None = None
    """Where the durable data lives; None: in `object_store/` of the state directory."""
    object_store_options: dict[str, str] = {}
    """Credentials, endpoint and the like, as far as they are not in the environment of `excimer start`."""
    pageserver_lag_max_mib: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """How far the pageserver may be behind a compute before writers wait, read when an endpoint starts."""
    saved_state_max_mib: Annotated[int, msgspec.Meta(ge=0, le=256)] | None = None
    """What a clean stop may save of what WAL does not carry, 0: nothing; read when an endpoint starts."""
    saved_unlogged_max_mib: Annotated[int, msgspec.Meta(ge=0, le=256)] | None = None
    """Of that, of unlogged relations."""
    prefetch_max_mib: Annotated[int, msgspec.Meta(ge=0, le=2048)] | None = None
    """What a start in an empty directory fetches unasked of what was used most."""
    slot_wal_max_mib: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """What WAL a replication slot may hold while no consumer is connected, read when an endpoint starts."""
    stopped_directories_max_mib: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """What the data directories of stopped endpoints may take together, read when an endpoint starts."""
    token_life_s: Annotated[int, msgspec.Meta(ge=2)] | None = None
    """How long computes and the pageserver go on without the controller; None: the controller's defaults."""
    local_disk_max_mib: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """What the pageserver's copies of layers may take; 0: no bound; None: the pageserver's default."""
    lagging_safekeeper_wal_max_mib: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """WAL that safekeepers keep for one that is away; None: their default."""
    tls: TlsSettings | None = None
    """None: services speak plainly, and listen on loopback addresses only."""
    redo_confinement_required: bool = False
    """Refuse to start the pageserver where redo workers cannot be confined: docs/architecture/redo.md."""
    trust_local: bool = False
    """Every user of this machine may be any role of every endpoint, without a password."""


class Process(NamedTuple):
    """Where a process of the installation is found."""

    name: str
    http_address: str
    lock_dir: Path


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the installation."""

    name: str
    """As in `excimer logs NAME`: broker, controller, pageserver, safekeeper-1, compute-node."""
    module: str
    settings: msgspec.Struct
    http_address: str
    lock_dir: Path
    """Where the process keeps its instance lock."""
    is_restarted: bool = True
    """Whether the supervisor starts it again when it dies."""


@dataclass(frozen=True, slots=True)
class Installation:
    directory: Path
    config: Config

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def tls_dir(self) -> Path:
        return self.directory.absolute() / TLS_NAME

    @property
    def has_own_certificates(self) -> bool:
        """Made by `init --tls`, and renewed by starts."""
        return self.config.tls is not None and self.config.tls.certificate.parent == self.tls_dir

    @property
    def endpoint_tls(self) -> TlsSettings | None:
        """Shown by endpoints without a certificate of their own.

        Whoever is superuser of one can read its key, so certificates that are made here are not of the
        CA that services believe. None: services speak plainly, and endpoints have no certificate to show.
        """
        if self.has_own_certificates:
            return own_tls(self.tls_dir / ENDPOINT_TLS_NAME)
        return self.config.tls

    @property
    def logs_dir(self) -> Path:
        return self.directory / "logs"

    @property
    def keys_dir(self) -> Path:
        return self.directory / "keys"

    def endpoint_dir(self, name: str) -> Path:
        return self.directory / "endpoints" / name

    @property
    def controller_address(self) -> str:
        return f"{HOST}:{self.config.controller_port}"

    def admin_token(self) -> str:
        """The token of this machine's user for the controller. Raises `StateDirectoryError`."""
        path = self.keys_dir / ADMIN_TOKEN_NAME
        try:
            return path.read_text().strip()
        except OSError as error:
            raise StateDirectoryError(f"cannot read {path}: {error.strerror}") from error

    def broker_url(self) -> str:
        if self.config.broker_url is not None:
            return self.config.broker_url
        scheme = "nats" if self.config.tls is None else "tls"
        return f"{scheme}://excimer:{self.config.broker_password}@{HOST}:{self.config.broker_port}"

    def object_store_url(self) -> str:
        return self.config.object_store_url or (self.directory / "object_store").as_uri()

    def service_parts(self) -> list[Part]:
        """All services, in an order in which they may start; they stop in the reverse one."""
        own_broker = [self._broker()] if self.config.broker_url is None else []
        return [
            *own_broker,
            *[self._safekeeper(ports) for ports in self.config.safekeepers],
            self._pageserver(),
            self._controller(),
            *([] if self.config.compute_node_http_port is None else [self.compute_node()]),
        ]

    def _broker(self) -> Part:
        from excimer.broker.settings import BrokerSettings

        settings = BrokerSettings(
            data_dir=self.directory / "broker",
            listen=f"{HOST}:{self.config.broker_port}",
            http_listen=f"{HOST}:{self.config.broker_http_port}",
            user="excimer",
            password=self.config.broker_password,
        )
        return Part("broker", "excimer.broker", settings, settings.http_listen, settings.data_dir)

    def _safekeeper(self, ports: SafekeeperPorts) -> Part:
        from excimer.safekeeper.settings import SafekeeperSettings

        settings = SafekeeperSettings(
            id=NodeId(ports.id),
            data_dir=self.directory / "safekeepers" / str(ports.id),
            proposer_listen=f"{HOST}:{ports.proposer}",
            replication_listen=f"{HOST}:{ports.replication}",
            http_listen=f"{HOST}:{ports.http}",
            broker_url=self.broker_url(),
            auth_public_key_path=self.keys_dir / "public.pem",
        )
        if (limit_mib := self.config.lagging_safekeeper_wal_max_mib) is not None:
            settings = msgspec.structs.replace(settings, lagging_safekeeper_wal_max_mib=limit_mib)
        name = f"safekeeper-{ports.id}"
        return Part(name, "excimer.safekeeper", settings, settings.http_listen, settings.data_dir)

    def _pageserver(self) -> Part:
        from excimer.pageserver.settings import PageserverSettings

        settings = PageserverSettings(
            id=1,
            data_dir=self.directory / "pageserver",
            object_store_url=self.object_store_url(),
            object_store_options=self.config.object_store_options,
            page_service_listen=f"{HOST}:{self.config.page_service_port}",
            http_listen=f"{HOST}:{self.config.pageserver_http_port}",
            broker_url=self.broker_url(),
            auth_public_key_path=self.keys_dir / "public.pem",
            controller_address=self.controller_address,
            auth_token_path=self.keys_dir / PAGESERVER_TOKEN_NAME,
            redo_confinement_required=self.config.redo_confinement_required,
        )
        if self.config.local_disk_max_mib is not None:
            settings = msgspec.structs.replace(settings, local_disk_max_mib=self.config.local_disk_max_mib)
        return Part("pageserver", "excimer.pageserver", settings, settings.http_listen, settings.data_dir)

    def _controller(self) -> Part:
        from excimer.controller.model import Pageserver, Safekeeper
        from excimer.controller.settings import ControllerSettings
        from excimer.controller.tokens import ENDPOINT_TOKEN_LIFE_S, WAL_TOKEN_LIFE_S

        config = self.config
        settings = ControllerSettings(
            data_dir=self.directory / "controller",
            http_listen=self.controller_address,
            auth_public_key_path=self.keys_dir / "public.pem",
            auth_private_key_path=self.keys_dir / "private.pem",
            endpoint_token_life_s=config.token_life_s or ENDPOINT_TOKEN_LIFE_S,
            wal_token_life_s=config.token_life_s or WAL_TOKEN_LIFE_S,
            pageservers=(
                Pageserver(
                    id=NodeId(1),
                    http_address=f"{HOST}:{config.pageserver_http_port}",
                    page_service_address=f"{HOST}:{config.page_service_port}",
                ),
            ),
            safekeepers=tuple(
                Safekeeper(
                    id=NodeId(ports.id),
                    http_address=f"{HOST}:{ports.http}",
                    proposer_address=f"{HOST}:{ports.proposer}",
                    replication_address=f"{HOST}:{ports.replication}",
                )
                for ports in config.safekeepers
            ),
        )
        return Part("controller", "excimer.controller", settings, settings.http_listen, settings.data_dir)

    def compute_node(self) -> Part:
        from excimer.compute_node.settings import ComputeNodeSettings, EndpointDefaults

        config, default_tls = self.config, self.endpoint_tls
        defaults = EndpointDefaults(
            trusts_local=config.trust_local,
            default_tls_certificate_path=None if default_tls is None else default_tls.certificate,
            default_tls_key_path=None if default_tls is None else default_tls.key,
        )
        names = (
            "pageserver_lag_max_mib",
            "prefetch_max_mib",
            "saved_state_max_mib",
            "saved_unlogged_max_mib",
            "slot_wal_max_mib",
            "stopped_directories_max_mib",
        )
        chosen = {name: value for name in names if (value := getattr(config, name)) is not None}
        settings = ComputeNodeSettings(
            id=NodeId(1),
            data_dir=self.directory / COMPUTE_NODE,
            run_dir=self.run_dir,
            logs_dir=self.logs_dir,
            endpoints_dir=self.directory / "endpoints",
            http_listen=f"{HOST}:{config.compute_node_http_port}",
            auth_public_key_path=self.keys_dir / "public.pem",
            auth_token_path=self.keys_dir / COMPUTE_NODE_TOKEN_NAME,
            controller_address=self.controller_address,
            capacity=config.compute_node_capacity,
            cgroup_parent=None if config.cgroup_parent is None else Path(config.cgroup_parent),
            unenforced_limits=config.unenforced_limits or "tell",
            endpoint_defaults=msgspec.structs.replace(defaults, **chosen),
        )
        return Part(COMPUTE_NODE, "excimer.compute_node", settings, settings.http_listen, settings.data_dir)

    def endpoint_process(self, endpoint: Mapping[str, Any]) -> Process:
        """The manager of a controller's row."""
        name = endpoint["name"]
        http_address = f"{HOST}:{endpoint['http_port']}"
        return Process(endpoint_part_name(name), http_address, self.endpoint_dir(name))


def endpoint_part_name(endpoint: str) -> str:
    return f"endpoint-{endpoint}"


def logged_parts(installation: Installation, *, with_deleted: bool = False) -> list[str]:
    """Services and endpoints that have a log; those of deleted endpoints stay where they are."""
    found = sorted(path.stem for path in installation.logs_dir.glob("*.log"))
    return found if with_deleted else [part for part in found if not is_deleted(installation, part)]


def is_deleted(installation: Installation, part: str) -> bool:
    """Whether a part that has a log is an endpoint that is no more."""
    prefix = endpoint_part_name("")
    return part.startswith(prefix) and not installation.endpoint_dir(part.removeprefix(prefix)).exists()


def load_installation(directory: Path) -> Installation:
    """Raises `StateDirectoryError` that says what to do."""
    path = directory / CONFIG_NAME
    if not path.exists():
        raise StateDirectoryError(
            f"there is no installation in {directory}: make one with `excimer init`, or name one with --dir"
        )
    try:
        config = load_settings(path, Config)
    except SettingsError as error:
        raise StateDirectoryError(
            f"{error}: restore the file, or start anew with `excimer init --force`"
        ) from error
    if config.version != CONFIG_VERSION:
        raise StateDirectoryError(
            f"{path} is of version {config.version}, this Excimer understands {CONFIG_VERSION}"
        )
    installation = Installation(directory, config)
    try:
        _configure_tls(installation)
    except TlsFilesError as error:
        raise StateDirectoryError(f"{error}: {path} names it in its block `tls`") from error
    return installation


def _configure_tls(installation: Installation) -> None:
    """For this process, which calls services too. Raises `TlsFilesError`."""
    try:
        configure_tls(installation.config.tls)
    except TlsFilesError:
        if not installation.has_own_certificates:
            raise
        renew_certificates(installation)
        configure_tls(installation.config.tls)


def new_config(
    pg_version: int,
    safekeepers: int,
    broker_url: str | None = None,
    object_store_url: str | None = None,
    object_store_options: dict[str, str] | None = None,
    tls: TlsSettings | None = None,
    *,
    trust_local: bool = False,
) -> Config:
    """A configuration with free ports. Raises `StateDirectoryError` for what is not a NATS URL."""
    if broker_url is not None and not _NATS_URL.match(broker_url):
        raise StateDirectoryError(
            f"{broker_url!r} is not the URL of a NATS server: write nats://USER:PASSWORD@HOST:PORT"
        )
    ports = iter(free_ports(6 + 3 * safekeepers))
    return Config(
        pg_version=pg_version,
        broker_port=next(ports),
        broker_http_port=next(ports),
        broker_url=broker_url,
        broker_password=secrets.token_urlsafe(24),
        object_store_url=object_store_url,
        object_store_options=object_store_options or {},
        tls=tls,
        trust_local=trust_local,
        controller_port=next(ports),
        page_service_port=next(ports),
        pageserver_http_port=next(ports),
        compute_node_http_port=next(ports),
        safekeepers=tuple(
            SafekeeperPorts(id=number, proposer=next(ports), replication=next(ports), http=next(ports))
            for number in range(1, safekeepers + 1)
        ),
    )


def create_installation(directory: Path, config: Config) -> Installation:
    """Writes keys and configuration into an empty directory; the configuration last, as it makes it one."""
    from excimer.wire.auth import generate_key_pair

    installation = Installation(directory, config)
    make_directories(installation)
    renew_certificates(installation)
    pair = generate_key_pair()
    _write_keys(installation, {"private.pem": pair.private_pem, "public.pem": pair.public_pem})
    write_tokens(installation)
    _save_config(installation)
    return installation


def _save_config(installation: Installation) -> None:
    save_settings(
        installation.directory / CONFIG_NAME,
        installation.config,
        "Written by excimer init. Ports may be changed while everything is stopped.",
    )


def own_tls(directory: Path) -> TlsSettings:
    """What `init --tls` puts in `directory`, as settings."""
    return TlsSettings(
        certificate=directory / "server.pem", key=directory / "server.key", ca=directory / "ca.pem"
    )


def renew_certificates(installation: Installation) -> None:
    """Makes the installation's own certificates, if it has some, where they are missing or near their end."""
    if installation.has_own_certificates:
        from excimer.cli.certificates import make_certificates

        make_certificates(installation.tls_dir)
        make_certificates(installation.tls_dir / ENDPOINT_TLS_NAME)


def make_directories(installation: Installation) -> None:
    """Those that all parts share, closed to everybody else, and secrets that were left open."""
    make_private_dir(installation.directory, passable=True)
    make_private_dir(installation.directory / "endpoints", passable=True)
    for made in (installation.run_dir, installation.logs_dir, installation.keys_dir):
        make_private_dir(made)
    for secret in (installation.directory / CONFIG_NAME, *installation.keys_dir.iterdir()):
        if secret.is_file():
            touch_private(secret)


def write_tokens(installation: Installation) -> None:
    """Those that do not run out: of this machine's user, and by which the controller knows its nodes.

    Raises OSError, AuthError for a key that is none.
    """
    from excimer.wire.auth import Claims, Right, encode_token

    private_pem = (installation.keys_dir / "private.pem").read_bytes()
    claims = {
        ADMIN_TOKEN_NAME: Claims(holder="cli", rights=frozenset({Right.MANAGE})),
        PAGESERVER_TOKEN_NAME: Claims(holder="pageserver:1"),
        COMPUTE_NODE_TOKEN_NAME: Claims(holder="compute_node:1"),
    }
    _write_keys(
        installation, {name: encode_token(private_pem, each).encode() for name, each in claims.items()}
    )


def complete_installation(installation: Installation) -> Installation:
    """With what one lacks that an older Excimer has made; to be called before services start.

    Raises as `write_tokens`.
    """
    names = (PAGESERVER_TOKEN_NAME, COMPUTE_NODE_TOKEN_NAME)
    if not all((installation.keys_dir / name).exists() for name in names):
        write_tokens(installation)
    if installation.config.compute_node_http_port is None:
        config = msgspec.structs.replace(installation.config, compute_node_http_port=free_ports(1)[0])
        installation = replace(installation, config=config)
        _save_config(installation)
    return installation


def _write_keys(installation: Installation, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        write_private(installation.keys_dir / name, content)


def free_ports(count: int, taken: frozenset[int] = frozenset()) -> list[int]:
    """Ports of the loopback address that nobody listens on now, none of `taken`."""
    chance = SystemRandom()
    found: list[int] = []
    for _ in range(PORT_ATTEMPTS):
        port = chance.choice(PORTS)
        if port not in taken and port not in found and is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise StateDirectoryError(f"found no {count} free ports between {PORTS[0]} and {PORTS[-1]}")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True
