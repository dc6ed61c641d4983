"""Compaction step by step: what a crash leaves is gone on with, and what cannot be read is not claimed."""

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from excimer.base.ids import TenantId
from excimer.base.keys import MAX_KEY, MIN_KEY, Fork, Relation, relation_block_key, relation_size_key
from excimer.base.lsn import MAX_LSN, Lsn
from excimer.io.object_store import MemoryObjectStore
from excimer.storage.engine.context import StorageSettings
from excimer.storage.engine.errors import TimelineStoppedError
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.layer_block import unpack_block
from excimer.storage.format.layer_file import LayerKind
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.format.values import Value
from excimer.storage.plan.compaction_plan import RoundPlan
from tests.kit.storage_oracle import IMPORTED
from tests.kit.storage_world import (
    MAIN,
    START,
    FakeRedo,
    attach,
    expected_page,
    in_event_loop,
    new_main,
    put,
    record_value,
    size_value,
    storage_context,
)

TABLE = Relation(1663, 5, 20000)
BLOCKS = 80
SETTINGS = StorageSettings(
    compaction_threshold=2,
    image_creation_threshold=1,
    block_size_bytes=10_000,
    image_layer_size_bytes=50_000,
)
"""A piece of a round is cut after 50,000 bytes of values; a batch of pages before that is whole."""


def block(number: int) -> bytes:
    return relation_block_key(TABLE, Fork.MAIN, 3 * number)  # every third: runs of one


class BadPageRedo(FakeRedo):
    """Cannot rebuild one block of the table."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    async def redo(
        self, requests: Sequence[bytes], pg_version: int, tenant: TenantId
    ) -> list[bytes | Exception]:
        pages = await super().redo(requests, pg_version, tenant)
        error = ValueError("a record that cannot be applied")
        bad = [
            struct.unpack_from("<8I", request, 8)[2:5] == (TABLE.rel, 0, self.block) for request in requests
        ]
        return [error if is_bad else page for is_bad, page in zip(bad, pages, strict=True)]


class History:
    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.chains: list[list[Value]] = [[] for _ in range(BLOCKS)]

    async def flush_all(self) -> None:
        """A record for each block, the first initialises it, and a flush."""
        lsn = int(self.timeline.last_record_lsn)
        values = [size_value(relation_size_key(TABLE, Fork.MAIN), lsn + 8, 3 * BLOCKS)]
        for number, chain in enumerate(self.chains):
            lsn += 8
            chain.append(record_value(block(number), lsn, b"%d" % lsn, will_init=not chain))
            values.append(chain[-1])
        put(self.timeline, values)
        await self.timeline.flush()

    async def check(self, timeline: Timeline) -> None:
        for number, chain in enumerate(self.chains):
            for count, newest in enumerate(chain, 1):
                page = await timeline.get_pages(block(number), 1, Lsn(newest.lsn))
                assert page == expected_page(chain[:count])
            page = await timeline.get_pages(block(number), 1, timeline.last_record_lsn)
            assert page == expected_page(chain)


def images(timeline: Timeline) -> list[LayerDescription]:
    return [
        layer for layer in timeline.manifest.layers if layer.kind is LayerKind.IMAGE and layer.end_lsn > START
    ]


async def begun(context_tenant: TenantStorage, pieces: int) -> tuple[Timeline, History]:
    """After a merge and some pieces of a round."""
    timeline = await context_tenant.create_timeline(new_main(), IMPORTED)
    history = History(timeline)
    await history.flush_all()
    await history.flush_all()
    for _ in range(1 + pieces):
        assert await timeline.compact()
    return timeline, history


@in_event_loop
async def test_a_round_goes_on_after_a_restart_where_it_was(tmp_path: Path) -> None:
    async with storage_context(tmp_path, settings=SETTINGS) as context:
        timeline, history = await begun(await attach(context), pieces=2)
        before = images(timeline)
        assert len(before) >= 2
        assert {(layer.covers_after_lsn, layer.round_after_lsn) for layer in before} == {(None, 0)}
        again = (await attach(context, generation=2)).timeline(MAIN)
        await history.check(again)
        while await again.compact():
            pass
        after = images(again)
        assert {layer.name for layer in before} < {layer.name for layer in after}
        assert {(layer.covers_after_lsn, layer.round_after_lsn) for layer in after} == {(0, None)}
        expected = BLOCKS + 1 + len(IMPORTED)  # blocks that nobody has written need no image
        assert sum(layer.value_count for layer in after) == expected  # each key once
        await history.check(again)


@in_event_loop
async def test_flushes_are_merged_between_the_pieces_of_a_round(tmp_path: Path) -> None:
    async with storage_context(tmp_path, settings=SETTINGS) as context:
        timeline, history = await begun(await attach(context), pieces=1)
        await history.flush_all()
        await history.flush_all()
        assert timeline.stack.disk.level_zero_count == 2
        assert await timeline.compact()
        assert timeline.stack.disk.level_zero_count == 0
        assert images(timeline)[0].round_after_lsn == 0
        await history.check(timeline)


@in_event_loop
async def test_a_round_without_a_page_covers_nothing_but_is_finished(tmp_path: Path) -> None:
    redo = BadPageRedo(3 * 5)
    async with storage_context(tmp_path, settings=SETTINGS, redo=redo) as context:
        timeline, history = await begun(await attach(context), pieces=0)
        while await timeline.compact():
            pass
        made = images(timeline)
        assert {(layer.covers_after_lsn, layer.round_after_lsn) for layer in made} == {(None, None)}
        held = {
            value.key
            for layer in made
            for raw in timeline.stack.files[layer.name].blocks(MIN_KEY, MAX_KEY, 0, MAX_LSN)
            for value in unpack_block(raw)
        }
        assert set(map(block, range(BLOCKS))) - held == {block(5)}
        redo.block = -1
        await history.check(timeline)


@in_event_loop
async def test_a_round_at_an_lsn_that_is_gone_is_given_up(tmp_path: Path) -> None:
    async with storage_context(tmp_path, store=MemoryObjectStore(), settings=SETTINGS) as context:
        timeline, history = await begun(await attach(context), pieces=1)
        pieces = tuple(images(timeline))
        plan = RoundPlan(Lsn(START - 8), 0, (), pieces=pieces)
        async with timeline.compaction_lock:
            assert await timeline._compactor.write_piece(plan)
        assert {(layer.covers_after_lsn, layer.round_after_lsn) for layer in images(timeline)} == {
            (None, None)
        }
        await history.check(timeline)


@pytest.mark.parametrize("pieces", [None, 0])
def test_compaction_of_what_is_being_deleted_does_not_tell_of_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pieces: int | None
) -> None:
    """Asked for by hand, it is not stopped before; it is in a merge, or in a round of images."""

    @in_event_loop
    async def story() -> None:
        async with storage_context(tmp_path, store=MemoryObjectStore(), settings=SETTINGS) as context:
            tenant = await attach(context)
            if pieces is None:
                timeline = await tenant.create_timeline(new_main(), IMPORTED)
                history = History(timeline)
                await history.flush_all()
                await history.flush_all()
            else:
                timeline, _ = await begun(tenant, pieces)
            await tenant.delete_timeline(MAIN)
            with pytest.raises(TimelineStoppedError):
                await timeline.compact()

    story()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
