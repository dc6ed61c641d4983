"""The metadata database in SQLite: one file, WAL mode, every change durable when its call returns.

LSNs and system identifiers are kept as text, because SQLite's integers are signed. `MIGRATIONS`
is the schema's whole history: a database of version n gets the scripts after the n-th, each in a
transaction; the version is SQLite's own `user_version`.

Rejected: an ORM. Seven tables read whole (an installation has hundreds of rows, not millions) need none.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from excimer.base.errors import CorruptionError, RefusedError, RetryableError
from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import format_lsn, parse_lsn
from excimer.controller.model import (
    ComputeNode,
    Endpoint,
    InUseError,
    NameTakenError,
    Pageserver,
    Placement,
    RolePassword,
    Safekeeper,
    Tenant,
    Timeline,
)
from excimer.io.private_files import touch_private
from excimer.wire.compute_limits import ComputeLimits

DATABASE_FILE_NAME: Final = "metadata.sqlite"
BUSY_TIMEOUT_S: Final = 5.0

MIGRATIONS: Final = (
    """
    CREATE TABLE pageserver (
        id INTEGER PRIMARY KEY, http_address TEXT NOT NULL, page_service_address TEXT NOT NULL
    ) STRICT;
    CREATE TABLE safekeeper (
        id INTEGER PRIMARY KEY, http_address TEXT NOT NULL, proposer_address TEXT NOT NULL,
        replication_address TEXT NOT NULL
    ) STRICT;
    CREATE TABLE tenant (
        tenant_id TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL,
        pageserver_id INTEGER NOT NULL REFERENCES pageserver, generation INTEGER NOT NULL,
        created_at REAL NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX tenant_name ON tenant (name) WHERE state <> 'deleting';
    CREATE TABLE timeline (
        timeline_id TEXT PRIMARY KEY, tenant_id TEXT NOT NULL REFERENCES tenant, name TEXT NOT NULL,
        state TEXT NOT NULL, pg_version INTEGER NOT NULL, ancestor_timeline_id TEXT REFERENCES timeline,
        ancestor_lsn TEXT, start_lsn TEXT, system_id TEXT NOT NULL, wal_segment_size INTEGER NOT NULL,
        created_at REAL NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX timeline_name ON timeline (tenant_id, name) WHERE state <> 'deleting';
    CREATE TABLE placement (
        timeline_id TEXT NOT NULL REFERENCES timeline ON DELETE CASCADE,
        safekeeper_id INTEGER NOT NULL REFERENCES safekeeper, tenant_id TEXT NOT NULL REFERENCES tenant,
        ready INTEGER NOT NULL, PRIMARY KEY (timeline_id, safekeeper_id)
    ) STRICT;
    CREATE TABLE endpoint (
        name TEXT PRIMARY KEY, tenant_id TEXT NOT NULL REFERENCES tenant,
        timeline_id TEXT NOT NULL REFERENCES timeline, mode TEXT NOT NULL, lsn TEXT,
        pg_version INTEGER NOT NULL, postgres_port INTEGER NOT NULL UNIQUE, http_port INTEGER NOT NULL UNIQUE,
        postgres_settings TEXT NOT NULL, created_at REAL NOT NULL
    ) STRICT;
    CREATE TABLE preference (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    """,
    """
    ALTER TABLE timeline ADD COLUMN replaces_timeline_id TEXT;
    ALTER TABLE timeline ADD COLUMN replaced_name TEXT
    """,
    """
    ALTER TABLE timeline ADD COLUMN quieting_id TEXT;
    ALTER TABLE timeline ADD COLUMN extension_workers INTEGER NOT NULL DEFAULT 1
    """,
    """
    ALTER TABLE endpoint ADD COLUMN listen_host TEXT NOT NULL DEFAULT '127.0.0.1';
    ALTER TABLE endpoint ADD COLUMN tls_certificate_path TEXT;
    ALTER TABLE endpoint ADD COLUMN tls_key_path TEXT;
    CREATE TABLE rolepassword (
        tenant_id TEXT NOT NULL REFERENCES tenant ON DELETE CASCADE, timeline_id TEXT NOT NULL,
        role TEXT NOT NULL, is_bootstrap INTEGER NOT NULL, verifier TEXT NOT NULL, password TEXT, lsn TEXT,
        created_at REAL NOT NULL, PRIMARY KEY (timeline_id, role, verifier)
    ) STRICT;
    """,
    # Endpoints that were made before there were suspends go on as they are: 0 is never.
    """
    ALTER TABLE endpoint ADD COLUMN suspend_delay_s INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE endpoint ADD COLUMN state TEXT NOT NULL DEFAULT 'stopped';
    ALTER TABLE endpoint ADD COLUMN last_active_at REAL;
    ALTER TABLE endpoint ADD COLUMN suspends INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE endpoint ADD COLUMN suspend_reason TEXT NOT NULL DEFAULT ''
    """,
    """
    CREATE TABLE computenode (
        id INTEGER PRIMARY KEY, http_address TEXT NOT NULL, capacity INTEGER NOT NULL
    ) STRICT;
    ALTER TABLE endpoint ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE endpoint ADD COLUMN node_id INTEGER
    """,
    "ALTER TABLE endpoint ADD COLUMN cache_size_mib INTEGER NOT NULL DEFAULT 0",
    """
    ALTER TABLE endpoint ADD COLUMN limits TEXT NOT NULL DEFAULT '{}';
    ALTER TABLE computenode ADD COLUMN room TEXT NOT NULL DEFAULT '{}'
    """,
)

S = TypeVar("S", bound=msgspec.Struct)

_LSN_COLUMNS: Final = ("lsn", "ancestor_lsn", "start_lsn")
_JSON_COLUMNS: Final = {"postgres_settings", "limits", "room"}
_FLAG_COLUMNS: Final = ("ready", "is_bootstrap")
_DEFAULT_TENANT: Final = "default_tenant"


class StoreDamagedError(CorruptionError):
    """The database file is not a sound SQLite database of ours."""


class StoreTooNewError(RefusedError):
    """A newer Excimer has written the database."""


class StoreUnavailableError(RetryableError):
    """The database cannot be written now: disk full, locked, no permission."""


def keep_private(path: Path) -> None:
    """Makes a file that holds passwords, if it is not there, readable by its owner alone."""
    try:
        path.touch(mode=0o600)
        path.chmod(0o600)
    except OSError as error:
        raise StoreUnavailableError(f"cannot use {path}: {error.strerror}") from error


class SqliteStore:
    """A `MetadataStore`. May be called from any thread; one transaction at a time."""

    def __init__(self, data_dir: Path) -> None:
        """Opens or makes the database, checks it, migrates it."""
        self._path = data_dir / DATABASE_FILE_NAME
        keep_private(self._path)  # before SQLite opens it, which gives its own files the same mode
        self._lock = threading.Lock()
        with contextlib.suppress(OSError):  # SQLite says what is wrong; its other files get this one's mode
            touch_private(self._path)
        with self._errors():
            self._connection = sqlite3.connect(
                self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        with contextlib.ExitStack() as on_failure, self._errors():
            on_failure.callback(self._connection.close)
            self._prepare()
            on_failure.pop_all()

    def close(self) -> None:
        self._connection.close()

    def _prepare(self) -> None:
        self._connection.row_factory = sqlite3.Row
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._connection.execute(f"PRAGMA {pragma}")
        problem = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise StoreDamagedError(f"{self._path} is damaged: {problem}")
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreTooNewError(
                f"{self._path} has schema version {version}, this Excimer knows {len(MIGRATIONS)}: upgrade it"
            )
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            self._connection.executescript(f"BEGIN; {script}; PRAGMA user_version = {number}; COMMIT;")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's errors as ours."""
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise _refusal(str(error)) from error
        except sqlite3.OperationalError as error:
            raise StoreUnavailableError(f"cannot use {self._path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise StoreDamagedError(f"{self._path} is damaged: {error}") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            with self._connection:  # commits, or rolls back on any error
                yield self._connection

    def _select(self, kind: type[S], where: str = "", values: Sequence[object] = ()) -> list[S]:
        table = kind.__name__.lower()
        with self._lock, self._errors():
            rows = self._connection.execute(
                f"SELECT * FROM {table} {where} ORDER BY rowid", tuple(values)
            ).fetchall()
        return [_from_row(kind, row) for row in rows]

    def _put(self, connection: sqlite3.Connection, key: tuple[str, ...], value: msgspec.Struct) -> None:
        row = _to_row(value)
        changes = ", ".join(f"{column} = excluded.{column}" for column in row if column not in key)
        connection.execute(
            f"INSERT INTO {type(value).__name__.lower()} ({', '.join(row)})"
            f" VALUES ({', '.join('?' * len(row))})"
            f" ON CONFLICT ({', '.join(key)}) DO UPDATE SET {changes}",
            tuple(row.values()),
        )

    def put_nodes(self, pageservers: Sequence[Pageserver], safekeepers: Sequence[Safekeeper]) -> None:
        with self._node_refusal(), self._transaction() as connection:
            for table, nodes in (("pageserver", pageservers), ("safekeeper", safekeepers)):
                kept = ", ".join(str(int(node.id)) for node in nodes)
                connection.execute(f"DELETE FROM {table} WHERE id NOT IN ({kept})")
                for node in nodes:
                    self._put(connection, ("id",), node)

    @contextlib.contextmanager
    def _node_refusal(self) -> Iterator[None]:
        try:
            yield
        except InUseError as error:
            raise InUseError(
                "a pageserver or safekeeper that the settings no longer name still holds timelines: "
                "name it again"
            ) from error

    def list_pageservers(self) -> list[Pageserver]:
        return self._select(Pageserver)

    def list_safekeepers(self) -> list[Safekeeper]:
        return self._select(Safekeeper)

    def list_compute_nodes(self) -> list[ComputeNode]:
        return self._select(ComputeNode)

    def put_compute_node(self, node: ComputeNode) -> None:
        with self._transaction() as connection:
            self._put(connection, ("id",), node)

    def list_tenants(self) -> list[Tenant]:
        return self._select(Tenant)

    def find_tenant(self, tenant_id: TenantId) -> Tenant | None:
        return next(iter(self._select(Tenant, "WHERE tenant_id = ?", (tenant_id,))), None)

    def put_tenant(self, tenant: Tenant) -> None:
        with self._transaction() as connection:
            self._put(connection, ("tenant_id",), tenant)

    def remove_tenant(self, tenant_id: TenantId) -> None:
        with self._transaction() as connection:
            connection.execute(
                "DELETE FROM preference WHERE name = ? AND value = ?", (_DEFAULT_TENANT, tenant_id)
            )
            connection.execute("DELETE FROM tenant WHERE tenant_id = ?", (tenant_id,))

    def read_default_tenant(self) -> TenantId | None:
        with self._lock, self._errors():
            row = self._connection.execute(
                "SELECT value FROM preference WHERE name = ?", (_DEFAULT_TENANT,)
            ).fetchone()
        return TenantId(row[0]) if row else None

    def set_default_tenant(self, tenant_id: TenantId | None) -> None:
        with self._transaction() as connection:
            connection.execute("DELETE FROM preference WHERE name = ?", (_DEFAULT_TENANT,))
            if tenant_id is not None:
                connection.execute("INSERT INTO preference VALUES (?, ?)", (_DEFAULT_TENANT, tenant_id))

    def list_timelines(self, tenant_id: TenantId | None = None) -> list[Timeline]:
        if tenant_id is None:
            return self._select(Timeline)
        return self._select(Timeline, "WHERE tenant_id = ?", (tenant_id,))

    def find_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> Timeline | None:
        keys = tenant_id, timeline_id
        return next(iter(self._select(Timeline, "WHERE tenant_id = ? AND timeline_id = ?", keys)), None)

    def put_timeline(self, timeline: Timeline) -> None:
        with self._transaction() as connection:
            self._put(connection, ("timeline_id",), timeline)

    def put_timelines(self, timelines: Sequence[Timeline]) -> None:
        with self._transaction() as connection:
            for timeline in timelines:
                self._put(connection, ("timeline_id",), timeline)

    def replace_timeline(self, old: Timeline, new: Timeline, endpoints: Sequence[str]) -> None:
        with self._transaction() as connection:
            for timeline in (old, new):
                self._put(connection, ("timeline_id",), timeline)
            connection.executemany(
                "UPDATE endpoint SET timeline_id = ? WHERE name = ?",
                [(new.timeline_id, name) for name in endpoints],
            )

    def remove_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> None:
        with self._transaction() as connection:
            connection.execute(
                "DELETE FROM timeline WHERE tenant_id = ? AND timeline_id = ?", (tenant_id, timeline_id)
            )

    def list_placements(self, timeline_id: TimelineId | None = None) -> list[Placement]:
        if timeline_id is None:
            return self._select(Placement)
        return self._select(Placement, "WHERE timeline_id = ?", (timeline_id,))

    def put_placements(self, placements: Sequence[Placement]) -> None:
        with self._transaction() as connection:
            for placement in placements:
                self._put(connection, ("timeline_id", "safekeeper_id"), placement)

    def remove_placement(self, timeline_id: TimelineId, safekeeper_id: NodeId) -> None:
        with self._transaction() as connection:
            connection.execute(
                "DELETE FROM placement WHERE timeline_id = ? AND safekeeper_id = ?",
                (timeline_id, safekeeper_id),
            )

    def list_endpoints(self) -> list[Endpoint]:
        return self._select(Endpoint)

    def add_endpoint(self, endpoint: Endpoint) -> None:
        row = _to_row(endpoint)
        with self._transaction() as connection:
            connection.execute(
                f"INSERT INTO endpoint ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})",
                tuple(row.values()),
            )

    def put_postgres_settings(self, name: str, settings: dict[str, str]) -> None:
        value = msgspec.json.encode(settings).decode()
        with self._transaction() as connection:
            connection.execute("UPDATE endpoint SET postgres_settings = ? WHERE name = ?", (value, name))

    def put_listen(self, endpoint: Endpoint) -> None:
        files = endpoint.tls_certificate_path, endpoint.tls_key_path
        with self._transaction() as connection:
            connection.execute(
                "UPDATE endpoint SET listen_host = ?, postgres_port = ?, tls_certificate_path = ?,"
                " tls_key_path = ? WHERE name = ?",
                (endpoint.listen_host, endpoint.postgres_port, *files, endpoint.name),
            )

    def put_mode(self, endpoint: Endpoint) -> None:
        with self._transaction() as connection:
            connection.execute("UPDATE endpoint SET mode = ? WHERE name = ?", (endpoint.mode, endpoint.name))

    def put_suspension(self, endpoint: Endpoint) -> None:
        columns = (
            *("suspend_delay_s", "state", "last_active_at", "suspends", "suspend_reason"),
            *("generation", "node_id"),
        )
        values = [getattr(endpoint, column) for column in columns]
        with self._transaction() as connection:
            connection.execute(
                f"UPDATE endpoint SET {', '.join(f'{column} = ?' for column in columns)} WHERE name = ?",
                (*values, endpoint.name),
            )

    def put_cache_size(self, name: str, size_mib: int) -> None:
        with self._transaction() as connection:
            connection.execute("UPDATE endpoint SET cache_size_mib = ? WHERE name = ?", (size_mib, name))

    def put_limits(self, name: str, limits: ComputeLimits) -> None:
        value = msgspec.json.encode(limits).decode()
        with self._transaction() as connection:
            connection.execute("UPDATE endpoint SET limits = ? WHERE name = ?", (value, name))

    def list_role_passwords(self, tenant_id: TenantId) -> list[RolePassword]:
        return self._select(RolePassword, "WHERE tenant_id = ?", (tenant_id,))

    def put_role_passwords(self, passwords: Sequence[RolePassword]) -> None:
        with self._transaction() as connection:
            for password in passwords:
                self._put(connection, ("timeline_id", "role", "verifier"), password)

    def remove_endpoint(self, name: str) -> None:
        with self._transaction() as connection:
            connection.execute("DELETE FROM endpoint WHERE name = ?", (name,))


def _to_row(value: msgspec.Struct) -> dict[str, Any]:
    row = msgspec.structs.asdict(value)
    for column in _LSN_COLUMNS:
        if row.get(column) is not None:
            row[column] = format_lsn(row[column])
    if "system_id" in row:
        row["system_id"] = str(row["system_id"])
    for column in _JSON_COLUMNS & row.keys():
        row[column] = msgspec.json.encode(row[column]).decode()
    return row


def _from_row(kind: type[S], row: sqlite3.Row) -> S:
    values: dict[str, Any] = dict(row)
    for column in _LSN_COLUMNS:
        if values.get(column) is not None:
            values[column] = parse_lsn(values[column])
    for column in _JSON_COLUMNS & values.keys():
        values[column] = msgspec.json.decode(values[column])
    for column in _FLAG_COLUMNS:
        if column in values:
            values[column] = bool(values[column])
    return msgspec.convert(values, kind, strict=False)


def _refusal(problem: str) -> NameTakenError | InUseError:
    """``UNIQUE constraint failed: endpoint.name`` as a sentence."""
    if "FOREIGN KEY" in problem:
        return InUseError("something else still needs it")
    column = problem.rpartition(": ")[2].rpartition(".")[2]
    words = {
        "postgres_port": "that PostgreSQL port belongs to another endpoint",
        "http_port": "that HTTP port belongs to another endpoint",
    }
    return NameTakenError(words.get(column, "that name is taken"))
