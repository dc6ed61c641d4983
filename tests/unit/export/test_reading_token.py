"""The token of an export: renewed halfway, and tried for again whatever a renewal fails of."""

import asyncio

import pytest

from excimer.base.errors import RefusedError, RetryableError
from excimer.export import reading_token
from excimer.export.reading_token import NewToken, ReadingToken


async def keep_until(token: ReadingToken, answers: list[NewToken | Exception]) -> list[tuple[str, float]]:
    """Which token was held when each renewal was asked for, and when."""
    asked: list[tuple[str, float]] = []
    done = asyncio.Event()

    async def renew() -> NewToken:
        asked.append((token.text, asyncio.get_running_loop().time()))
        if not answers:
            done.set()
            await asyncio.Event().wait()
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    keeping = asyncio.ensure_future(token.keep(renew))
    await asyncio.wait_for(done.wait(), 60)
    keeping.cancel()
    return asked


def test_it_is_renewed_halfway_and_after_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_token, "RETRY_S", 0.01)

    async def story() -> None:
        begun = asyncio.get_running_loop().time()
        token = ReadingToken(NewToken("first", 0.2))
        answers: list[NewToken | Exception] = [
            NewToken("second", 0.1),
            RetryableError("the controller does not run"),
            RefusedError("not now"),
            NewToken("third", 0.02),
        ]
        asked = await keep_until(token, answers)
        assert [text for text, _ in asked] == ["first", "second", "second", "second", "third"]
        assert asked[0][1] - begun >= 0.1
        assert asked[1][1] - asked[0][1] >= 0.05
        assert token.text == "third"

    asyncio.run(story())
