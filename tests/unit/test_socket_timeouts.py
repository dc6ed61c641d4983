"""A socket's ETIMEDOUT is a TimeoutError in Python: it is a lost connection, never a deadline of ours."""

import asyncio
import errno
import os
import time

import pytest

from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.compute import basebackup_client
from excimer.compute.basebackup_client import PageserverUnreachableError, fetch_basebackup
from excimer.safekeeper.endpoints import replication_port
from excimer.service.http_client import HttpClient, UnreachableError
from excimer.service.tasks import SystemClock
from excimer.wire.auth import Claims, TokenExpiredError

LOST = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


class _LostSession(replication_port._Session):
    """A reader's connection that a network takes away."""

    def __init__(self, expires: float) -> None:
        self._claims = Claims(holder="pageserver:1", exp=int(expires))
        self._clock = SystemClock()

    async def _serve_queries(self, timeline: object) -> None:
        if self._claims is not None and self._claims.exp is not None and self._claims.exp < time.time():
            await asyncio.sleep(60)
        raise LOST


def test_a_lost_reader_of_wal_is_not_one_whose_token_has_expired() -> None:
    with pytest.raises(TimeoutError) as lost:
        asyncio.run(_LostSession(time.time() + 3600)._serve_until_expiry(None))  # type: ignore[arg-type]
    assert lost.value is LOST
    with pytest.raises(TokenExpiredError):
        asyncio.run(_LostSession(time.time() - 1)._serve_until_expiry(None))  # type: ignore[arg-type]


class _LostClient(HttpClient):
    async def _exchange(
        self, method: str, target: str, payload: bytes | None = None, media_type: str = ""
    ) -> tuple[int, bytes]:
        if self.timeout_s < 1:
            await asyncio.sleep(60)
        raise LOST


@pytest.mark.parametrize(
    ("timeout_s", "said"), [(30, r"not reachable at 127\.0\.0\.1:1: .*timed out"), (0.01, "within 0.01 s")]
)
def test_a_service_behind_a_dead_network_is_not_a_slow_one(timeout_s: float, said: str) -> None:
    with pytest.raises(UnreachableError, match=f"(?i){said}"):
        asyncio.run(_LostClient("the controller", "127.0.0.1:1", timeout_s=timeout_s).get("/x"))


@pytest.mark.parametrize(
    ("is_lost", "said"), [(True, "hung up: .*timed out"), (False, "sent no basebackup at")]
)
def test_a_basebackup_says_whether_it_was_late_or_lost(
    monkeypatch: pytest.MonkeyPatch, is_lost: bool, said: str
) -> None:
    monkeypatch.setattr(basebackup_client, "ANSWER_TIMEOUT_S", 60 if is_lost else 0.01)

    async def answer(*_: object) -> bytes:
        if not is_lost:
            await asyncio.sleep(60)
        raise LOST

    monkeypatch.setattr(basebackup_client, "_answer", answer)

    async def main() -> None:
        async def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with await asyncio.start_server(accepted, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            await fetch_basebackup(
                f"{host}:{port}", TenantId("aa" * 16), TimelineId("bb" * 16), "token", Lsn(1 << 24)
            )

    with pytest.raises(PageserverUnreachableError, match=f"(?i){said}"):
        asyncio.run(main())
