"""Servers that suites run against: an endpoint of an installation of its own, or stock PostgreSQL."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from excimer.cli.commands.endpoint import create_endpoint
from excimer.cli.installation import load_installation
from excimer.postgres import PostgresBuild, run_initdb
from tests.kit.directories import reachable_directory
from tests.kit.stack import Stack, running_stack
from tests.kit.stock_server import stock_server
from tests.regress.suites import Place

SETTINGS = {
    "max_prepared_transactions": "10",
    "max_connections": "200",
    "compute_query_id": "regress",  # pg_stat_statements is preloaded, and EXPLAIN would show numbers
}

Verify = Callable[[], int]
"""Prints what differs, one line each; how many of those are not known."""


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
