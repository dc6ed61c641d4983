"""[stack_idle_rss_mib] Memory of a whole installation that nobody uses.

An installation as `excimer up` makes it: supervisor, broker with its NATS server, three safekeepers,
pageserver, controller, and the manager of one endpoint. The proportional set sizes of all of them are added
up, a page that n processes share counting 1/n for each; PostgreSQL, redo workers included, is left out.
Measured each round after `idle_s` without work: first as the installation was made, then after restarts.
"""

import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from bench.excimer_stack import ENDPOINT
from bench.model import Bench, Samples
from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack

IDS = ("stack_idle_rss_mib",)
KIB_PER_MIB = 1024


def measure(bench: Bench) -> Samples:
    samples = []
    with running_stack(NEWEST_VERSION) as stack:
        stack.create_main()
        for _ in range(bench.effort.rounds):
            time.sleep(bench.effort.idle_s)
            sizes = sizes_mib(stack)
            bench.note(", ".join(f"{name} {size:.0f}" for name, size in sizes))
            samples.append(sum(size for _, size in sizes))
            stack.text("stop")
            stack.text("start")
            stack.text("endpoint", "start", ENDPOINT)
    return {"stack_idle_rss_mib": samples}


def sizes_mib(stack: Stack, *, with_postgres: bool = False) -> list[tuple[str, float]]:
    """Names and proportional set sizes, the supervisor first; without processes that have just ended."""
    sizes = _family(stack.pid("supervisor"))
    return [(name, size) for name, size in sizes if with_postgres or name != "postgres"]


def _family(pid: int) -> Iterator[tuple[str, float]]:
    place = Path(f"/proc/{pid}")
    try:
        lines = (place / "smaps_rollup").read_text().splitlines()
        name = (place / "comm").read_text().strip()
        children = [(task / "children").read_text().split() for task in (place / "task").iterdir()]
    except OSError:
        return
    rollup = dict(line.split(":", 1) for line in lines if line.endswith("kB"))
    yield name, int(rollup["Pss"].split()[0]) / KIB_PER_MIB
    for child in chain.from_iterable(children):
        yield from _family(int(child))
