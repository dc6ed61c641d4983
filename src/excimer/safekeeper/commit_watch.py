"""Lets readers on the event loop wait for a commit LSN that threads advance.

A thread that commits pays for waking the loop only while somebody waits, and once per batch.

Not here: what the commit LSN means (`consensus.acceptor`).
"""

import asyncio

from excimer.base.lsn import Lsn


class CommitWatch:
    """`advance` is any thread's; everything else belongs to the event loop it was made on."""

    def __init__(self, commit_lsn: Lsn) -> None:
        self.commit_lsn = commit_lsn
        self._loop = asyncio.get_running_loop()
        self._waiters: set[asyncio.Future[None]] = set()
        self._is_wake_due = False

    def advance(self, commit_lsn: Lsn) -> None:
        self.commit_lsn = max(self.commit_lsn, commit_lsn)
        if self._waiters and not self._is_wake_due and not self._loop.is_closed():
            self._is_wake_due = True
            self._loop.call_soon_threadsafe(self._wake)

    async def wait_beyond(self, lsn: Lsn, timeout_s: float) -> bool:
        """Whether the commit LSN has passed `lsn`; waits at most `timeout_s` for it."""
        waiter = self._loop.create_future()
        self._waiters.add(waiter)  # before looking, so that no advance falls in between
        try:
            if self.commit_lsn <= lsn:
                await asyncio.wait((waiter,), timeout=timeout_s)
        finally:
            self._waiters.discard(waiter)
            waiter.cancel()
        return self.commit_lsn > lsn

    def _wake(self) -> None:
        self._is_wake_due = False
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
