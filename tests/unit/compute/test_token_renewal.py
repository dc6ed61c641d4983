"""A manager's tokens: taken once, renewed in time, asked for again while the controller is away."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from fastapi import Request

from excimer.base.errors import RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.compute.token_renewal import (
    EndpointGoneError,
    TokenRenewal,
    TokensMissingError,
    take_tokens,
)
from excimer.controller.access import Access
from excimer.controller.endpoints.access_api import make_access_router
from excimer.controller.tokens import TokenMaker
from excimer.service.health import Health
from excimer.service.http import bearer_auth, create_app, serving_http
from excimer.service.http_client import HttpClient, RemoteRefusedError
from excimer.service.metrics import new_registry
from excimer.service.tasks import SystemClock, running
from excimer.wire.auth import Claims, Resource, Right, TokenVerifier
from excimer.wire.endpoint_tokens import EndpointTokens
from tests.kit.storage_fakes import KEYS, World, fake_world
from tests.kit.tokens import make_token

LIFE_S = 2
TENANT = TenantId("ab" * 16)
MAIN = TimelineId("cd" * 16)


class Controller:
    """The real routes on a real store; it can be away."""

    def __init__(self, world: World, maker: TokenMaker) -> None:
        self.world = world
        self.access = Access(world.store, maker)
        self.is_away = False
        self.address = ""
        self._authenticate = bearer_auth(TokenVerifier(KEYS.public_pem), SystemClock())

    async def authenticate(self, request: Request) -> Claims:
        if self.is_away:
            raise RetryableError("the controller is away")
        return await self._authenticate(request)

    async def first_tokens(self, name: str = "main") -> EndpointTokens:
        endpoint, _ = await self.world.controller.find_endpoint(name)
        return self.access.tokens_of(endpoint)

    def renewal(self, first: EndpointTokens, renewed: list[EndpointTokens], health: Health) -> TokenRenewal:
        return TokenRenewal(
            first,
            controller_address=self.address,
            endpoint_name="main",
            clock=SystemClock(),
            chance=random.Random(1),
            health=health,
            on_renewed=renewed.append,
        )


@asynccontextmanager
async def controller(directory: Path) -> AsyncIterator[Controller]:
    async with fake_world(directory) as world:
        await world.controller.create_tenant(TENANT, MAIN, "shop", 18, True)
        for number, name in enumerate(("main", "other")):
            await world.controller.create_endpoint(
                name,
                "shop",
                "main",
                mode="primary",
                at=None,
                pg_version=None,
                ports=(5000 + number, 6000 + number),
                postgres_settings={},
            )
        made = Controller(world, TokenMaker(KEYS.private_pem, SystemClock(), endpoint_token_life_s=LIFE_S))
        app = create_app(
            "controller", "1", Health("controller"), new_registry("controller", "1"), verifier=None
        )
        app.include_router(make_access_router(made.access, made.authenticate))
        async with serving_http(app, "127.0.0.1:0", "controller") as address:
            made.address = str(address)
            yield made


def test_tokens_are_renewed_before_they_run_out_and_after_an_outage(tmp_path: Path) -> None:
    async def story() -> None:
        async with controller(tmp_path) as here:
            renewed: list[EndpointTokens] = []
            health = Health("compute")
            first = await here.first_tokens()
            renewal = here.renewal(first, renewed, health)
            async with running("renewal", renewal.run()):
                await _until(lambda: len(renewed) == 1, LIFE_S * 0.8)
                assert renewal.current is renewed[0]
                assert renewal.left_s > LIFE_S * 0.9
                here.is_away = True
                await _until(lambda: "about to run out" in health.warnings.get("tokens", ""), LIFE_S)
                await _until(lambda: "have run out" in health.warnings.get("tokens", ""), LIFE_S)
                assert len(renewed) == 1
                here.is_away = False
                await _until(lambda: len(renewed) == 2, 3.0)
                assert health.warnings == {}
            verifier = TokenVerifier(KEYS.public_pem)
            for tokens in (first, *renewed):
                assert tokens.write_wal is not None
                rights: list[list[Right]] = []
                for text in (tokens.read_pages, tokens.write_wal, tokens.renewal):
                    claims = verifier.verify(text, 0)
                    assert (claims.tenant_id, claims.timeline_id) == (TENANT, MAIN)
                    rights.append(list(claims.rights))
                assert rights == [[Right.READ_PAGES], [Right.WRITE_WAL], []]

    asyncio.run(story())


def test_an_endpoint_that_is_gone_gets_no_tokens_and_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        async with controller(tmp_path) as here:
            renewal = here.renewal(await here.first_tokens(), [], Health("compute"))
            await here.world.controller.delete_endpoint("main")
            with pytest.raises(EndpointGoneError, match="no endpoint 'main'"):
                await asyncio.wait_for(renewal.run(), LIFE_S)

    asyncio.run(story())


def test_only_the_endpoint_itself_renews_its_tokens(tmp_path: Path) -> None:
    """Not another one of the branch, not whoever manages everything, and not who found a token of its own."""

    async def story() -> None:
        async with controller(tmp_path) as here:
            others = (await here.first_tokens("other")).renewal
            manager = make_token(KEYS, Right.MANAGE)
            first = await here.first_tokens()
            similar = make_token(KEYS, holder="endpoint:mai", tenant_id=TENANT, timeline_id=MAIN)
            for token in (others, manager, similar, first.read_pages, str(first.write_wal)):
                with pytest.raises(RemoteRefusedError, match="is not endpoint main's own"):
                    await _ask(here, token)
            for elsewhere in (Resource(TENANT, TimelineId("ff" * 16)), Resource(TENANT), Resource()):
                moved = make_token(
                    KEYS,
                    holder="endpoint:main",
                    tenant_id=elsewhere.tenant_id,
                    timeline_id=elsewhere.timeline_id,
                )
                with pytest.raises(Exception, match="serves another branch now"):
                    await _ask(here, moved)
            assert (await _ask(here, first.renewal))["valid_for_s"] == LIFE_S

    asyncio.run(story())


async def _ask(here: Controller, token: str) -> dict[str, object]:
    answer: dict[str, object] = await HttpClient("controller", here.address, token).post(
        "/v1/endpoints/main/tokens"
    )
    return answer


async def _until(condition: Callable[[], bool], limit_s: float) -> None:

    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_first_tokens_are_taken_from_standard_input_and_are_gone() -> None:
    tokens = EndpointTokens(read_pages="r", write_wal=None, renewal="n", valid_for_s=5.0)
    reading, writing = os.pipe()
    os.write(writing, msgspec.json.encode(tokens))
    os.close(writing)
    try:
        assert take_tokens(reading) == tokens
        assert os.readlink(f"/proc/self/fd/{reading}") == os.devnull
        assert os.read(reading, 10) == b""
    finally:
        os.close(reading)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"tokens",
        b"{}",
        b'{"read_pages": "", "write_wal": null, "renewal": "n", "valid_for_s": 1}',
        b'{"read_pages": "r", "write_wal": null, "renewal": "n", "valid_for_s": 0}',
        b'{"read_pages": "r", "write_wal": null, "renewal": "n", "valid_for_s": 1, "more": 1}',
    ],
)
def test_what_are_no_tokens_is_refused(content: bytes) -> None:
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    try:
        with pytest.raises(TokensMissingError, match="no tokens came"):
            take_tokens(reading)
    finally:
        os.close(reading)
