"""Keeps the LSN of an export readable while it takes, however quickly garbage is collected."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final

from excimer.base.errors import RetryableError
from excimer.base.lsn import Lsn, format_lsn
from excimer.export.page_stream import BranchAccess
from excimer.service.http_client import HttpClient, path_of

RENEWALS_PER_LEASE: Final = 4
RENEWAL_INTERVAL_S_MIN: Final = 1.0

Ask = Callable[[], Awaitable[float]]
"""Takes or renews the lease; how many seconds it holds from now on."""


def lease_of(access: BranchAccess, lsn: Lsn) -> Ask:
    """Of an LSN of the branch, at its pageserver. Raises what that one answers: refused, when the history
    is gone.
    """
    client = HttpClient("pageserver", access.pageserver_http_address, access.token)
    path = path_of("v1", "tenant", access.tenant_id, "timeline", access.timeline_id, "lsn_lease")

    async def ask() -> float:
        answer = await client.post(path, {"lsn": format_lsn(lsn)})
        return datetime.fromisoformat(answer["valid_until"]).timestamp() - time.time()

    return ask


async def keep_lease(ask: Ask, length_s: float) -> None:
    """Renews a lease of this length, until cancelled. A failure that may pass is tried again in time."""
    while True:
        await asyncio.sleep(max(length_s / RENEWALS_PER_LEASE, RENEWAL_INTERVAL_S_MIN))
        try:
            length_s = await ask()
        except RetryableError:
            length_s = 0.0
