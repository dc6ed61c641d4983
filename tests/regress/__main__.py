"""`python -m tests.regress --pg-version 18 [--suites core,isolation,contrib] [--source DIR] [--control]`.

Prints each test that differs; exit code 1 if one does that is not known, or if verify finds a difference.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from excimer.base.errors import ExcimerError
from excimer.cli.commands.endpoint import create_endpoint
from excimer.cli.installation import load_installation
from excimer.io.processes import make_owned_dir
from excimer.postgres import PostgresBuild, run_initdb
from tests.kit.builds import build_of
from tests.kit.directories import reachable_directory
from tests.kit.stack import Stack, running_stack
from tests.kit.stock_server import stock_server
from tests.regress.sources import source_tree
from tests.regress.suites import KNOWN, Place, SuiteResult, contrib, core, isolation

SUITES = ("core", "isolation", "contrib")
SETTINGS = {
    "max_prepared_transactions": "10",
    "max_connections": "200",
    "compute_query_id": "regress",  # pg_stat_statements is preloaded, and EXPLAIN would show numbers
}

Verify = Callable[[], int]
"""Prints what differs, one line each; how many of those are not known."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.regress", description=__doc__)
    parser.add_argument("--pg-version", type=int, default=18)
    parser.add_argument("--suites", default=",".join(SUITES))
    parser.add_argument("--source", type=Path, help="an unpacked source tree, instead of Debian's")
    parser.add_argument("--control", action="store_true", help="the same on stock PostgreSQL")
    parser.add_argument("--keep", type=Path, help="where outputs and regression.diffs go")
    arguments = parser.parse_args()
    build = build_of(arguments.pg_version)
    try:
        source = arguments.source or source_tree(build)
    except ExcimerError as error:
        print(f"{error}\nwith --source DIR the suites are taken from a source tree that you have unpacked")
        return 1
    kept = arguments.keep or Path(tempfile.mkdtemp(prefix="excimer-regress-"))
    kept.mkdir(mode=0o755, exist_ok=True)
    kept.chmod(0o755)
    print(f"PostgreSQL {build.full_version}; outputs and regression.diffs in {kept}", flush=True)
    making = stock_place if arguments.control else endpoint_place
    problems = 0
    with making(build, source, make_owned_dir(kept / f"pg{build.version}", 0o755)) as (place, verify):
        for suite in arguments.suites.split(","):
            begun = time.monotonic()
            results = run_suite(suite, place)
            problems += sum(report(suite, result) for result in results)
            print(f"{suite}: {time.monotonic() - begun:.0f} s", flush=True)
            problems += verify()
    return 1 if problems else 0


def run_suite(suite: str, place: Place) -> list[SuiteResult]:
    match suite:
        case "core":
            return [core(place)]
        case "isolation":
            return [isolation(place)]
        case "contrib":
            return contrib(place)
    raise SystemExit(f"there is no suite {suite!r}: {', '.join(SUITES)}")


def report(suite: str, result: SuiteResult) -> int:
    """One line, and one for each test that differs; how many of those are not known."""
    print(f"{suite}: {result.name}: {result.passed} passed, {len(result.failed)} differ", flush=True)
    unknown = 0
    for test in result.failed:
        reason = KNOWN.get(f"{result.name}/{test}")
        unknown += reason is None
        print(f"    {test}: {reason or 'NOT KNOWN'}", flush=True)
    return unknown


@contextlib.contextmanager
def endpoint_place(build: PostgresBuild, source: Path, work_dir: Path) -> Iterator[tuple[Place, Verify]]:
    with running_stack(build.version) as stack:
        stack.text("tenant", "create", "--set-default")
        body = {
            "name": "main",
            "tenant": "",
            "branch": "main",
            "mode": "primary",
            "lsn": None,
            "pg_version": None,
            "postgres_settings": SETTINGS,
        }
        create_endpoint(load_installation(stack.directory), body, None)
        stack.text("endpoint", "start", "main")
        place = Place(build, source, stack.connection_environment(), work_dir)
        yield place, lambda: verify_differences(stack)


def verify_differences(stack: Stack) -> int:
    result = stack.run("--json", "verify", "--rate", "0")
    if not result.stdout:
        print(f"verify: {result.stderr.strip()}", flush=True)
        return 1
    answer = json.loads(result.stdout)
    print(f"verify: {answer['relations']} relations, {answer['pages']} pages, {answer['looks']} looks")
    for found in answer["differences"]:
        print(f"    {json.dumps(found)}", flush=True)
    return len(answer["differences"])


@contextlib.contextmanager
def stock_place(build: PostgresBuild, source: Path, work_dir: Path) -> Iterator[tuple[Place, Verify]]:
    with reachable_directory() as root:
        run_initdb(build, root / "data")
        with stock_server(build, root / "data", SETTINGS | {"fsync": "off"}) as server:
            environment = {
                "PGHOST": str(server.socket_dir),
                "PGPORT": str(server.port),
                "PGUSER": "postgres",
                "PGDATABASE": "postgres",
            }
            yield Place(build, source, environment, work_dir), lambda: 0


if __name__ == "__main__":
    sys.exit(main())
