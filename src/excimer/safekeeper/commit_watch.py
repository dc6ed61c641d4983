"""Lets readers on the event loop wait for a commit LSN that threads advance.

A thread that commits pays for waking the loop only while somebody waits, and once per batch.

Not here: what the commit LSN means (`consensus.acceptor`).
"""

import asyncio

from excimer._native.append_path import CommitMark
from excimer.base.lsn import Lsn


class CommitWatch:
    """`advance` and `wake` are any thread's; everything else belongs to the event loop it was made on."""

    def __init__(self, commit_lsn: Lsn) -> None:
        self.mark = CommitMark(commit_lsn)
        """Who raises it otherwise than by `advance` calls `wake` when that is asked for."""
        self._loop = asyncio.get_running_loop()
        self._waiters: set[asyncio.Future[None]] = set()

    @property
    def commit_lsn(self) -> Lsn:
        return self.mark.commit_lsn

    def advance(self, commit_lsn: Lsn) -> None:
        if self.mark.advance(commit_lsn):
            self.wake()

    def wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    async def wait_beyond(self, lsn: Lsn, timeout_s: float) -> bool:
        """Whether the commit LSN has passed `lsn`; waits at most `timeout_s` for it."""
        waiter = self._loop.create_future()
        self._waiters.add(waiter)
        self.mark.wait_next()  # before looking, so that no advance falls in between
        try:
            if self.commit_lsn <= lsn:
                await asyncio.wait((waiter,), timeout=timeout_s)
        finally:
            self._waiters.discard(waiter)
            waiter.cancel()
        return self.commit_lsn > lsn

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
