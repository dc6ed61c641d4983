"""New clusters: PostgreSQL's own initdb, run once per build and kept, then imported for each timeline.

The kept directory is a template: every timeline made from it gets a system identifier of its own, so
that WAL of one can never be taken for another's, and the verifier of its superuser's password. The
template's own password is random and known to nobody: it only holds the verifier's place.

Not here: reading the directory's files (`initdb_import`), storing the images (`storage`).
"""

import hashlib
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from excimer.base.chance import Chance
from excimer.base.clock import UnixTime, unix_to_timestamptz
from excimer.base.errors import RefusedError
from excimer.base.keys import GLOBAL_TABLESPACE, Fork, KeyKind, Relation, make_key, parse_key
from excimer.io.cache import cache_entry
from excimer.io.processes import give_to_user, make_owned_dir
from excimer.pageserver.initdb_import import ImportedCluster, import_initdb
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.relation_map import parse_relation_map
from excimer.pgformat.role_catalog import AUTHID_OID, replace_verifier
from excimer.postgres import SUPPORTED_VERSIONS, PostgresBuild, find_build, redo_extension, run_initdb

DEFAULT_VERSION = max(SUPPORTED_VERSIONS)
TEMPLATE_REVISION = 2
"""Grows when `run_initdb` makes clusters differently: older templates are then left unused."""


class PostgresVersionError(RefusedError):
    """Excimer does not support this PostgreSQL version."""


def initdb_template(build: PostgresBuild) -> Path:
    """The kept data directory of a build, made if it is not there. Blocks, some seconds the first time.

    Raises `BuildUnusableError`, `ProgramFailedError`, `CacheUnusableError`.
    """
    identity = hashlib.sha256(f"{TEMPLATE_REVISION} {build.identity()}".encode()).hexdigest()[:16]

    def make(directory: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="excimer-initdb-") as private:
            password_file = make_owned_dir(Path(private)) / "password"
            password_file.touch(mode=0o600)
            password_file.write_text(secrets.token_urlsafe())
            give_to_user(password_file)
            run_initdb(build, directory / "data", options=[f"--pwfile={password_file}"])

    return cache_entry("initdb", f"{build.version}-{identity}", make) / "data"


def own_control_file(pg_version: int) -> ControlFile:
    """pg_control as our build of a version makes it, to compare with. Blocks, the first time for seconds.

    Raises what `new_cluster` does: without a build that can replay WAL nothing of that version is taken in.
    """
    data_dir = initdb_template(_usable_build(pg_version))
    return ControlFile.unpack((data_dir / "global/pg_control").read_bytes(), pg_version)


def new_cluster(
    pg_version: int, chance: Chance, now: UnixTime, password_verifier: str | None = None
) -> ImportedCluster:
    """Everything that a new timeline of this version begins with; its history begins `now`. Blocks.

    `password_verifier` is that of the superuser's password (`wire.scram`); without one, nobody knows it.
    Raises `PostgresVersionError`, `PostgresMissingError` and what `initdb_template` and `redo_extension` do.
    """
    cluster = import_initdb(initdb_template(_usable_build(pg_version)), pg_version)
    system_id = chance.randrange(1, 1 << 63)
    control = msgspec.structs.replace(cluster.control_file, system_id=system_id)
    images = dict(cluster.images)
    images[make_key(KeyKind.CONTROL_FILE)] = control.pack()
    images[make_key(KeyKind.COMMIT_TIME)] = unix_to_timestamptz(now).to_bytes(8, "little", signed=True)
    if password_verifier is not None:
        keys = authid_keys(images)
        images |= zip(keys, replace_verifier([images[key] for key in keys], password_verifier), strict=True)
    return cluster._replace(control_file=control, images=list(images.items()))


def authid_keys(images: Mapping[bytes, bytes]) -> list[bytes]:
    """The keys of pg_authid's pages among a cluster's images."""
    file_numbers = parse_relation_map(images[make_key(KeyKind.RELATION_MAP, GLOBAL_TABLESPACE)])
    authid = Relation(GLOBAL_TABLESPACE, 0, file_numbers[AUTHID_OID])
    return [key for key in images if _is_page_of(key, authid)]


def _is_page_of(key: bytes, relation: Relation) -> bool:
    fields = parse_key(key)
    is_main = fields.kind == KeyKind.RELATION_BLOCK and fields.fork == Fork.MAIN
    return is_main and (fields.spc, fields.db, fields.rel) == relation


def _usable_build(pg_version: int) -> PostgresBuild:
    if pg_version not in SUPPORTED_VERSIONS:
        supported = ", ".join(map(str, SUPPORTED_VERSIONS))
        raise PostgresVersionError(f"PostgreSQL {pg_version} is not supported: choose one of {supported}")
    build = find_build(pg_version)
    redo_extension(build)  # without it nothing that is written could be read again: refused before that
    return build
