"""A timeline's background work as steps that are done over and over, each in a task of its own.

An error that may pass is logged and the step tried again after a pause that grows; any other ends them all.

Not here: what the steps do (`timeline`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from excimer.base.errors import RetryableError
from excimer.storage.engine.context import StorageSettings

_log = logging.getLogger(__name__)

Step = Callable[[], Awaitable[None]]
"""Waits until there is something to do, and does it."""


async def run_steps(timeline_id: str, steps: Mapping[str, Step], settings: StorageSettings) -> None:
    """Until cancelled. Raises what ended one of them, `FencedError` for instance."""
    try:
        async with asyncio.TaskGroup() as group:
            for name, step in steps.items():
                job = _again_after_errors(f"{name} of timeline {timeline_id}", step, settings)
                group.create_task(job, name=f"{name} {timeline_id}")
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors


async def _again_after_errors(what: str, step: Step, settings: StorageSettings) -> None:
    delay_ms = settings.retry_delay_ms_first
    while True:
        try:
            await step()
            delay_ms = settings.retry_delay_ms_first
        except (RetryableError, OSError) as error:
            _log.warning("%s failed, trying again: %s", what, error)
            await asyncio.sleep(delay_ms / 1000)
            delay_ms = min(delay_ms * 2, settings.retry_delay_ms_max)
