"""A static endpoint's lease: asked for before anything is read, renewed, refused."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI

from excimer.base.errors import RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.compute import lsn_lease
from excimer.compute.lsn_lease import LeasedMoment, LeaseRefusedError, LsnLease
from excimer.service.health import Health
from excimer.service.http import create_app, serving_http
from excimer.service.metrics import new_registry
from tests.kit.storage_world import in_event_loop

TENANT, TIMELINE = TenantId("0a" * 16), TimelineId("11" * 16)


class FakePageserver:
    def __init__(self) -> None:
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self.error: Exception | None = None
        self.valid_for_s = 0.0

    def app(self) -> FastAPI:
        app = create_app("fake", "1", Health("fake", ready=True), new_registry("fake", "1"), verifier=None)

        @app.post(f"/v1/tenant/{TENANT}/timeline/{TIMELINE}/lsn_lease")
        async def lease(body: dict[str, Any]) -> dict[str, Any]:
            assert body["holder"] == "endpoint:past"
            self.asked.put_nowait(body["lsn"])
            if self.error is not None:
                raise self.error
            return {"valid_for_s": self.valid_for_s}

        return app

    async def asked_again(self) -> str:
        async with asyncio.timeout(10):
            return await self.asked.get()


@contextlib.asynccontextmanager
async def pageserver() -> AsyncIterator[tuple[FakePageserver, LsnLease]]:
    fake = FakePageserver()
    async with serving_http(fake.app(), "127.0.0.1:0", "fake pageserver") as address:
        moment = LeasedMoment(
            str(address),
            TENANT,
            TIMELINE,
            lambda: "token",
            lambda: Lsn(0x100000010),
            onwards=False,
            holder="endpoint:past",
        )
        yield fake, LsnLease(moment)


@in_event_loop
async def test_it_is_renewed_and_survives_a_pageserver_that_is_away() -> None:
    async with pageserver() as (fake, lease):
        await lease.acquire()
        assert await fake.asked_again() == "1/10"
        renewing = asyncio.create_task(lease.run())
        assert await fake.asked_again() == "1/10"
        fake.error = RetryableError("starting")
        await fake.asked_again()
        fake.error = None
        await fake.asked_again()
        assert not renewing.done()
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)


@in_event_loop
async def test_a_start_without_an_answer_goes_on_and_asks_again() -> None:
    async with pageserver() as (fake, lease):
        fake.error = RetryableError("starting")
        await lease.acquire()
        await fake.asked_again()
        fake.error = None
        renewing = asyncio.create_task(lease.run())
        await fake.asked_again()
        await fake.asked_again()
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)


@in_event_loop
async def test_a_moment_that_is_gone_cannot_be_started_at() -> None:
    async with pageserver() as (fake, lease):
        fake.error = RefusedError("the history begins later")
        with pytest.raises(LeaseRefusedError, match=r"1/10 cannot be kept: .*the history begins later"):
            await lease.acquire()
        async with asyncio.timeout(10):
            await lease.run()  # says so once, and ends


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsn_lease, "RETRY_AFTER_S", 0.02)
    monkeypatch.setattr(lsn_lease, "RENEW_AFTER_S_MIN", 0.02)
