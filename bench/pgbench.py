"""Runs pgbench against a server on this machine, over TCP whichever server it is, and reads its report."""

import re
import subprocess
from collections.abc import Callable, Sequence
from typing import NamedTuple

from excimer.io.processes import program_environment
from excimer.postgres import PostgresBuild

RUN_LIMIT_S = 900


class BenchFailedError(Exception):
    """A program of the benchmark failed; the message has its output."""


class Target(NamedTuple):
    """A running server: ours or the peer."""

    name: str
    build: PostgresBuild
    port: int
    password: str = ""

    def run(self, program: str, *arguments: str) -> str:
        """One of PostgreSQL's programs, connected here, to its end; its output."""
        connection = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": "postgres",
            "PGDATABASE": "postgres",
            "PGPASSWORD": self.password,
            "PGSSLMODE": "disable",  # an endpoint may offer TLS; what it costs clients is not measured
        }
        result = subprocess.run(
            [str(self.build.program(program)), *arguments],
            env=program_environment(self.build.environment() | connection),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_LIMIT_S,
            check=False,
        )
        if result.returncode:
            raise BenchFailedError(f"{program} on {self.name}: {result.stdout[-2000:]}")
        return result.stdout

    def sql(self, *statements: str) -> str:
        """Each in a transaction of its own; their rows, unaligned."""
        commands = [part for statement in statements for part in ("-c", statement)]
        return self.run("psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", *commands)


class Report(NamedTuple):
    """What pgbench says at the end of a run."""

    transactions_per_s: float
    latency_ms: float
    """Mean over the run's transactions."""


def load(target: Target, scale: int) -> None:
    """Makes and vacuums pgbench's tables."""
    target.run("pgbench", "-i", "-q", "-s", str(scale))


def run_pgbench(
    target: Target, *arguments: str, clients: int, seconds: int = 0, transactions: int = 0
) -> Report:
    """For so many seconds, or so many transactions of each client."""
    length = ("-t", str(transactions)) if transactions else ("-T", str(seconds))
    output = target.run("pgbench", "-n", "-c", str(clients), "-j", str(min(clients, 2)), *length, *arguments)
    rate = re.search(r"^tps = ([0-9.]+)", output, re.MULTILINE)
    latency = re.search(r"^latency average = ([0-9.]+) ms", output, re.MULTILINE)
    if rate is None or latency is None:
        raise BenchFailedError(f"pgbench's report is not understood: {output[-2000:]}")
    return Report(float(rate[1]), float(latency[1]))


def interleave(
    targets: Sequence[Target], rounds: int, run: Callable[[Target], Report]
) -> list[dict[str, Report]]:
    """Reports by target name, round by round; every second round in the other order."""
    results = []
    for number in range(rounds):
        order = targets if number % 2 == 0 else targets[::-1]
        results.append({target.name: run(target) for target in order})
    return results
