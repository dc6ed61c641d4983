"""The command that brings what a build lacks: for `pg list`, `doctor`, refusals, CREATE EXTENSION's hint.

Not here: what a build has (`inspection`), bringing one (`installation`).
"""

from collections.abc import Sequence
from typing import Final

from excimer.postgres.build import PostgresBuild
from excimer.postgres.debian_packages import has_packages

DEBIAN_LIBRARIES: Final = {"libossp-uuid.so.16": "libossp-uuid16"}
"""The packages of libraries that builds from elsewhere expect of the machine."""

WITH_PGVECTOR: Final = (17, 18)
"""Major versions whose release of Debian has a package of pgvector."""

_WHEEL: Final = ("TLS", "LZ4", "XML", "pgcrypto")
_PACKAGES: Final = ("ICU", "TLS", "LZ4", "zstd", "XML", "server headers", "amcheck", "pgcrypto", "uuid-ossp")


def brought_by_install(version: int) -> list[str]:
    """Of what builds may lack: what the one has that `excimer pg install VERSION` brings here."""
    if has_packages(version):
        return [*_PACKAGES, *(["pgvector"] if version in WITH_PGVECTOR else [])]
    return [*_WHEEL, "server headers", "amcheck"]


def remedy(build: PostgresBuild) -> str | None:
    """A clause with the command that helps; None when this build lacks nothing that a command brings."""
    lacks = {name.partition(" (")[0] for name in build.features.lacks()}
    gained = [name for name in brought_by_install(build.version) if name in lacks]
    ways = []
    if gained:
        ways.append(f"`excimer pg install {build.version}` brings a build with {_listed(gained)}")
    for name, library in build.features.broken_extensions:
        if library in DEBIAN_LIBRARIES and name not in gained:
            ways.append(
                f"on Debian `apt-get install {DEBIAN_LIBRARIES[library]}` brings {library} for {name}"
            )
    return "; ".join(ways) or None


def remedy_for(build: PostgresBuild, things: Sequence[str]) -> str:
    """A clause with the command that brings those things, each called as in a list of what builds lack."""
    brought = [thing for thing in things if thing in brought_by_install(build.version)]
    others = [thing for thing in things if thing not in brought]
    ways = []
    if brought:
        ways.append(f"`excimer pg install {build.version}` brings a build with {_listed(brought)}")
    if others:
        ways.append(f"`excimer pg add PG_CONFIG` names an installation that has {_listed(others)}")
    return "; ".join(ways)


def extension_hint(build: PostgresBuild) -> str:
    """What to tell somebody who asks for an extension, or a collation, that is not there."""
    lacks = ", ".join(build.features.lacks())
    way = remedy(build) or "`excimer pg add PG_CONFIG` names another installation"
    return (
        f"This PostgreSQL {build.full_version} lacks {lacks or 'none of the usual'}. "
        f"{way[0].upper()}{way[1:]}. "
        "Another build is used from the endpoint's next start on; `excimer pg list` shows what each has."
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
