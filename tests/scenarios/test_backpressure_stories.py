"""Backpressure stories: what writers want and how fast others follow, and what must come of it.

A line `at S: bulk=N small=N quorum=N ingest=N` sets rates in MB/s from second S on (what it does not name
stays). `end S` ends the story. Then each line says what holds of all that came after second S, in MB and
MB/s::

    from S: lag <= N     committed and not ingested
    from S: queue <= N   written and not committed
    from S: bulk >= N    what loaders got, on average; small, likewise

The world is simulated in steps of 20 ms: three loaders write half a megabyte for each ticket, small writers
wait for the commit before, the manager knows what the pageserver has ingested 60 ms late.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from excimer.base.lsn import Lsn
from excimer.compute.backpressure_plan import BackpressurePlan, Limits, Positions

STORIES = sorted((Path(__file__).parent / "backpressure").glob("*.txt"))
MB = 1e6
STEP_S = 0.02
CHUNK_BYTES = 512 << 10
LOADERS = 3
KNOWN_LATE_STEPS = 3
_SETTING = re.compile(r"at ([\d.]+): (.*)")
_END = re.compile(r"end ([\d.]+)")
_EXPECTED = re.compile(r"from ([\d.]+): (lag|queue|bulk|small) (<=|>=) ([\d.]+)")


@dataclass
class Sample:
    at_s: float
    lag: float
    queue: float
    bulk: float
    small: float


@dataclass
class World:
    """Positions in bytes; `limits` is what the plan said last."""

    plan: BackpressurePlan
    rates: dict[str, float] = field(default_factory=lambda: {"bulk": 0, "small": 0, "quorum": 0, "ingest": 0})
    written: float = 0.0
    committed: float = 0.0
    ingested: float = 0.0
    bulk: float = 0.0
    small: float = 0.0
    taken: int = 0
    tickets: list[int] = field(default_factory=list)
    known: list[float] = field(default_factory=lambda: [0.0] * KNOWN_LATE_STEPS)
    wanted: float = 0.0

    def step(self, at_s: float) -> None:
        self.known.append(self.ingested)
        at = Positions(
            Lsn(int(self.written)),
            Lsn(int(self.written)),
            Lsn(int(self.committed)),
            Lsn(int(self.known.pop(0))),
            self.taken,
        )
        limits = self.plan.step(at_s, at)
        self._write_small(limits)
        self._write_bulk(limits)
        self.committed = min(self.written, self.committed + self.rates["quorum"] * MB * STEP_S)
        self.ingested = min(self.committed, self.ingested + self.rates["ingest"] * MB * STEP_S)

    def _write(self, size: float, limits: Limits) -> bool:
        if self.written + size > limits.wal_limit_lsn:
            return False
        self.written += size
        return True

    def _write_small(self, limits: Limits) -> None:
        size = self.rates["small"] * MB * STEP_S
        if self.committed <= limits.confirm_lsn and self._write(size, limits):
            self.small += size

    def _write_bulk(self, limits: Limits) -> None:
        self.wanted = min(self.wanted + self.rates["bulk"] * MB * STEP_S, LOADERS * CHUNK_BYTES)
        while len(self.tickets) < LOADERS and self.rates["bulk"]:
            self.taken += CHUNK_BYTES
            self.tickets.append(self.taken)
        while self.tickets and self.tickets[0] <= limits.allowed_bytes and self.wanted >= CHUNK_BYTES:
            if not self._write(CHUNK_BYTES, limits):
                return
            self.wanted -= CHUNK_BYTES
            self.bulk += CHUNK_BYTES
            self.taken += CHUNK_BYTES
            self.tickets = [*self.tickets[1:], self.taken]


def play(text: str) -> tuple[list[Sample], list[str]]:
    settings = [
        (float(at), dict(pair.split("=") for pair in rates.split())) for at, rates in _SETTING.findall(text)
    ]
    end = _END.search(text)
    assert end is not None, "a story needs an end"
    world = World(BackpressurePlan(64 << 20, 0.0, Lsn(0)))
    samples = []
    for number in range(1, int(float(end[1]) / STEP_S)):
        at_s = number * STEP_S
        for since, rates in settings:
            if since <= at_s < since + STEP_S or (number == 1 and since == 0):
                world.rates |= {name: float(rate) for name, rate in rates.items()}
        world.step(at_s)
        samples.append(
            Sample(
                at_s,
                (world.committed - world.ingested) / MB,
                (world.written - world.committed) / MB,
                world.bulk / MB,
                world.small / MB,
            )
        )
    return samples, [match[0] for match in _EXPECTED.finditer(text)]


def measure(samples: list[Sample], since_s: float, what: str) -> float:
    counted = [sample for sample in samples if sample.at_s >= since_s]
    first, last = counted[0], counted[-1]
    if what in ("lag", "queue"):
        return max(float(getattr(sample, what)) for sample in counted)
    return float(getattr(last, what) - getattr(first, what)) / (last.at_s - first.at_s)


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story(path: Path) -> None:
    samples, expected = play(path.read_text())
    assert expected, "a story without an expectation"
    failed = []
    for line in expected:
        match = _EXPECTED.fullmatch(line)
        assert match is not None
        value = measure(samples, float(match[1]), match[2])
        bound = float(match[4])
        if not (value <= bound if match[3] == "<=" else value >= bound):
            failed.append(f"{line}: it is {value:.2f}")
    assert not failed, "\n".join(failed)


def test_every_story_is_understood() -> None:
    for path in STORIES:
        for line in path.read_text().splitlines():
            known = _SETTING.fullmatch(line) or _END.fullmatch(line) or _EXPECTED.fullmatch(line)
            assert known or line.startswith("#") or not line, f"{path.name}: {line}"
