"""A safekeeper's timeline without its process: a proposer's messages in, its answers out, any disk below."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry

from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import INVALID_LSN, Lsn
from excimer.consensus.acceptor import AcceptorState, ConnectionId
from excimer.safekeeper.control_file import ControlRecord
from excimer.safekeeper.disk import Disk
from excimer.safekeeper.metrics import SafekeeperMetrics
from excimer.safekeeper.timeline import SafekeeperTimeline, TimelineClosedError
from excimer.wire.safekeeping import (
    AcceptorMessage,
    AppendRequest,
    CommitAnnounce,
    ElectedResponse,
    ProposerElected,
    ProposerId,
    ProposerMessage,
    Term,
    TermStart,
    TimelineIdentity,
    VoteRequest,
    VoteResponse,
)
from tests.kit.wal_builder import SYSTEM_ID

SEGMENT_SIZE_BYTES = 1 << 20
START = Lsn(3 * SEGMENT_SIZE_BYTES + 0x2000 + 24)
IDENTITY = TimelineIdentity(
    tenant_id=TenantId("aa" * 16),
    timeline_id=TimelineId("bb" * 16),
    pg_version=18,
    system_id=SYSTEM_ID,
    wal_segment_size_bytes=SEGMENT_SIZE_BYTES,
)
CONNECTION = ConnectionId(1)


def create_timeline(directory: Path) -> None:
    record = ControlRecord.of(NodeId(1), IDENTITY, START, AcceptorState.bootstrap(START))
    SafekeeperTimeline.create(directory, record, Disk())


@contextmanager
def opened(
    directory: Path, disk: Disk | None = None, metrics: SafekeeperMetrics | None = None
) -> Iterator[SafekeeperTimeline]:
    """The timeline as a process finds it at its start. Leaving is a crash: nothing is saved."""

    async def open_it() -> SafekeeperTimeline:
        return SafekeeperTimeline(
            directory,
            disk=disk or Disk(),
            preparer=preparer,
            metrics=metrics or SafekeeperMetrics(CollectorRegistry()),
        )

    with ThreadPoolExecutor(1) as preparer:
        yield asyncio.run(open_it())


def close(timeline: SafekeeperTimeline) -> None:
    timeline.close(TimelineClosedError("the test is over"))


class Driver:
    """A proposer of one timeline object."""

    def __init__(self, timeline: SafekeeperTimeline, number: int = 1) -> None:
        self.timeline = timeline
        self.id = ProposerId(bytes([number]) * 16)
        self.term = Term(timeline.term)
        self.election: ProposerElected

    def say(self, *messages: ProposerMessage) -> list[AcceptorMessage]:
        return [message for _, message in self.timeline.handle(CONNECTION, messages)]

    def win(self) -> Lsn:
        """Wins the next term, begins it at the last record's end."""
        self.term = Term(self.term + 1)
        (vote,) = self.say(VoteRequest(self.term, self.id))
        assert isinstance(vote, VoteResponse)
        assert vote.granted
        self.adopt(vote, vote.last_record_end_lsn)
        return vote.last_record_end_lsn

    def adopt(self, vote: VoteResponse, start_lsn: Lsn) -> None:
        kept = tuple(entry for entry in vote.history if entry.start_lsn <= start_lsn)
        self.election = ProposerElected(self.term, (*kept, TermStart(self.term, start_lsn)))
        self.say(self.election)

    def rejoin(self) -> Lsn:
        """Announces the same election again, as after a lost connection; where to go on from."""
        (answer,) = self.say(self.election)
        assert isinstance(answer, ElectedResponse)
        return answer.flush_lsn

    def append(self, begin_lsn: Lsn, wal: bytes) -> list[AcceptorMessage]:
        return self.say(AppendRequest(self.term, begin_lsn, INVALID_LSN, INVALID_LSN, wal))

    def commit(self, commit_lsn: Lsn) -> None:
        self.say(CommitAnnounce(self.term, commit_lsn, INVALID_LSN))
