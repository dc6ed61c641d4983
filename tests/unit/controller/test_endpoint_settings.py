"""One list of settings per endpoint: checked whole, changed by differences, for its owner and for users."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from excimer.base.errors import RefusedError
from excimer.controller.endpoint_settings import EndpointSettings
from excimer.controller.endpoints.settings_api import make_settings_router
from excimer.controller.model import UnknownNameError
from excimer.controller.tokens import TokenMaker
from excimer.service.health import Health
from excimer.service.http import create_app
from excimer.service.metrics import new_registry
from excimer.service.tasks import SystemClock
from excimer.wire.auth import Claims, Resource, Right, TokenVerifier, encode_token
from tests.kit.storage_fakes import KEYS, World, fake_world
from tests.unit.controller.test_shell import MAIN, TENANT, make_tenant


class Build:
    """PostgreSQL's part: refuses values `bad`, and more than three settings together."""

    def check(self, pg_version: int, settings: Mapping[str, str]) -> dict[str, str]:
        for name, value in settings.items():
            if value == "bad":
                raise RefusedError(f"{name} is bad for {pg_version}")
        if len(settings) > 3:
            raise RefusedError("too many together")
        return {name.lower(): value for name, value in settings.items()}

    def at_start_only(self, pg_version: int, names: Sequence[str]) -> list[str]:
        return [name for name in names if name.startswith("late")]


def play(tmp_path: Path, story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_world(tmp_path) as world:
            world.controller.settings = EndpointSettings(world.store, world.controller.find_endpoint, Build())
            await make_tenant(world)
            for number, name in enumerate(("one", "two")):
                await create(world, name, number, {"A": "1"})
            await story(world)

    asyncio.run(asyncio.wait_for(main(), 30))


async def create(world: World, name: str, number: int, settings: dict[str, str]) -> None:
    await world.controller.create_endpoint(
        name,
        "shop",
        "main",
        mode="primary",
        at=None,
        pg_version=None,
        ports=(5000 + number, 6000 + number),
        postgres_settings=settings,
    )


def test_changes_are_differences_and_are_stored(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        settings = world.controller.settings
        assert (await settings.read("one")).settings == {"a": "1"}
        done = await settings.change("one", {"B": "2", "late": "3"}, ["A", "never"])
        assert (done.settings, done.changed, done.at_start_only) == (
            {"b": "2", "late": "3"},
            ["a", "b", "late"],
            ["late"],
        )
        again = await settings.change("one", {"b": "2"}, [])
        assert (again.changed, again.at_start_only) == ([], ["late"])
        assert (await settings.change("one", {"x": "1"}, ["*"])).settings == {"x": "1"}
        assert [row.postgres_settings for row in world.store.list_endpoints()] == [{"x": "1"}, {"a": "1"}]

    play(tmp_path, story)


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        settings = world.controller.settings
        with pytest.raises(RefusedError, match="c is bad for 18"):
            await settings.change("one", {"b": "2", "c": "bad"}, ["a"])
        with pytest.raises(RefusedError, match="too many together"):
            await settings.change("one", {"b": "2", "c": "3", "d": "4"}, [])
        with pytest.raises(UnknownNameError):
            await settings.change("three", {}, [])
        with pytest.raises(RefusedError, match="a is bad"):
            await create(world, "three", 3, {"a": "bad"})
        assert [row.postgres_settings for row in world.store.list_endpoints()] == [{"a": "1"}, {"a": "1"}]

    play(tmp_path, story)


def test_what_is_bad_by_now_can_be_unset(tmp_path: Path) -> None:
    """Stored by an older Excimer, say, or another build is used now."""

    async def story(world: World) -> None:
        world.store.put_postgres_settings("one", {"old": "bad", "b": "2"})
        assert (await world.controller.settings.change("one", {}, ["b"])).settings == {"old": "bad"}
        assert (await world.controller.settings.change("one", {"c": "1"}, ["old"])).settings == {"c": "1"}

    play(tmp_path, story)


def test_changes_at_once_are_all_kept(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        change = world.controller.settings.change
        await asyncio.gather(
            change("one", {"b": "2"}, []), change("one", {"c": "3"}, []), change("one", {}, ["a"])
        )
        assert (await world.controller.settings.read("one")).settings == {"b": "2", "c": "3"}

    play(tmp_path, story)


def test_a_compute_changes_its_own_list_and_no_other(tmp_path: Path) -> None:
    tokens = TokenMaker(KEYS.private_pem, SystemClock())

    async def story(world: World) -> None:
        app = create_app("test", "1", Health("test"), new_registry("test", "1"), verifier=None)
        verifier = TokenVerifier(KEYS.public_pem)
        app.include_router(make_settings_router(world.controller, verifier, SystemClock()))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://controller") as client:

            async def ask(name: str, token: str, body: dict[str, Any]) -> int:
                headers = {"authorization": f"Bearer {token}"} if token else {}
                answer = await client.patch(f"/v1/endpoints/{name}/settings", json=body, headers=headers)
                return answer.status_code

            own = (await world.controller.read_spec("one")).tokens.renewal
            assert await ask("one", own, {"set": {"b": "2"}}) == 200
            admin = encode_token(KEYS.private_pem, Claims(holder="cli", rights=frozenset({Right.MANAGE})))
            assert await ask("two", admin, {"set": {"b": "2"}}) == 200
            assert await ask("two", own, {"set": {"b": "3"}}) == 403
            assert (
                await ask(
                    "one",
                    tokens.for_endpoint("endpoint:one", Resource(TENANT, MAIN), may_write=True).read_pages,
                    {"set": {"b": "3"}},
                )
                == 403
            )
            assert await ask("one", "", {"set": {"b": "3"}}) == 401
            assert await ask("one", own, {"sets": {}}) == 400
            read = await client.get("/v1/endpoints/one/settings", headers={"authorization": f"Bearer {own}"})
            assert read.json() == {"settings": {"a": "1", "b": "2"}, "changed": [], "at_start_only": []}

    play(tmp_path, story)
