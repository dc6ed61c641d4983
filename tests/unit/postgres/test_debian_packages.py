"""Which of Debian's packages make a PostgreSQL, how they are laid out, and when they cannot be had."""

from pathlib import Path

import pytest

from excimer.postgres import BuildUnusableError, installation
from excimer.postgres.build import PostgresMissingError
from excimer.postgres.debian_packages import (
    Package,
    PackagesUnavailableError,
    host_libc,
    install_packages,
    libc_version,
    parse_packages,
    plan_packages,
)
from excimer.postgres.installation import BuildSource, install_build

INDEX = """\
Package: postgresql-18
Version: 18.6-3
Section: database
Depends: locales | locales-all, postgresql-client-18, postgresql-common, libicu78 (>= 78.1), libc6 (>= 2.43)
Description: The World's Most Advanced Open Source Relational Database
 Depends: on nothing, says the description

Package: postgresql-client-18
Version: 18.6-3
Section: database
Depends: libpq5 (>= 18~), libreadline8 | libreadline8t64 (>= 6.0)

Package: postgresql-server-dev-18
Version: 18.6-3
Section: libdevel
Depends: llvm-21-dev, clang-21

Package: postgresql-18-pgvector
Version: 0.8.7-1
Section: database
Depends: postgresql-18, libgcc-s1:any

Package: postgresql-common
Version: 293
Section: database
Depends: perl, libjson-perl

Package: libicu78
Version: 78.3-3
Section: libs
Depends: libc6 (>= 2.42), libstdc++6 (>= 16)

Package: libicu78
Version: 78.3-2
Section: libs

Package: libstdc++6
Version: 16.2.0-3
Section: contrib/libs
Depends: gcc-16-base (= 16.2.0-3)

Package: gcc-16-base
Version: 16.2.0-3
Section: libs

Package: libc6
Version: 2.43-7
Section: libs
Pre-Depends: libgcc-s1

Package: libgcc-s1
Version: 16.2.0-3
Section: libs
Depends: libc6

Package: libpq5
Version: 18.6-3
Section: libs

Package: libreadline8t64
Version: 8.3-4
Section: libs

Package: llvm-21-dev
Version: 21
Section: libs

Package: perl
Version: 5.40
Section: perl
"""


def shown(names: list[str], without: str = "") -> list[Package]:
    return [package for package in parse_packages(INDEX) if package.name in names and package.name != without]


def test_a_server_is_planned_with_its_libraries_and_nothing_else() -> None:
    planned = plan_packages(18, shown)
    assert set(planned) == {
        "postgresql-18",
        "postgresql-client-18",
        "postgresql-server-dev-18",
        "postgresql-18-pgvector",
        "libicu78",
        "libstdc++6",
        "gcc-16-base",
        "libc6",
        "libgcc-s1",
        "libpq5",
        "libreadline8t64",
    }
    assert planned["libicu78"].version == "78.3-3", "the newest, which comes first"
    assert planned["postgresql-18"].depends[0] == ("locales", "locales-all")


def test_a_release_may_lack_pgvector_but_not_the_server() -> None:
    assert "postgresql-18-pgvector" not in plan_packages(
        18, lambda names: shown(names, "postgresql-18-pgvector")
    )
    with pytest.raises(BuildUnusableError, match="forky has no package postgresql-server-dev-18"):
        plan_packages(18, lambda names: shown(names, "postgresql-server-dev-18"))


def test_versions_of_libc_are_compared_as_numbers() -> None:
    assert libc_version("2.43-7") == (2, 43) > libc_version("2.9-1")
    assert libc_version("1:2.36-9+deb12u10") == (2, 36)
    assert host_libc() >= (2, 17)
    with pytest.raises(BuildUnusableError, match="not a version"):
        libc_version("none")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that has only what a test puts there."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_apt_that_fails_or_has_no_debian_says_so(programs: Path, tmp_path: Path) -> None:
    with pytest.raises(PackagesUnavailableError, match="cannot be run"):
        install_packages(18, "postgres", tmp_path / "one", lambda *_: None)
    script(programs / "apt-get", "echo 'Ubuntu|Ubuntu|noble|http://mirror.example/ubuntu'")
    with pytest.raises(PackagesUnavailableError, match="no mirror of Debian"):
        install_packages(18, "postgres", tmp_path / "two", lambda *_: None)
    script(
        programs / "apt-get",
        'test "$1" = indextargets && echo "Debian|Debian|trixie|http://mirror.example/debian" && exit\n'
        "echo 'E: Temporary failure resolving' >&2; exit 100",
    )
    with pytest.raises(PackagesUnavailableError, match="Temporary failure resolving"):
        install_packages(18, "postgres", tmp_path / "three", lambda *_: None)
    sources = (tmp_path / "three" / "sources.list").read_text().splitlines()
    assert [line.split()[-3:] for line in sources] == [["http://mirror.example/debian", "forky", "main"]]


def test_the_wheel_is_taken_when_packages_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object) -> Path:
        raise PackagesUnavailableError("no network today")

    class Taken(Exception):
        pass

    def taken(*_: object) -> Path:
        raise Taken

    monkeypatch.setattr(installation, "has_packages", lambda version: version == 18)
    monkeypatch.setattr(installation, "install_packages", unavailable)
    monkeypatch.setattr(installation, "_download", taken)
    notes: list[str] = []
    with pytest.raises(Taken):
        install_build(18, note=notes.append)
    assert "without ICU" in notes[0]
    assert "no network today" in notes[0]
    with pytest.raises(PackagesUnavailableError, match="no network today"):
        install_build(18, source=BuildSource.DEBIAN)
    with pytest.raises(Taken):
        install_build(16, note=notes.append)
    with pytest.raises(PostgresMissingError, match="no release of Debian has PostgreSQL 16"):
        install_build(16, source=BuildSource.DEBIAN)
    assert len(notes) == 1
