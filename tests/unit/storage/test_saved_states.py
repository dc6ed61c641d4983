"""Saved states as objects of a branch: found at their LSN, replaced, held for branches, removed with the
branch.
"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore, ObjectStoreError
from excimer.pgformat.control_file import CONTROL_FILE_SIZE_BYTES
from excimer.pgformat.saved_state import DamagedStateError, SavedState, pack_state
from excimer.storage.engine.errors import TimelineStoppedError
from excimer.storage.engine.manifest_store import OvertakenError
from excimer.storage.engine.saved_states import ForeignStateError, StateSupersededError
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.saved_state_name import SavedStateName, parse_saved_state_name
from excimer.storage.plan.saved_states import states_at, superseded_states
from tests.kit.storage_world import (
    MAIN,
    START,
    TENANT,
    attach,
    in_event_loop,
    new_main,
    put,
    storage_context,
)
from tests.unit.storage.test_retention import CHILD
from tests.unit.storage.test_timeline import IMPORTED, block, image

STATES = f"tenants/{TENANT}/timelines/{MAIN}/states/"


def state_of(lsn: int, *, tenant: TenantId = TENANT, timeline: TimelineId = MAIN, mark: bytes = b"") -> bytes:
    page = lsn - lsn % 8192
    wal = mark.ljust(lsn - page, b"w") if lsn - page else mark.ljust(8192, b"w")
    start = page if lsn - page else page - 8192
    return pack_state(
        tenant,
        timeline,
        lsn,
        18,
        SavedState(control=bytes(CONTROL_FILE_SIZE_BYTES), wal_lsn=start, wal=wal),
    )


def put_page(timeline: Timeline, lsn: int) -> None:
    put(timeline, [image(block(0), lsn, b"page")])


def kept(objects: MemoryObjectStore) -> list[SavedStateName]:
    names = [name.removeprefix(STATES) for name in objects.objects if name.startswith(STATES)]
    return sorted(found for each in names if (found := parse_saved_state_name(each)) is not None)


def at(lsn: int, generation: int = 1) -> SavedStateName:
    return SavedStateName(lsn, generation)


LSNS = st.integers(1, 6)
NAMES = st.builds(SavedStateName, LSNS, st.integers(1, 4))


@given(st.sets(NAMES), LSNS, st.sets(LSNS), st.integers(1, 4))
def test_what_is_superseded(names: set[SavedStateName], end: int, wanted: set[int], generation: int) -> None:
    gone = superseded_states(names, end_lsn=Lsn(end), wanted={*map(Lsn, wanted)}, generation=generation)
    left = names - set(gone)
    assert set(gone) <= names
    assert all(name.generation <= generation for name in gone)
    ours = [name for name in left if name.generation <= generation]
    assert all(name.lsn >= end or name.lsn in wanted for name in ours)
    assert len({name.lsn for name in ours}) == len(ours)
    for lsn in {name.lsn for name in names if name.lsn >= end or name.lsn in wanted}:
        assert states_at(left, Lsn(lsn), generation)[:1] == states_at(names, Lsn(lsn), generation)[:1]


@given(st.sets(NAMES), LSNS, st.integers(1, 4))
def test_only_what_is_ours_answers(names: set[SavedStateName], lsn: int, generation: int) -> None:
    found = states_at(names, Lsn(lsn), generation)
    assert all(name.lsn == lsn and name.generation <= generation for name in found)
    assert [name.generation for name in found] == sorted((n.generation for n in found), reverse=True)


def test_names() -> None:
    assert parse_saved_state_name(str(at(0x16B3F50, 3))) == at(0x16B3F50, 3)
    for other in ("state-1-1", "index-00000001-00000001", f"{at(1)}x", f"x{at(1)}"):
        assert parse_saved_state_name(other) is None


@in_event_loop
async def test_one_is_found_at_its_lsn_alone_and_replaced_by_the_next(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        first, second = Lsn(START + 0x100), Lsn(START + 0x200)
        assert await timeline.find_saved_state(first) is None
        await timeline.saved_states.keep(first, state_of(first))
        assert await timeline.find_saved_state(first) == state_of(first)
        assert await timeline.find_saved_state(Lsn(first + 8)) is None
        await timeline.saved_states.keep(first, state_of(first))  # its answer was lost
        await timeline.saved_states.keep(second, state_of(second))
        assert kept(objects) == [at(second)]
        assert await timeline.find_saved_state(first) is None
        put_page(timeline, second + 8)
        with pytest.raises(StateSupersededError):
            await timeline.saved_states.keep(second, state_of(second))


@in_event_loop
async def test_at_a_page_boundary_all_its_lsns_are_one(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        await timeline.saved_states.keep(Lsn(0x4000), state_of(0x4000))
        assert await timeline.find_saved_state(Lsn(0x4018)) == state_of(0x4000)


@in_event_loop
async def test_what_belongs_elsewhere_is_refused_and_what_is_damaged_ignored(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        lsn = Lsn(START + 0x100)
        for foreign in (
            state_of(lsn, tenant=TenantId("0b" * 16)),
            state_of(lsn, timeline=TimelineId("12" * 16)),
            state_of(lsn + 8),
        ):
            with pytest.raises(ForeignStateError):
                await timeline.saved_states.keep(lsn, foreign)
        with pytest.raises(DamagedStateError):
            await timeline.saved_states.keep(lsn, state_of(lsn)[:-1])
        assert kept(objects) == []
        await timeline.saved_states.keep(lsn, state_of(lsn))
        name = f"{STATES}{at(lsn)}"
        for content in (b"", state_of(lsn)[:-9], state_of(lsn, timeline=TimelineId("12" * 16))):
            objects.objects[name] = content
            assert await timeline.find_saved_state(lsn) is None
        await timeline.saved_states.keep(lsn, state_of(lsn))  # puts a good one in the damaged one's place
        assert await timeline.find_saved_state(lsn) == state_of(lsn)


@in_event_loop
async def test_a_branch_begins_with_its_ancestors_state_for_as_long_as_it_is_there(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects) as context:
        tenant = await attach(context)
        main = await tenant.create_timeline(new_main(), IMPORTED)
        point, later = Lsn(START + 0x100), Lsn(START + 0x200)
        put_page(main, point)
        await main.saved_states.keep(point, state_of(point))
        branch = await tenant.branch_timeline(CHILD, MAIN, lsn=point, prev_record_lsn=Lsn(0))
        put_page(main, START + 0x180)
        await main.saved_states.keep(later, state_of(later))
        assert kept(objects) == [at(point), at(later)]
        assert await branch.find_saved_state(point) == state_of(point)
        assert await branch.find_saved_state(later) is None
        await tenant.delete_timeline(CHILD)
        await main.saved_states.remove_superseded()
        assert kept(objects) == [at(later)]


@in_event_loop
async def test_a_collection_removes_what_wal_has_left(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        lsn = Lsn(START + 0x100)
        await timeline.saved_states.keep(lsn, state_of(lsn))  # before its WAL has come here
        await timeline.saved_states.remove_superseded()
        assert kept(objects) == [at(lsn)]
        put_page(timeline, lsn)
        await timeline.saved_states.remove_superseded()
        assert kept(objects) == [at(lsn)]
        put_page(timeline, lsn + 8)
        await timeline.saved_states.remove_superseded()
        assert kept(objects) == []


@in_event_loop
async def test_it_goes_with_its_branch(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects) as context:
        tenant = await attach(context)
        timeline = await tenant.create_timeline(new_main(), IMPORTED)
        lsn = Lsn(START + 0x100)
        await timeline.saved_states.keep(lsn, state_of(lsn))
        await tenant.delete_timeline(MAIN)
        assert kept(objects) == []
        with pytest.raises(TimelineStoppedError):
            await timeline.saved_states.keep(lsn, state_of(lsn))
        assert kept(objects) == []


@in_event_loop
async def test_a_superseded_generation_removes_nothing_of_a_newer_one(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with (
        storage_context(tmp_path / "old", store=objects) as old_context,
        storage_context(tmp_path / "new", store=objects) as new_context,
    ):
        old = await (await attach(old_context)).create_timeline(new_main(), IMPORTED)
        first, second, third, fourth = (Lsn(START + 0x100 * step) for step in (1, 2, 3, 4))
        await old.saved_states.keep(first, state_of(first))
        new = (await attach(new_context, 2)).timeline(MAIN)
        assert await new.find_saved_state(first) == state_of(first)
        await new.saved_states.keep(second, state_of(second))
        assert kept(objects) == [at(second, 2)]
        await old.saved_states.keep(third, state_of(third))
        assert kept(objects) == [at(second, 2), at(third)]
        with pytest.raises(OvertakenError):
            await old.saved_states.keep(fourth, state_of(fourth))
        with pytest.raises(OvertakenError):
            await _superseding(old, fourth)
        assert kept(objects) == [at(second, 2), at(third), at(fourth)]
        assert await new.find_saved_state(second) == state_of(second)
        assert await old.find_saved_state(second) is None  # it is not for this one to serve


async def _superseding(timeline: Timeline, lsn: Lsn) -> None:
    put_page(timeline, lsn + 8)
    await timeline.saved_states.remove_superseded()


@in_event_loop
async def test_the_same_of_a_restart_and_of_two_generations_at_one_lsn(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects) as context:
        tenant = await attach(context)
        timeline = await tenant.create_timeline(new_main(), IMPORTED)
        lsn = Lsn(START + 0x100)
        await timeline.saved_states.keep(lsn, state_of(lsn))
        await tenant.close()
        timeline = (await attach(context, 3)).timeline(MAIN)
        assert await timeline.find_saved_state(lsn) == state_of(lsn)
        await timeline.saved_states.keep(lsn, state_of(lsn, mark=b"new"))
        assert kept(objects) == [at(lsn, 3)]
        assert await timeline.find_saved_state(lsn) == state_of(lsn, mark=b"new")


class Failing:
    operation = ""

    def __call__(self, operation: str, name: str) -> None:
        if operation == self.operation and "/states/" in name:
            raise ObjectStoreError(f"{operation} of {name}")


@pytest.mark.parametrize("operation", ["put", "delete"])
@in_event_loop
async def test_a_failure_leaves_the_former_one_or_one_too_many(tmp_path: Path, operation: str) -> None:
    objects = MemoryObjectStore()
    fault = Failing()
    async with storage_context(tmp_path, store=FaultyObjectStore(objects, fault)) as context:
        tenant: TenantStorage = await attach(context)
        timeline = await tenant.create_timeline(new_main(), IMPORTED)
        first, second = Lsn(START + 0x100), Lsn(START + 0x200)
        await timeline.saved_states.keep(first, state_of(first))
        fault.operation = operation
        if operation == "put":
            with pytest.raises(ObjectStoreError):
                await timeline.saved_states.keep(second, state_of(second))
            assert kept(objects) == [at(first)]
        else:
            await timeline.saved_states.keep(second, state_of(second))
            assert kept(objects) == [at(first), at(second)]
        fault.operation = ""
        await timeline.saved_states.keep(second, state_of(second))
        assert kept(objects) == [at(second)]
