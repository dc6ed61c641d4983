"""What the controller's HTTP API refuses by itself, before any pageserver is asked."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

from excimer.controller.endpoints.api import make_router
from excimer.service.health import Health
from excimer.service.http import create_app
from excimer.service.metrics import new_registry
from tests.kit.storage_fakes import fake_world
from tests.unit.controller.test_shell import make_tenant

JSON = {"content-type": "application/json"}
Ask = Callable[..., Awaitable[httpx.Response]]


def play(tmp_path: Path, story: Callable[[Ask], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_world(tmp_path) as world:
            await make_tenant(world)
            app = create_app("test", "1", Health("test"), new_registry("test", "1"), verifier=None)
            app.include_router(make_router(world.controller))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://controller") as client:
                await story(client.request)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_settings_that_are_no_finite_numbers_do_not_become_null(tmp_path: Path) -> None:
    async def story(ask: Ask) -> None:
        for method in ("PUT", "PATCH"):
            for value in ("NaN", "Infinity", "-Infinity", "1e400"):
                body = f'{{"pitr_interval_s": {value}}}'
                answer = await ask(method, "/v1/tenants/shop/config", content=body, headers=JSON)
                assert (answer.status_code, answer.json()["error"]) == (400, "refused")
                assert "pitr_interval_s is not a finite number" in answer.json()["message"]

    play(tmp_path, story)


def test_times_that_leave_the_calendar_in_utc_are_refused(tmp_path: Path) -> None:
    async def story(ask: Ask) -> None:
        for moment in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
            query = {"timestamp": moment, "branch": "main"}
            answer = await ask("GET", "/v1/tenants/shop/lsn_at_timestamp", params=query)
            assert (answer.status_code, "years 1 to 9999" in answer.json()["message"]) == (400, True)
            body = {"name": "dev", "ancestor": "main", "at_timestamp": moment}
            answer = await ask("POST", "/v1/tenants/shop/branches", json=body)
            assert (answer.status_code, "years 1 to 9999" in answer.json()["message"]) == (400, True)

    play(tmp_path, story)
