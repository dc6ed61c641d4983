"""Brings a whole PostgreSQL, with ICU and TLS, from Debian's own packages, on machines that have apt.

Debian keeps one major version per release, with all of contrib, and its packages are signed. They are
downloaded by apt into a directory of their own, from the mirror and with the keys that this machine's apt is
set up with, whatever release the machine itself is; nothing of the system is changed, and root is not needed.
The packages are unpacked together with the shared libraries that they depend on::

    <entry>/usr/lib/postgresql/18/bin, lib    programs, modules
    <entry>/usr/share/postgresql/18           what initdb and CREATE EXTENSION read
    <entry>/usr/include/postgresql/18/server  headers
    <entry>/usr/lib/x86_64-linux-gnu          libraries; libc and its loader too, if they are newer than ours

Programs are made to look there (DT_RPATH), and to start with that loader where the machine's libc is older
than the packages want. Libraries that are preloaded, and modules compiled here, are made for the machine's
libc, which a newer one serves too.

Not here: PostgreSQL 14 and 16, which no release of Debian has (`installation`).
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from excimer.base.errors import RetryableError
from excimer.io.cache import cache_directory, cache_entry
from excimer.postgres.build import BuildUnusableError

RELEASES: Final = {15: "bookworm", 17: "trixie", 18: "forky"}
"""The release of Debian that has a major version of PostgreSQL."""

PROGRAMS: Final = "usr/lib/postgresql/{version}/bin"
"""Where its programs are in a cache entry."""

_TEST_PROGRAMS: Final = "usr/lib/postgresql/{version}/lib/pgxs/src/test/*/*"
_LAYOUT: Final = 2
"""Part of an entry's name: what is made of the same packages is no longer the same."""

KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT_TIMEOUT_S: Final = 600
CONNECT_TIMEOUT_S: Final = 20
_PROGRAM_TIMEOUT_S: Final = 120
_LIBC: Final = "libc6"
_UNUSED: Final = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "usr/share/gdb")
_VERSION: Final = re.compile(r"(?:\d+:)?(\d+)\.(\d+)")


class PackagesUnavailableError(RetryableError):
    """This machine's apt cannot bring them."""


@dataclass(frozen=True, slots=True)
class Package:
    """One binary package, as the release's index has it."""

    name: str
    version: str
    section: str
    depends: tuple[tuple[str, ...], ...]
    """Each dependency's alternatives, by name."""

    @property
    def is_library(self) -> bool:
        return self.section.rpartition("/")[2] == "libs"


def has_packages(version: int) -> bool:
    """Whether this machine can be expected to bring a major version this way. Quick; asks nobody."""
    return (
        version in RELEASES
        and KEYRING.exists()
        and all(map(shutil.which, ("apt-get", "apt-cache", "dpkg-deb")))
    )


def install_packages(
    version: int, kind: str, directory: Path, progress: Callable[[str, float], None]
) -> Path:
    """pg_config of a PostgreSQL of `version`, in a cache entry of `kind`; `directory` is for scratch. Blocks.

    `progress` is called with what is being done and how much of the whole is done, 0 to 1.
    Raises `PackagesUnavailableError`, `BuildUnusableError`.
    """
    apt = Apt(directory, RELEASES[version])
    progress(f"reading the list of Debian's packages ({RELEASES[version]})", 0.0)
    apt.update()
    packages = plan_packages(version, apt.show)
    keeps_libc = host_libc() < libc_version(packages[_LIBC].version)
    if not keeps_libc:
        del packages[_LIBC]
    progress(f"downloading {len(packages)} packages", 0.2)
    archives = apt.download([*packages, "patchelf"])
    postgres = packages[f"postgresql-{version}"].version
    progress("unpacking", 0.7)
    names = "\n".join([f"layout {_LAYOUT}", *sorted(path.name for path in archives)])
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    key = f"{version}-debian-{re.sub(r'[^0-9A-Za-z.+-]', '_', postgres)}-{digest}"
    final = cache_directory() / kind / key
    cache_entry(kind, key, lambda place: _unpack(archives, place, final, version))
    return final / PROGRAMS.format(version=version) / "pg_config"


def plan_packages(version: int, show: Callable[[list[str]], list[Package]]) -> dict[str, Package]:
    """What to unpack, by name: the server, its client, headers, pgvector, and the libraries they depend on.

    `show` answers with those packages of the names that exist. Only libraries are followed: what else the
    packages depend on (perl, debconf, scripts that make clusters) serves an installed system.
    Raises `BuildUnusableError` when the release lacks one of PostgreSQL's own packages.
    """
    wanted = [f"postgresql-{version}", f"postgresql-client-{version}", f"postgresql-server-dev-{version}"]
    found = {package.name: package for package in show([*wanted, f"postgresql-{version}-pgvector"])}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise BuildUnusableError(f"Debian {RELEASES[version]} has no package {', '.join(missing)}")
    headers = wanted[-1]  # depends on compilers and what else builds extensions
    level = [package for name, package in found.items() if name != headers]
    while level:
        names = {name for package in level for names in package.depends for name in names} - found.keys()
        level = [package for package in show(sorted(names)) if package.is_library] if names else []
        found |= {package.name: package for package in level}
    if _LIBC not in found:
        raise BuildUnusableError(
            f"PostgreSQL {version} of Debian {RELEASES[version]} does not depend on {_LIBC}"
        )
    return found


def parse_packages(text: str) -> list[Package]:
    """The newest of each name, in the format of ``apt-cache show`` (deb822, newest first)."""
    packages: dict[str, Package] = {}
    for stanza in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
        if "Package" not in fields or fields["Package"] in packages:
            continue
        clauses = [fields[name] for name in ("Pre-Depends", "Depends") if fields.get(name)]
        packages[fields["Package"]] = Package(
            name=fields["Package"],
            version=fields["Version"],
            section=fields.get("Section", ""),
            depends=tuple(_names(clause) for clause in ", ".join(clauses).split(", ") if clause),
        )
    return list(packages.values())


def _names(clause: str) -> tuple[str, ...]:
    """``a (>= 1) | b:any`` -> a, b."""
    return tuple(part.split()[0].partition(":")[0] for part in clause.split("|"))


def libc_version(package_version: str) -> tuple[int, int]:
    """``2.43-7`` -> (2, 43)."""
    match = _VERSION.match(package_version)
    if match is None:
        raise BuildUnusableError(f"{package_version!r} is not a version of {_LIBC}")
    return int(match[1]), int(match[2])


def host_libc() -> tuple[int, int]:
    """This machine's. Raises `BuildUnusableError` where it is not glibc."""
    try:
        name = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except ValueError:
        name = ""
    if not name.startswith("glibc "):
        raise BuildUnusableError("this machine's C library is not glibc, with which Debian's packages run")
    return libc_version(name.removeprefix("glibc "))


class Apt:
    """apt with lists, archives and sources of its own; the mirror and other settings are the machine's."""

    def __init__(self, directory: Path, release: str) -> None:
        self._directory = directory
        self._release = release
        for name in ("lists/partial", "archives/partial"):
            (directory / name).mkdir(parents=True)
        (directory / "status").touch()
        self._sources = directory / "sources.list"

    def update(self) -> None:
        """Fetches the release's lists. Raises `PackagesUnavailableError`."""
        self._sources.write_text("".join(f"{line}\n" for line in self._source_lines()))
        self._run("apt-get", "--error-on=any", "update")

    def show(self, names: list[str]) -> list[Package]:
        """Those of the names that the release has."""
        if not names:
            return []
        return parse_packages(self._run("apt-cache", "show", *names, may_miss=True))

    def download(self, names: Iterable[str]) -> list[Path]:
        """Their archives; apt compares them with the signed lists. Raises `PackagesUnavailableError`."""
        place = self._directory / "packages"
        place.mkdir()
        self._run("apt-get", "download", *names, directory=place)
        return sorted(place.glob("*.deb"))

    def _source_lines(self) -> list[str]:
        form = "$(ORIGIN)|$(LABEL)|$(RELEASE)|$(SITE)"
        answer = _run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"])
        rows = [line.split("|") for line in answer.splitlines() if line.count("|") == 3]
        main = [site for origin, label, _, site in rows if (origin, label) == ("Debian", "Debian")]
        if not main:
            raise PackagesUnavailableError(
                "this machine's apt has no mirror of Debian: `apt-get update` reads its lists"
            )
        signed = f"[signed-by={KEYRING}]"
        lines = [f"deb {signed} {main[0]} {self._release} main"]
        # Security updates have an archive of their own, which has a suite for the machine's own release.
        return lines + [
            f"deb {signed} {site} {suite} main"
            for _, label, suite, site in rows
            if label == "Debian-Security" and suite == f"{self._release}-security"
        ]

    def _run(
        self, program: str, *arguments: str, directory: Path | None = None, may_miss: bool = False
    ) -> str:
        places = {
            "Dir::Etc::sourcelist": self._sources,
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": self._directory / "lists",
            "Dir::State::status": self._directory / "status",
            "Dir::Cache": self._directory,
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::http::Timeout": CONNECT_TIMEOUT_S,
            "Acquire::https::Timeout": CONNECT_TIMEOUT_S,
        }
        options = [part for name, value in places.items() for part in ("-o", f"{name}={value}")]
        return _run([program, "-qq", *options, *arguments], directory=directory, may_miss=may_miss)


def _run(command: list[str], *, directory: Path | None = None, may_miss: bool = False) -> str:
    try:
        answer = subprocess.run(
            command,
            env=os.environ | {"LC_ALL": "C"},
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=APT_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise PackagesUnavailableError(f"{command[0]} cannot be run: {error}") from error
    if answer.returncode != 0 and not may_miss:
        said = " ".join((answer.stderr or answer.stdout).split())[-400:]
        raise PackagesUnavailableError(f"{command[0]} failed: {said}")
    return answer.stdout


def _unpack(archives: list[Path], place: Path, final: Path, version: int) -> None:
    """Fills `place`, which will be called `final`."""
    for archive in archives:
        try:
            subprocess.run(
                ["dpkg-deb", "--extract", archive, place],
                check=True,
                capture_output=True,
                timeout=_PROGRAM_TIMEOUT_S,
            )
        except subprocess.SubprocessError as error:
            raise BuildUnusableError(f"{archive.name} cannot be unpacked: {error}") from error
    for name in _UNUSED:
        shutil.rmtree(place / name, ignore_errors=True)
    libraries = _merge_libraries(place)
    programs = [
        *(place / PROGRAMS.format(version=version)).iterdir(),
        *place.glob(_TEST_PROGRAMS.format(version=version)),
    ]
    _patch_programs(place, final, libraries, programs)


def _merge_libraries(place: Path) -> Path:
    """usr/lib/TRIPLET, with what older releases have in lib/TRIPLET."""
    known = next(iter(place.glob("usr/lib/*/libpq.so.5")), None)
    if known is None:
        raise BuildUnusableError("Debian's packages hold no libpq")
    libraries = known.parent
    old = place / "lib" / libraries.name
    for path in old.iterdir() if old.is_dir() and not (place / "lib").is_symlink() else ():
        if not (libraries / path.name).exists():
            path.rename(libraries / path.name)
    return libraries


def _patch_programs(place: Path, final: Path, libraries: Path, programs: Iterable[Path]) -> None:
    """They find the libraries beside them, and the loader that goes with these."""
    loader = next(iter(sorted(libraries.glob("ld-linux-*.so.*"))), None)
    patchelf: list[str | Path] = [place / "usr/bin/patchelf", "--force-rpath"]
    environment: Mapping[str, str] = {}
    if loader is None:
        environment = {"LD_LIBRARY_PATH": str(libraries)}
    else:
        patchelf = [loader, "--library-path", libraries, *patchelf]
        patchelf += ["--set-interpreter", final / loader.relative_to(place)]
    for program in sorted(programs):
        if program.is_symlink() or not program.is_file() or program.read_bytes()[:4] != b"\x7fELF":
            continue
        places = f"$ORIGIN/{os.path.relpath(libraries, program.parent)}"
        try:
            subprocess.run(
                [*patchelf, "--set-rpath", places, program],
                env=dict(environment),
                check=True,
                capture_output=True,
                timeout=_PROGRAM_TIMEOUT_S,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise BuildUnusableError(
                f"{program.name} cannot be made to find its libraries: {error}"
            ) from error
    (place / "usr/bin/patchelf").unlink()
