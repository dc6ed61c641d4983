"""A timeline's saved states in object storage: keeping one, finding the one of an LSN, removing the others.

::

    put states/state-LSN-GENERATION  ->  no newer generation?  ->  delete the superseded ones

States are created and never overwritten; no manifest names them. A crash before the deletion leaves one too
many, which the next state, or the next garbage collection, removes. A newer generation's are never touched
(G1).
One that is damaged, or lies where it does not belong, is as good as none: who starts goes on without.

A branch that begins at a state's LSN finds it at its ancestor, which keeps it for as long as the branch is
there.

Not here: what a state says (`excimer.pgformat.saved_state`), who may bring one
(`excimer.pageserver.endpoints`).
"""

import asyncio
import logging
from collections.abc import Callable, Set
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeVar

from excimer.base.errors import ConflictError
from excimer.base.lsn import MAX_LSN, Lsn, format_lsn, record_end
from excimer.io.object_store import ObjectExistsError, ObjectMissingError, ObjectStoreError
from excimer.pgformat.saved_state import DamagedStateError, StateHeader, unpack_header
from excimer.storage.engine.layer_stack import LayerHome
from excimer.storage.engine.manifest_store import check_not_overtaken, timeline_prefix
from excimer.storage.format.saved_state_name import FOLDER, SavedStateName, parse_saved_state_name
from excimer.storage.plan.retention import Retention
from excimer.storage.plan.saved_states import states_at, superseded_states

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class StateSupersededError(ConflictError):
    """A saved state is of an LSN that WAL has left: nobody will ever start there."""


class ForeignStateError(ConflictError):
    """A saved state is not of the timeline and LSN for which it was brought."""


class StatefulTimeline(Protocol):
    home: LayerHome
    generation: int
    retention: Retention
    wal_segment_size_bytes: int

    @property
    def pg_version(self) -> int: ...
    @property
    def last_record_lsn(self) -> Lsn: ...
    def check_runs(self) -> None: ...
    async def in_thread(self, function: Callable[[], _Result], /) -> _Result: ...
    async def whole_in_thread(self, function: Callable[[], _Result], /) -> _Result: ...


class SavedStates:
    """Of one timeline. On the event loop's thread; `lock` is held while one is being kept or removed."""

    def __init__(self, timeline: StatefulTimeline) -> None:
        self._timeline = timeline
        self.lock = asyncio.Lock()

    async def keep(self, lsn: Lsn, data: bytes) -> None:
        """Durable on return, and the only one but for branch points.

        Raises `DamagedStateError`, `ForeignStateError`, `StateSupersededError`, `OvertakenError`,
        `ObjectStoreError`: call it again.
        """
        timeline = self._timeline
        lsn = record_end(lsn, timeline.wal_segment_size_bytes)
        async with self.lock:
            timeline.check_runs()
            if lsn < timeline.last_record_lsn:
                raise StateSupersededError(
                    f"a state of {format_lsn(lsn)} is of no use: timeline {timeline.home.timeline_id} has "
                    f"WAL up to {format_lsn(timeline.last_record_lsn)}"
                )
            await timeline.whole_in_thread(partial(self._keep, lsn, data))

    async def find(self, lsn: Lsn) -> bytes | None:
        """The state of exactly this LSN; None if there is none that could be used.

        Raises `ObjectStoreError`.
        """
        lsn = record_end(lsn, self._timeline.wal_segment_size_bytes)
        return await self._timeline.in_thread(partial(self._find, lsn))

    async def remove_superseded(self) -> None:
        """What neither the end of WAL nor a branch needs. Raises `OvertakenError`, `ObjectStoreError`."""
        timeline = self._timeline
        async with self.lock:
            timeline.check_runs()
            await timeline.whole_in_thread(partial(self._remove_superseded, timeline.last_record_lsn, set()))

    def _keep(self, lsn: Lsn, data: bytes) -> None:
        timeline = self._timeline
        name = self._object_name(SavedStateName(lsn, timeline.generation))
        self._check_belongs(unpack_header(data, name), lsn)
        try:
            timeline.home.context.store.put(name, data)
        except ObjectExistsError:
            self._replace_if_damaged(name, lsn, data)
        with suppress(ObjectStoreError):  # one too many does no harm
            self._remove_superseded(MAX_LSN, {lsn})

    def _replace_if_damaged(self, name: str, lsn: Lsn, data: bytes) -> None:
        """A clean shutdown's LSN comes once: what is there is this very state, its answer lost."""
        if self._read(name, lsn) is None:
            self._timeline.home.context.store.delete(name)
            self._timeline.home.context.store.put(name, data)

    def _find(self, lsn: Lsn) -> bytes | None:
        for name in states_at(self._names(), lsn, self._timeline.generation):
            found = self._read(self._object_name(name), lsn)
            if found is not None:
                return found
        return None

    def _read(self, object_name: str, lsn: Lsn) -> bytes | None:
        """None if it is gone, damaged or another's."""
        try:
            data = self._timeline.home.context.store.get(object_name)
            self._check_belongs(unpack_header(data, object_name), lsn)
        except ObjectMissingError:
            return None
        except (DamagedStateError, ForeignStateError) as error:
            _log.warning("a saved state is not used: %s", error)
            return None
        return data

    def _check_belongs(self, header: StateHeader, lsn: Lsn) -> None:
        home, pg_version = self._timeline.home, self._timeline.pg_version
        expected = (home.tenant_id, home.timeline_id, lsn, pg_version)
        found = (header.tenant_id, header.timeline_id, header.lsn, header.pg_version)
        if found != expected:
            raise ForeignStateError(
                f"the saved state is of timeline {header.timeline_id} of tenant {header.tenant_id} at "
                f"{format_lsn(Lsn(header.lsn))} (PostgreSQL {header.pg_version}), not of timeline "
                f"{home.timeline_id} at {format_lsn(lsn)} (PostgreSQL {pg_version})"
            )

    def _remove_superseded(self, end_lsn: Lsn, wanted: Set[Lsn]) -> None:
        timeline = self._timeline
        store, home = timeline.home.context.store, timeline.home
        if timeline.retention.find_standstill() is not None:
            return  # branches may be there that nobody knows
        superseded = superseded_states(
            self._names(),
            end_lsn=end_lsn,
            wanted=wanted | set(timeline.retention.branch_points().values()),
            generation=timeline.generation,
        )
        if superseded:
            check_not_overtaken(store, home.tenant_id, home.timeline_id, timeline.generation)
            store.delete_many([self._object_name(name) for name in superseded])

    def _names(self) -> list[SavedStateName]:
        listed = self._timeline.home.context.store.list(self._folder)
        found = (parse_saved_state_name(info.name.rsplit("/", 1)[-1]) for info in listed)
        return [name for name in found if name is not None]

    @property
    def _folder(self) -> str:
        home = self._timeline.home
        return f"{timeline_prefix(home.tenant_id, home.timeline_id)}/{FOLDER}"

    def _object_name(self, name: SavedStateName) -> str:
        return f"{self._folder}/{name}"
