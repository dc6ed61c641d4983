"""Gives a proposer's commits to the native way (`_native/commit_path.pyx`) while they are all that happens.

The event loop asks before each wait. The native way is open while this proposer leads, postgres streams to
it, every safekeeper that is connected follows, and no socket has bytes that wait or a message in part. After
the wait the proposer, its window, its connections and the walsender's are as if they had done it all: WAL is
in the window, bytes that were not the native way's go to their protocols, what a socket did not take is
written by its transport.

Not here: the loop (`service.native_loop`), the rules (`_native/led_wal.pyx`, `consensus.proposer`).
"""

import asyncio
import mmap
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from excimer._native.commit_path import CommitPath
from excimer._native.wal_scanner import WalScanner
from excimer.base.lsn import Lsn
from excimer.compute.safekeeper_peer import PeerConnection
from excimer.consensus.leader_state import LeaderState, Member
from excimer.consensus.wal_window import WalWindow
from excimer.service.replication_client import ReplicationClient

UNSENT_SIZE_BYTES_MAX = 256 << 10
"""With more WAL that a safekeeper has not been sent, it is not commits that are waited for."""


class SteadyStream(NamedTuple):
    """What a proposer has while commits are all that happens."""

    leader: LeaderState
    scanner: WalScanner
    source: ReplicationClient
    connections: Sequence[tuple[Member, PeerConnection]]
    """Of all safekeepers that are connected, at least one."""
    term: int


class CommitBoard(Protocol):
    """Where others look for the commit LSN (`Arena`)."""

    @property
    def memory(self) -> mmap.mmap: ...

    def set_quorum(self, lsn: Lsn) -> None: ...


class CommitOwner(Protocol):
    """The proposer, to its relay."""

    def steady_stream(self) -> SteadyStream | None: ...

    @property
    def window(self) -> WalWindow: ...

    @property
    def confirmed_lsn(self) -> Lsn: ...

    @property
    def confirm_limit_lsn(self) -> Lsn: ...

    @property
    def awaits_commit(self) -> bool:
        """Whether it wants to know of the next commit."""

    @property
    def window_size_bytes_max(self) -> int:
        """With so much in the window postgres is read no further."""

    @property
    def board(self) -> CommitBoard | None:
        """Hears of each new commit LSN; what a commit waits for comes before it."""

    def relayed(self, confirmed_lsn: Lsn) -> None:
        """Commits up to there have returned; the rest is in its places."""

    def go_on(self, *, has_committed: bool) -> None:
        """Whatever follows from what was relayed."""


class CommitRelay:
    """A `NativeWaiter`."""

    def __init__(self, owner: CommitOwner) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._stream: SteadyStream | None = None
        self._path: CommitPath | None = None

    def wait(self, epoll_fd: int, timeout_ms: int) -> list[tuple[int, int]] | None:
        stream = self._owner.steady_stream()
        if stream is None or not self._open(stream):
            return None
        assert self._path is not None
        events = self._path.wait(epoll_fd, timeout_ms)
        self._hand_back(stream, self._path)
        return events

    def _open(self, stream: SteadyStream) -> bool:
        owner = self._owner
        leader, window = stream.leader, owner.window
        sent_lsns = [member.sent_lsn for member, _ in stream.connections if member.sent_lsn is not None]
        unsent_lsn = min(*sent_lsns, window.end_lsn)
        if window.end_lsn != leader.window_end_lsn or window.end_lsn - unsent_lsn > UNSENT_SIZE_BYTES_MAX:
            return False
        if self._path is None or stream != self._stream:
            links = [connection.link(member) for member, connection in stream.connections]
            source_fd = stream.source.fileno()
            self._path = CommitPath(leader, stream.scanner, links, source_fd=source_fd, term=stream.term)
            self._stream = stream
        self._path.start(
            window.slice(unsent_lsn, window.end_lsn),
            server_end_lsn=stream.source.server_end_lsn,
            confirmed_lsn=owner.confirmed_lsn,
            confirm_limit_lsn=owner.confirm_limit_lsn,
            window_size_max=owner.window_size_bytes_max,
            returns_at_commit=owner.awaits_commit,
            arena=None if owner.board is None else owner.board.memory,
        )
        return True

    def _hand_back(self, stream: SteadyStream, path: CommitPath) -> None:
        """Nothing here runs other code: what was ready before the wait must not meet half of it."""
        wal, source_bytes, unsent = path.take_results()
        self._owner.window.append(wal)
        stream.source.relayed(stream.leader.window_end_lsn, path.server_end_lsn, path.confirmed_lsn, unsent)
        self._owner.relayed(path.confirmed_lsn)
        peer_bytes: list[bytes | None] = []
        for link, (_, connection) in zip(path.links, stream.connections, strict=True):
            has_heard, received, unsent = link.take_results()
            connection.relayed(unsent, has_heard=has_heard)
            peer_bytes.append(received)
        if wal or source_bytes or path.is_left or path.has_committed:
            self._loop.call_soon(self._follow_up, stream, source_bytes, peer_bytes, path.has_committed)

    def _follow_up(
        self,
        stream: SteadyStream,
        source_bytes: bytes,
        peer_bytes: Sequence[bytes | None],
        has_committed: bool,
    ) -> None:
        if source_bytes:
            stream.source.data_received(source_bytes)
        for received, (_, connection) in zip(peer_bytes, stream.connections, strict=True):
            if received is not None:
                connection.read_on(received)
        self._owner.go_on(has_committed=has_committed)
