"""Which LSN of a branch is meant by "now", by a time, or by an LSN that a user gives.

What a PostgreSQL user reads from `pg_current_wal_lsn()` may be ahead of everybody else: the walsender, the
safekeepers and the pageserver follow one after the other::

    begin ............ ingested ............ committed ......... flushed ......... written
          pageserver has it    a majority has it     some safekeeper has it      only the compute

* At or below the commit LSN an LSN is good; the pageserver waits until it has ingested so far.
* Above it, up to what a majority has flushed, it lies within a record that is not whole yet: then the commit
  LSN is meant, the end of the last whole record at or before it.
* Above that it is waited for, as long as a compute writes and WAL comes; then it is refused, as is at once an
  LSN that nobody writes towards.

An LSN on a page border or in a page's header is the end of the record before it (`base.lsn.record_end`), and
one within a whole record shows what was there before that record.

Not here: whether history still reaches so far back, which is the pageserver's to say.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple, TypeGuard

from excimer.base.clock import Clock
from excimer.base.errors import RetryableError
from excimer.base.lsn import Lsn, format_lsn, record_end
from excimer.controller import core
from excimer.controller.model import BadRequestError, Tenant, Timeline
from excimer.controller.remote import PageserverApi, PageserverTimeline, SafekeeperApi, SafekeeperTimeline

COMMIT_WAIT_S: Final = 0.3
"""How long a branch at the head waits for WAL that is flushed somewhere to be known as committed."""
COMMIT_POLL_S: Final = 0.02
WRITTEN_STALL_S: Final = 2.0
"""How long an LSN that only the compute may have is waited for while no WAL comes: its walwriter flushes five
times a second.
"""
WRITTEN_WAIT_S_MAX: Final = 30.0

INGEST_STALL_S: Final = 10.0
"""How long the pageserver is waited for while it ingests nothing."""
INGEST_WAIT_S_MAX: Final = 90.0
INGEST_POLL_S: Final = 0.05


class QuorumUnreachableError(RetryableError):
    """Fewer than a majority of safekeepers answered."""


class IngestBehindError(RetryableError):
    """The pageserver does not have all WAL of a branch yet."""


class LsnNotReachedError(BadRequestError):
    """An LSN that the branch's WAL has not come to."""


class QuorumPosition(NamedTuple):
    """How far a timeline's WAL has come, as a majority of safekeepers says."""

    flush_lsn: Lsn
    """The highest that any has."""
    majority_flush_lsn: Lsn
    """What a majority has at least."""
    commit_lsn: Lsn
    """The end of a record."""
    has_writer: bool
    """A compute is connected that writes."""


def plan_point(end_lsn: Lsn, position: QuorumPosition, waited_s: float, stalled_s: float) -> Lsn | None:
    """Which LSN `end_lsn`, the end of a record, stands for; None: wait, and look again.

    `stalled_s` is how long `position` has been what it is. Raises `LsnNotReachedError`, without the name of
    a branch.
    """
    if end_lsn <= position.commit_lsn:
        return end_lsn
    if stalled_s < COMMIT_WAIT_S and end_lsn <= position.flush_lsn:
        return None
    if end_lsn <= position.majority_flush_lsn:
        return position.commit_lsn
    if position.has_writer and stalled_s < WRITTEN_STALL_S and waited_s < WRITTEN_WAIT_S_MAX:
        return None
    raise LsnNotReachedError(
        f"has not reached LSN {format_lsn(end_lsn)}: it is at {format_lsn(position.commit_lsn)}"
    )


def _is_behind(known: PageserverTimeline | None, lsn: Lsn) -> TypeGuard[PageserverTimeline]:
    """Whether a pageserver that serves a branch will have WAL up to there later."""
    if known is None or known.is_archived or known.is_damaged:
        return False
    return known.last_record_lsn < lsn


def _behind(timeline: Timeline, seen_lsn: Lsn, lsn: Lsn) -> IngestBehindError:
    return IngestBehindError(
        f"the pageserver has branch {timeline.name!r} up to {format_lsn(seen_lsn)} and not yet "
        f"up to {format_lsn(lsn)}: try again"
    )


class BranchPoints:
    """Asks safekeepers and pageserver; for all operations that take a point in history."""

    def __init__(
        self,
        clock: Clock,
        safekeeper_apis: Callable[[Timeline], Awaitable[list[SafekeeperApi]]],
        pageserver_api: Callable[[Tenant], Awaitable[PageserverApi]],
    ) -> None:
        self._clock = clock
        self._safekeeper_apis = safekeeper_apis
        self._pageserver_api = pageserver_api

    async def find(self, tenant: Tenant, timeline: Timeline, at: Lsn | str | None) -> Lsn:
        """The LSN of a point: an LSN, a time (RFC 3339), or None for the head.

        Raises `LsnNotReachedError`, RefusedError for a time outside the history, RetryableError.
        """
        if at is None:
            return await self.newest_commit_lsn(timeline)
        if isinstance(at, str):
            return await self.lsn_at(tenant, timeline, at)
        return await self._reached(tenant, timeline, at)

    async def find_ingested(self, tenant: Tenant, timeline: Timeline, at: Lsn | str | None) -> Lsn:
        """As `find`, and the pageserver has WAL up to there.

        It may wait for long, so nobody who calls it holds the tenant's lock. Raises also `IngestBehindError`.
        """
        lsn = await self.find(tenant, timeline, at)
        if isinstance(at, str):
            return lsn  # the pageserver itself has named it
        end_lsn = record_end(lsn, timeline.wal_segment_size)
        await self.wait_until_ingested(await self._pageserver_api(tenant), timeline, end_lsn)
        return lsn

    async def newest_commit_lsn(self, timeline: Timeline) -> Lsn:
        """At least everything that a client was told is committed before this call.

        Such a commit is flushed at a majority, so every majority has seen it flushed; its commit LSN
        follows with the proposer's next message, which is waited for a little (it never comes if the
        compute has just died, and then it was not yet known to be committed either).
        """
        wanted = committed = await self._read_position(timeline)
        deadline = self._clock.monotonic() + COMMIT_WAIT_S
        while committed.commit_lsn < wanted.flush_lsn and self._clock.monotonic() < deadline:
            await asyncio.sleep(COMMIT_POLL_S)
            committed = await self._read_position(timeline)
        return max(committed.commit_lsn, timeline.start_lsn or Lsn(0))

    async def lsn_at(self, tenant: Tenant, timeline: Timeline, timestamp: str) -> Lsn:
        """The newest LSN before any commit later than the timestamp (RFC 3339).

        A pageserver that knows no later commit may only be behind: then it is asked again when it has what
        was committed when it was first asked.
        """
        pageserver = await self._pageserver_api(tenant)
        lsn, is_newest = await pageserver.lsn_by_timestamp(tenant.tenant_id, timeline.timeline_id, timestamp)
        if is_newest:
            head_lsn = await self.newest_commit_lsn(timeline)
            if lsn < head_lsn:
                await self.wait_until_ingested(pageserver, timeline, head_lsn)
                lsn, _ = await pageserver.lsn_by_timestamp(tenant.tenant_id, timeline.timeline_id, timestamp)
        return lsn

    async def wait_until_ingested(self, pageserver: PageserverApi, timeline: Timeline, lsn: Lsn) -> None:
        """Raises `IngestBehindError` if the pageserver does not come so far in a bounded time.

        One that does not serve the branch is not waited for: what is asked of it next says why.
        """
        clock = self._clock
        begun = progressed = clock.monotonic()
        seen_lsn = Lsn(0)
        while True:
            known = (await pageserver.list_timelines(timeline.tenant_id)).get(timeline.timeline_id)
            if not _is_behind(known, lsn):
                return
            now = clock.monotonic()
            if known.last_record_lsn > seen_lsn:
                seen_lsn, progressed = known.last_record_lsn, now
            if now - progressed >= INGEST_STALL_S or now - begun >= INGEST_WAIT_S_MAX:
                raise _behind(timeline, seen_lsn, lsn)
            await asyncio.sleep(INGEST_POLL_S)

    async def require_ingested(self, pageserver: PageserverApi, timeline: Timeline, lsn: Lsn) -> None:
        """As `wait_until_ingested`, and does not wait."""
        known = (await pageserver.list_timelines(timeline.tenant_id)).get(timeline.timeline_id)
        if _is_behind(known, lsn):
            raise _behind(timeline, known.last_record_lsn, lsn)

    async def _reached(self, tenant: Tenant, timeline: Timeline, at: Lsn) -> Lsn:
        end_lsn = record_end(at, timeline.wal_segment_size)
        clock = self._clock
        begun = changed = clock.monotonic()
        last: QuorumPosition | None = None
        while True:
            try:
                position = await self._read_position(timeline)
            except QuorumUnreachableError:
                if await self._is_ingested(tenant, timeline, end_lsn):
                    return at
                raise
            now = clock.monotonic()
            if position != last:
                last, changed = position, now
            try:
                point = plan_point(end_lsn, position, now - begun, now - changed)
            except LsnNotReachedError as error:
                raise LsnNotReachedError(f"branch {timeline.name!r} {error}") from None
            if point is not None:
                return at if point == end_lsn else point
            await asyncio.sleep(COMMIT_POLL_S)

    async def _is_ingested(self, tenant: Tenant, timeline: Timeline, end_lsn: Lsn) -> bool:
        """Only committed WAL is ingested (C3), so that old history needs no safekeeper."""
        known = await (await self._pageserver_api(tenant)).list_timelines(tenant.tenant_id)
        found = known.get(timeline.timeline_id)
        return found is not None and found.last_record_lsn >= end_lsn

    async def _read_position(self, timeline: Timeline) -> QuorumPosition:
        apis = await self._safekeeper_apis(timeline)
        answers = await asyncio.gather(
            *(api.read_timeline(timeline.tenant_id, timeline.timeline_id) for api in apis),
            return_exceptions=True,
        )
        heard = [answer for answer in answers if isinstance(answer, SafekeeperTimeline)]
        require_quorum(len(heard), answers)
        flushed = sorted((each.flush_lsn for each in heard), reverse=True)
        return QuorumPosition(
            flush_lsn=flushed[0],
            majority_flush_lsn=flushed[core.quorum(len(answers)) - 1],
            commit_lsn=max(each.commit_lsn for each in heard),
            has_writer=any(each.writers for each in heard),
        )


def require_quorum(succeeded: int, answers: Sequence[object]) -> None:
    """Raises the first failure, or `QuorumUnreachableError`, unless a majority succeeded."""
    if succeeded >= core.quorum(len(answers)):
        return
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    for failure in failures:
        if not isinstance(failure, RetryableError):
            raise failure
    raise QuorumUnreachableError(
        f"{succeeded} of {len(answers)} safekeepers answered, "
        f"{core.quorum(len(answers))} are needed: {failures[0]}"
    )
