"""Keeps the LSN that is read readable while it takes, however quickly garbage is collected, and no longer."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from typing import Final

from excimer.base.errors import ExcimerError, RetryableError
from excimer.base.lsn import Lsn, format_lsn
from excimer.export.page_stream import BranchAccess
from excimer.service.http_client import HttpClient, RemoteBusyError, path_of

RENEWALS_PER_LEASE: Final = 4
RENEWAL_INTERVAL_S_MIN: Final = 1.0
RELEASE_TIMEOUT_S: Final = 3.0
ARRIVAL_LIMIT_S: Final = 60.0
ARRIVAL_POLL_S: Final = 0.05
TOKEN_HOLDER: Final = "cli"
"""Of the access's token: it takes and gives back leases in names that begin with this."""

Ask = Callable[[], Awaitable[float]]
"""Takes or renews the lease; how many seconds it holds from now on."""


class ReadingLease:
    """On an LSN of the branch, at its pageserver; `work` shows in its holder's name."""

    def __init__(self, access: BranchAccess, lsn: Lsn, work: str) -> None:
        self._access = access
        self._lsn = lsn
        self._holder = f"{TOKEN_HOLDER}/{work}-{secrets.token_hex(8)}"
        self._path = path_of("v1", "tenant", access.tenant_id, "timeline", access.timeline_id, "lsn_lease")

    async def ask(self) -> float:
        """Raises what the pageserver answers: refused, when the history is gone."""
        client = HttpClient("pageserver", self._access.pageserver_http_address, self._access.token.text)
        body = {"lsn": format_lsn(self._lsn), "holder": self._holder}
        answer = await client.post(self._path, body)
        return datetime.fromisoformat(answer["valid_until"]).timestamp() - time.time()

    async def release(self) -> None:
        """Gives it back. If that fails, it runs out by itself."""
        access = self._access
        client = HttpClient(
            "pageserver", access.pageserver_http_address, access.token.text, RELEASE_TIMEOUT_S
        )
        with suppress(ExcimerError):
            await client.delete(self._path + path_of(self._holder))


async def take_lease(ask: Ask) -> float:
    """The first `ask`, of an LSN that the pageserver is about to reach: it is a moment behind the commits.

    Raises what `ask` does; `RemoteBusyError` when the LSN is not reached in `ARRIVAL_LIMIT_S`.
    """
    deadline = time.monotonic() + ARRIVAL_LIMIT_S
    while True:
        try:
            return await ask()
        except RemoteBusyError:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(ARRIVAL_POLL_S)


async def keep_lease(ask: Ask, length_s: float) -> None:
    """Renews a lease of this length, until cancelled. A failure that may pass is tried again in time."""
    while True:
        await asyncio.sleep(max(length_s / RENEWALS_PER_LEASE, RENEWAL_INTERVAL_S_MIN))
        try:
            length_s = await ask()
        except RetryableError:
            length_s = 0.0
