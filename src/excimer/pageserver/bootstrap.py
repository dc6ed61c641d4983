"""New clusters: PostgreSQL's own initdb, run once per build and kept, then imported for each timeline.

The kept directory is a template: every timeline made from it gets a system identifier of its own, so
that WAL of one can never be taken for another's.

Not here: reading the directory's files (`initdb_import`), storing the images (`storage`).
"""

import hashlib
from pathlib import Path

import msgspec

from excimer.base.chance import Chance
from excimer.base.clock import UnixTime, unix_to_timestamptz
from excimer.base.errors import RefusedError
from excimer.base.keys import KeyKind, make_key
from excimer.io.cache import cache_entry
from excimer.pageserver.initdb_import import ImportedCluster, import_initdb
from excimer.pgformat.control_file import ControlFile
from excimer.postgres import SUPPORTED_VERSIONS, PostgresBuild, find_build, redo_extension, run_initdb

DEFAULT_VERSION = max(SUPPORTED_VERSIONS)
TEMPLATE_REVISION = 1
"""Grows when `run_initdb` makes clusters differently: older templates are then left unused."""


class PostgresVersionError(RefusedError):
    """Excimer does not support this PostgreSQL version."""


def initdb_template(build: PostgresBuild) -> Path:
    """The kept data directory of a build, made if it is not there. Blocks, some seconds the first time.

    Raises `BuildUnusableError`, `ProgramFailedError`, `CacheUnusableError`.
    """
    identity = hashlib.sha256(f"{TEMPLATE_REVISION} {build.identity()}".encode()).hexdigest()[:16]

    def make(directory: Path) -> None:
        run_initdb(build, directory / "data")

    return cache_entry("initdb", f"{build.version}-{identity}", make) / "data"


def own_control_file(pg_version: int) -> ControlFile:
    """pg_control as our build of a version makes it, to compare with. Blocks, the first time for seconds.

    Raises what `new_cluster` does: without a build that can replay WAL nothing of that version is taken in.
    """
    data_dir = initdb_template(_usable_build(pg_version))
    return ControlFile.unpack((data_dir / "global/pg_control").read_bytes(), pg_version)


def new_cluster(pg_version: int, chance: Chance, now: UnixTime) -> ImportedCluster:
    """Everything that a new timeline of this version begins with; its history begins `now`. Blocks.

    Raises `PostgresVersionError`, `PostgresMissingError` and what `initdb_template` and `redo_extension` do.
    """
    cluster = import_initdb(initdb_template(_usable_build(pg_version)), pg_version)
    system_id = chance.randrange(1, 1 << 63)
    control = msgspec.structs.replace(cluster.control_file, system_id=system_id)
    images = dict(cluster.images)
    images[make_key(KeyKind.CONTROL_FILE)] = control.pack()
    images[make_key(KeyKind.COMMIT_TIME)] = unix_to_timestamptz(now).to_bytes(8, "little", signed=True)
    return cluster._replace(control_file=control, images=list(images.items()))


def _usable_build(pg_version: int) -> PostgresBuild:
    if pg_version not in SUPPORTED_VERSIONS:
        supported = ", ".join(map(str, SUPPORTED_VERSIONS))
        raise PostgresVersionError(f"PostgreSQL {pg_version} is not supported: choose one of {supported}")
    build = find_build(pg_version)
    redo_extension(build)  # without it nothing that is written could be read again: refused before that
    return build
