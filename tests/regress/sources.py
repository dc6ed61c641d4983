"""PostgreSQL's source of the minor version at hand: as Debian publishes it, checked with Debian's keys."""

import re
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from excimer.base.errors import RefusedError
from excimer.io.cache import cache_directory, cache_entry
from excimer.postgres import PostgresBuild
from excimer.postgres.debian_packages import RELEASES, Apt

_RECORD: Final = re.compile(r"^Version: (\S+)$", re.MULTILINE)


class SourcesMissingError(RefusedError):
    """Debian does not publish this minor version."""


class _SourceApt(Apt):
    def _source_lines(self) -> list[str]:
        return [line.replace("deb ", "deb-src ", 1) for line in super()._source_lines()]

    def versions(self, package: str) -> list[str]:
        return _RECORD.findall(self._run("apt-cache", "showsrc", package, may_miss=True))

    def download_source(self, package: str, version: str, place: Path) -> Path:
        wanted = f"{package}={version}"
        self._run("apt-get", "source", "--download-only", "--only-source", wanted, directory=place)
        (archive,) = place.glob("*.orig.tar.*")
        return archive


def source_tree(build: PostgresBuild) -> Path:
    """The unpacked source of the build's own minor version. Raises `SourcesMissingError`, and as apt does."""
    minor = build.full_version.split()[0]
    place = cache_directory() / "postgres-source" / minor
    if place.exists():
        return place
    if build.version not in RELEASES:
        raise SourcesMissingError(
            f"Debian has no source of PostgreSQL {build.version}: unpack postgresql-{minor}.tar.bz2 "
            "and pass its directory with --source"
        )
    with tempfile.TemporaryDirectory() as scratch:
        apt = _SourceApt(Path(scratch), RELEASES[build.version])
        apt.update()
        package = f"postgresql-{build.version}"
        versions = apt.versions(package)
        fitting = [version for version in versions if version.partition("-")[0] == minor]
        if not fitting:
            raise SourcesMissingError(
                f"Debian has the source of {', '.join(versions)} and the build in use is {minor}: "
                f"`excimer pg install {build.version}` brings Debian's, or pass --source"
            )
        archive = apt.download_source(package, fitting[0], Path(scratch))
        return cache_entry("postgres-source", minor, lambda target: _unpack(archive, target))


def _unpack(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            member.name = member.name.partition("/")[2]
            if member.name and not member.name.startswith("/"):
                tar.extract(member, target, filter="data")
