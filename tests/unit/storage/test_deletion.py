"""Deleting a timeline while its background work is in the middle of a write."""

import asyncio
import threading
from pathlib import Path

from excimer.base.keys import Relation, relation_block_key, relation_size_key
from excimer.base.lsn import Lsn
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore
from tests.kit.storage_world import (
    MAIN,
    START,
    attach,
    new_main,
    put,
    record_value,
    size_value,
    storage_context,
)

RELATION = Relation(1663, 5, 100)


class Gate:
    """Holds the thread that writes an object whose name holds `part`, once `is_armed`."""

    def __init__(self, part: str) -> None:
        self._part = part
        self.is_armed = False
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, operation: str, name: str) -> None:
        if self.is_armed and operation == "put" and self._part in name:
            self.is_armed = False
            self.reached.set()
            assert self.opened.wait(10)


def test_a_flush_under_way_does_not_bring_a_deleted_timeline_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        gate = Gate("index-")
        objects = MemoryObjectStore()
        async with storage_context(tmp_path, store=FaultyObjectStore(objects, gate)) as context:
            tenant = await attach(context)
            timeline = await tenant.create_timeline(new_main(), [])
            lsn = Lsn(START + 64)
            key = relation_block_key(RELATION, 0, 0)
            put(
                timeline,
                [
                    size_value(relation_size_key(RELATION, 0), lsn, 1),
                    record_value(key, lsn, b"x", will_init=True),
                ],
            )
            gate.is_armed = True
            flushing = asyncio.create_task(timeline.flush())
            await asyncio.to_thread(gate.reached.wait, 10)
            flushing.cancel()
            deleting = asyncio.create_task(tenant.delete_timeline(MAIN))
            await asyncio.sleep(0.1)
            gate.opened.set()
            await asyncio.gather(flushing, return_exceptions=True)
            await deleting
            await asyncio.sleep(0.1)
            left = [name for name in objects.objects if "/timelines/" in name]
            assert [name.rsplit("/", 1)[-1] for name in left] == ["deleted"]
            assert not (await attach(context)).timelines

    asyncio.run(scenario())
