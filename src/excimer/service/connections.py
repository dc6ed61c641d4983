"""Who may be connected to a port: bounded numbers, and one deadline for proving who one is.

::

    accepted --> waiting --authenticated--> authenticated --> released
                 |  at most `waiting_max`; the oldest goes when one more comes
                 |  at most `handshake_s` from accept to proof, whatever trickles in meanwhile
                 '--> its socket is shut down, which whoever reads from it sees as the end

The two kinds are counted apart, so that strangers crowd out strangers only: who has a token proves it
within milliseconds, long before as many others have come as may wait.

An `HttpConnection` goes back to waiting after each answer; other connections stay authenticated.

Not here: accepting (`accept`), and what a proof is (`wire.auth`).
"""

import asyncio
import contextlib
import resource
import socket
import threading
from dataclasses import dataclass
from typing import Final

from excimer.base.errors import RetryableError
from excimer.service.logs import get_logger

_FILES_PER_WAITING: Final = 16
_FILES_PER_AUTHENTICATED: Final = 4

log = get_logger(__name__)


class TooManyConnectionsError(RetryableError):
    """A port has as many authenticated connections as it may have."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds of one port."""

    authenticated_max: int = 1000
    waiting_max: int = 64
    """Connections that have not proved yet who they are."""
    handshake_s: float = 10.0
    """From accept to proof, TLS included."""
    read_s: float = 60.0
    """A peer that is sent an answer takes some 48 KiB of it in this time (asyncio's buffer, from its upper to
    its lower mark), or loses its connection. The answer as a whole may take as long as it does."""

    def within_open_files(self, files_max: int) -> "ConnectionLimits":
        """The same, but no more than a process can hold that may open `files_max` files.

        A process has up to three ports, and needs files for its work too.
        """
        return ConnectionLimits(
            authenticated_max=max(1, min(self.authenticated_max, files_max // _FILES_PER_AUTHENTICATED)),
            waiting_max=max(1, min(self.waiting_max, files_max // _FILES_PER_WAITING)),
            handshake_s=self.handshake_s,
            read_s=self.read_s,
        )


def process_limits(limits: ConnectionLimits | None = None) -> ConnectionLimits:
    """`limits` (by default the defaults), bounded by what this process may open."""
    files_max, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files_max == resource.RLIM_INFINITY:
        return limits or ConnectionLimits()
    return (limits or ConnectionLimits()).within_open_files(files_max)


class Admission:
    """One connection's place at a port, from accept to `release`. May be used from any thread."""

    __slots__ = ("_gate", "deadline", "socket")

    def __init__(self, gate: "ConnectionGate", accepted: socket.socket, deadline: float) -> None:
        self._gate = gate
        self.socket = accepted
        self.deadline = deadline
        """On the event loop's clock; counts while the connection waits."""

    @property
    def port(self) -> str:
        """The port's name in logs."""
        return self._gate.what

    @property
    def limits(self) -> ConnectionLimits:
        return self._gate.limits

    def authenticated(self) -> None:
        """It has proved who it is: it may stay. Raises `TooManyConnectionsError`. Idempotent."""
        self._gate.promote(self)

    def waits_again(self, limit_s: float) -> None:
        """It must prove itself anew within `limit_s`. On the event loop only."""
        self._gate.demote(self, limit_s)

    def release(self) -> None:
        """To be called before the socket is closed: a later one may get its number. Idempotent."""
        self._gate.remove(self)


class ConnectionGate:
    """The places of one port. `admit` is called on the event loop."""

    def __init__(self, what: str, limits: ConnectionLimits) -> None:
        self.what = what
        self.limits = limits
        self._lock = threading.Lock()
        self._waiting: dict[Admission, None] = {}  # in the order of arrival
        self._authenticated: set[Admission] = set()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def authenticated_count(self) -> int:
        return len(self._authenticated)

    def admit(self, accepted: socket.socket) -> Admission:
        """A place for a new connection; if too many wait, the one that waits longest loses its."""
        deadline = asyncio.get_running_loop().time() + self.limits.handshake_s
        admission = Admission(self, accepted, deadline)
        with self._lock:
            is_full = len(self._waiting) >= self.limits.waiting_max
            self._waiting[admission] = None
        if is_full:
            self.evict_oldest()
        self._arm(deadline)
        return admission

    def evict_oldest(self) -> bool:
        """Ends the connection that has waited longest; False if none waits."""
        with self._lock:
            oldest = next(iter(self._waiting), None)
            if oldest is None:
                return False
            self._shut_down(oldest)
        log.warning("unauthenticated connection dropped", port=self.what, reason="others wait for its place")
        return True

    def promote(self, admission: Admission) -> None:
        with self._lock:
            if admission in self._authenticated:
                return
            if len(self._authenticated) >= self.limits.authenticated_max:
                raise TooManyConnectionsError(
                    f"{self.what} has {self.limits.authenticated_max} connections: close some, or wait"
                )
            if admission in self._waiting:  # else it has just been dropped
                del self._waiting[admission]
                self._authenticated.add(admission)

    def demote(self, admission: Admission, limit_s: float) -> None:
        with self._lock:
            if admission not in self._waiting and admission not in self._authenticated:
                return
            self._authenticated.discard(admission)
            self._waiting.pop(admission, None)
            admission.deadline = asyncio.get_running_loop().time() + limit_s
            self._waiting[admission] = None
            is_full = len(self._waiting) > self.limits.waiting_max
        if is_full:
            self.evict_oldest()
        self._arm(admission.deadline)

    def remove(self, admission: Admission) -> None:
        with self._lock:
            self._waiting.pop(admission, None)
            self._authenticated.discard(admission)

    def close(self) -> None:
        """Stops looking at deadlines; connections are their owners' to end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, deadline: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(deadline, self._expire)

    def _expire(self) -> None:
        """Ends what has waited beyond its deadline."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        with self._lock:
            expired = [each for each in self._waiting if each.deadline <= now]
            for admission in expired:
                self._shut_down(admission)
            next_deadline = min((each.deadline for each in self._waiting), default=None)
        if expired:
            log.info("connections dropped", port=self.what, reason="no proof in time", count=len(expired))
        if next_deadline is not None:
            self._arm(next_deadline)

    def _shut_down(self, admission: Admission) -> None:
        """With the lock held, so that the socket has not been closed meanwhile."""
        self._waiting.pop(admission, None)
        with contextlib.suppress(OSError):
            admission.socket.shutdown(socket.SHUT_RDWR)
