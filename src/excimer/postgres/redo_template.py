"""The smallest directory in which `postgres --single` gets as far as the redo worker's hook.

Only pg_control differs between builds (it names the catalog version); it is taken from one initdb per build,
kept in the cache.
"""

import shutil
from pathlib import Path

from excimer.io.cache import cache_entry
from excimer.io.processes import give_to_user, make_owned_dir
from excimer.postgres.build import PostgresBuild
from excimer.postgres.cluster import run_initdb

_DIRECTORIES = ("global", "base", "base/1", "pg_notify", "pg_dynshmem")


def redo_control_file(build: PostgresBuild) -> bytes:
    """A pg_control of this build. Blocks half a second the first time."""

    def make(place: Path) -> None:
        cluster = place / "cluster"
        run_initdb(build, cluster)
        (cluster / "global" / "pg_control").rename(place / "pg_control")
        shutil.rmtree(cluster)

    return (cache_entry("redo-template", build.identity(), make) / "pg_control").read_bytes()


def make_redo_directory(directory: Path, version: int, control_file: bytes) -> None:
    """Fills a new directory for one worker; it belongs to the unprivileged user."""
    make_owned_dir(directory)
    for name in _DIRECTORIES:
        (directory / name).mkdir(mode=0o700)
        give_to_user(directory / name)
    files = {"PG_VERSION": f"{version}\n".encode(), "postgresql.conf": b"", "global/pg_control": control_file}
    for name, content in files.items():
        (directory / name).write_bytes(content)
        (directory / name).chmod(0o600)
        give_to_user(directory / name)
