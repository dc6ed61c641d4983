"""One of PostgreSQL's suites against a server that runs, by PostgreSQL's own pg_regress."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from excimer.io.processes import ProgramFailedError, make_owned_dir, run
from excimer.postgres import PostgresBuild
from excimer.postgres.redo_extension import find_compiler

SUITE_TIMEOUT_S: Final = 3600

_TABLESPACE: Final = "CREATE TABLESPACE is refused with 0A000, and regress_tblspace is missing"
KNOWN: Final[Mapping[str, str]] = {
    **{f"core/{test}": _TABLESPACE for test in ("test_setup", "database", "stats", "tablespace")},
    "amcheck/check_heap": _TABLESPACE,
    "citext/create_index_acl": _TABLESPACE,
    "pg_logicalinspect-isolation/logical_inspect": "needs wal_level=logical",
}
"""Tests that differ from stock, and why (docs/architecture/regress.md)."""

NOT_RUN: Final[Mapping[str, str]] = {
    "basic_archive": "needs archive_mode and a server of its own",
    "dblink": "connects back by the default socket, without a password",
    "postgres_fdw": "connects back by the default socket, without a password",
    "pg_stat_statements": "needs a server on which nothing else was run",
    "pg_walinspect": "needs WAL of a server of its own",
    "sepgsql": "needs SELinux",
    "test_decoding": "needs wal_level=logical",
}
"""Suites of contrib that stock PostgreSQL does not run against a server either that serves others too."""

NOTHING_RUN: Final = "(no test was run)"

_RESULT: Final = re.compile(
    r"^(?P<not>not )?ok \d+\s+[-+]\s+(?P<tap>\S+)|"
    r"^(?:test |\s+)(?P<old>\S+)\s+\.\.\. (?P<word>ok|FAILED)",
    re.MULTILINE,
)
_NAMES: Final = re.compile(r"^(REGRESS|ISOLATION)\s*\+?=\s*((?:[^\\\n]|\\\n)*)", re.MULTILINE)


class Place(NamedTuple):
    """A server, and where its suites are."""

    build: PostgresBuild
    source: Path
    environment: Mapping[str, str]
    """libpq's variables."""
    work_dir: Path


class SuiteResult(NamedTuple):
    name: str
    passed: int
    failed: list[str]
    output: str


def core(place: Place) -> SuiteResult:
    """src/test/regress."""
    directory = _schedule(place, "core").parent
    libraries = make_owned_dir(place.work_dir / "lib", 0o755)
    _compile(place.build, directory / "regress.c", libraries)
    for name in ("autoinc", "refint"):  # of 17 and before
        _compile(place.build, place.source / f"contrib/spi/{name}.c", libraries)
    options = [f"--schedule={_schedule(place, 'core')}", "--max-concurrent-tests=20"]
    return _run(place, "core", directory, [f"--dlpath={libraries}", *options])


def isolation(place: Place) -> SuiteResult:
    """src/test/isolation."""
    schedule = _schedule(place, "isolation")
    return _run(place, "isolation", schedule.parent, [f"--schedule={schedule}"], isolation=True)


def scheduled(place: Place, suite: str) -> int:
    """How many tests there are of core or isolation."""
    lines = _schedule(place, suite).read_text().splitlines()
    return sum(len(line.split()[1:]) for line in lines if line.startswith("test:"))


def _schedule(place: Place, suite: str) -> Path:
    names = {"core": "regress/parallel_schedule", "isolation": "isolation/isolation_schedule"}
    return place.source / "src/test" / names[suite]


def contrib(place: Place) -> list[SuiteResult]:
    """Every suite of contrib whose extension the build has, one database each."""
    results = []
    for makefile in sorted(place.source.glob("contrib/*/Makefile")):
        directory = makefile.parent
        has_files = any(place.build.lib_dir.glob(f"{directory.name}*.so"))
        if directory.name in NOT_RUN or not has_files:
            continue
        for kind, names in regress_names(makefile):
            options = [f"--dbname=contrib_regression_{directory.name}", *_loads(makefile, kind), *names]
            is_isolation = kind == "ISOLATION"
            name = f"{directory.name}{'-isolation' if is_isolation else ''}"
            results.append(_run(place, name, directory, options, isolation=is_isolation))
    return results


def regress_names(makefile: Path) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for kind, names in _NAMES.findall(makefile.read_text()):
        listed = [name for name in names.replace("\\\n", " ").split() if "$" not in name and "#" not in name]
        found.setdefault(kind, []).extend(listed)
    return [(kind, names) for kind, names in found.items() if names]


def _loads(makefile: Path, kind: str) -> list[str]:
    """Extensions that are there before the tests begin."""
    found = re.search(rf"^{kind}_OPTS\s*\+?=(.*)$", makefile.read_text(), re.MULTILINE)
    return [] if found is None else [word for word in found[1].split() if word.startswith("--load-extension")]


def _run(
    place: Place, name: str, directory: Path, arguments: list[str], *, isolation: bool = False
) -> SuiteResult:
    assert place.build.pgxs_dir is not None, "the build has the test programs beside its headers"
    programs = place.build.pgxs_dir / "src/test"
    program = programs / ("isolation/pg_isolation_regress" if isolation else "regress/pg_regress")
    output_dir = make_owned_dir(place.work_dir / name)
    command: list[str | Path] = [program, f"--inputdir={directory}", f"--outputdir={output_dir}"]
    command += [f"--bindir={place.build.bin_dir}", f"--host={place.environment['PGHOST']}"]
    command += [f"--port={place.environment['PGPORT']}", f"--user={place.environment['PGUSER']}", *arguments]
    environment = place.build.whole_environment(place.environment)
    try:
        output = run(command, environment=environment, directory=directory, timeout_s=SUITE_TIMEOUT_S)
    except ProgramFailedError as error:
        output = error.output
    passed, failed = read_results(output)
    if passed + len(failed) == 0:
        failed = [NOTHING_RUN]
    return SuiteResult(name, passed, failed, output)


def read_results(output: str) -> tuple[int, list[str]]:
    """How many tests passed, and the names of those that did not: from TAP (16 on), or what came before."""
    passed, failed = 0, []
    for match in _RESULT.finditer(output):
        if match["not"] or match["word"] == "FAILED":
            failed.append(match["tap"] or match["old"])
        else:
            passed += 1
    return passed, failed


def _compile(build: PostgresBuild, source: Path, place: Path) -> None:
    if source.exists():
        command = [
            find_compiler(),
            "-O2",
            "-fPIC",
            "-shared",
            "-w",
            "-DREFINT_VERBOSE",
            "-I",
            str(build.include_server_dir),
        ]
        target = place / f"{source.stem}.so"
        subprocess.run([*command, "-o", str(target), str(source)], check=True)
