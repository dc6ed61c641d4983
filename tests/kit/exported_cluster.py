"""A cluster that Excimer has written, started by plain PostgreSQL with nothing of Excimer around it."""

import contextlib
from collections.abc import AsyncIterator

from excimer.base.address import Address
from excimer.io.processes import make_owned_dir, run
from excimer.postgres import PostgresBuild
from tests.kit.plain_postgres import PlainPostgres
from tests.kit.rich_cluster import DUMP_OPTIONS, comparable

PROGRAM_TIMEOUT_S = 120.0


@contextlib.asynccontextmanager
async def place_for_cluster(build: PostgresBuild) -> AsyncIterator[PlainPostgres]:
    """`data_dir` of what comes back is free for an export; it is removed at the end."""
    cluster = PlainPostgres(build)
    make_owned_dir(cluster.root)
    try:
        yield cluster
    finally:
        cluster.remove()


def address_of(cluster: PlainPostgres) -> Address:
    return Address(str(cluster.root), cluster.port)


def dump_all(build: PostgresBuild, address: Address) -> str:
    """All roles, databases and their logged content."""
    return comparable(program(build, address, "pg_dumpall", *DUMP_OPTIONS))


def check_all(build: PostgresBuild, address: Address, *options: str) -> None:
    """Every table against its indexes. Raises ProgramFailedError with what is wrong.

    The option --parent-check looks deeper, and waits for prepared transactions.
    """
    program(build, address, "pg_amcheck", "--all", "--install-missing", "--heapallindexed", *options)


def program(build: PostgresBuild, address: Address, name: str, *arguments: str) -> str:
    """The output of one of PostgreSQL's programs. Raises ProgramFailedError."""
    place = ["--host", address.host, "--port", str(address.port), "--username", "postgres"]
    return run(
        [build.program(name), *place, *arguments],
        environment=build.whole_environment({}),
        timeout_s=PROGRAM_TIMEOUT_S,
    )
