"""What a data directory's databases need of a PostgreSQL build, read from its catalogs without a server.

Seen are databases that sort by ICU (PostgreSQL 15 and newer) and the libraries of functions in C, which are
those of extensions. Not seen are single collations and compressed columns, which lie in catalogs whose layout
changes with each version: the server that is asked while it runs (`import_server_needs`) says those.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

from excimer.base.errors import CorruptionError
from excimer.cli.import_needs import ClusterNeeds
from excimer.pgformat.catalog_rows import DATABASE_OID, PROC_OID, icu_databases, library_names
from excimer.pgformat.relation_map import parse_relation_map

PAGE_SIZE_BYTES: Final = 8192
_MAP: Final = "pg_filenode.map"
_XACTS_PER_SEGMENT: Final = 32 * PAGE_SIZE_BYTES * 4
_COMMITTED: Final = 1
_FIRST_NORMAL_XID: Final = 3


def directory_needs(directory: Path, pg_version: int) -> ClusterNeeds:
    """Raises OSError. A catalog that cannot be understood is in `unseen`; importing it will say more."""
    is_committed = partial(_is_committed, directory)
    icu: set[str] = set()
    libraries: dict[str, str] = {}
    unseen: list[str] = []
    try:
        if pg_version >= 15:
            icu = icu_databases(_pages(directory / "global", DATABASE_OID), is_committed)
    except CorruptionError as error:
        unseen.append(f"its databases: {error}")
    for place in sorted((directory / "base").iterdir(), key=lambda path: path.name.zfill(10)):
        if not (place.name.isdigit() and (place / _MAP).exists()):
            continue
        try:
            for name in library_names(_pages(place, PROC_OID), is_committed):
                libraries.setdefault(name, f"the database in base/{place.name}")
        except CorruptionError as error:
            unseen.append(f"base/{place.name}: {error}")
    return ClusterNeeds(
        icu=tuple(f"database {name}" for name in sorted(icu)), libraries=libraries, unseen=tuple(unseen)
    )


def _pages(place: Path, catalog_oid: int) -> Iterator[bytes]:
    number = parse_relation_map((place / _MAP).read_bytes()).get(catalog_oid)
    if number is None:
        raise CorruptionError(f"{place / _MAP} does not name catalog {catalog_oid}")
    with (place / str(number)).open("rb") as file:
        while len(page := file.read(PAGE_SIZE_BYTES)) == PAGE_SIZE_BYTES:
            yield page


def _is_committed(directory: Path, xid: int) -> bool:
    """By pg_xact. Of a transaction that is older than its first file every trace is frozen or aborted."""
    if xid < _FIRST_NORMAL_XID:
        return xid > 0
    segment, place = divmod(xid, _XACTS_PER_SEGMENT)
    try:
        with (directory / "pg_xact" / f"{segment:04X}").open("rb") as file:
            file.seek(place // 4)
            status = file.read(1)
    except FileNotFoundError:
        return False
    return bool(status) and status[0] >> place % 4 * 2 & 3 == _COMMITTED
