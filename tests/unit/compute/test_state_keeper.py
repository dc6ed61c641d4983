"""Saving and fetching through a pageserver's door: a whole circle; nothing of it fails a stop or a start."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import Request

from excimer.base.errors import ExcimerError
from excimer.base.lsn import Lsn
from excimer.compute.arena import Arena
from excimer.compute.state_collection import StateLimits
from excimer.compute.state_keeper import StateKeeper, StateOwner
from excimer.io.object_store import MemoryObjectStore
from excimer.pageserver.endpoints.state_api import is_state, make_state_routers
from excimer.pgformat.saved_state import OBJECT_SIZE_BYTES_MAX
from excimer.service.health import Health
from excimer.service.http import create_app, serving_http
from excimer.service.http_client import HttpClient
from excimer.service.metrics import new_registry
from excimer.storage.engine.timeline import Timeline
from excimer.wire.endpoint_tokens import EndpointTokens
from tests.kit.ports import free_port
from tests.kit.storage_world import MAIN, TENANT, attach, in_event_loop, new_main, storage_context
from tests.unit.compute.test_saved_state import FORKS, PLENTY, Stopped
from tests.unit.storage.test_timeline import IMPORTED

TOKENS = EndpointTokens(read_pages="reads", write_wal="writes", renewal="renews", valid_for_s=60.0)
WHOLLY_LOCAL = cast(Arena, SimpleNamespace(find_presence=lambda path: None))


def keeper_at(address: str, limits: StateLimits = PLENTY) -> StateKeeper:
    return StateKeeper(StateOwner(TENANT, MAIN, 18, address), limits, lambda: TOKENS)


def anybody(request: Request) -> None:
    """May do everything."""


@asynccontextmanager
async def a_pageserver(root: Path) -> AsyncIterator[tuple[str, Timeline, MemoryObjectStore]]:
    """The door before a timeline; its address."""
    objects = MemoryObjectStore()
    async with storage_context(root, store=objects) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        operations = cast(Any, SimpleNamespace(active=lambda *_: SimpleNamespace(store=timeline)))
        app = create_app("x", "1", Health("x"), new_registry("x", "1"), verifier=None, is_stream=is_state)
        for router in make_state_routers(operations, anybody, anybody):
            app.include_router(router)
        async with serving_http(app, "127.0.0.1:0", "x") as address:
            yield str(address), timeline, objects


def states(objects: MemoryObjectStore) -> list[str]:
    return [name for name in objects.objects if "/states/" in name]


@pytest.fixture
def stopped(tmp_path: Path) -> Stopped:
    root = tmp_path / "stopped"
    root.mkdir()
    stopped = Stopped(root)
    stopped.put("base/5/16384_fsm", b"m" * 8192)
    stopped.put("pg_stat/pgstat.stat", b"statistics")
    return stopped


@in_event_loop
async def test_what_was_saved_comes_back_at_its_lsn_alone(tmp_path: Path, stopped: Stopped) -> None:
    async with a_pageserver(tmp_path) as (address, _, objects):
        keeper = keeper_at(address)
        assert await keeper.fetch(stopped.end_lsn) is None
        await keeper.save(stopped.root, WHOLLY_LOCAL, stopped.end_lsn)
        assert len(states(objects)) == 1
        fetched = await keeper.fetch(stopped.end_lsn)
        resumption = keeper.resume(fetched, stopped.backup(FORKS))
        assert resumption is not None
        assert dict(resumption.carried.files)["base/5/16384_fsm"] == b"m" * 8192
        assert await keeper.fetch(Lsn(stopped.end_lsn + 8)) is None
        assert keeper.resume(fetched, stopped.backup(FORKS, prev_lsn=stopped.checkpoint_lsn - 8)) is None
        [name] = states(objects)
        objects.objects[name] = objects.objects[name][:-1]
        assert await keeper.fetch(stopped.end_lsn) is None


@in_event_loop
async def test_what_no_quorum_has_is_not_saved(tmp_path: Path, stopped: Stopped) -> None:
    async with a_pageserver(tmp_path) as (address, _, objects):
        await keeper_at(address).save(stopped.root, WHOLLY_LOCAL, Lsn(stopped.end_lsn - 8))
        assert states(objects) == []


@in_event_loop
async def test_nothing_is_saved_of_a_directory_that_was_not_shut(tmp_path: Path, stopped: Stopped) -> None:
    async with a_pageserver(tmp_path) as (address, _, objects):
        (stopped.root / "global/pg_control").write_bytes(b"torn")
        await keeper_at(address).save(stopped.root, WHOLLY_LOCAL, stopped.end_lsn)
        assert states(objects) == []


@in_event_loop
async def test_a_pageserver_that_is_away_fails_neither_stop_nor_start(stopped: Stopped) -> None:
    keeper = keeper_at(f"127.0.0.1:{free_port()}")
    assert await keeper.save(stopped.root, WHOLLY_LOCAL, stopped.end_lsn), "it may be there all the same"
    assert await keeper.fetch(stopped.end_lsn) is None
    assert keeper.may_count_again


@in_event_loop
async def test_one_that_is_silent_is_waited_for_no_longer_than_its_bound(
    stopped: Stopped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("excimer.compute.state_keeper.SAVE_LIMIT_S", 0.2)
    monkeypatch.setattr("excimer.compute.state_keeper.FETCH_LIMIT_S", 0.2)
    release = asyncio.Event()

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
        keeper = keeper_at("{}:{}".format(*server.sockets[0].getsockname()))
        await keeper.save(stopped.root, WHOLLY_LOCAL, stopped.end_lsn)
        assert await keeper.fetch(stopped.end_lsn) is None
        release.set()


@pytest.mark.parametrize(("address", "limits"), [("", PLENTY), ("127.0.0.1:1", StateLimits(0, 0))])
@in_event_loop
async def test_it_can_be_off(stopped: Stopped, address: str, limits: StateLimits) -> None:
    keeper = keeper_at(address, limits)
    assert not keeper.is_on
    await keeper.save(stopped.root, WHOLLY_LOCAL, stopped.end_lsn)
    assert await keeper.fetch(stopped.end_lsn) is None


@in_event_loop
async def test_one_with_which_postgres_does_not_start_is_not_tried_again(
    tmp_path: Path, stopped: Stopped
) -> None:
    async with a_pageserver(tmp_path) as (address, _, _):
        keeper = keeper_at(address)
        await keeper.save(stopped.root, WHOLLY_LOCAL, stopped.end_lsn)

        async def start(failure: str | None) -> bool:
            resumption = keeper.resume(await keeper.fetch(stopped.end_lsn), stopped.backup(FORKS))
            keeper.start_ended(failure)
            return resumption is not None

        assert await start(None)
        assert await start('FATAL: logical replication slot "a" exists, but "wal_level" < "logical"')
        assert await start("FATAL: something is wrong with it")
        assert not await start("FATAL: something is wrong without it")
        keeper.start_ended("FATAL: without any")
        assert not await start(None)


@in_event_loop
async def test_the_door_takes_no_more_than_anybody_would_take_back(tmp_path: Path) -> None:
    async with a_pageserver(tmp_path) as (address, timeline, objects):
        client = HttpClient("x", address)
        path = f"/v1/tenant/{TENANT}/timeline/{MAIN}/saved_state/{timeline.last_record_lsn:016x}"
        with pytest.raises(ExcimerError):  # refused; told, or cut off while it still sends
            await client.put_bytes(path, bytes(OBJECT_SIZE_BYTES_MAX + 1))
        assert states(objects) == []
