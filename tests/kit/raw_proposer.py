"""A proposer of one safekeeper, by hand: says exactly what a test wants on a blocking socket."""

import socket

from excimer.base.address import Address
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import INVALID_LSN, Lsn
from excimer.wire.safekeeping import (
    AcceptorFrame,
    AcceptorGreeting,
    AcceptorMessageParser,
    AppendRequest,
    AppendResponse,
    CommitAnnounce,
    ElectedResponse,
    ProposerElected,
    ProposerFrame,
    ProposerGreeting,
    ProposerId,
    Term,
    TermStart,
    TimelineIdentity,
    VoteRequest,
    VoteResponse,
    encode_proposer_message,
)

TIMEOUT_S = 10.0


class RawProposer:
    """Closes its socket at the end of a `with` block."""

    def __init__(self, address: Address, number: int = 1) -> None:
        self.id = ProposerId(bytes([number]) * 16)
        self.term = Term(0)
        self.commit_lsn = Lsn(0)
        self._socket = socket.create_connection(address, timeout=TIMEOUT_S)
        self._parser = AcceptorMessageParser()
        self._received: list[AcceptorFrame] = []

    def __enter__(self) -> "RawProposer":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, *messages: ProposerFrame) -> None:
        self._socket.sendall(b"".join(encode_proposer_message(message) for message in messages))

    def receive(self) -> AcceptorFrame | None:
        """The next message; None when the safekeeper has closed."""
        while not self._received:
            data = self._socket.recv(1 << 16)
            if not data:
                return None
            self._received = self._parser.feed(data)
        return self._received.pop(0)

    def greet(self, tenant_id: TenantId, timeline_id: TimelineId, token: str) -> AcceptorFrame | None:
        identity = TimelineIdentity(
            tenant_id=tenant_id, timeline_id=timeline_id, pg_version=0, system_id=0, wal_segment_size_bytes=0
        )
        self.send(ProposerGreeting(identity=identity, proposer_id=self.id, token=token))
        answer = self.receive()
        if isinstance(answer, AcceptorGreeting):
            self.term = answer.term
        return answer

    def win(self) -> Lsn:
        """Wins the next term with this one vote and adopts what is there; where its WAL begins."""
        self.term = Term(self.term + 1)
        self.send(VoteRequest(self.term, self.id))
        vote = self.receive()
        assert isinstance(vote, VoteResponse)
        assert vote.granted
        start_lsn = vote.last_record_end_lsn
        history = (*(entry for entry in vote.history), TermStart(self.term, start_lsn))
        self.send(ProposerElected(self.term, history))
        answer = self.receive()
        assert isinstance(answer, ElectedResponse)
        assert answer.term == self.term
        return start_lsn

    def append(self, begin_lsn: Lsn, wal: bytes) -> AcceptorFrame | None:
        """Appends and returns the answer, if the safekeeper gives one."""
        self.send(AppendRequest(self.term, begin_lsn, INVALID_LSN, INVALID_LSN, wal))
        return self.receive()

    def append_all(self, begin_lsn: Lsn, wal: bytes, chunk_size_bytes: int = 1 << 18) -> Lsn:
        """Appends in chunks; everything must be acknowledged. Returns the end."""
        for offset in range(0, len(wal), chunk_size_bytes):
            part = wal[offset : offset + chunk_size_bytes]
            answer = self.append(Lsn(begin_lsn + offset), part)
            assert isinstance(answer, AppendResponse)
            assert answer.flush_lsn == begin_lsn + offset + len(part)
        return Lsn(begin_lsn + len(wal))

    def commit(self, commit_lsn: Lsn) -> None:
        self.send(CommitAnnounce(self.term, commit_lsn, INVALID_LSN))
