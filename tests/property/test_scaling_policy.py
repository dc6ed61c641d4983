"""The size of an endpoint, whatever is sampled: within its limits, never below what is in use, and at rest
where the load is.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Final

from hypothesis import given, settings
from hypothesis import strategies as st

from excimer.compute_node.scaling_policy import (
    CPU_WINDOW_S,
    MEMORY_WINDOW_S,
    Sample,
    Scaling,
    advance,
    begin,
)
from excimer.wire.compute_limits import ComputeLimits

COUNTER: Final = st.integers(0, 1 << 40)


@st.composite
def limits(draw: st.DrawFn) -> ComputeLimits:
    low, memory = draw(st.integers(100, 8000)), draw(st.integers(256, 8192))
    has_cpu, has_memory = draw(st.booleans()), draw(st.booleans())
    return ComputeLimits(
        cpu_min_milli=low * has_cpu,
        cpu_max_milli=(low + draw(st.integers(0, 8000))) * has_cpu,
        memory_min_mib=memory * has_memory,
        memory_max_mib=(memory + draw(st.integers(0, 1 << 16))) * has_memory,
    )


SAMPLES = st.lists(
    st.builds(
        Sample,
        time_s=st.floats(0, 1e6),
        cpu_us=COUNTER,
        throttled_us=COUNTER,
        refaults=COUNTER,
        stalled_us=COUNTER,
        reads=COUNTER,
        memory_mib=st.integers(0, 1 << 17),
        in_use_mib=st.integers(0, 1 << 17),
        processes=st.integers(0, 1000),
    ),
    max_size=12,
)


@given(limits=limits(), samples=SAMPLES)
@settings(max_examples=60)
def test_a_size_is_within_its_limits_and_not_below_what_is_in_use(
    limits: ComputeLimits, samples: list[Sample]
) -> None:
    """Also where clocks go back, counters begin anew, and nothing fits together."""
    state = begin(limits, 0.0)
    for sample in samples:
        state = advance(state, sample, limits)
        size = state.size
        assert limits.cpu_min_milli <= size.cpu_milli <= limits.cpu_max_milli
        assert limits.memory_min_mib <= size.memory_mib <= limits.memory_max_mib
        assert size.memory_mib >= min(sample.in_use_mib, limits.memory_max_mib)


class Load:
    """An endpoint that wants `milli` of CPU, and reads a working set of `files_mib` again and again."""

    def __init__(
        self, limits: ComputeLimits, milli: int = 0, in_use_mib: int = 100, files_mib: int = 0
    ) -> None:
        self.limits = limits
        self.milli = milli
        self.in_use_mib = in_use_mib
        self.files_mib = files_mib
        self.state: Scaling = begin(limits, 0.0)
        self.sample = Sample(0.0, 0, 0, 0, 0, 1, 0, in_use_mib, 5)

    def run(self, seconds: int) -> list[tuple[int, int]]:
        """The size after each second."""
        sizes = []
        for _ in range(seconds):
            cpu_milli, memory_mib = self.state.size.cpu_milli, self.state.size.memory_mib
            used = min(self.milli, cpu_milli) if self.limits.cpu_max_milli else self.milli
            lacks = self.milli > used
            wanted_mib = self.in_use_mib + self.files_mib
            is_thrashing = bool(memory_mib) and wanted_mib > memory_mib
            before = self.sample
            self.sample = Sample(
                before.time_s + 1,
                before.cpu_us + used * 1000,
                before.throttled_us + 300_000 * lacks,
                before.refaults + 20_000 * is_thrashing,
                before.stalled_us,
                before.reads + 20_000,
                min(wanted_mib, memory_mib) if memory_mib else wanted_mib,
                self.in_use_mib,
                5,
            )
            self.state = advance(self.state, self.sample, self.limits)
            sizes.append((self.state.size.cpu_milli, self.state.size.memory_mib))
        return sizes


@given(limits=limits(), milli=st.integers(0, 20_000), later=st.integers(0, 20_000))
@settings(max_examples=10, deadline=None)
def test_a_steady_load_gets_what_it_wants_soon_and_the_size_rests(
    limits: ComputeLimits, milli: int, later: int
) -> None:
    load = Load(limits, milli)
    load.run(600)
    load.milli = later
    sizes = [cpu for cpu, _ in load.run(600)]
    enough = min(later, limits.cpu_max_milli)
    if limits.cpu_max_milli:
        steps = math.ceil(math.log2(limits.cpu_max_milli / limits.cpu_min_milli)) + 2
        assert all(size >= enough for size in sizes[steps:]), "up at once"
        assert len(set(sizes[480:])) == 1, "it swings"
        assert sizes[-1] <= max(limits.cpu_min_milli, 50 + later / 0.7), "and no more than that"


@given(peaks=st.lists(st.tuples(st.integers(1, 59), st.integers(0, 4000)), min_size=1, max_size=9))
@settings(max_examples=10, deadline=None)
def test_it_goes_down_only_after_a_whole_window_and_never_by_more_than_half(
    peaks: list[tuple[int, int]],
) -> None:
    load = Load(ComputeLimits(cpu_min_milli=100, cpu_max_milli=4000))
    sizes, wanted = [4000], [0]
    for seconds, milli in peaks:
        load.milli = milli
        sizes += [cpu for cpu, _ in load.run(seconds)]
        wanted += [milli] * seconds
    changed_at = 0
    for second in range(1, len(sizes)):
        before, now = sizes[second - 1], sizes[second]
        if now < before:
            assert second - changed_at >= CPU_WINDOW_S - 1
            assert now >= before // 2
            assert now >= max(wanted[max(1, second - int(CPU_WINDOW_S) + 1) : second + 1])
        if now != before:
            changed_at = second


@given(in_use=st.integers(0, 3000), files=st.integers(0, 9000))
@settings(max_examples=10, deadline=None)
def test_memory_grows_to_the_working_set_and_attempts_to_shrink_become_rare(in_use: int, files: int) -> None:
    limits = ComputeLimits(memory_min_mib=256, memory_max_mib=8192)
    load = Load(limits, in_use_mib=in_use, files_mib=files)
    grown = [memory for _, memory in load.run(60)]
    enough = min(8192, in_use + files)
    assert grown[-1] >= enough
    assert grown[-1] <= max(256, 1.5 * enough + 64, in_use + 37 + 64), "and not far beyond it"
    sizes = [memory for _, memory in load.run(2 * 3600)]
    lows = [second for second, (before, now) in enumerate(itertools.pairwise(sizes)) if now < before]
    assert len(lows) <= 40, "attempts that failed are not made again and again"
    short = sum(memory < enough for memory in sizes)
    assert short <= 60, "and what they take is given back at once"
    assert min(sizes) >= min(8192, in_use)


def test_a_cache_that_nobody_reads_again_shrinks_slowly() -> None:
    load = Load(ComputeLimits(memory_min_mib=256, memory_max_mib=8192), files_mib=6000)
    load.run(60)
    load.files_mib = 0
    sizes = [memory for _, memory in load.run(3 * 3600)]
    changed = [second for second, (before, now) in enumerate(itertools.pairwise(sizes)) if now != before]
    assert all(later - earlier >= MEMORY_WINDOW_S for earlier, later in itertools.pairwise(changed))
    assert sizes[-1] == 256
    assert all(now >= before * 7 // 8 for before, now in itertools.pairwise(sizes))


def test_a_long_scan_that_is_never_repeated_takes_no_memory() -> None:
    """Its pages were never in the cache before: none of them is a refault."""
    load = Load(ComputeLimits(memory_min_mib=256, memory_max_mib=8192), milli=900, files_mib=100)
    assert {memory for _, memory in load.run(900)} == {256}


def test_waiting_for_memory_is_a_lack_although_nothing_is_read_again() -> None:
    limits = ComputeLimits(memory_min_mib=256, memory_max_mib=1024)
    state = begin(limits, 0.0)
    for second in range(4):
        sample = Sample(float(second), 0, 0, 0, second * 100_000, 0, 250, 100, 5)
        state = advance(state, sample, limits)
    assert state.size.memory_mib > 256


RECORDED: Final = Path(__file__).parent / "recorded_load.json"
"""Samples of PostgreSQL 15 in a group, one a second: idle, `pgbench -S` with 4 clients from 8 s to 28 s,
TPC-B with one from 38 s to 50 s, 200 selects a second from 52 s to 67 s, idle. Two cores that others used,
too; no limits, and no memory controller.
"""
LIMITS: Final = ComputeLimits(cpu_min_milli=100, cpu_max_milli=2000)


def recorded(repeats: int) -> list[Sample]:
    """The same load again and again, as one."""
    once = [Sample(*row) for row in json.loads(RECORDED.read_text())]
    seconds, cpu_us = once[-1].time_s + 1, once[-1].cpu_us - once[0].cpu_us
    return [
        each._replace(time_s=each.time_s + turn * seconds, cpu_us=each.cpu_us + turn * cpu_us)
        for turn in range(repeats)
        for each in once
    ]


def test_a_recorded_load_always_has_what_it_uses_and_less_than_all() -> None:
    samples = recorded(8)
    state, sizes, short = begin(LIMITS, 0.0), [], 0
    for before, now in itertools.pairwise(samples):
        used_milli = (now.cpu_us - before.cpu_us) / (now.time_s - before.time_s) / 1000
        short += used_milli > state.size.cpu_milli
        state = advance(state, now, LIMITS)
        sizes.append(state.size.cpu_milli)
        assert state.size.cpu_milli >= used_milli
    settled = sizes[len(sizes) // 2 :]
    assert short <= 8, "a sample late at most, where a load begins"
    assert max(settled) <= 600, "not far above the 365 millicores that it ever uses"
    assert sum(before != now for before, now in itertools.pairwise(settled)) <= 8, "twice a turn"
