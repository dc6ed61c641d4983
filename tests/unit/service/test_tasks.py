"""Task scopes: nothing is left behind, errors come out as themselves, supervised jobs are restarted."""

import asyncio
import gc
import io
import json
import logging
from collections.abc import Coroutine

import pytest

from excimer.base.errors import FencedError, RetryableError
from excimer.service.logs import configure_logging, get_logger, log_context
from excimer.service.tasks import Backoff, TaskScope, running


def test_leaving_the_scope_cancels_and_awaits() -> None:
    ended: list[str] = []

    async def wait_for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    async def main() -> None:
        async with TaskScope() as scope:
            scope.start("waits", wait_for_ever())
            await asyncio.sleep(0)

    asyncio.run(main())
    assert ended == ["cleaned up"]


def test_an_error_of_a_task_ends_the_block_as_itself() -> None:
    async def fail() -> None:
        raise RetryableError("not now")

    async def main() -> None:
        async with running("fails", fail()):
            await asyncio.sleep(60)

    with pytest.raises(RetryableError, match="not now"):
        asyncio.run(asyncio.wait_for(main(), 30))


def test_an_error_of_the_block_is_not_hidden() -> None:
    async def main() -> None:
        async with TaskScope() as scope:
            scope.start("waits", asyncio.sleep(60))
            raise RetryableError("from the block")

    with pytest.raises(RetryableError, match="from the block"):
        asyncio.run(main())


@pytest.mark.filterwarnings("error")
def test_what_is_cancelled_before_its_first_step_is_not_reported_as_never_awaited() -> None:
    begun: list[str] = []

    async def connection() -> None:
        begun.append("begun")

    async def main() -> None:
        async with TaskScope() as scope:
            scope.contain("connection", connection())

    asyncio.run(main())
    gc.collect()
    assert begun == []


def test_what_a_callback_starts_while_the_scope_is_left_is_cancelled_too() -> None:
    ended: list[str] = []

    async def main() -> None:
        async with TaskScope() as scope:

            async def accept_at_the_end() -> None:
                try:
                    await asyncio.Event().wait()
                finally:
                    scope.contain("late connection", wait_for_ever())
                    ended.append("accepted")

            scope.start("accept", accept_at_the_end())
            await asyncio.sleep(0)

    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    asyncio.run(asyncio.wait_for(main(), 10))
    assert ended == ["accepted"]


def test_an_unexpected_error_of_contained_work_goes_no_further() -> None:
    async def fail() -> None:
        raise ValueError("bad")

    async def main() -> str:
        async with TaskScope() as scope:
            await scope.contain("fails", fail())
            return "went on"

    assert asyncio.run(main()) == "went on"


def test_a_supervised_job_is_restarted_until_it_returns() -> None:
    attempts: list[int] = []

    async def job() -> None:
        attempts.append(len(attempts))
        if len(attempts) < 3:
            raise ZeroDivisionError("a bug")

    async def main() -> None:
        async with TaskScope() as scope:
            await scope.supervise("job", job, Backoff(first_s=0.001))

    stream = io.StringIO()
    configure_logging("test", "info", stream=stream)
    asyncio.run(main())
    configure_logging("test", "warning")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert attempts == [0, 1, 2]
    assert [line["event"] for line in lines] == ["task crashed, will restart"] * 2
    assert "ZeroDivisionError" in lines[0]["traceback"]


def test_a_fenced_job_is_not_restarted() -> None:
    attempts: list[int] = []

    async def job() -> None:
        attempts.append(1)
        raise FencedError("a newer generation exists")

    async def main() -> None:
        async with TaskScope() as scope:
            await asyncio.wait_for(scope.supervise("job", job, Backoff(first_s=0.001)), 5)

    asyncio.run(main())
    assert attempts == [1]


def test_backoff_grows_to_its_limit() -> None:
    backoff = Backoff(first_s=0.1, most_s=1.0)
    assert [backoff.next_wait(n) for n in (1, 2, 3, 4, 5, 5000)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_log_lines_are_json_with_context_and_readable_lsns() -> None:
    stream = io.StringIO()
    configure_logging("safekeeper-1", "info", stream=stream)
    log = get_logger("excimer.safekeeper.shell").bind(timeline_id="ab")
    with log_context(request_id="r1"):
        log.info("flushed", flush_lsn=0x16B3748, error=ValueError("bad"), event_time=1)
        log.debug("not written")
    log.info("after")
    configure_logging("test", "warning")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info",
        "service": "safekeeper-1",
        "event": "flushed",
        "logger": "safekeeper.shell",
        "timeline_id": "ab",
        "request_id": "r1",
        "flush_lsn": "0/16B3748",
        "error": "ValueError: bad",
        "event_time": 1,
    }
    assert "request_id" not in second


def test_what_is_started_while_a_scope_is_left_is_closed() -> None:
    """Or Python would complain, long after, about a coroutine that was never awaited."""

    async def late() -> None:
        raise AssertionError

    async def main() -> "Coroutine[None, None, None]":
        coroutine = late()
        scope = TaskScope()
        async with scope:
            pass
        with pytest.raises(RuntimeError):
            scope.start("late", coroutine)
        return coroutine

    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        asyncio.run(main()).send(None)


def test_what_the_engine_logs_is_seen_and_what_libraries_chat_is_not() -> None:
    """The storage engine, which may not import the services' kit, logs by the standard library."""
    stream = io.StringIO()
    configure_logging("pageserver-1", "info", stream=stream)
    with log_context(tenant_id="ab"):
        logging.getLogger("excimer.storage.engine.compactor").info("timeline %s: given up", "cd")
        logging.getLogger("excimer.storage.engine.compactor").debug("not written")
        logging.getLogger("uvicorn.access").info("not written")
        logging.getLogger("uvicorn.error").warning("slow")
    configure_logging("test", "warning")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert {name: first[name] for name in ("level", "logger", "event", "tenant_id")} == {
        "level": "info",
        "logger": "storage.engine.compactor",
        "event": "timeline cd: given up",
        "tenant_id": "ab",
    }
    assert (second["level"], second["logger"], second["event"]) == ("warning", "uvicorn.error", "slow")
