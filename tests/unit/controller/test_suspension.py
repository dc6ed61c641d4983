"""When endpoints are suspended, as the controller keeps it: checked, durable, told by the endpoint."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from excimer.controller.endpoints.api import make_router
from excimer.controller.endpoints.suspension_api import make_suspension_router
from excimer.controller.metrics import add_suspends
from excimer.controller.model import BadRequestError, Endpoint
from excimer.controller.sqlite_store import SqliteStore
from excimer.controller.suspension import DELAY_S_MAX, changed, plan_delay
from excimer.service.health import Health
from excimer.service.http import create_app
from excimer.service.metrics import new_registry, render
from tests.kit.storage_fakes import fake_world
from tests.unit.controller.test_shell import make_tenant
from tests.unit.controller.test_sqlite_store import ENDPOINT, filled

PRIMARY = msgspec.structs.replace(ENDPOINT, mode="primary", lsn=None)
Ask = Callable[..., Awaitable[httpx.Response]]


def play(tmp_path: Path, story: Callable[[Ask], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_world(tmp_path) as world:
            await make_tenant(world)
            app = create_app("test", "1", Health("test"), new_registry("test", "1"), verifier=None)
            app.include_router(make_router(world.controller))
            app.include_router(make_suspension_router(world.controller.suspension, lambda: None))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://controller") as client:
                await story(client.request)

    asyncio.run(asyncio.wait_for(main(), 30))


async def make(ask: Ask, name: str, **fields: Any) -> httpx.Response:
    ports = {"postgres_port": 5000 + len(name), "http_port": 6000 + len(name)}
    return await ask("POST", "/v1/endpoints", json={"name": name, "tenant": "shop", **ports, **fields})


def test_a_delay_is_checked_and_has_a_default() -> None:
    assert plan_delay("primary", None) == 300
    assert plan_delay("primary", 0) == 0
    assert plan_delay("static", None) == 0
    assert plan_delay("static", 0) == 0
    for delay_s in (-1, DELAY_S_MAX + 1):
        with pytest.raises(BadRequestError, match="after 1 to 604800 seconds without use, or never"):
            plan_delay("primary", delay_s)
    with pytest.raises(BadRequestError, match="stop it when it is not needed"):
        plan_delay("static", 1)


def test_suspends_are_counted_once_each() -> None:
    asleep = changed(PRIMARY, state="suspended", last_active_at=7.0, reason="idle")
    assert (asleep.state, asleep.suspends, asleep.suspend_reason, asleep.last_active_at) == (
        *("suspended", 1, "idle"),
        7.0,
    )
    assert changed(asleep, state="suspended", reason="asked") == asleep, "told twice"
    awake = changed(asleep, state="running")
    assert (awake.state, awake.suspends, awake.last_active_at) == ("running", 1, 7.0)
    assert changed(awake, state="suspended", reason="asked").suspends == 2
    with pytest.raises(BadRequestError, match="static"):
        changed(ENDPOINT, state="suspended")


def test_everything_of_it_survives_reopening_and_nothing_else_changes(tmp_path: Path) -> None:
    store = filled(tmp_path)
    told: Endpoint = msgspec.structs.replace(
        ENDPOINT, suspend_delay_s=60, state="running", last_active_at=8.5, suspends=3, suspend_reason="idle"
    )
    store.put_postgres_settings("ep", {"work_mem": "1MB"})  # somebody else, meanwhile
    store.put_suspension(told)
    store.close()
    store = SqliteStore(tmp_path)
    expected = msgspec.structs.replace(told, postgres_settings={"work_mem": "1MB"})
    assert store.list_endpoints() == [expected]
    store.close()


def test_suspends_are_counted_by_reason_for_metrics(tmp_path: Path) -> None:
    async def story() -> None:
        async with fake_world(tmp_path) as world:
            await make_tenant(world)
            suspension = world.controller.suspension
            registry = new_registry("test", "1")
            add_suspends(registry, suspension.counts)
            await world.controller.create_endpoint(
                *("a", "shop", "main"),
                mode="primary",
                at=None,
                pg_version=None,
                ports=(5000, 5001),
                postgres_settings={},
            )
            for state, reason in (("suspended", "idle"), ("running", ""), ("suspended", "asked")):
                told: dict[str, Any] = {"delay_s": None, "last_active_at": None}
                await suspension.change("a", **told, state=state, reason=reason)  # type: ignore[arg-type]
            await suspension.change("a", **told, state="suspended", reason="idle")  # told twice
            text = render(registry).decode()
            for reason in ("idle", "asked"):
                assert f'excimer_controller_suspends_total{{reason="{reason}"}} 1.0' in text

    asyncio.run(asyncio.wait_for(story(), 30))


def test_the_route_keeps_delays_and_states(tmp_path: Path) -> None:
    async def story(ask: Ask) -> None:
        assert (await make(ask, "a")).json()["suspend_delay_s"] == 300
        assert (await make(ask, "bb", suspend_delay_s=0)).json()["suspend_delay_s"] == 0
        refused = await make(ask, "ccc", suspend_delay_s=-5)
        assert (refused.status_code, "-5 is neither" in refused.json()["message"]) == (400, True)
        place = "/v1/endpoints/a/suspension"
        answer = await ask("PATCH", place, json={"suspend_delay_s": 5})
        assert (answer.json()["suspend_delay_s"], answer.json()["state"]) == (5, "stopped")
        told = {"state": "suspended", "last_active_at": 1e9, "reason": "idle"}
        assert (await ask("PATCH", place, json=told)).json() == (await ask("GET", place)).json()
        shown = (await ask("GET", "/v1/endpoints/a")).json()
        assert (shown["state"], shown["suspend_delay_s"], shown["suspends"]) == ("suspended", 5, 1)
        assert (shown["last_active_at"], shown["suspend_reason"]) == ("2001-09-09T01:46:40Z", "idle")
        for wrong in ({"state": "asleep"}, {"suspend_delay_s": 1e400}, {"last_active_at": -1}, {"delay": 5}):
            text = msgspec.json.encode(wrong).replace(b"null", b"1e400")
            answer = await ask("PATCH", place, content=text, headers={"content-type": "application/json"})
            assert answer.status_code in (400, 422), wrong
        assert (await ask("GET", "/v1/endpoints/nobody/suspension")).status_code == 404

    play(tmp_path, story)
