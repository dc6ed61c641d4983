"""How a page comes about, told by the read itself: visits, values, and the page of a real read."""

from pathlib import Path

from excimer.base.ids import TimelineId
from excimer.base.keys import Relation, relation_block_key, relation_size_key
from excimer.base.lsn import Lsn
from excimer.storage.engine.page_explanation import PageExplanation
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.values import Value, ValueKind
from tests.kit.storage_world import (
    START,
    attach,
    image_of,
    in_event_loop,
    new_main,
    put,
    record_value,
    storage_context,
)

TABLE = Relation(1663, 5, 16384)
KEY = relation_block_key(TABLE, 0, 0)
BRANCH = TimelineId("22" * 16)
IMPORTED = [(relation_size_key(TABLE, 0), (1).to_bytes(4, "little")), (KEY, image_of(b"0"))]


async def _explained(timeline: Timeline, lsn: int) -> PageExplanation:
    found = await timeline.explain_page(KEY, Lsn(lsn))
    assert found.problem is None
    assert found.page == await timeline.get_pages(KEY, 1, Lsn(lsn)), "it is the page of a real read"
    return found


def _seen(found: PageExplanation) -> list[tuple[str, int, int, list[int]]]:
    """(layer, low LSN, high LSN, LSNs of its values) of each visit."""
    return [
        (
            "memory" if visit.layer is None else visit.layer.kind.name.lower(),
            visit.low_lsn,
            visit.high_lsn,
            [value.lsn for value in visit.values],
        )
        for visit in found.visits
    ]


@in_event_loop
async def test_memory_then_delta_then_image_then_nothing_more(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        put(timeline, [record_value(KEY, 0x1010, b"a"), record_value(KEY, 0x1020, b"b")])
        await timeline.flush()
        put(timeline, [record_value(KEY, 0x1030, b"c")])
        assert _seen(await _explained(timeline, 0x1030)) == [
            ("memory", 0x1020, 0x1030, [0x1030]),
            ("delta", 0x1000, 0x1020, [0x1020, 0x1010]),
            ("image", 0x0FFF, 0x1000, [0x1000]),
        ]
        found = await _explained(timeline, 0x1018)
        assert _seen(found) == [
            ("delta", 0x1000, 0x1018, [0x1010]),
            ("image", 0x0FFF, 0x1000, [0x1000]),
        ]
        assert found.visits[-1].values[0] == Value(KEY, 0x1000, ValueKind.IMAGE, True, image_of(b"0"))
        assert not found.visits[0].values[0].starts_chain


@in_event_loop
async def test_a_record_that_initialises_the_page_ends_the_walk(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        put(timeline, [record_value(KEY, 0x1010, b"a", will_init=True), record_value(KEY, 0x1020, b"b")])
        found = await _explained(timeline, 0x1020)
        assert _seen(found) == [("memory", START, 0x1020, [0x1020, 0x1010])]
        assert [value.starts_chain for value in found.visits[0].values] == [False, True]


@in_event_loop
async def test_a_branch_goes_on_in_its_ancestor_below_the_branch_point(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        tenant = await attach(context)
        timeline = await tenant.create_timeline(new_main(), IMPORTED)
        put(timeline, [record_value(KEY, 0x1010, b"a")])
        branch = await tenant.branch_timeline(BRANCH, timeline.timeline_id)
        put(timeline, [record_value(KEY, 0x1020, b"not the branch's")])
        put(branch, [record_value(KEY, 0x1030, b"c")])
        found = await _explained(branch, 0x1030)
        assert _seen(found) == [
            ("memory", 0x1010, 0x1030, [0x1030]),
            ("memory", 0x1000, 0x1010, [0x1010]),
            ("image", 0x0FFF, 0x1000, [0x1000]),
        ]
        assert [visit.timeline_id for visit in found.visits] == [BRANCH, *[timeline.timeline_id] * 2]


@in_event_loop
async def test_what_redo_cannot_do_is_part_of_the_explanation(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        put(timeline, [record_value(KEY, 0x1010, b"a")])
        context.redo.fail_next = ValueError("no")  # type: ignore[attr-defined]
        found = await timeline.explain_page(KEY, Lsn(0x1010))
        assert found.page is None
        assert "cannot be rebuilt" in (found.problem or "")
        assert len(found.visits) == 2
