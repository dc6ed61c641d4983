"""Finds out who is there in a running PostgreSQL, at next to no cost while nobody is.

::

    every few seconds   logins (shared memory)   and   the postmaster's children (/proc)
                            | another number: used            | one that is not known yet
                            '-> no more is asked              '-> pg_stat_activity, once: what is it?

So PostgreSQL is asked nothing, and no process of it wakes up, while its processes are the same: an idle
server has its checkpointer, its writers and launchers, and our walsender. A session that began and ended
between two samples has left its login behind.

Processes are told apart by `backend_type`, never by wait events, whose names change between versions, nor by
WAL, which an idle server writes too.

Not here: what follows from it (`idle_policy`).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from excimer.base.clock import Clock
from excimer.base.errors import ExcimerError
from excimer.compute.idle_policy import Sample
from excimer.service.logs import get_logger

SESSIONS: Final = "client sessions"
REPLICATION: Final = "replication clients"
SUBSCRIPTIONS: Final = "enabled subscriptions"
MAINTENANCE: Final = "autovacuum workers"
EXTENSIONS: Final = "working background workers"

_QUIET_TYPES: Final = frozenset(
    {
        *("autovacuum launcher", "logical replication launcher", "background writer", "checkpointer"),
        *("walwriter", "startup", "archiver", "walsummarizer", "walreceiver", "slotsync worker", "io worker"),
    }
)
"""Of 14 to 18: what PostgreSQL runs for itself."""

log = get_logger(__name__)


class ServerProcess(NamedTuple):
    """A row of pg_stat_activity."""

    backend_type: str
    is_in_transaction: bool
    is_ours: bool = False
    """The proposer's walsender."""


class ServerLook(NamedTuple):
    """What PostgreSQL says of itself; without the connection that asked."""

    processes: Mapping[int, ServerProcess]
    """By pid."""
    enabled_subscriptions: int


class ServerQuestion(Protocol):
    async def __call__(self) -> ServerLook:
        """Raises ExcimerError if it is not answered."""


class Logins(Protocol):
    @property
    def logins(self) -> int: ...


class Kind(Enum):
    QUIET = auto()
    """PostgreSQL's own, and what is not in pg_stat_activity: the logger, who has not logged in yet."""
    SESSION = auto()
    REPLICATION = auto()
    SUBSCRIPTION = auto()
    MAINTENANCE = auto()
    EXTENSION = auto()
    """Not PostgreSQL's own, like a scheduler of jobs: it may be there for ever and do nothing."""


def kind_of(process: ServerProcess) -> Kind:
    name = process.backend_type
    if process.is_ours or name in _QUIET_TYPES:
        return Kind.QUIET
    if name in ("client backend", "parallel worker"):
        return Kind.SESSION
    if name == "walsender":
        return Kind.REPLICATION
    if name.startswith("logical replication "):
        return Kind.SUBSCRIPTION
    if name == "autovacuum worker":
        return Kind.MAINTENANCE
    return Kind.EXTENSION


_LASTING: Final = frozenset({Kind.QUIET, Kind.SESSION, Kind.MAINTENANCE, Kind.EXTENSION})
"""A process stays what it was found to be. Of a walsender that has just begun it is not known yet whether it
is the proposer's."""


class ActivitySampler:
    """Of one life of PostgreSQL."""

    def __init__(
        self, children: Callable[[], frozenset[int]], logins: Logins, ask: ServerQuestion, clock: Clock
    ) -> None:
        """`children`: pids of the postmaster's, see `child_pids`."""
        self._children = children
        self._logins = logins
        self._ask = ask
        self._clock = clock
        self._kinds: dict[int, Kind] = {}
        self._seen_logins = logins.logins
        self._may_pass = False
        """The newest look found what no process shows: a job, a subscription."""
        self.samples = 0
        self.questions = 0
        """How often PostgreSQL was asked."""

    async def sample(self) -> Sample:
        """Asks PostgreSQL only if it must."""
        self.samples += 1
        if self._has_new_logins():
            return self._count({})
        children = self._children()
        self._kinds = {pid: kind for pid, kind in self._kinds.items() if pid in children}
        if children <= self._kinds.keys() and not self._may_pass:
            return self._count(self._kinds)
        return await self.look()

    async def look(self) -> Sample:
        """Asks PostgreSQL. A login meanwhile shows in the sample's count, or in that of the next."""
        children = self._children()
        try:
            self.questions += 1
            found = await self._ask()
        except ExcimerError as error:
            log.debug("postgres does not say who is there", error=error)
            return self._count(self._kinds)._replace(is_known=False)
        kinds = {pid: kind_of(process) for pid, process in found.processes.items()}
        if not self._has_new_logins():
            self._kinds = {pid: kinds.get(pid, Kind.QUIET) for pid in children if _lasts(kinds.get(pid))}
        sample = self._count(kinds)
        working = sum(
            kinds[pid] is Kind.EXTENSION and process.is_in_transaction
            for pid, process in found.processes.items()
        )
        uses = {**sample.uses}
        if found.enabled_subscriptions:
            uses[SUBSCRIPTIONS] = found.enabled_subscriptions
        holds = {**sample.holds, **({EXTENSIONS: working} if working else {})}
        self._may_pass = bool(working or found.enabled_subscriptions)
        return sample._replace(uses=uses, holds=holds)

    def _has_new_logins(self) -> bool:
        """Then it was used anyway; and a pid may belong to another process now."""
        logins = self._logins.logins
        if logins == self._seen_logins:
            return False
        self._seen_logins = logins
        self._kinds.clear()
        return True

    def _count(self, kinds: Mapping[int, Kind]) -> Sample:
        count = Counter(kinds.values())
        uses = {SESSIONS: count[Kind.SESSION], REPLICATION: count[Kind.REPLICATION]}
        uses[SUBSCRIPTIONS] = count[Kind.SUBSCRIPTION]
        holds = {MAINTENANCE: count[Kind.MAINTENANCE]}
        return Sample(self._clock.monotonic(), self._seen_logins, _some(uses), _some(holds))


def _lasts(kind: Kind | None) -> bool:
    return kind is None or kind in _LASTING


def _some(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def child_pids(parent_pid: int) -> frozenset[int]:
    """Pids of a process's children; none if it is gone. Costs one read of /proc."""
    try:
        listed = Path(f"/proc/{parent_pid}/task/{parent_pid}/children").read_bytes()
    except OSError:
        return frozenset()
    return frozenset(map(int, listed.split()))
