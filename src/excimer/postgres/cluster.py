"""Makes a database cluster with a build's own initdb, with the settings that every timeline starts from."""

from collections.abc import Sequence
from pathlib import Path

from excimer.io.processes import make_owned_dir, run
from excimer.postgres.build import BuildUnusableError, PostgresBuild

SUPERUSER = "postgres"
LOCALE = "C.UTF-8"
INITDB_TIMEOUT_S = 300.0


def run_initdb(
    build: PostgresBuild,
    directory: Path,
    *,
    superuser: str = SUPERUSER,
    locale: str = LOCALE,
    wal_segment_size_mib: int = 16,
    options: Sequence[str] = (),
) -> None:
    """Fills `directory` (missing or empty) with a new cluster that belongs to the unprivileged user. Blocks.

    UTF-8, the C.UTF-8 locale of libc (it sorts by code point on every machine, so that a cluster can move
    between machines and between builds with and without ICU), no data checksums (a compute's pages
    are checked where they are stored), no fsync (the caller stores it elsewhere). pg_hba.conf trusts
    everyone: whoever serves the cluster over a network writes another one.
    Raises `BuildUnusableError`, `ProgramFailedError`.
    """
    build.require_runnable()
    if directory.exists() and any(directory.iterdir()):
        raise BuildUnusableError(
            f"{directory} is not empty: initdb makes a cluster only in an empty directory"
        )
    make_owned_dir(directory)
    arguments: list[str | Path] = [
        build.program("initdb"),
        "-D",
        directory,
        "-U",
        superuser,
        "-A",
        "trust",
        "-N",
    ]
    arguments += [
        "--no-instructions",
        "-E",
        "UTF8",
        f"--locale={locale}",
        f"--wal-segsize={wal_segment_size_mib}",
    ]
    if build.version >= 15:
        arguments.append("--locale-provider=libc")
    if build.version >= 18:
        arguments.append("--no-data-checksums")
    run(
        [*arguments, *options],
        environment=build.whole_environment(),
        timeout_s=INITDB_TIMEOUT_S,
    )
