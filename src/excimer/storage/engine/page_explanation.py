"""How a page comes about: what a read visits and finds, layer by layer, and the page it ends with.

It *is* a read, by the code of every other one, with somebody watching its walk.
"""

from dataclasses import dataclass

from excimer._native.memory_layer import MemoryLayer
from excimer._native.page_chains import PageChains
from excimer.base.errors import CorruptionError
from excimer.storage.engine.page_reads import PageRead, PageSource
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.format.values import Value, ValueKind
from excimer.storage.plan.read_path import Visit


@dataclass(frozen=True, slots=True)
class ExplainedVisit:
    """One layer on the way, and what it had to give."""

    timeline_id: str
    layer: LayerDescription | None
    """None: a memory layer."""
    low_lsn: int
    high_lsn: int
    """Values with low_lsn < LSN <= high_lsn were looked for."""
    values: tuple[Value, ...]
    """Newest first."""


@dataclass(frozen=True, slots=True)
class PageExplanation:
    key: bytes
    lsn: int
    visits: tuple[ExplainedVisit, ...]
    page: bytes | None
    problem: str | None
    """Why there is no page although the walk has come to its end; None if there is one."""


async def explain_page(source: PageSource, key: bytes, lsn: int) -> PageExplanation:
    """One block at an LSN that `source` can be read at. Errors as of reads, but damage that the walk has
    met or redo finds is part of the explanation.
    """
    walk = _WatchedWalk(key, lsn)
    try:
        page = await PageRead(source, key, 1, lsn, walk.visited).run()
    except CorruptionError as error:
        return PageExplanation(key, lsn, tuple(walk.visits), None, f"{type(error).__name__}: {error}")
    return PageExplanation(key, lsn, tuple(walk.visits), page, None)


class _WatchedWalk:
    """Notes what each visit adds to the chain."""

    def __init__(self, key: bytes, lsn: int) -> None:
        self.visits: list[ExplainedVisit] = []
        self._key = key
        self._high_lsn = lsn
        self._seen = 0
        self._at: PageSource | None = None

    def visited(self, at: PageSource, place: MemoryLayer | Visit, chains: PageChains) -> None:
        """In the thread that walks."""
        if self._at is not None and self._at is not at and self._at.stack.ancestry is not None:
            self._high_lsn = min(self._high_lsn, self._at.stack.ancestry.lsn)
        self._at = at
        values = [
            Value(self._key, lsn, ValueKind(kind), starts_chain, payload)
            for lsn, kind, starts_chain, payload in chains.values(0)
        ]
        new, self._seen = tuple(values[self._seen :]), len(values)
        if isinstance(place, MemoryLayer):
            visit = ExplainedVisit(at.timeline_id, None, place.start_lsn, self._high_lsn, new)
        else:
            visit = ExplainedVisit(
                at.timeline_id, place.layer.description, place.low_lsn, place.high_lsn, new
            )
        self.visits.append(visit)
