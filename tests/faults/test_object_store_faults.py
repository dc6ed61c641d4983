"""The storage engine on a real S3 server behind a network that breaks things, and on lagging listings.

A third of all requests go wrong, in every way that `Fault` knows. Nothing that was acknowledged as
durable may be missing afterwards (D2), no page may be another than the oracle's (S1), and all must come
to its end.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from excimer.base.errors import RetryableError
from excimer.base.keys import Relation, relation_block_key
from excimer.base.lsn import Lsn
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore, ObjectStoreError
from excimer.io.obstore_object_store import CallLimits, ObstoreObjectStore
from excimer.storage.engine.local_disk import LocalDisk
from excimer.storage.engine.manifest_store import OvertakenError, check_not_overtaken
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.format.values import Value, ValueKind
from tests.faults import test_storage_faults as scripted
from tests.kit.faulty_proxy import Fault, FaultyProxy, running_proxy
from tests.kit.s3_server import S3Server, running_s3_server
from tests.kit.storage_world import MAIN, TENANT, attach, in_event_loop, new_main, put, storage_context

SEEDS = int(os.environ.get("EXCIMER_NETWORK_SEEDS", "2"))
FAULT_RATE = 0.33
SLOW_RATE = 0.01
LIMITS = CallLimits(request_s=0.7, retries_max=0)  # the engine has to cope by itself
QUICK_FAULTS = tuple(fault for fault in Fault if fault is not Fault.SLOW)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_s3_server(tmp_path_factory.mktemp("s3") / "log") as server:
        server.create_bucket("bucket")
        yield server


def misbehave(proxy: FaultyProxy, seed: int) -> None:
    chance = random.Random(seed)

    def choose(method: str, path: str) -> Fault | None:
        if chance.random() < SLOW_RATE:
            return Fault.SLOW
        fault = chance.choice(QUICK_FAULTS) if chance.random() < FAULT_RATE else None
        # A whole object that comes short, and says that it is all, only its own checksum can tell: of a
        # manifest that is damage, which is not tried again.
        return None if fault is Fault.SHORT and "/layers/" not in path else fault

    proxy.choose = choose


async def patiently(step: Callable[[], Awaitable[object]]) -> None:
    """Until it succeeds, as the host does it."""
    for _ in range(300):
        try:
            await step()
        except (RetryableError, OSError):
            continue
        return
    raise AssertionError("it never comes to an end")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_bad_network_loses_nothing_and_serves_nothing_wrong(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The script of `test_storage_faults`, then another pageserver with an empty disk. Runs on any seed."""
    monkeypatch.setattr(scripted, "TRIES", 300)
    world = scripted.World()

    async def live(proxy: FaultyProxy) -> None:
        store = ObstoreObjectStore(f"s3://bucket/{seed}", server.options(endpoint=proxy.endpoint), LIMITS)
        async with storage_context(tmp_path / "first", store=store, settings=scripted.SMALL) as context:
            await scripted.script(context, world)
        small_disk = LocalDisk(100_000)
        async with storage_context(
            tmp_path / "second", store=store, settings=scripted.SMALL, local_disk=small_disk
        ) as context:
            tenants: list[TenantStorage] = []

            async def attach_again() -> None:
                tenants.append(await TenantStorage.attach(context, TENANT, 2 + len(tenants)))

            await patiently(attach_again)
            for timeline_id, durable_lsn in world.durable.items():
                assert tenants[0].timeline(timeline_id).remote_consistent_lsn >= durable_lsn
            await patiently(lambda: scripted.replay(tenants[0], world))
            await patiently(lambda: scripted.check(tenants[0], world))
            assert small_disk.fetches > 10

    with running_proxy(server.endpoint) as proxy:
        misbehave(proxy, seed)
        asyncio.run(live(proxy))
        faults = {fault for _, _, fault in proxy.requests}
        assert faults >= {None, *QUICK_FAULTS}, "every kind of fault happened"


TABLE = Relation(1663, 5, 16384)


@in_event_loop
async def test_a_lagging_listing_never_brings_an_old_manifest_back(tmp_path: Path) -> None:
    store = FaultyObjectStore(MemoryObjectStore(), lambda operation, name: None)

    async def write(generation: int, count: int) -> None:
        async with storage_context(tmp_path / str(generation), store=store) as context:
            tenant = await attach(context, generation)
            if MAIN not in tenant.timelines:
                await tenant.create_timeline(new_main(), [])
            timeline = tenant.timeline(MAIN)
            for _ in range(count):
                lsn = Lsn(timeline.last_record_lsn + 0x100)
                put(
                    timeline,
                    [Value(relation_block_key(TABLE, 0, 0), lsn, ValueKind.IMAGE, True, b"\1" * 8192)],
                )
                await timeline.flush()
            await tenant.close()

    await write(1, 3)
    for generation, count in ((1, 1), (2, 1), (2, 2), (3, 7)):
        store.stale_listings = False
        store.stale_listings = True  # from here on listings do not change
        frozen = store._frozen_listing
        store.stale_listings = False
        await write(generation, count)
        store._frozen_listing = frozen
        async with storage_context(tmp_path / "other", store=store) as context:
            with pytest.raises(ObjectStoreError):
                await attach(context, 4)
            if generation > 1:
                with pytest.raises(OvertakenError):
                    check_not_overtaken(store, TENANT, MAIN, generation - 1)
    store.stale_listings = False
    async with storage_context(tmp_path / "other", store=store) as context:
        timeline = (await attach(context, 4)).timeline(MAIN)
        assert timeline.last_record_lsn == new_main().last_record_lsn + 0x100 * 14
