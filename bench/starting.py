"""[endpoint_start_ms, manifest_to_row_ms] From nothing to a row.

endpoint_start_ms: the wall-clock time from calling `excimer endpoint start` (a new process) until, after
it has returned, a new connection has its first row of a table. The endpoint was stopped just before; its data
directory is new each time.

manifest_to_row_ms: in rounds of its own, from the moment at which the compute's manager has the basebackup
(from its log: the moment it was ready less the steps after the basebackup) until a client that tries again
and again to connect has that row.
"""

import subprocess
import sys
import time
from datetime import datetime

import psycopg

from bench.excimer_stack import ENDPOINT, MeasuredStack, measured_stack
from bench.model import Bench, Samples
from bench.pgbench import BenchFailedError, load

FIRST_ROW = "select abalance from pgbench_accounts where aid = 4711"
RETRY_S = 0.005
START_LIMIT_S = 60.0


def measure(bench: Bench) -> Samples:
    with measured_stack() as ours:
        load(ours.target, bench.effort.pgbench_scale)
        ours.settle()
        url = str(ours.stack.endpoint(ENDPOINT)["url"])
        starts = [_measure_start_ms(ours, url) for _ in range(bench.effort.rounds)]
        rows = []
        for _ in range(bench.effort.rounds):
            rows.append(_measure_row_ms(ours, url))
            steps = {name: value for name, value in _ready_entry(ours).items() if name.endswith("_ms")}
            bench.note(f"steps of a start: {', '.join(f'{name} {value}' for name, value in steps.items())}")
            bench.note(f"its manager's steps together, ms: {_steps_ms(ours):.0f}; warm: {_warm_ms(ours):.0f}")
    bench.note(f"starts, ms: {', '.join(f'{each:.0f}' for each in starts)}")
    bench.note(f"from basebackup to row, ms: {', '.join(f'{each:.0f}' for each in rows)}")
    return {"endpoint_start_ms": starts, "manifest_to_row_ms": rows}


def _measure_start_ms(ours: MeasuredStack, url: str) -> float:
    ours.stop()
    begun = time.monotonic()
    ours.start()
    with psycopg.connect(url) as connection:
        connection.execute(FIRST_ROW).fetchall()
        return (time.monotonic() - begun) * 1000


def _measure_row_ms(ours: MeasuredStack, url: str) -> float:
    ours.stop()
    arguments = [sys.executable, "-m", "excimer.cli", "--dir", str(ours.stack.directory)]
    with subprocess.Popen([*arguments, "endpoint", "start", ENDPOINT], stdout=subprocess.DEVNULL) as command:
        first_row_s = _wait_first_row(url)
    if command.returncode:
        raise BenchFailedError(f"excimer endpoint start ended with {command.returncode}")
    ready = _ready_entry(ours)
    ready_s = datetime.fromisoformat(ready["time"]).timestamp()
    received_s = ready_s - (float(ready["directory_ms"]) + float(ready["postgres_ms"])) / 1000
    return (first_row_s - received_s) * 1000


def _steps_ms(ours: MeasuredStack) -> float:
    return sum(float(value) for name, value in _ready_entry(ours).items() if name.endswith("_ms"))


def _warm_ms(ours: MeasuredStack) -> float:
    """The same of a start on the directory that a clean stop has kept."""
    ours.stop_keeping()
    ours.start()
    if _ready_entry(ours)["start"] != "warm":
        raise BenchFailedError("a start after a clean stop was not warm")
    return _steps_ms(ours)


def _ready_entry(ours: MeasuredStack) -> dict[str, str]:
    """The log entry of the manager's last start, with the milliseconds of its steps."""
    return {name: str(value) for name, value in ours.last_log_entry("ready").items()}


def _wait_first_row(url: str) -> float:
    """Wall-clock time of the first row."""
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            with psycopg.connect(url) as connection:
                connection.execute(FIRST_ROW).fetchall()
                return time.time()
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                raise BenchFailedError(f"no row: {error}") from error
            time.sleep(RETRY_S)
