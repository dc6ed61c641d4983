"""What a running server's databases need of a PostgreSQL build, asked by ordinary connections.

A role that may replicate need not be one that may connect to databases: what cannot be asked is said, and the
import goes on.

Not here: the comparison (`import_needs`), the import (`import_server`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from psycopg.conninfo import make_conninfo

from excimer.cli.import_needs import ClusterNeeds
from excimer.cli.import_source import SourceRefusedError, one_line

APPLICATION_NAME: Final = "excimer_import"
DATABASES: Final = (None, "postgres", "template1")
"""Where to ask first: the URL's own, then those that are nearly always there."""

EXCIMER_ENDPOINT: Final = (
    "this server is an endpoint of Excimer, whose WAL is its safekeepers': on the same installation make a "
    "branch (excimer timeline branch), from another `excimer export BRANCH DIRECTORY` there, start and stop "
    "PostgreSQL on that directory once, and import it"
)
_IS_EXCIMER: Final = "select pg_catalog.current_setting('excimer.subscriptions_wait', true)"
_DATABASES: Final = "select datname from pg_catalog.pg_database where datallowconn order by 1"
_ICU_DATABASES: Final = "select datname from pg_catalog.pg_database where datlocprovider = 'i' order by 1"
_LIBRARIES: Final = """
    select distinct probin from pg_catalog.pg_proc p join pg_catalog.pg_language l on l.oid = p.prolang
     where l.lanname = 'c' and probin like '$libdir/%' order by 1
"""
_COLLATIONS: Final = """
    select collname from pg_catalog.pg_collation c
     where collprovider = 'i' and (c.oid >= 16384 or exists (
           select from pg_catalog.pg_attribute where attcollation = c.oid and attrelid >= 16384))
     order by 1 limit 5
"""
_COLUMNS: Final = """
    select attrelid::pg_catalog.regclass::text || '.' || attname
      from pg_catalog.pg_attribute where attrelid >= 16384 and not attisdropped and {} order by 1 limit 5
"""
_LZ4_COLUMNS: Final = _COLUMNS.format("attcompression::text = 'l'")
_XML_COLUMNS: Final = _COLUMNS.format("atttypid = 'pg_catalog.xml'::pg_catalog.regtype")

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(slots=True)
class _Found:
    icu: list[str] = field(default_factory=list)
    lz4: list[str] = field(default_factory=list)
    zstd: list[str] = field(default_factory=list)
    xml: list[str] = field(default_factory=list)
    libraries: dict[str, str] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)


def server_needs(url: str) -> ClusterNeeds:
    """What could not be asked is in `unseen`; of a server that lets no ordinary connection in that is all.

    Raises `SourceRefusedError` for an endpoint of Excimer, which cannot be imported live.
    """
    found = _Found()
    for database in _look_at_server(url, found):
        try:
            with _connected(url, database) as connection:
                _look_into(connection, database, found)
        except psycopg.Error as error:
            found.unseen.append(f"database {database}: {one_line(str(error))}")
    return ClusterNeeds(
        icu=tuple(found.icu),
        lz4=tuple(found.lz4),
        zstd=tuple(found.zstd),
        xml=tuple(found.xml),
        libraries=found.libraries,
        unseen=tuple(found.unseen),
    )


def _look_at_server(url: str, found: _Found) -> list[str]:
    """Names of its databases; none when it lets nobody in."""
    refused: psycopg.Error | None = None
    for database in DATABASES:
        try:
            with _connected(url, database) as connection:
                if _names(connection, _IS_EXCIMER) not in ([], ["None"]):
                    raise SourceRefusedError(EXCIMER_ENDPOINT)
                _look_at_settings(connection, found)
                return _names(connection, _DATABASES)
        except psycopg.Error as error:
            refused = refused or error
    assert refused is not None
    found.unseen.append(f"its databases: {one_line(str(refused))}")
    return []


def _look_at_settings(connection: Connection, found: _Found) -> None:
    if connection.info.server_version >= 150_000:
        found.icu += [f"database {name}" for name in _names(connection, _ICU_DATABASES)]
    for setting in ("wal_compression", "default_toast_compression"):
        (value,) = _names(connection, f"select pg_catalog.current_setting('{setting}')")
        {"lz4": found.lz4, "zstd": found.zstd}.get(value, []).append(f"{setting} = {value}")


def _look_into(connection: Connection, database: str, found: _Found) -> None:
    for probin in _names(connection, _LIBRARIES):
        library = probin.removeprefix("$libdir/").removesuffix(".so")
        found.libraries.setdefault(library, f"database {database}")
    for query, kind, things in (
        (_COLLATIONS, "collation", found.icu),
        (_LZ4_COLUMNS, "column", found.lz4),
        (_XML_COLUMNS, "column", found.xml),
    ):
        things += [f"{kind} {name} in database {database}" for name in _names(connection, query)]


def _names(connection: Connection, query: str) -> list[str]:
    return [str(value) for (value,) in connection.execute(query.encode()).fetchall()]


@contextmanager
def _connected(url: str, database: str | None) -> Iterator[Connection]:
    """Raises `psycopg.Error`, also for a URL that cannot be parsed."""
    changes = {"application_name": APPLICATION_NAME} | ({} if database is None else {"dbname": database})
    connection = psycopg.connect(make_conninfo(url, **changes), autocommit=True)
    try:
        yield connection
    finally:
        connection.close()
