"""[backpressure_tps_ratio] Small transactions beside bulk loaders that the pageserver cannot follow at once.

TPC-B with four clients beside three sessions that load tables without pause, on Excimer and on plain
PostgreSQL with its own fsync, nothing replicated. Excimer holds its loaders back to what the pageserver
ingests, on the same cores; plain PostgreSQL lets them have what they get. How far the pageserver was behind
is noted.
"""

import contextlib
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx

from bench.excimer_stack import MeasuredStack, measured_stack
from bench.model import Bench, Samples
from bench.peer import plain_postgres
from bench.pgbench import Report, Target, interleave, load, run_pgbench

CLIENTS = 4
LOADERS = 3
HEAD_START_S = 3.0
"""The loaders run alone for so long."""
LOOK_S = 0.1
MAKE_TABLES = "create table loaded_{number} (number int, filler text)"
LOAD = "insert into loaded_:client_id select g, repeat(md5(g::text), 8) from generate_series(1, 50000) g;\n"
_LAG = re.compile(r"^excimer_compute_ingest_lag_bytes (\S+)$", re.MULTILINE)


def measure(bench: Bench) -> Samples:
    seconds = 2 * bench.effort.run_s

    def run_beside_loaders(target: Target) -> Report:
        names = ", ".join(f"loaded_{number}" for number in range(LOADERS))
        target.sql(f"truncate {names}", "checkpoint")
        with _loading(target, script, seconds + HEAD_START_S):
            return run_pgbench(target, clients=CLIENTS, seconds=seconds)

    with measured_stack() as ours, plain_postgres(ours.target.build) as plain, _script() as script:
        targets = (ours.target, plain)
        for target in targets:
            load(target, bench.effort.pgbench_scale)
            target.sql(*(MAKE_TABLES.format(number=number) for number in range(LOADERS)))
        with _watched_lag(ours) as lags:
            rounds = interleave(targets, bench.effort.rounds, run_beside_loaders)
    for name in (target.name for target in targets):
        rates = ", ".join(f"{each[name].transactions_per_s:,.0f}" for each in rounds)
        bench.note(f"TPC-B beside loaders, transactions per second, {name}: {rates}")
    bench.note(f"the pageserver was behind by {max(lags) / 1e6:.0f} MB at most")
    ratios = [each["excimer"].transactions_per_s / each["plain"].transactions_per_s for each in rounds]
    return {"backpressure_tps_ratio": ratios}


@contextlib.contextmanager
def _loading(target: Target, script: str, seconds: float) -> Iterator[None]:
    """Loaders that have begun `HEAD_START_S` ago, and end with the block."""
    loaders = threading.Thread(
        target=run_pgbench,
        args=(target, "-f", script),
        kwargs={"clients": LOADERS, "seconds": round(seconds)},
    )
    loaders.start()
    try:
        loaders.join(HEAD_START_S)
        yield
    finally:
        loaders.join()


@contextlib.contextmanager
def _watched_lag(ours: MeasuredStack) -> Iterator[list[float]]:
    """In bytes, as the endpoint's manager says it, all along."""
    lags: list[float] = []
    over = threading.Event()
    url = f"http://127.0.0.1:{ours.stack.endpoint('main')['http_port']}/metrics"

    def watch() -> None:
        while not over.wait(LOOK_S):
            found = _LAG.search(httpx.get(url).text)
            if found is not None:
                lags.append(float(found[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lags
    finally:
        over.set()
        watcher.join()


@contextlib.contextmanager
def _script() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="excimer-bench-") as directory:
        path = Path(directory) / "load.sql"
        path.write_text(LOAD)
        yield str(path)
