"""[wake_…, awake_endpoint_extra_rss_mib] A suspended endpoint is woken by a call.

From the call of the controller (`POST /v1/endpoints/NAME/start`, over an open connection) until a new
connection has its first row of a table. *Warm*: on the directory that its suspend kept; the peer,
measured in turns with it, is `pg_ctl start` of the same PostgreSQL build on a plain directory with the same
table, and the same query. *Cold*: in a new directory; `wake_20k_tables_ms` with 20,000 tables.

awake_endpoint_extra_rss_mib: proportional set sizes of all processes that are not PostgreSQL's, with the
endpoint awake and idle, less the same with it suspended.

wake_storm_100_s: a hundred endpoints on branches of their own, all suspended and cold, woken at once; until
the last one has answered a query. A note says how fair that was (the order of the answers beside that of the
calls; this process has a hundred threads, and its calls do not come in the order of their numbers), and what
the most memory was.
"""

import contextlib
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx
import psycopg

from bench.excimer_stack import ENDPOINT, MeasuredStack, measured_stack
from bench.model import Bench, Samples
from bench.pgbench import BenchFailedError, Target, load
from bench.stack_memory import sizes_mib
from excimer.compute.postgres_settings import DEFAULTS
from excimer.io.processes import drop_arguments, give_to_user, make_owned_dir
from excimer.postgres import PostgresBuild, run_initdb
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.ports import free_port
from tests.kit.stack import running_stack

WAKE_IDS: Final = (
    "wake_warm_p50_ms",
    "wake_warm_ratio",
    "wake_cold_p50_ms",
    "wake_cold_p99_ms",
    "awake_endpoint_extra_rss_mib",
)
TABLES: Final = 20_000
STORM: Final = 100
STORM_LIMIT_S: Final = 600.0
FIRST_ROW: Final = "select abalance from pgbench_accounts where aid = 4711"


class Waker:
    """Calls the controller over a connection that is open already."""

    def __init__(self, ours: MeasuredStack, name: str = ENDPOINT) -> None:
        settings = tomllib.loads((ours.stack.directory / "run" / "controller.toml").read_text())
        token = (ours.stack.directory / "keys" / "admin.token").read_text().strip()
        self._path = f"/v1/endpoints/{name}"
        self._client = httpx.Client(
            base_url=f"http://{settings['http_listen']}",
            headers={"Authorization": f"Bearer {token}"},
            timeout=STORM_LIMIT_S,
        )
        self._ours = ours
        self._name = name
        self.url = str(ours.stack.endpoint(name)["url"])

    def suspend(self, *, is_cold: bool) -> None:
        self._client.post(f"{self._path}/stop", json={"suspend": True}).raise_for_status()
        if is_cold:
            self._ours.stack.evict(self._name)

    def call(self) -> None:
        """Returns when it accepts connections."""
        answer = self._client.post(f"{self._path}/start", json={})
        if answer.is_error:
            raise BenchFailedError(f"endpoint {self._name} does not wake: {answer.text}")

    def wake_ms(self, query: str) -> float:
        begun = time.monotonic()
        self.call()
        with psycopg.connect(self.url) as connection:
            connection.execute(query.encode()).fetchall()
        return (time.monotonic() - begun) * 1000


def measure(bench: Bench) -> Samples:
    wakes = 20 * bench.effort.rounds
    with (
        measured_stack() as ours,
        stopped_plain(build_of(NEWEST_VERSION), bench.effort.pgbench_scale) as plain,
    ):
        load(ours.target, bench.effort.pgbench_scale)
        ours.settle()
        waker = Waker(ours)
        memory = _measure_memory(bench, ours, waker)
        warm, peer = [], []
        for number in range(wakes):
            turns = [
                lambda: warm.append(_wake_ms(waker, is_cold=False)),
                lambda: peer.append(plain.start_ms()),
            ]
            for turn in turns if number % 2 else reversed(turns):
                turn()
        cold = [_wake_ms(waker, is_cold=True) for _ in range(wakes)]
    bench.note(f"{wakes} warm wakes, ms: {_spread(warm)}; pg_ctl start and the query: {_spread(peer)}")
    bench.note(f"{wakes} cold wakes, ms: {_spread(cold)}")
    return {
        "wake_warm_p50_ms": warm,
        "wake_warm_ratio": [statistics.median(warm) / statistics.median(peer)],
        "wake_cold_p50_ms": cold,
        "wake_cold_p99_ms": [_percentile(cold, 0.99)],
        "awake_endpoint_extra_rss_mib": memory,
    }


def _wake_ms(waker: Waker, *, is_cold: bool) -> float:
    waker.suspend(is_cold=is_cold)
    return waker.wake_ms(FIRST_ROW)


def _measure_memory(bench: Bench, ours: MeasuredStack, waker: Waker) -> list[float]:
    samples = []
    for _ in range(bench.effort.rounds):
        waker.suspend(is_cold=False)
        time.sleep(bench.effort.idle_s)
        asleep = sum(size for _, size in sizes_mib(ours.stack))
        waker.wake_ms(FIRST_ROW)
        time.sleep(bench.effort.idle_s)
        samples.append(sum(size for _, size in sizes_mib(ours.stack)) - asleep)
    return samples


def _places_apart(first: dict[int, float], second: dict[int, float]) -> int:
    """How far somebody's place in the one order is from that in the other, at most."""
    places = {number: place for place, number in enumerate(sorted(first, key=lambda each: first[each]))}
    order = sorted(second, key=lambda each: second[each])
    return max(abs(place - places[number]) for place, number in enumerate(order))


def _percentile(samples: list[float], part: float) -> float:
    return sorted(samples)[min(len(samples) - 1, int(part * len(samples)))]


def _spread(samples: list[float]) -> str:
    points = ((0.0, "least"), (0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (1.0, "most"))
    return ", ".join(f"{name} {_percentile(samples, part):.0f}" for part, name in points)


class StoppedPlain:
    """A plain cluster that is started and stopped by pg_ctl."""

    def __init__(self, build: PostgresBuild, root: Path) -> None:
        self._build = build
        self._data_dir = root / "data"
        self._root = root
        self.port = free_port()

    def make(self, scale: int) -> None:
        make_owned_dir(self._root)
        run_initdb(self._build, self._data_dir)
        settings = DEFAULTS | {"port": str(self.port), "listen_addresses": "127.0.0.1"}
        lines = "".join(f"{name} = '{value}'\n" for name, value in settings.items())
        with (self._data_dir / "postgresql.conf").open("a") as file:
            file.write(f"{lines}unix_socket_directories = '{self._root}'\n")
        give_to_user(self._data_dir / "postgresql.conf")
        self._control("start")
        load(Target("plain", self._build, self.port), scale)

    def start_ms(self) -> float:
        """Of a stopped server: `pg_ctl start`, which waits until it is ready, and the query."""
        self.stop()
        begun = time.monotonic()
        self._control("start")
        with psycopg.connect(f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres") as connection:
            connection.execute(FIRST_ROW.encode()).fetchall()
        return (time.monotonic() - begun) * 1000

    def stop(self) -> None:
        self._control("stop", "-m", "fast")

    def _control(self, *arguments: str) -> None:
        subprocess.run(
            [
                *(str(self._build.program("pg_ctl")), "-D", str(self._data_dir)),
                *("-w", "-l", str(self._root / "log"), *arguments),
            ],
            env=self._build.whole_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
            **drop_arguments(),
        )


@contextlib.contextmanager
def stopped_plain(build: PostgresBuild, scale: int) -> Iterator[StoppedPlain]:
    root = Path(tempfile.mkdtemp(prefix="excimer-bench-"))
    root.chmod(0o755)
    plain = StoppedPlain(build, root / "plain")
    try:
        plain.make(scale)
        yield plain
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            plain.stop()
        shutil.rmtree(root, ignore_errors=True)


def measure_tables(bench: Bench) -> Samples:
    with measured_stack() as ours:
        making = (
            "do $$ begin for n in {} .. {} loop "
            "execute format('create table t%s (a int)', n); end loop; end $$"
        )
        for first in range(0, TABLES, 1000):
            ours.target.sql(making.format(first, first + 999))
        ours.settle()
        waker = Waker(ours)
        samples = []
        for _ in range(5 * bench.effort.rounds):
            waker.suspend(is_cold=True)
            samples.append(waker.wake_ms("select count(*) from t4711"))
    bench.note(f"cold wakes with {TABLES} tables, ms: {_spread(samples)}")
    return {"wake_20k_tables_ms": samples}


def measure_storm(bench: Bench) -> Samples:
    names = [f"storm{number}" for number in range(STORM)]
    with running_stack(NEWEST_VERSION, safekeepers=1) as stack:
        stack.create_main()
        ours = MeasuredStack(stack, "excimer")
        stack.text("endpoint", "stop", ENDPOINT)
        for name in names:
            stack.text("timeline", "branch", "--branch-name", name, "--ancestor", "main")
            stack.text("endpoint", "create", name, "--branch-name", name, "--suspend-after", "never")
        wakers = [Waker(ours, name) for name in names]
        calls_s: dict[int, float] = {}
        answers_s: dict[int, float] = {}
        ends_s: dict[int, float] = {}
        begun = time.monotonic()

        def wake(number: int) -> None:
            calls_s[number] = time.monotonic() - begun
            wakers[number].call()
            answers_s[number] = time.monotonic() - begun
            with psycopg.connect(wakers[number].url) as connection:
                connection.execute("select 1").fetchall()
            ends_s[number] = time.monotonic() - begun

        threads = [threading.Thread(target=wake, args=(place,)) for place in range(STORM)]
        most_mib = 0.0
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most_mib = max(most_mib, sum(size for _, size in sizes_mib(stack, with_postgres=True)))
            time.sleep(1)
        if len(ends_s) < STORM:
            raise BenchFailedError(f"{STORM - len(ends_s)} endpoints were not woken")
        bench.note(
            f"awake after, s: {_spread(list(ends_s.values()))}; last call after {max(calls_s.values()):.1f};"
            f" answered at most {_places_apart(calls_s, answers_s)} places out of the order of the calls;"
            f" all processes together at most {most_mib:.0f} MiB"
        )
        return {"wake_storm_100_s": [max(ends_s.values())]}
