"""The lease of an export: renewed in time, tried again when that may help, given up when it is gone."""

import asyncio

import pytest

from excimer.base.errors import RefusedError, RetryableError
from excimer.export import lease
from excimer.export.lease import keep_lease


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
