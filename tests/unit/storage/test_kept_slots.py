"""Replication slots as objects of a timeline: the newest of the newest term, whoever wrote it."""

from pathlib import Path

import pytest

from excimer.base.ids import TimelineId
from excimer.base.lsn import MAX_LSN, Lsn
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore, ObjectStoreError
from excimer.pgformat.kept_slots import DamagedSlotsError, KeptSlot, KeptSlots, pack_slots, unpack_slots
from excimer.storage.engine.kept_slots import ForeignSlotsError, SlotsSupersededError
from excimer.storage.engine.manifest_store import OvertakenError
from excimer.storage.format.kept_slots_name import KeptSlotsName, parse_kept_slots_name
from tests.kit.storage_world import MAIN, TENANT, attach, in_event_loop, new_main, storage_context
from tests.unit.compute.test_saved_state import slot_file
from tests.unit.storage.test_retention import CHILD
from tests.unit.storage.test_timeline import IMPORTED

FOLDER = f"tenants/{TENANT}/timelines/{MAIN}/slots/"


def slots_of(*slots: tuple[str, int], timeline: TimelineId = MAIN, limit: int = 0) -> bytes:
    files = [KeptSlot(state=slot_file(name, lsn), snapshot=name.encode()) for name, lsn in slots]
    return pack_slots(
        KeptSlots(tenant_id=TENANT, timeline_id=timeline, pg_version=18, wal_limit_bytes=limit, slots=files)
    )


def kept(objects: MemoryObjectStore) -> list[KeptSlotsName]:
    names = (name.removeprefix(FOLDER) for name in objects.objects if name.startswith(FOLDER))
    return sorted(found for each in names if (found := parse_kept_slots_name(each)) is not None)


def test_what_slots_need() -> None:
    slots = unpack_slots(slots_of(("one", 5000), ("two", 4000)), "it")
    assert slots.needed_lsn(Lsn(9000)) == 4000
    limited = unpack_slots(slots_of(("one", 5000), ("two", 4000), limit=3000), "it")
    assert limited.needed_lsn(Lsn(9000)) == 6000
    assert limited.needed_lsn(Lsn(5000)) == 4000
    none = KeptSlot(state=slot_file("given_up", 10, invalid=1))
    idle = KeptSlots(tenant_id=TENANT, timeline_id=MAIN, pg_version=18, wal_limit_bytes=0, slots=[none])
    assert idle.needed_lsn(Lsn(9000)) == MAX_LSN


def test_damaged_slots_are_noticed() -> None:
    data = slots_of(("one", 5000))
    for damaged in (b"", data[:-1], data[:40] + b"x" + data[41:], b"excimer replication slots 2" + data[27:]):
        with pytest.raises(DamagedSlotsError):
            unpack_slots(damaged, "it")
    with pytest.raises(DamagedSlotsError, match="names the slots"):
        unpack_slots(slots_of(("one", 5000), ("one", 6000)), "it")


@in_event_loop
async def test_the_newest_counts_and_older_ones_go(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        slots = timeline.kept_slots
        heard: list[int] = []
        slots.on_changed = lambda: heard.append(1)
        assert await slots.take_over(3) is None
        assert await slots.needed_lsn(Lsn(9000)) == 9000
        await slots.keep(3, 1, slots_of(("one", 5000)))
        await slots.keep(3, 1, slots_of(("one", 5000)))  # its answer was lost
        await slots.keep(3, 2, slots_of(("one", 6000)))
        assert [name[:2] for name in kept(objects)] == [(3, 2)]
        assert await slots.needed_lsn(Lsn(9000)) == 6000
        assert len(heard) == 3
        with pytest.raises(ForeignSlotsError):
            await slots.keep(3, 3, slots_of(("one", 6000), timeline=CHILD))
        with pytest.raises(DamagedSlotsError):
            await slots.keep(3, 3, b"nothing")
        assert await slots.take_over(3) == slots_of(("one", 6000))


@in_event_loop
async def test_who_takes_over_has_the_last_word(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects) as context:
        slots = (await (await attach(context)).create_timeline(new_main(), IMPORTED)).kept_slots
        await slots.keep(3, 7, slots_of(("one", 5000)))
        assert await slots.take_over(5) == slots_of(("one", 5000))
        with pytest.raises(SlotsSupersededError):
            await slots.keep(3, 8, slots_of(("one", 6000)))
        with pytest.raises(SlotsSupersededError):
            await slots.take_over(4)
        await slots.keep(5, 1, slots_of())
        assert await slots.take_over(6) == slots_of()
        assert [name[:2] for name in kept(objects)] == [(6, 0)]


@in_event_loop
async def test_another_pageserver_knows_them_before_it_tells_anything(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with (
        storage_context(tmp_path / "old", store=objects) as context,
        storage_context(tmp_path / "new", store=objects) as other,
    ):
        old = (await (await attach(context)).create_timeline(new_main(), IMPORTED)).kept_slots
        await old.keep(3, 1, slots_of(("one", 5000)))
        new = (await attach(other, generation=2)).timeline(MAIN).kept_slots
        assert await new.needed_lsn(Lsn(9000)) == 5000
        with pytest.raises(OvertakenError):
            await old.keep(3, 2, slots_of(("one", 6000)))
        assert await new.take_over(4) in (slots_of(("one", 5000)), slots_of(("one", 6000)))


@in_event_loop
async def test_object_storage_that_fails_makes_no_answer(tmp_path: Path) -> None:
    broken = {"list"}

    def fault(operation: str, name: str) -> None:
        if operation in broken and "/slots" in name:
            raise ObjectStoreError(f"{operation} fails")

    faulty = FaultyObjectStore(MemoryObjectStore(), fault)
    async with storage_context(tmp_path, store=faulty) as context:
        slots = (await (await attach(context)).create_timeline(new_main(), IMPORTED)).kept_slots
        for _ in range(2):
            with pytest.raises(ObjectStoreError):
                await slots.needed_lsn(Lsn(9000))
        broken.clear()
        await slots.keep(3, 1, slots_of(("one", 5000)))
        broken.add("put")
        with pytest.raises(ObjectStoreError):
            await slots.keep(3, 2, slots_of(("one", 6000)))
        assert await slots.needed_lsn(Lsn(9000)) == 5000
