"""A timeline's replication slots in object storage: keeping the newest, and which WAL they need.

::

    put slots/slots-TERM-SEQUENCE-GENERATION  ->  no newer generation?  ->  acknowledged; older ones go

A compute saves all its slots at each change that PostgreSQL makes durable, and is answered when that is so.
The next compute *takes over*: the newest slots come under its own term, and from then on those of an older
term are refused. A newer generation's objects are never touched (G1).

What the slots need of WAL is part of what safekeepers are told (D2): who attaches the timeline reads it
before it tells them anything. A newer generation writes its claim before it reads; an older one looks for
that claim after it has put: so either the older one refuses, or the newer one has read it.

Not here: the bytes (`excimer.pgformat.kept_slots`), telling safekeepers (`excimer.pageserver.durable_wal`).
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeVar

from excimer.base.errors import ConflictError, FencedError
from excimer.base.lsn import Lsn
from excimer.io.object_store import ObjectExistsError, ObjectMissingError, ObjectStoreError
from excimer.pgformat.kept_slots import DamagedSlotsError, KeptSlots, pack_slots, unpack_slots
from excimer.storage.engine.layer_stack import LayerHome
from excimer.storage.engine.manifest_store import check_not_overtaken, timeline_prefix
from excimer.storage.format.kept_slots_name import FOLDER, KeptSlotsName, parse_kept_slots_name

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class SlotsSupersededError(FencedError):
    """A newer compute has taken the timeline's replication slots over."""


class ForeignSlotsError(ConflictError):
    """Replication slots are not of the timeline for which they were brought."""


class SlottedTimeline(Protocol):
    home: LayerHome
    generation: int

    @property
    def pg_version(self) -> int: ...
    def check_runs(self) -> None: ...
    async def whole_in_thread(self, function: Callable[[], _Result], /) -> _Result: ...


class KeptSlotsStore:
    """Of one timeline. On the event loop's thread."""

    def __init__(self, timeline: SlottedTimeline) -> None:
        self._timeline = timeline
        self._lock = asyncio.Lock()
        self._newest: KeptSlotsName | None = None
        self._slots: KeptSlots | None = None
        self._is_read = False
        self.on_changed: Callable[[], None] = lambda: None
        """Called on the event loop when other WAL may be needed."""

    async def keep(self, term: int, sequence: int, data: bytes) -> None:
        """Durable on return, in place of what there was.

        Raises `DamagedSlotsError`, `ForeignSlotsError`, `SlotsSupersededError`, `OvertakenError`,
        `ObjectStoreError`: call it again.
        """
        async with self._lock:
            self._timeline.check_runs()
            await self._read()
            slots = self._check_belongs(unpack_slots(data, "the body"))
            await self._put(term, sequence, slots)

    async def take_over(self, term: int) -> bytes | None:
        """The newest slots, those of `term` from now on; None if there are none. Raises as `keep`."""
        async with self._lock:
            self._timeline.check_runs()
            await self._read()
            if self._slots is None:
                return None
            if self._newest is not None and self._newest.term != term:
                await self._put(term, 0, self._slots)
            return pack_slots(self._slots)

    async def needed_lsn(self, durable_lsn: Lsn) -> Lsn:
        """WAL from here on is kept for slots; at or above `durable_lsn` if they need none of what is durable.

        Raises `ObjectStoreError`.
        """
        if not self._is_read:
            async with self._lock:
                await self._read()
        return durable_lsn if self._slots is None else self._slots.needed_lsn(durable_lsn)

    async def _read(self) -> None:
        if not self._is_read:
            self._newest, self._slots = await self._timeline.whole_in_thread(self._find)
            self._is_read = True

    async def _put(self, term: int, sequence: int, slots: KeptSlots) -> None:
        name = KeptSlotsName(term, sequence, self._timeline.generation)
        if self._newest is not None and name[:2] < self._newest[:2]:
            raise SlotsSupersededError(
                f"timeline {self._timeline.home.timeline_id} has replication slots of term "
                f"{self._newest.term}: those of term {term} are out of date"
            )
        await self._timeline.whole_in_thread(partial(self._put_object, name, pack_slots(slots)))
        self._newest, self._slots = name, slots
        self.on_changed()

    def _put_object(self, name: KeptSlotsName, data: bytes) -> None:
        home = self._timeline.home
        store = home.context.store
        try:
            store.put(self._object_name(name), data)
        except ObjectExistsError:
            if store.get(self._object_name(name)) != data:  # not this very one, its answer lost
                raise
        check_not_overtaken(store, home.tenant_id, home.timeline_id, self._timeline.generation)
        with suppress(ObjectStoreError):  # one too many does no harm
            old = [
                each for each in self._names() if each[:2] < name[:2] and each.generation <= name.generation
            ]
            store.delete_many([self._object_name(each) for each in old])

    def _find(self) -> tuple[KeptSlotsName | None, KeptSlots | None]:
        """The newest that is whole and this timeline's."""
        newest = None
        for name in sorted(self._names(), reverse=True):
            newest = newest or name
            object_name = self._object_name(name)
            try:
                data = self._timeline.home.context.store.get(object_name)
                return newest, self._check_belongs(unpack_slots(data, object_name))
            except ObjectMissingError:
                continue
            except (DamagedSlotsError, ForeignSlotsError) as error:
                _log.warning("replication slots are not used: %s", error)
        return newest, None

    def _check_belongs(self, slots: KeptSlots) -> KeptSlots:
        home, pg_version = self._timeline.home, self._timeline.pg_version
        found = slots.tenant_id, slots.timeline_id, slots.pg_version
        if found != (home.tenant_id, home.timeline_id, pg_version):
            raise ForeignSlotsError(
                f"the replication slots are of timeline {slots.timeline_id} of tenant {slots.tenant_id} "
                f"(PostgreSQL {slots.pg_version}), not of timeline {home.timeline_id}"
            )
        return slots

    def _names(self) -> list[KeptSlotsName]:
        listed = self._timeline.home.context.store.list(self._folder)
        found = (parse_kept_slots_name(info.name.rsplit("/", 1)[-1]) for info in listed)
        return [name for name in found if name is not None]

    @property
    def _folder(self) -> str:
        home = self._timeline.home
        return f"{timeline_prefix(home.tenant_id, home.timeline_id)}/{FOLDER}"

    def _object_name(self, name: KeptSlotsName) -> str:
        return f"{self._folder}/{name}"
