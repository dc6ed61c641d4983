"""Which size an endpoint is to have, between its minimum and its maximum. Pure.

::

    samples --> CPU:    what is used, or more than that where it is held back
            --> memory: what cannot be given back, and more where the cache of files is too small

Up at once, down slowly: to more CPU with the first sample that shows a lack, to less only when nothing of a
whole `CPU_WINDOW_S` needed it. Room is left above what is used (`HEADROOM`), so that a size that has been
found stays while the load does.

How large a working set is shows nowhere while it fits: a cache fills whatever it is given. What shows is that
pages are read again which were given back lately (refaults), or that processes wait for memory. Then memory
grows, once what it has been given is full; after a quiet time it shrinks a little. If that was too much it
comes back at once, and the next attempt waits twice as long.

Not here: where samples come from (`group_sample`), what carries a size out (`resources`).
"""

from typing import Final, NamedTuple

from excimer.wire.compute_limits import ComputeLimits, ComputeSize

HEADROOM: Final = 0.7
"""Of the CPU it has, what it is to use."""
BUSY: Final = 0.85
"""Of the CPU it has: who uses more may want more than it gets."""
CPU_STEP_MILLI: Final = 50
CPU_GROWTH: Final = 2.0
"""By how much more it gets, at once, when what it would use cannot be seen because it is held back."""
CPU_WINDOW_S: Final = 60.0
CPU_SHRINK: Final = 0.5
"""To no less than this part of it, per window."""
THROTTLED: Final = 0.02
"""Of the time, held back for so long: it lacks CPU."""

MEMORY_STEP_MIB: Final = 64
MEMORY_GROWTH: Final = 1.5
MEMORY_SHRINK: Final = 7 / 8
MEMORY_SHRINK_MIB_MAX: Final = 256
"""Whoever lowers a limit waits while the kernel takes pages back."""
MEMORY_WINDOW_S: Final = 120.0
MEMORY_WINDOW_S_MAX: Final = 3600.0
FULL: Final = 0.85
"""Of the size: it has not been tried out before so much of it is taken."""
REFAULTS_PER_S: Final = 256
"""Pages of 4 KiB; fewer than these are noise."""
REFAULT_RATIO: Final = 0.05
"""Of the pages that PostgreSQL read past its shared buffers, so many were in the cache not long ago."""
PAGES_PER_BLOCK: Final = 2
STALLED: Final = 0.05
"""Of the time, some process waited for memory."""
RESERVE_MIB: Final = 32
PROCESS_RESERVE_MIB: Final = 1
"""Above what is in use, for what comes before the next sample."""
GAP_S: Final = 30.0
"""Samples farther apart say nothing of the time between."""


class Sample(NamedTuple):
    """Counters of a group, and of PostgreSQL in it, since they began."""

    time_s: float
    cpu_us: int
    throttled_us: int
    """Of all cores' shares together."""
    refaults: int
    """Pages of files."""
    stalled_us: int
    """Time in which some process waited for memory."""
    reads: int
    """Blocks that PostgreSQL read past shared buffers; 0: it is not known."""
    memory_mib: int
    """All that it has, cached files included."""
    in_use_mib: int
    """Of that, what cannot be given back."""
    processes: int


class Scaling(NamedTuple):
    """What is remembered of one endpoint between two samples."""

    size: ComputeSize
    newest: Sample | None = None
    needs: tuple[tuple[float, int], ...] = ()
    """Of CPU, in millicores, of one window: falling, each with its time. The first one is the most."""
    cpu_since_s: float = 0.0
    memory_since_s: float = 0.0
    """Since when the size is as it is, and has been enough."""
    memory_window_s: float = MEMORY_WINDOW_S
    has_shrunk: bool = False
    """The last change of memory was down."""


class _Step(NamedTuple):
    """What happened between two samples."""

    seconds: float
    used_milli: int
    is_throttled: bool
    refaults_per_s: float
    refault_ratio: float
    """1 if it is not known how much was read."""
    stalled: float


def begin(limits: ComputeLimits, now_s: float) -> Scaling:
    """A start has all the CPU that it may have, because somebody waits for it, and its minimum of memory."""
    size = ComputeSize(limits.cpu_max_milli, limits.memory_min_mib)
    return Scaling(size, cpu_since_s=now_s, memory_since_s=now_s)


def adjust(state: Scaling, limits: ComputeLimits) -> Scaling:
    """For other limits: the size that is nearest to the one of before."""
    return _within(state, limits)


def advance(state: Scaling, sample: Sample, limits: ComputeLimits) -> Scaling:
    """The state after a sample; its `size` is between minimum and maximum of `limits`, whatever comes."""
    state = _within(state, limits)
    step = _step(state.newest, sample)
    state = state._replace(newest=sample)
    if step is not None:
        state = _advance_cpu(state, step, sample, limits)
        state = _advance_memory(state, step, sample, limits)
    return _hold_in_use(state, sample, limits)


def _within(state: Scaling, limits: ComputeLimits) -> Scaling:
    size = ComputeSize(
        _clip(state.size.cpu_milli or limits.cpu_max_milli, limits.cpu_min_milli, limits.cpu_max_milli),
        _clip(state.size.memory_mib or limits.memory_max_mib, limits.memory_min_mib, limits.memory_max_mib),
    )
    return state._replace(size=size)


def _step(before: Sample | None, now: Sample) -> _Step | None:
    """None: nothing can be said, because one of them is missing, late, or of another life."""
    if before is None or not 0 < now.time_s - before.time_s <= GAP_S:
        return None
    if any(later < earlier for earlier, later in zip(before[1:6], now[1:6], strict=True)):
        return None
    seconds = now.time_s - before.time_s
    refaults, pages = now.refaults - before.refaults, (now.reads - before.reads) * PAGES_PER_BLOCK
    return _Step(
        seconds,
        used_milli=round((now.cpu_us - before.cpu_us) / seconds / 1000),
        is_throttled=now.throttled_us - before.throttled_us > THROTTLED * seconds * 1e6,
        refaults_per_s=refaults / seconds,
        refault_ratio=refaults / pages if pages and now.reads else 1.0,
        stalled=(now.stalled_us - before.stalled_us) / seconds / 1e6,
    )


def _advance_cpu(state: Scaling, step: _Step, sample: Sample, limits: ComputeLimits) -> Scaling:
    if not limits.cpu_max_milli:
        return state
    has = state.size.cpu_milli
    need = _up(step.used_milli / HEADROOM, CPU_STEP_MILLI)
    if step.is_throttled and step.used_milli > BUSY * has:
        need = max(need, _up(has * CPU_GROWTH, CPU_STEP_MILLI))
    need = _clip(need, limits.cpu_min_milli, limits.cpu_max_milli)
    now_s = sample.time_s
    recent = [each for each in state.needs if each[0] > now_s - CPU_WINDOW_S and each[1] > need]
    state = state._replace(needs=(*recent, (now_s, need)))
    if need > has and step.used_milli > BUSY * has:
        return _with_cpu(state, need, now_s)
    most = state.needs[0][1]
    if most < has and now_s - state.cpu_since_s >= CPU_WINDOW_S:
        least = _up(has * CPU_SHRINK, CPU_STEP_MILLI)
        wanted = _clip(max(most, least), limits.cpu_min_milli, limits.cpu_max_milli)
        if wanted < has:
            return _with_cpu(state, wanted, now_s)
    return state


def _with_cpu(state: Scaling, milli: int, now_s: float) -> Scaling:
    size = ComputeSize(milli, state.size.memory_mib)
    return state._replace(size=size, cpu_since_s=now_s)


def _advance_memory(state: Scaling, step: _Step, sample: Sample, limits: ComputeLimits) -> Scaling:
    if not limits.memory_max_mib:
        return state
    has, now_s = state.size.memory_mib, sample.time_s
    is_thrashing = step.refaults_per_s > REFAULTS_PER_S and step.refault_ratio > REFAULT_RATIO
    if is_thrashing or step.stalled > STALLED:
        window_s = state.memory_window_s
        if state.has_shrunk:
            window_s = min(2 * window_s, MEMORY_WINDOW_S_MAX)
        state = state._replace(memory_since_s=now_s, memory_window_s=window_s, has_shrunk=False)
        if sample.memory_mib < FULL * has:
            return state
        wanted = _up(has * MEMORY_GROWTH, MEMORY_STEP_MIB)
        return _with_memory(state, _clip(wanted, limits.memory_min_mib, limits.memory_max_mib), now_s)
    if now_s - state.memory_since_s < state.memory_window_s:
        return state
    less = max(int(has * MEMORY_SHRINK), has - MEMORY_SHRINK_MIB_MAX)
    wanted = _clip(less, _floor(sample, limits), limits.memory_max_mib)
    if wanted >= has:
        return state
    return _with_memory(state, wanted, now_s)._replace(has_shrunk=True)


def _with_memory(state: Scaling, mib: int, now_s: float) -> Scaling:
    size = ComputeSize(state.size.cpu_milli, mib)
    return state._replace(size=size, memory_since_s=now_s)


def _hold_in_use(state: Scaling, sample: Sample, limits: ComputeLimits) -> Scaling:
    """Memory that is in use is never taken, whatever else is found."""
    least = _floor(sample, limits)
    if not limits.memory_max_mib or state.size.memory_mib >= least:
        return state
    return _with_memory(state, least, sample.time_s)._replace(has_shrunk=False)


def _floor(sample: Sample, limits: ComputeLimits) -> int:
    needed = sample.in_use_mib + RESERVE_MIB + PROCESS_RESERVE_MIB * sample.processes
    return _clip(_up(needed, MEMORY_STEP_MIB), limits.memory_min_mib, limits.memory_max_mib)


def _clip(value: int, least: int, most: int) -> int:
    return max(least, min(value, most))


def _up(value: float, step: int) -> int:
    return -int(-value // step) * step
