"""The token by which an export reads: renewed while it takes, however long that is.

Connections that are open live on without it; each new one, and each call about the lease, shows the newest.

Not here: what the token opens (docs/architecture/rights.md), who signs it (the controller).
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from excimer.base.errors import ExcimerError

RENEW_AFTER: Final = 0.5
"""Part of its life."""
RETRY_S: Final = 5.0


class NewToken(NamedTuple):
    text: str
    valid_for_s: float


Renew = Callable[[], Awaitable[NewToken]]


class ReadingToken:
    """`text` is always the newest; `keep` renews it."""

    def __init__(self, first: NewToken) -> None:
        self.text = first.text
        self._valid_for_s = first.valid_for_s

    async def keep(self, renew: Renew) -> None:
        """Renews it halfway through its life, until cancelled.

        Whatever a renewal fails of, it is tried again: what the old token opens, it opens until it runs out,
        and then whoever reads is told so.
        """
        while True:
            await asyncio.sleep(self._valid_for_s * RENEW_AFTER)
            self.text, self._valid_for_s = await _renewed(renew)


async def _renewed(renew: Renew) -> NewToken:
    while True:
        try:
            return await renew()
        except ExcimerError:
            await asyncio.sleep(RETRY_S)
