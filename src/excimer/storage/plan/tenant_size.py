"""The synthetic size of a tenant: what its history costs to keep, whatever the storage engine does with it.

The physical size depends on when flushes, merges and images happened to run; a bill should not. The
model, which is Neon's, asks instead: with full copies ("snapshots", as large as the logical size at an
LSN) and WAL as the only two ways to keep anything, what is the least that keeps everything which has
to stay readable? The tenant is a tree of points; each point stands for itself and for the stretch of WAL
that leads to it from its parent::

    main   o-----------C=====o=====H      C cutoff, H head: every LSN on === must stay readable
           a                 b            b, and a below the cutoff, are branch points
           \\                 \\
    branch  C==H              C===H

For every point, from the leaves on, the cheapest way is found twice: if its parent can be had
(`with_parent`), and if not (`alone`)::

    wal(p)         = lsn(p) - lsn(parent) + sum of with_parent(child)      needs the parent
    snapshot(p)    = size(p)              + sum of with_parent(child)      not for a needed stretch
    later(p)       =                        sum of alone(child)            not for a needed stretch
    alone(p)       = min(snapshot(p), later(p))
    with_parent(p) = min(wal(p), alone(p))

    synthetic size = sum over roots of alone(root)

A *needed* stretch has to be readable at every LSN, so that only its WAL will do. A single readable LSN is a
needed stretch of length 0.

Not here: logical sizes (`excimer.pageserver.sizes`). Worked examples: docs/architecture/sizes.md.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from excimer.base.ids import TimelineId
from excimer.base.lsn import Lsn


class SizePoint(NamedTuple):
    """A point of the tree and the stretch that leads to it."""

    parent: int | None
    """Number of an earlier point; None for a root."""
    lsn: int
    size_bytes: int | None
    """Logical size here; None where no snapshot is considered."""
    is_needed: bool
    """Every LSN after the parent's up to this one must be readable."""


class Method(StrEnum):
    SNAPSHOT = "snapshot"
    WAL = "wal"
    NOTHING = "nothing"


class SyntheticSize(NamedTuple):
    size_bytes: int
    methods: list[Method]
    """How each point is kept."""


def synthetic_size(points: Sequence[SizePoint]) -> SyntheticSize:
    """The formula above. Every parent comes before its children; a root needs a size, or children that can
    be had alone. Raises ValueError for a tree that cannot be kept.
    """
    choices = [_Choice() for _ in points]
    for number in range(len(points) - 1, -1, -1):
        point, choice = points[number], choices[number]
        parent = None if point.parent is None else points[point.parent]
        choice.decide(point, 0 if parent is None else point.lsn - parent.lsn)
        if point.parent is not None:
            choices[point.parent].add_child(choice)
    total = 0
    methods: list[Method] = []
    is_available: list[bool] = []
    for point, choice in zip(points, choices, strict=True):
        if point.parent is None:
            if choice.alone is None:
                raise ValueError("a history has no point at which a snapshot of it could be taken")
            total += choice.alone
        with_parent = point.parent is not None and is_available[point.parent]
        methods.append(choice.method if with_parent else choice.method_alone)
        is_available.append(methods[-1] is not Method.NOTHING)
    return SyntheticSize(total, methods)


@dataclass(slots=True)
class _Choice:
    """Of one point; first gathers what its children cost."""

    children_with_parent: int = 0
    children_alone: int | None = 0
    with_parent: int = 0
    alone: int | None = None
    method: Method = Method.WAL
    method_alone: Method = Method.NOTHING

    def add_child(self, child: "_Choice") -> None:
        self.children_with_parent += child.with_parent
        if self.children_alone is not None:
            self.children_alone = None if child.alone is None else self.children_alone + child.alone

    def decide(self, point: SizePoint, wal_bytes: int) -> None:
        if point.size_bytes is not None and (point.parent is None or not point.is_needed):
            self.alone, self.method_alone = point.size_bytes + self.children_with_parent, Method.SNAPSHOT
        later = None if point.is_needed else self.children_alone
        if later is not None and (self.alone is None or later <= self.alone):
            self.alone, self.method_alone = later, Method.NOTHING
        wal = wal_bytes + self.children_with_parent
        if self.alone is None or wal < self.alone:
            self.with_parent, self.method = wal, Method.WAL
        else:
            self.with_parent, self.method = self.alone, self.method_alone


@dataclass(frozen=True, slots=True)
class TimelineHistory:
    """What of one timeline must stay readable. Its ancestor comes before it in any list."""

    timeline_id: TimelineId
    home_id: TimelineId | None
    """The timeline in whose own history it begins; None for a root."""
    start_lsn: Lsn
    """Where it begins; of a root the oldest LSN that it has."""
    cutoff_lsn: Lsn
    """Every LSN from here to the head; not below `start_lsn`."""
    head_lsn: Lsn
    held: frozenset[Lsn]
    """Single LSNs that are readable for their own sake (leases, archived branches)."""
    branch_points: frozenset[Lsn]
    """Where others begin in its own history, by whom they are readable."""


def sizes_wanted(history: TimelineHistory) -> list[Lsn]:
    """The LSNs whose logical sizes `plan_points` asks for: where a snapshot is worth considering."""
    return [lsn for lsn in _own_lsns(history) if lsn <= history.cutoff_lsn]


def plan_points(
    histories: Iterable[TimelineHistory], sizes: Mapping[tuple[TimelineId, Lsn], int]
) -> list[SizePoint]:
    """The tree of a tenant. Histories come after the ones they begin in."""
    points: list[SizePoint] = []
    numbers: dict[tuple[TimelineId, Lsn], int] = {}
    for history in histories:
        before = None if history.home_id is None else numbers[history.home_id, history.start_lsn]
        before_lsn = history.start_lsn
        for lsn in _own_lsns(history):
            is_needed = before_lsn >= history.cutoff_lsn and lsn > before_lsn
            size = sizes[history.timeline_id, lsn] if lsn <= history.cutoff_lsn else None
            points.append(SizePoint(before, lsn, size, is_needed))
            before, before_lsn = len(points) - 1, lsn
            numbers[history.timeline_id, lsn] = before
            if lsn in history.held or lsn == history.head_lsn:
                points.append(SizePoint(before, lsn, None, True))
    return points


def _own_lsns(history: TimelineHistory) -> list[Lsn]:
    """In ascending order, each once: what is held, where others begin, the cutoff, the head."""
    own = {history.cutoff_lsn, history.head_lsn, *history.held, *history.branch_points}
    return sorted(own)
