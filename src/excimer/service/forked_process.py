"""The first steps of a fork that becomes another process: session, signals, standard streams, name.

Whoever forks blocks `FORK_SIGNALS` around it, so that none is taken for the other's::

    with forking():
        pid = os.fork()
        if pid == 0:
            leave_parent("endpoint-main", ["-m", "excimer.compute", path], output=log)

Not here: what it runs then.
"""

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from excimer.service.process_names import show_as

FORK_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
"""Those that a parent may handle itself."""


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Signals wait while the block runs, which is for the parent and for a child up to `leave_parent`."""
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORK_SIGNALS)
    try:
        yield
    finally:
        if os.getpid() == parent:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORK_SIGNALS)


def leave_parent(name: str, arguments: Sequence[str], *, output: int) -> None:
    """In the fork, which takes `output` over and has nothing to read. Raises OSError."""
    signal.set_wakeup_fd(-1)
    for number in FORK_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORK_SIGNALS)
    os.setsid()
    _take(os.open(os.devnull, os.O_RDONLY), [0])
    _take(output, [1, 2])
    show_as(name, arguments)


def close_all_but(kept: int) -> None:
    """Every descriptor above standard error except `kept`: the parent's locks, sockets and event loop.

    The objects that hold them must live on: one that is collected would close somebody else's descriptor.
    """
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))


def _take(descriptor: int, places: Iterable[int]) -> None:
    for place in places:
        os.dup2(descriptor, place)
    os.close(descriptor)
