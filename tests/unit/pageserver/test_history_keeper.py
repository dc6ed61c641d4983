"""Settings, collections by hand and by schedule, leases, on a real engine with a clock in the test's hand."""

import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fastapi import Depends
from httpx import ASGITransport, AsyncClient

from excimer.base.clock import Monotonic, UnixTime, unix_to_timestamptz
from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import KeyKind, make_key
from excimer.base.lsn import Lsn, format_lsn
from excimer.pageserver.endpoints.retention_api import make_lease_router, make_retention_router
from excimer.pageserver.history_keeper import HistoryKeeper, SettingsUnknownError
from excimer.pageserver.lsn_by_timestamp import WindowStart, find_window_start
from excimer.service.health import Health
from excimer.service.http import bearer_auth, create_app
from excimer.service.metrics import new_registry
from excimer.service.tasks import SystemClock, TaskScope
from excimer.storage.engine.context import StorageSettings
from excimer.storage.engine.damaged_timeline import DamagedTimeline
from excimer.storage.engine.garbage_collector import GcStandsStillError, GcTooEarlyError
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.tenant_settings import Overrides, TenantSettingsError
from excimer.storage.format.values import Value, ValueKind
from excimer.wire.auth import Right, TokenVerifier, generate_key_pair
from tests.kit.storage_oracle import IMPORTED
from tests.kit.storage_world import MAIN, START, TENANT, attach, in_event_loop, new_main, put, storage_context
from tests.kit.tokens import bearer, make_token

COMMIT_TIME = make_key(KeyKind.COMMIT_TIME)
NOW = 1_800_000_000.0
HOUR = 3600.0


@dataclass
class HandClock:
    time: float = NOW

    def monotonic(self) -> Monotonic:
        return Monotonic(self.time)

    def now(self) -> UnixTime:
        return UnixTime(self.time)


class Kept:
    """A timeline in service, without WAL."""

    def __init__(self, store: Timeline) -> None:
        self.store = store
        self.searches = 0

    def record_end(self, lsn: int) -> Lsn:
        return Lsn(lsn & ~7)

    async def window_start(self, timestamptz: int) -> WindowStart:
        self.searches += 1
        store = self.store
        return find_window_start(self.commit_time, store.oldest_lsn, store.last_record_lsn, timestamptz)

    def commit_time(self, lsn: Lsn) -> int | None:
        value = self.store.get_value(COMMIT_TIME, lsn)
        return None if value is None else int.from_bytes(value, "little", signed=True)

    async def commit(self, lsn: int, time: float) -> None:
        value = struct.pack("<q", unix_to_timestamptz(time))
        put(self.store, [Value(COMMIT_TIME, lsn, ValueKind.IMAGE, True, value)])
        await self.store.flush()


@dataclass
class Attached:
    """One attached tenant."""

    storage: TenantStorage
    kept: dict[TimelineId, Kept] = field(default_factory=dict)

    def storage_of(self, tenant_id: TenantId) -> TenantStorage:
        return self.storage

    async def set_settings(self, tenant_id: TenantId, overrides: Overrides) -> None:
        await self.storage.set_settings(overrides)

    def active(self, tenant_id: TenantId, timeline_id: TimelineId) -> Kept:
        return self.kept[timeline_id]

    def active_of(self, tenant_id: TenantId) -> list[Kept]:
        return list(self.kept.values())

    def all_active(self) -> list[Kept]:
        return list(self.kept.values())

    def gc_periods(self) -> list[tuple[TenantId, float]]:
        return [(TENANT, self.storage.settings.current.gc_period_s)]


@dataclass
class World:
    keeper: HistoryKeeper
    main: Kept
    clock: HandClock
    scope: TaskScope
    storage: TenantStorage

    async def pass_time(self, seconds: float) -> None:
        """A look at who is due, then what it started."""
        self.clock.time += seconds
        before = asyncio.all_tasks()
        self.keeper.start_due()
        for task in asyncio.all_tasks() - before:
            await task


@contextlib.asynccontextmanager
async def world(directory: Path) -> AsyncIterator[World]:
    settings = StorageSettings(gc_horizon_bytes=0, lsn_lease_length_s=0.0, pitr_interval_s=24 * HOUR)
    async with storage_context(directory, settings=settings) as context, TaskScope() as scope:
        storage = await attach(context)
        main = Kept(await storage.create_timeline(new_main(), IMPORTED))
        clock = HandClock()
        keeper = HistoryKeeper(Attached(storage, {MAIN: main}), scope, clock, random.Random(1))
        yield World(keeper, main, clock, scope, storage)


def test_a_window_begins_before_the_first_commit_that_is_in_it() -> None:
    times = {20: 1000, 30: 2000, 40: 3000}

    def commit_time(lsn: Lsn) -> int | None:
        return max((time for at, time in times.items() if at <= lsn), default=None)

    def start(timestamptz: int) -> WindowStart:
        return find_window_start(commit_time, Lsn(10), Lsn(50), timestamptz)

    assert start(500) == WindowStart(Lsn(19), 1000)  # what was before the first commit is as old as can be
    assert start(1000) == WindowStart(Lsn(29), 2000)
    assert start(2999) == WindowStart(Lsn(39), 3000)
    assert start(3000) == WindowStart(Lsn(50), None)
    assert find_window_start(commit_time, Lsn(20), Lsn(50), 500) == WindowStart(Lsn(20), 1000)
    assert find_window_start(lambda lsn: None, Lsn(10), Lsn(50), 500) == WindowStart(Lsn(10), None)


@in_event_loop
async def test_history_leaves_the_window_by_time(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        for number in range(1, 5):
            await here.main.commit(START + 0x100 * number, NOW + number * HOUR)
        here.clock.time = NOW + 5 * HOUR
        assert (await here.keeper.collect_garbage(TENANT, MAIN)).cutoff_lsn == START + 0x100 - 8
        await here.keeper.change_config(TENANT, {"pitr_interval_s": 2.5 * HOUR})
        assert (await here.keeper.collect_garbage(TENANT, MAIN)).cutoff_lsn == START + 0x300 - 8
        here.clock.time = NOW + 100 * HOUR
        assert here.main.commit_time(Lsn(START + 0x300)) is not None  # until it is collected
        assert (await here.keeper.collect_garbage(TENANT, MAIN)).cutoff_lsn == START + 0x400


@in_event_loop
async def test_an_idle_timeline_is_looked_at_only_when_a_commit_leaves_the_window(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.main.commit(START + 0x100, NOW)
        await here.main.commit(START + 0x200, NOW + HOUR)
        await here.pass_time(0)
        assert here.main.searches == 0  # its first turn is some time within the first period
        await here.pass_time(1.5 * HOUR)
        assert here.main.searches == 1
        for _ in range(20):
            await here.pass_time(HOUR)
        assert here.main.searches == 1
        for _ in range(4):
            await here.pass_time(HOUR)
        assert here.main.searches == 3  # one for each commit, and then never again
        assert here.main.store.oldest_lsn == START + 0x200
        for _ in range(50):
            await here.pass_time(HOUR)
        assert here.main.searches == 3
        await here.main.commit(START + 0x300, here.clock.time)
        await here.pass_time(HOUR)
        assert here.main.searches == 4


@in_event_loop
async def test_settings_are_live_and_wrong_ones_change_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        keeper = here.keeper
        await keeper.set_config(TENANT, {"gc_period_s": 0})
        await here.main.commit(START + 0x100, NOW)
        await here.pass_time(1000 * HOUR)
        assert here.main.searches == 0  # only by hand
        with pytest.raises(TenantSettingsError):
            await keeper.change_config(TENANT, {"gc_period_s": 60, "nonsense": 1})
        assert keeper.config(TENANT).overrides == {"gc_period_s": 0}
        await keeper.change_config(TENANT, {"gc_period_s": 60})
        await here.pass_time(0)
        await here.pass_time(60)
        assert here.main.searches == 1
        await keeper.change_config(TENANT, {"gc_period_s": None})
        assert keeper.config(TENANT).effective.gc_period_s == 3600


@in_event_loop
async def test_a_collection_that_is_too_early_is_made_when_it_may_be(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.main.commit(START + 0x100, NOW)
        await here.keeper.change_config(TENANT, {"lsn_lease_length_s": 600, "pitr_interval_s": 0})
        with pytest.raises(GcTooEarlyError):
            await here.keeper.collect_garbage(TENANT, MAIN)
        await here.pass_time(0)
        await here.pass_time(HOUR)
        assert here.main.store.oldest_lsn == START
        here.main.store.retention.attached_at_s -= 600
        await here.pass_time(601)
        assert here.main.store.oldest_lsn == START + 0x100


@in_event_loop
async def test_nothing_is_collected_while_a_timeline_is_damaged(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        for number in range(1, 5):
            await here.main.commit(START + 0x100 * number, NOW + number * HOUR)
        lost = TimelineId("77" * 16)
        here.storage.damaged[lost] = DamagedTimeline(lost, "manifest index-1-2 fails its checksum", None)
        await here.pass_time(0)
        await here.pass_time(200 * HOUR)
        assert here.main.searches == 0
        assert here.main.store.oldest_lsn == START
        with pytest.raises(GcStandsStillError, match="index-1-2"):
            await here.keeper.collect_garbage(TENANT, MAIN)
        assert here.main.store.retention.cutoff_lsn == START
        del here.storage.damaged[lost]
        await here.pass_time(HOUR)
        assert here.main.store.oldest_lsn == START + 0x400


@in_event_loop
async def test_settings_that_cannot_be_read_are_set_anew_as_a_whole(tmp_path: Path) -> None:
    """Until then the defaults count, and nothing goes: the tenant may have wanted to keep more."""
    async with world(tmp_path) as here:
        await here.main.commit(START + 0x100, NOW)
        here.storage.settings.set_damaged("settings-1-2 fail their checksum")
        assert here.keeper.config(TENANT).problem == "settings-1-2 fail their checksum"
        here.clock.time = NOW + 100 * HOUR
        with pytest.raises(GcStandsStillError, match="settings-1-2"):
            await here.keeper.collect_garbage(TENANT, MAIN)
        with pytest.raises(SettingsUnknownError, match="settings-1-2"):
            await here.keeper.change_config(TENANT, {"gc_period_s": 60})
        config = await here.keeper.set_config(TENANT, {"pitr_interval_s": 50 * HOUR})
        assert (config.overrides, config.problem) == ({"pitr_interval_s": 50 * HOUR}, None)
        assert (await here.keeper.collect_garbage(TENANT, MAIN)).cutoff_lsn == START + 0x100


KEYS = generate_key_pair()


def token(*rights: Right, tenant_id: TenantId | None = None, holder: str = "test") -> dict[str, str]:
    return bearer(make_token(KEYS, *rights, tenant_id=tenant_id, holder=holder))


@in_event_loop
async def test_the_routes(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.main.commit(START + 0x100, NOW)
        verifier = TokenVerifier(KEYS.public_pem)
        registry = new_registry("pageserver", "1")
        app = create_app("pageserver", "1", Health("pageserver"), registry, verifier=verifier)
        auth = bearer_auth(verifier, SystemClock(), Right.MANAGE)
        app.include_router(make_retention_router(here.keeper), dependencies=[Depends(auth)])
        app.include_router(make_lease_router(here.keeper, bearer_auth(verifier, SystemClock())))
        async with AsyncClient(transport=ASGITransport(app), base_url="http://pageserver/v1") as client:
            await check_routes(client, here)


async def check_routes(client: AsyncClient, here: World) -> None:
    timeline = f"/tenant/{TENANT}/timeline/{MAIN}"
    operator = token(Right.MANAGE)
    reader = token(Right.READ_PAGES, tenant_id=TENANT)
    strangers: tuple[dict[str, str], ...] = (
        token(Right.READ_PAGES, tenant_id=TenantId("ff" * 16)),
        token(Right.READ_WAL),
        {},
    )
    config = (await client.get(f"/tenant/{TENANT}/config", headers=operator)).json()
    assert config["overrides"] == {}
    assert config["effective"]["gc_period_s"] == 3600
    answer = await client.put(f"/tenant/{TENANT}/config", json={"gc_period_s": 5}, headers=operator)
    assert answer.json()["overrides"] == {"gc_period_s": 5}
    answer = await client.patch(f"/tenant/{TENANT}/config", json={"gc_perid_s": 5}, headers=operator)
    assert (answer.status_code, "did you mean 'gc_period_s'" in answer.json()["message"]) == (400, True)
    answer = await client.patch(
        f"/tenant/{TENANT}/config", json={"lsn_lease_length_s": 60, "gc_period_s": None}, headers=operator
    )
    assert answer.json()["overrides"] == {"lsn_lease_length_s": 60}
    lease = {"lsn": format_lsn(START + 0x100)}
    for claims, holder in ((reader, ""), (reader, "test/1"), (operator, "somebody")):
        body = {**lease, "holder": holder}
        answer = await client.post(f"{timeline}/lsn_lease", json=body, headers=claims)
        assert answer.status_code == 200, answer.text
        assert answer.json()["valid_until"].startswith("2027-01-15T08:0")
    for wrong in strangers:
        answer = await client.post(f"{timeline}/lsn_lease", json=lease, headers=wrong)
        assert answer.status_code in (401, 403), answer.text
    in_anothers_name = {**lease, "holder": "somebody"}
    answer = await client.post(f"{timeline}/lsn_lease", json=in_anothers_name, headers=reader)
    assert answer.status_code == 403
    answer = await client.put(f"{timeline}/do_gc", headers=operator)
    assert (answer.status_code, answer.json()["kind"]) == (503, "GcTooEarlyError")
    await check_release(client, timeline, lease, strangers)
    await here.keeper.set_config(TENANT, {})
    answer = await client.put(f"{timeline}/do_gc", headers=operator)
    assert answer.json() == {
        "cutoff_lsn": format_lsn(START + 0x100 - 8),
        "held_points": 0,
        "layers_removed": 0,
        "removed_bytes": 0,
        "wrote_images": False,
    }
    assert (await client.put(f"{timeline}/compact", headers=operator)).json() == {"steps": 0}
    assert (await client.put(f"{timeline}/do_gc", headers=reader)).status_code == 403
    answer = await client.post(f"{timeline}/lsn_lease", json={"lsn": format_lsn(START)}, headers=reader)
    assert (answer.status_code, answer.json()["kind"]) == (400, "LsnTooOldError")


async def check_release(
    client: AsyncClient, timeline: str, lease: dict[str, str], strangers: Iterable[dict[str, str]]
) -> None:
    """In its own name, which may have a slash; a manager in any; what nobody gives back runs out."""
    reader = token(Right.READ_PAGES, tenant_id=TENANT, holder="endpoint:a")
    other = token(Right.READ_PAGES, tenant_id=TENANT, holder="endpoint:ab")
    for holder in ("endpoint:a/export 1", "endpoint:a"):
        await client.post(f"{timeline}/lsn_lease", json={**lease, "holder": holder}, headers=reader)
    path = f"{timeline}/lsn_lease/endpoint%3Aa%2Fexport%201"
    for wrong in (*strangers, other):
        assert (await client.delete(path, headers=wrong)).status_code in (401, 403)
    by_manager = await client.delete(f"{timeline}/lsn_lease/endpoint%3Aa", headers=token(Right.MANAGE))
    assert by_manager.json() == {"released": 1}
    released = [(await client.delete(path, headers=reader)).json() for _ in range(2)]
    assert released == [{"released": 1}, {"released": 0}]
    long_name = {**lease, "holder": "x" * 101}
    assert (await client.post(f"{timeline}/lsn_lease", json=long_name, headers=reader)).status_code == 400
