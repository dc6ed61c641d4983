"""The size of an endpoint's cache, as the controller keeps it."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from excimer.controller.cache_size import SIZE_MIB_MAX, check_cache_size
from excimer.controller.endpoints.api import make_router
from excimer.controller.endpoints.cache_size_api import make_cache_size_router
from excimer.controller.model import BadRequestError
from excimer.controller.sqlite_store import SqliteStore
from excimer.service.health import Health
from excimer.service.http import create_app
from excimer.service.metrics import new_registry
from tests.kit.storage_fakes import fake_world
from tests.unit.controller.test_shell import make_tenant
from tests.unit.controller.test_sqlite_store import ENDPOINT, filled

Ask = Callable[..., Awaitable[httpx.Response]]


def play(tmp_path: Path, story: Callable[[Ask], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_world(tmp_path) as world:
            await make_tenant(world)
            app = create_app("test", "1", Health("test"), new_registry("test", "1"), verifier=None)
            app.include_router(make_router(world.controller))
            app.include_router(make_cache_size_router(world.controller, lambda: None))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://controller") as client:
                await story(client.request)

    asyncio.run(asyncio.wait_for(main(), 30))


async def make(ask: Ask, name: str, **fields: Any) -> httpx.Response:
    ports = {"postgres_port": 5000 + len(name), "http_port": 6000 + len(name)}
    return await ask("POST", "/v1/endpoints", json={"name": name, "tenant": "shop", **ports, **fields})


@pytest.mark.parametrize("size_mib", [0, 16, SIZE_MIB_MAX])
def test_a_size_that_may_be(size_mib: int) -> None:
    check_cache_size(size_mib)


@pytest.mark.parametrize("size_mib", [-1, 1, 15, SIZE_MIB_MAX + 1])
def test_a_size_that_may_not_be(size_mib: int) -> None:
    with pytest.raises(
        BadRequestError, match=f"16 MiB to 64 TiB, or no bound .0.: {size_mib} MiB is neither"
    ):
        check_cache_size(size_mib)


def test_it_survives_reopening_and_nothing_else_changes(tmp_path: Path) -> None:
    store = filled(tmp_path)
    before = store.list_endpoints()
    store.put_cache_size("nobody", 17)
    assert store.list_endpoints() == before
    store.put_cache_size("ep", 17)
    store.close()
    store = SqliteStore(tmp_path)
    assert store.list_endpoints() == [msgspec.structs.replace(ENDPOINT, cache_size_mib=17)]
    store.close()


def test_it_is_given_changed_and_shown(tmp_path: Path) -> None:
    async def story(ask: Ask) -> None:
        assert (await make(ask, "a")).json()["cache_size_mib"] == 0
        assert (await make(ask, "bb", cache_size_mib=64)).json()["cache_size_mib"] == 64
        refused = await make(ask, "ccc", cache_size_mib=7)
        assert refused.status_code == 400
        path = "/v1/endpoints/bb/cache_size"
        assert (await ask("PATCH", path, json={"cache_size_mib": 128})).json() == {"cache_size_mib": 128}
        assert (await ask("GET", path)).json() == {"cache_size_mib": 128}
        assert (await ask("PATCH", path, json={"cache_size_mib": 1})).status_code == 400
        assert (await ask("GET", "/v1/endpoints/nobody/cache_size")).status_code == 404
        assert (await ask("GET", "/v1/endpoints/bb")).json()["cache_size_mib"] == 128

    play(tmp_path, story)
