"""The lease of an export: renewed in time, tried again when that may help, given up when it is gone."""

import asyncio

import pytest

from excimer.base.errors import RefusedError, RetryableError
from excimer.export import lease
from excimer.export.lease import keep_lease, take_lease
from excimer.service.http_client import RemoteBusyError, RemoteRefusedError


class Pageserver:
    """Answers renewals from a list; then it refuses, which ends the test."""

    def __init__(self, answers: list[float | None]) -> None:
        self.answers = answers
        self.asked_at: list[float] = []

    async def ask(self) -> float:
        self.asked_at.append(asyncio.get_running_loop().time())
        if not self.answers:
            raise RefusedError("its history is gone")
        answer = self.answers.pop(0)
        if answer is None:
            raise RetryableError("restarting")
        return answer


def test_it_is_renewed_several_times_in_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWAL_INTERVAL_S_MIN", 0.01)
    pageserver = Pageserver([0.2, 0.2, None, 0.2])

    async def run() -> float:
        begun = asyncio.get_running_loop().time()
        with pytest.raises(RefusedError, match="gone"):
            await keep_lease(pageserver.ask, 0.2)
        return begun

    begun = asyncio.run(run())
    assert len(pageserver.asked_at) == 5
    waits = [
        after - before
        for before, after in zip([begun, *pageserver.asked_at], pageserver.asked_at, strict=False)
    ]
    assert all(wait >= 0.049 for wait in [*waits[:3], waits[4]]), "a quarter of its length"
    assert waits[3] >= 0.009, "soon after a failure"


def test_an_lsn_that_the_pageserver_is_about_to_reach_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is behind the commits by a moment; one that it never reaches ends the wait."""
    monkeypatch.setattr("excimer.export.lease.ARRIVAL_POLL_S", 0.0)
    answers: list[float | Exception] = [RemoteBusyError("not reached"), RemoteBusyError("not reached"), 30.0]

    async def ask() -> float:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert asyncio.run(take_lease(ask)) == 30.0
    monkeypatch.setattr("excimer.export.lease.ARRIVAL_LIMIT_S", 0.0)
    answers[:] = [RemoteBusyError("not reached"), 30.0]
    with pytest.raises(RemoteBusyError):
        asyncio.run(take_lease(ask))
    answers[:] = [RemoteRefusedError("its history is gone"), 30.0]
    with pytest.raises(RemoteRefusedError):
        asyncio.run(take_lease(ask))
