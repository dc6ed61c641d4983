"""An asyncio event loop whose wait for sockets can do native work meanwhile.

::

    timers, callbacks (Python)  ->  wait: epoll, and what a `NativeWaiter` does with its own sockets
             ^                                      |
             +-- other sockets are ready, a timer is due, the waiter has something for Python

The waiter runs on the loop's thread while no Python code of the loop does, so the two need no locks. To
asyncio all this is a selector that sometimes takes longer.

Not here: any native work (`compute.commit_relay`).
"""

import asyncio
import math
import select
import selectors
from typing import Protocol


class NativeWaiter(Protocol):
    def wait(self, epoll_fd: int, timeout_ms: int) -> list[tuple[int, int]] | None:
        """Waits for `epoll_fd` as epoll does (-1: for ever): pairs of a descriptor and a mask of those events
        that it has not dealt with. None, at once, while it has nothing to do with the sockets.
        """


class NativeSelector(selectors.EpollSelector):
    """`waiter` does the waiting, if there is one."""

    waiter: NativeWaiter | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.waiter is None:
            return super().select(timeout)
        timeout_ms = -1 if timeout is None else max(math.ceil(timeout * 1000), 0)
        events = self.waiter.wait(self.fileno(), timeout_ms)
        if events is None:
            return super().select(timeout)
        keys = self.get_map()
        ready = []
        for fd, mask in events:
            key = keys.get(fd)
            wanted = (selectors.EVENT_WRITE if mask & ~select.EPOLLIN else 0) | (
                selectors.EVENT_READ if mask & ~select.EPOLLOUT else 0
            )
            if key is not None and wanted & key.events:
                ready.append((key, wanted & key.events))
        return ready


class NativeEventLoop(asyncio.SelectorEventLoop):
    """`serve` gives its waits to a waiter, or takes them back with None."""

    def __init__(self) -> None:
        self._native_selector = NativeSelector()
        super().__init__(self._native_selector)

    def serve(self, waiter: NativeWaiter | None) -> None:
        self._native_selector.waiter = waiter
