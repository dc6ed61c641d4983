"""Two pageservers with one tenant: the older generation works on, while the newer attaches and works too.

In one of three seeds another generation comes between them: it attaches, at any speed, and may be killed
at any operation.

Each runs in a thread of its own with its own event loop, and does all its work in that thread. A baton says
who runs: at every operation on the object store it may change hands, as the seed says, and never
elsewhere. So a seed is one interleaving of the two processes' operations, always the same.

What the newest one has acknowledged must be there for the next, which attaches when all are done (G1).
"""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from excimer.base.errors import FencedError, RefusedError, RetryableError
from excimer.base.ids import TimelineId
from excimer.base.lsn import Lsn
from excimer.io.filesystem import LocalFilesystem
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore
from excimer.storage.engine import deletion_queue, manifest_store
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.errors import LsnTimeoutError
from excimer.storage.engine.partial_copy import LayerMissingError
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.values import pack_batch
from tests.kit.engine_oracle import FILES, IMPORTED, TimelineOracle
from tests.kit.engine_world import SMALL, PromptDisk, compact_wholly, record_start, sweep_suspected
from tests.kit.io_faults import InlineExecutor
from tests.kit.storage_world import MAIN, TENANT, FakeRedo, apply_native, new_main

TURN_TIMEOUT_S = 60.0
SETTINGS = replace(SMALL, lsn_lease_length_s=0.0)

Action = Callable[[TenantStorage], Coroutine[None, None, None]]


class Baton:
    """Exactly one of the threads that `enter` runs between two calls of `pass_on`."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._changed = threading.Condition()
        self._waiting: list[str] = []
        self._holder: str | None = None
        self.trace: list[str] = []

    def enter(self, names: list[str]) -> None:
        """Before the threads start."""
        self._waiting = list(names)
        self._holder = self._chance.choice(names)

    def pass_on(self, name: str, operation: str) -> None:
        with self._changed:
            self.trace.append(f"{name} {operation}")
            self._holder = self._chance.choice(self._waiting)
            self._changed.notify_all()
        self.wait(name)

    def wait(self, name: str) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._holder == name, TURN_TIMEOUT_S):
                raise AssertionError(f"{name} never had its turn")

    def leave(self, name: str) -> None:
        with self._changed:
            self._waiting.remove(name)
            self._holder = self._chance.choice(self._waiting) if self._waiting else None
            self._changed.notify_all()


class Pageserver:
    """One generation's process, in the thread that calls `run`."""

    def __init__(self, world: "TwoPageservers", name: str, generation: int) -> None:
        self.world = world
        self.name = name
        self.generation = generation
        self.chance = random.Random(f"{world.seed} {name}")
        self.error: BaseException | None = None
        self.context = StorageContext(
            store=FaultyObjectStore(world.objects, self._step),
            filesystem=LocalFilesystem(),
            local_dir=world.directory / name,
            redo=FakeRedo(),
            apply_native=apply_native,
            executor=InlineExecutor(),
            settings=SETTINGS,
            local_disk=PromptDisk(),
        )

    def _step(self, operation: str, name: str) -> None:
        self.world.baton.pass_on(self.name, f"{operation} {name.rsplit('/', 2)[-1]}")

    def run(self) -> None:
        try:
            self.world.baton.wait(self.name)
            asyncio.run(self._live())
        except BaseException as error:
            self.error = error
        finally:
            self.world.baton.leave(self.name)

    async def _live(self) -> None:
        try:
            tenant = await self.attach()
        except FencedError:
            self.world.seen["never attached"] += 1
            return
        try:
            for _ in range(self.world.actions):
                await self.act(tenant)
        except FencedError:
            self.world.seen["fenced"] += 1
        except LayerMissingError:
            if self.generation != 1:
                raise
            self.world.seen["layers gone"] += 1
        await tenant.close()

    async def attach(self) -> TenantStorage:
        for _ in range(20):
            try:
                return await TenantStorage.attach(self.context, TENANT, self.generation)
            except RetryableError:
                self.world.seen["attached again"] += 1
        raise AssertionError("attaching comes to no end")

    async def act(self, tenant: TenantStorage) -> None:
        action = self.chance.choice(self.actions(tenant))
        self.world.seen[f"{self.name} {action.__name__}"] += 1
        await action(tenant)

    def actions(self, tenant: TenantStorage) -> list[Action]:
        return [self.put, self.flush, self.compact, self.collect, self.sweep, self.read]

    async def put(self, tenant: TenantStorage) -> None:
        """Both get the same WAL."""
        timeline = self.any_timeline(tenant)
        oracle = self.world.histories[timeline.timeline_id]
        if oracle.last_lsn == timeline.last_record_lsn:
            oracle.next_values(self.chance, 15)
        await self.catch_up(timeline)

    async def catch_up(self, timeline: Timeline) -> None:
        oracle = self.world.histories[timeline.timeline_id]
        for values, end_lsn in oracle.batches_after(timeline.last_record_lsn, 10):
            if not timeline._has_room():
                await timeline.flush()
            timeline.put_batch(pack_batch(values), end_lsn, Lsn(end_lsn - 8))

    async def flush(self, tenant: TenantStorage) -> None:
        timeline = self.any_timeline(tenant)
        await timeline.flush()
        self.acknowledge(timeline)

    async def compact(self, tenant: TenantStorage) -> None:
        await compact_wholly(self.any_timeline(tenant))

    async def collect(self, tenant: TenantStorage) -> None:
        timeline = self.any_timeline(tenant)
        kept_bytes = self.chance.randrange(400)
        await timeline.collect_garbage(Lsn(max(0, timeline.last_record_lsn - kept_bytes)))
        await timeline.in_thread(timeline.deletions.drain)

    async def sweep(self, tenant: TenantStorage) -> None:
        """For layers that nobody names."""
        await sweep_suspected(self.any_timeline(tenant))

    async def read(self, tenant: TenantStorage) -> None:
        """Until it is fenced it answers, and never wrongly."""
        timeline = self.any_timeline(tenant)
        oracle = self.world.histories[timeline.timeline_id]
        lsn = self.chance.randint(timeline.oldest_lsn, max(timeline.oldest_lsn, timeline.last_record_lsn))
        with suppress(LsnTimeoutError):  # a branch is behind whose ancestor is
            await check_timeline(timeline, oracle, lsn, self.chance)

    def acknowledge(self, timeline: Timeline) -> None:
        """Whoever is overtaken may say so and be wrong: WAL is still kept for the newer (D2)."""

    def any_timeline(self, tenant: TenantStorage) -> Timeline:
        return tenant.timeline(self.chance.choice(sorted(tenant.timelines)))


class Older(Pageserver):
    """Knows of nothing. It was asked to delete a branch, just before the newer one came or after."""

    def actions(self, tenant: TenantStorage) -> list[Action]:
        return [*super().actions(tenant), self.delete, self.delete]

    async def delete(self, tenant: TenantStorage) -> None:
        """Its request may have been sent long ago: the newer one is not asked."""
        victim = self.world.victim
        if victim not in tenant.timelines:
            return
        try:
            await tenant.delete_timeline(victim)
        except FencedError:
            self.world.seen["deletion fenced"] += 1
            raise


class KilledError(Exception):
    """The process is gone."""


class Passing(Pageserver):
    """A generation that was never told what came of it: it does not come to serve, or not for long."""

    def __init__(self, world: "TwoPageservers", name: str, generation: int) -> None:
        super().__init__(world, name, generation)
        self._operations_left = self.chance.randrange(30)

    def _step(self, operation: str, name: str) -> None:
        self._operations_left -= 1
        if self._operations_left < 0:
            raise KilledError
        super()._step(operation, name)

    async def _live(self) -> None:
        try:
            await super()._live()
        except KilledError:
            self.world.seen["killed"] += 1
        except LayerMissingError:
            self.world.seen["layers gone"] += 1


class Newer(Pageserver):
    """Owns the tenant: branches, deletes, and what it says is durable is durable."""

    def actions(self, tenant: TenantStorage) -> list[Action]:
        return [*super().actions(tenant), self.branch, self.delete]

    async def attach(self) -> TenantStorage:
        tenant = await super().attach()
        if self.world.victim not in tenant.timelines:
            self.world.oracles.pop(self.world.victim)
            self.world.seen["victim gone before"] += 1
        for timeline in tenant.timelines.values():
            self.acknowledge(timeline)
        return tenant

    async def branch(self, tenant: TenantStorage) -> None:
        ancestor = self.any_timeline(tenant)
        if len(self.world.oracles) >= 6:
            return
        oracle = self.world.histories[ancestor.timeline_id]
        ends = (oracle.ancestor_lsn, *oracle.ends)
        lsn = self.chance.choice(
            [end for end in ends if ancestor.oldest_lsn <= end <= ancestor.last_record_lsn]
        )
        timeline_id = TimelineId(f"{self.chance.getrandbits(64) | 1 << 70:032x}")
        branch = await tenant.branch_timeline(
            timeline_id, ancestor.timeline_id, lsn=Lsn(lsn), prev_record_lsn=record_start(lsn)
        )
        self.world.add(timeline_id, TimelineOracle(oracle, lsn))
        self.acknowledge(branch)

    async def delete(self, tenant: TenantStorage) -> None:
        timeline_id = self.any_timeline(tenant).timeline_id
        if timeline_id == MAIN or (timeline_id == self.world.victim and self.chance.random() < 0.5):
            return
        try:
            await tenant.delete_timeline(timeline_id)
        except RefusedError:
            return
        del self.world.oracles[timeline_id]
        del self.world.durable[timeline_id]

    def acknowledge(self, timeline: Timeline) -> None:
        self.world.durable[timeline.timeline_id] = timeline.remote_consistent_lsn


class TwoPageservers:
    """One run of one seed. `directory` is for local files."""

    def __init__(self, seed: int, directory: Path, actions: int = 12) -> None:
        self.seed = seed
        self.directory = directory
        self.actions = actions
        self.chance = random.Random(seed)
        self.baton = Baton(self.chance)
        self.objects = MemoryObjectStore()
        self.oracles: dict[TimelineId, TimelineOracle] = {}
        """Of the timelines that the newer one has."""
        self.histories: dict[TimelineId, TimelineOracle] = {}
        """Of those that it had, too."""
        self.add(MAIN, TimelineOracle.imported())
        self.durable: dict[TimelineId, int] = {}
        self.victim = TimelineId("de" * 16)
        self.seen: Counter[str] = Counter()

    def add(self, timeline_id: TimelineId, oracle: TimelineOracle) -> None:
        self.oracles[timeline_id] = self.histories[timeline_id] = oracle

    def run(self) -> "TwoPageservers":
        """Raises AssertionError when the newer one, or who comes after, has lost something."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(manifest_store, "ThreadPoolExecutor", InlineExecutor)
            if self.seed % 2:  # most of what is dropped does not fit, and is left to sweeps
                patch.setattr(deletion_queue, "ENTRIES_MAX", 1)
            return self._run()

    def _run(self) -> "TwoPageservers":
        self._lay_foundation()
        pageservers: list[Pageserver] = [Older(self, "older", 1)]
        if self.seed % 3 == 0:
            pageservers.append(Passing(self, "passing", 2))
        pageservers.append(Newer(self, "newer", 3))
        self.baton.enter([each.name for each in pageservers])
        threads = [threading.Thread(target=each.run, name=each.name) for each in pageservers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for each in pageservers:
            if each.error is not None:
                raise each.error
        asyncio.run(self._check_after())
        return self

    def _lay_foundation(self) -> None:
        """What was there before anyone else came: made by the older one, alone."""
        self.baton.enter(["first"])
        first = Pageserver(self, "first", 1)

        async def lay() -> None:
            tenant = await first.attach()
            main = await tenant.create_timeline(new_main(), IMPORTED)
            for _ in range(3):
                await first.put(tenant)
                await main.flush()
            await tenant.branch_timeline(self.victim, MAIN)
            self.add(self.victim, TimelineOracle(self.oracles[MAIN], main.last_record_lsn))
            await tenant.close()

        asyncio.run(lay())

    async def _check_after(self) -> None:
        self.baton.enter(["next"])
        following = Pageserver(self, "next", 4)
        tenant = await following.attach()
        assert set(tenant.timelines) == set(self.oracles), f"seed {self.seed}: timelines"
        for timeline_id, timeline in tenant.timelines.items():
            assert timeline.disk_consistent_lsn >= self.durable[timeline_id], f"seed {self.seed}: lost"
            await following.catch_up(timeline)
        for timeline_id, oracle in self.oracles.items():
            timeline = tenant.timeline(timeline_id)
            for lsn in {int(timeline.oldest_lsn), int(timeline.last_record_lsn)}:
                await check_timeline(timeline, oracle, lsn, self.chance)
        await tenant.close()


async def check_timeline(timeline: Timeline, oracle: TimelineOracle, lsn: int, chance: random.Random) -> None:
    """Some files whole, at one LSN."""
    for file in chance.sample(FILES, 3):
        blocks = oracle.blocks(file, lsn)
        assert timeline.size_blocks(file.block_key(0), Lsn(lsn)) == blocks
        if blocks:
            assert await timeline.get_pages(file.block_key(0), blocks, Lsn(lsn)) == oracle.pages(
                file, 0, blocks, lsn
            )
