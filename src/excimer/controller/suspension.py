"""When endpoints are suspended, and which of them are: the one place where it is kept.

A running compute reads its delay here and tells when it was suspended; a person changes the delay, stops and
suspends. What is told is remembered: whether a process lives is known where it runs.

Not here: the decision (the compute's manager), starting again.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from excimer.controller.model import (
    NEVER,
    SUSPEND_DELAY_S,
    BadRequestError,
    Endpoint,
    EndpointMode,
    EndpointState,
)
from excimer.controller.store import MetadataStore
from excimer.service.logs import get_logger

DELAY_S_MAX: Final = 7 * 24 * 3600

log = get_logger(__name__)


def plan_delay(mode: EndpointMode, delay_s: int | None) -> int:
    """The delay of an endpoint for which `delay_s` is wanted; None: what it has by default.

    Raises `BadRequestError`.
    """
    if delay_s is None:
        return NEVER if mode == "static" else SUSPEND_DELAY_S
    if not 0 <= delay_s <= DELAY_S_MAX:
        raise BadRequestError(
            f"an endpoint is suspended after 1 to {DELAY_S_MAX} seconds without use, or never (0): "
            f"{delay_s} is neither"
        )
    if mode == "static" and delay_s != NEVER:
        raise BadRequestError(
            "a static endpoint is not suspended: while it slept, the moment that it shows could leave what "
            "is retained; stop it when it is not needed"
        )
    return delay_s


def changed(
    endpoint: Endpoint,
    *,
    delay_s: int | None = None,
    state: EndpointState | None = None,
    last_active_at: float | None = None,
    reason: str = "",
) -> Endpoint:
    """The row after what was told; None leaves a thing as it is. Raises `BadRequestError`."""
    if delay_s is not None:
        endpoint = msgspec.structs.replace(endpoint, suspend_delay_s=plan_delay(endpoint.mode, delay_s))
    if last_active_at is not None:
        endpoint = msgspec.structs.replace(endpoint, last_active_at=last_active_at)
    if state is None:
        return endpoint
    if state == "suspended":
        if endpoint.mode == "static":
            plan_delay(endpoint.mode, 1)
        if endpoint.state != "suspended":
            endpoint = msgspec.structs.replace(
                endpoint, suspends=endpoint.suspends + 1, suspend_reason=reason
            )
    return msgspec.structs.replace(endpoint, state=state)


class Suspension:
    """Reads and changes it, one change at a time."""

    def __init__(
        self, store: MetadataStore, find_endpoint: Callable[[str], Awaitable[tuple[Endpoint, str]]]
    ) -> None:
        self._store = store
        self._find_endpoint = find_endpoint
        self.changing = asyncio.Lock()
        """Held for each change of an endpoint's state, its reading included."""
        self.counts = Counter({"idle": 0, "asked": 0})
        """Suspends since the controller started, by reason."""

    async def read(self, name: str) -> Endpoint:
        return (await self._find_endpoint(name))[0]

    async def change(
        self,
        name: str,
        *,
        delay_s: int | None,
        state: EndpointState | None,
        last_active_at: float | None,
        reason: str,
    ) -> Endpoint:
        """As `changed`; durable when it returns. Raises `UnknownNameError`, `BadRequestError`."""
        async with self.changing:
            before, _ = await self._find_endpoint(name)
            after = changed(
                before, delay_s=delay_s, state=state, last_active_at=last_active_at, reason=reason
            )
            if after != before:
                await asyncio.to_thread(self._store.put_suspension, after)
            if after.suspends != before.suspends:
                self.counts[reason or "asked"] += 1
            if after.state != before.state:
                log.info(f"endpoint {after.state}", endpoint=name, reason=reason)
            return after
