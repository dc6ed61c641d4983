"""The proposer: takes WAL from the local postgres to the safekeepers and confirms it when a majority has it.

::

    postgres --walsender--> [window of recent WAL] --append--> safekeeper 1..N, each at its own pace
        ^                                                          |
        '---- status update: flushed up to the commit LSN <--------' a majority has synced it

`elect` wins the election and repairs a majority; `stream` then carries WAL until it is cancelled. All
decisions are `consensus.proposer`'s; this shell owns the sockets, the window, and time. What a commit
waits for runs in socket callbacks: WAL in, frames out, acknowledgements in, status update out. While
nothing else happens it does not come here at all (`commit_relay`).

A safekeeper that is slow or away delays nobody: at most `ProposerLimits.in_flight_size_bytes_max` is
under way to it; it catches up from the window or, below that, from what another safekeeper has.
When WAL that no majority has fills the window, postgres is read no further until safekeepers go on.

Not here: starting postgres; when commits wait for the pageserver's sake (`backpressure`).
"""

import asyncio
import os
import random
import time
from collections.abc import Sequence
from typing import NamedTuple, Never, assert_never

from excimer._native.wal_scanner import WalScanner
from excimer.base.address import Address, parse_address
from excimer.base.chance import Chance
from excimer.base.clock import unix_to_timestamptz
from excimer.base.errors import ExcimerError, FencedError, RefusedError, RetryableError
from excimer.base.ids import ID_SIZE_BYTES, TenantId, TimelineId
from excimer.base.lsn import INVALID_LSN, MAX_LSN, Lsn
from excimer.compute.commit_relay import CommitBoard, CommitRelay, SteadyStream
from excimer.compute.postgres_settings import PROPOSER_NAME
from excimer.compute.safekeeper_peer import SafekeeperLacksTimelineError, SafekeeperPeer
from excimer.compute.standby_needs import StandbysNeeds
from excimer.consensus import proposer as core
from excimer.consensus.quorum import majority
from excimer.consensus.wal_window import WalWindow
from excimer.service.logs import get_logger
from excimer.service.native_loop import NativeEventLoop
from excimer.service.replication_client import ReplicationClient, connect_replication
from excimer.service.tasks import Backoff, TaskScope
from excimer.wire.pg_client import unlimited_session
from excimer.wire.replication import HotStandbyFeedback, encode_feedback
from excimer.wire.safekeeping import (
    AcceptorMessage,
    ProposerId,
    StandbysNeed,
    Term,
    TermStart,
    TimelineIdentity,
    TokenRenewal,
    encode_proposer_message,
)

ELECTION_TIMEOUT_S = 30.0
HEARTBEAT_INTERVAL_S = 1.0
WALSENDER_PARAMETERS = {"wal_sender_timeout": "60s"}
"""Whatever the endpoint's own setting is: with one that is too short no commit would come through."""

PROPOSER_SLOT = PROPOSER_NAME
"""Postgres keeps WAL that the quorum has not confirmed; the slot dies with the compute's directory."""
CAMPAIGN_DELAY_S_MAX = 0.3
"""A lost election is tried again after a random part of this."""
ANNOUNCE_DELAY_S = 0.02
"""A commit LSN that has stood this long is announced; while commits go on, appends alone carry it."""
WRITABLE_SIZE_BYTES_MIN = 1 << 20
"""Postgres is read only while the window has room for this much."""
_WALSENDER = Backoff(first_s=0.05, most_s=1.0, reset_after_s=5.0)

log = get_logger(__name__)


class ElectionTimeoutError(RetryableError):
    """No majority of safekeepers could be won in time."""


class WindowRestartedError(RetryableError):
    """The stream from postgres begins anew, further back."""


class NewerProposerError(FencedError):
    """Another compute has taken over the timeline: this one must stop."""


class TimelineGoneError(RefusedError):
    """A majority of the safekeepers no longer keeps the timeline: nothing more can be committed."""


class PostgresAddress(NamedTuple):
    """The local postgres, by its Unix socket."""

    socket_dir: str
    port: int
    pg_version: int
    """Major version."""
    user: str = "postgres"


class Election(NamedTuple):
    term: Term
    start_lsn: Lsn
    """E: end of the last record. Committed: a majority of safekeepers has everything below."""
    writer: TermStart | None
    """Whose WAL ends at E; None if the history does not say."""


class Proposer:
    """One life as the timeline's writer: `elect`, then `stream`, then `close`."""

    def __init__(
        self,
        *,
        tenant_id: TenantId,
        timeline_id: TimelineId,
        safekeepers: Sequence[Address | str],
        token: str,
        limits: core.ProposerLimits | None = None,
        chance: Chance | None = None,
    ) -> None:
        """Raises MemberCountError, InvalidAddressError."""
        identity = TimelineIdentity(
            tenant_id=tenant_id, timeline_id=timeline_id, pg_version=0, system_id=0, wal_segment_size_bytes=0
        )
        self._chance = chance or random.SystemRandom()
        self._limits = limits or core.ProposerLimits()
        self._core = core.Proposer(
            identity=identity,
            proposer_id=ProposerId(os.urandom(ID_SIZE_BYTES)),
            token=token,
            member_count=len(safekeepers),
            limits=self._limits,
        )
        addresses = [parse_address(each) if isinstance(each, str) else each for each in safekeepers]
        self._peers = [SafekeeperPeer(index, address, self) for index, address in enumerate(addresses)]
        self._window = WalWindow(INVALID_LSN)
        self._scanner: WalScanner | None = None
        self._election: Election | None = None
        self._client: ReplicationClient | None = None
        self._is_repaired = False
        """A majority has all below E. Later commits wake no task: each would cost a turn of the loop."""
        self._is_ending = False
        self._confirm_limit_lsn = MAX_LSN
        self._confirmed_lsn = INVALID_LSN
        """What PostgreSQL was told; commits up to here have returned."""
        self._is_paused = False
        self._failure: ExcimerError | None = None
        self._changed = asyncio.Event()  # elected, committed for the first time, failed, or source lost
        self._source_error: ExcimerError | None = None
        self._needs = StandbysNeeds()
        self._frame: tuple[core.SendWal, bytes] | None = None  # the last append, as bytes
        self._announce_timer: asyncio.TimerHandle | None = None
        self.board: CommitBoard | None = None
        """Hears of each new commit LSN; what a commit waits for comes before it."""

    @property
    def commit_lsn(self) -> Lsn:
        """WAL below is durable at a majority; 0 before the election."""
        return self._core.commit_lsn

    @property
    def last_writer(self) -> TermStart | None:
        """Whose WAL ends at the commit LSN: this proposer's own, once it has committed some."""
        history = self._core.history
        return None if history is None else history.writer_of(self.commit_lsn)

    @property
    def received_lsn(self) -> Lsn:
        """How far PostgreSQL's WAL has come here; 0 before the election."""
        return self._window.end_lsn

    def confirm_up_to(self, lsn: Lsn) -> None:
        """Commits above `lsn` wait, although they are durable, until a later call allows them."""
        was_held = self._core.commit_lsn > self._confirmed_lsn
        self._confirm_limit_lsn = lsn
        if was_held:
            self._confirm()

    def expect_end(self) -> None:
        """Postgres is being stopped: that it then closes its connection is no failure."""
        self._is_ending = True

    @property
    def walsender_pid(self) -> int | None:
        """Of the postgres process whose WAL it reads; None while there is none."""
        return None if self._client is None else self._client.server_pid

    @property
    def connected_count(self) -> int:
        """Safekeepers that are connected now."""
        return sum(peer.is_connected for peer in self._peers)

    def missing_majority(self) -> str | None:
        """Which safekeepers are missing for a majority, in one sentence; None while enough of them answer."""
        is_elected = self._election is not None
        asked = [peer.silence(is_elected=is_elected) for peer in self._peers]
        silent = [sentence for sentence in asked if sentence is not None]
        if len(self._peers) - len(silent) >= majority(len(self._peers)):
            return None
        return f"a majority of safekeepers: {', '.join(silent)}"

    def renew_token(self, token: str) -> None:
        """For connections to come, and for those that are open."""
        self._core.token = token
        frame = encode_proposer_message(TokenRenewal(token))
        for peer in self._peers:
            peer.send_frame(frame)

    async def elect(self) -> Election:
        """Wins an election, and returns when a majority has everything below E.

        Raises `ElectionTimeoutError`, `NewerProposerError`, RefusedError when too many safekeepers
        refuse for a majority to be possible.
        """
        try:
            async with asyncio.timeout(ELECTION_TIMEOUT_S), TaskScope() as scope:
                self._start_talking(scope)
                while self._election is None or self._core.commit_lsn < self._election.start_lsn:
                    self._raise_failure()
                    await self._wait_change()
        except TimeoutError as error:
            raise ElectionTimeoutError(f"no majority of safekeepers: {self._describe_failures()}") from error
        log.info("elected", term=self._election.term, start_lsn=self._election.start_lsn)
        return self._election

    async def stream(self, postgres: PostgresAddress) -> Never:
        """Carries WAL from E on until cancelled. Raises `NewerProposerError`, CorruptionError."""
        if self._election is None:
            raise ValueError("elect before streaming")
        loop = asyncio.get_running_loop()
        if isinstance(loop, NativeEventLoop):
            loop.serve(CommitRelay(self))
        try:
            async with TaskScope() as scope:
                self._start_talking(scope)
                await self._read_postgres(postgres)
        finally:
            if isinstance(loop, NativeEventLoop):
                loop.serve(None)
            self.close()

    def _start_talking(self, scope: TaskScope) -> None:
        for peer in self._peers:
            scope.start(f"dial safekeeper {peer.address}", peer.maintain())
        scope.start("heartbeat", self._beat())

    def close(self) -> None:
        """Closes all connections; may be called at any time, also twice."""
        self._close_source()
        if self._announce_timer is not None:
            self._announce_timer.cancel()
        if self._failure is None:  # a last word, so that WAL which all have can go while no compute runs
            self._carry_out(self._core.announce(to_all=True))
        for peer in self._peers:
            peer.close()

    # Postgres

    async def _read_postgres(self, postgres: PostgresAddress) -> Never:
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            started = loop.time()
            try:
                await self._read_once(postgres)
            except (RetryableError, RefusedError) as error:
                if self._is_ending:
                    log.info("postgres has sent its last WAL", commit_lsn=self.commit_lsn)
                    self._close_source()
                    await asyncio.Event().wait()
                failures = 1 if loop.time() - started >= _WALSENDER.reset_after_s else failures + 1
                log.warning("postgres sends no WAL", error=error)
            finally:
                self._close_source()
            await asyncio.sleep(_WALSENDER.next_wait(failures))
            self._raise_failure()

    async def _read_once(self, postgres: PostgresAddress) -> Never:
        """One walsender's life. Raises what ended it."""
        self._source_error = None
        self._client = client = await connect_replication(
            Address(postgres.socket_dir, postgres.port),
            user=postgres.user,
            application_name=PROPOSER_NAME,
            parameters=unlimited_session(postgres.pg_version) | WALSENDER_PARAMETERS,
        )
        await client.reserve_wal(PROPOSER_SLOT)
        await client.start_physical(self._window.end_lsn, self, slot=PROPOSER_SLOT)
        self._is_paused = False
        self._confirm()
        self._tell_needs()
        log.info("streaming", start_lsn=self._window.end_lsn)
        while True:
            self._raise_failure()
            if self._source_error is not None:
                raise self._source_error
            await self._wait_change()

    # What hot standbys need, on its way to postgres

    def standbys_need(self, peer: SafekeeperPeer, needs: StandbysNeed) -> None:
        loop_time = asyncio.get_running_loop().time()
        told = HotStandbyFeedback(needs.xmin, needs.catalog_xmin)
        if self._needs.tell(peer.index, told, loop_time):
            self._tell_needs()

    def _tell_needs(self) -> None:
        """As a standby of its own would; PostgreSQL keeps it in the slot until it is told otherwise."""
        if self._client is not None:
            payload = encode_feedback(self._needs.oldest, unix_to_timestamptz(time.time()))
            self._client.send_feedback(payload)

    def _close_source(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def wal_received(self, start_lsn: Lsn, data: bytes) -> None:
        """From the walsender's socket (WalSink)."""
        if self._failure is not None or self._scanner is None:
            return
        try:
            self._scanner.feed(data)
            end_lsn = self._window.append(data)
            self._carry_out(self._core.wal_appended(end_lsn, self._scanner.last_record_end))
        except ExcimerError as error:
            self._fail(error)
        self._regulate()

    def stream_ended(self, error: ExcimerError) -> None:
        """From the walsender's socket (WalSink)."""
        self._source_error = error
        self._changed.set()

    def _confirm(self) -> None:
        """Releases the commits that wait for this LSN: nothing may stand between quorum and this."""
        if self._client is not None:
            lsn = max(self._confirmed_lsn, min(self._core.commit_lsn, self._confirm_limit_lsn))
            self._confirmed_lsn = lsn
            self._client.report(write_lsn=lsn, flush_lsn=lsn, apply_lsn=lsn)

    # The native way (CommitOwner)

    def steady_stream(self) -> SteadyStream | None:
        leader = self._core.steady_leader
        source, scanner = self._client, self._scanner
        if leader is None or source is None or scanner is None or self._failure or self._is_paused:
            return None
        if not source.is_steady:
            return None
        connections = []
        for peer, member in zip(self._peers, leader.members, strict=True):
            if not member.connected:
                continue
            if peer.connection is None or not peer.connection.is_steady:
                return None
            connections.append((member, peer.connection))
        return SteadyStream(leader, scanner, source, connections, self._core.term) if connections else None

    @property
    def window(self) -> WalWindow:
        return self._window

    @property
    def confirmed_lsn(self) -> Lsn:
        return self._confirmed_lsn

    @property
    def confirm_limit_lsn(self) -> Lsn:
        return self._confirm_limit_lsn

    @property
    def awaits_commit(self) -> bool:
        return self._announce_timer is None or not self._is_repaired

    @property
    def window_size_bytes_max(self) -> int:
        return self._limits.window_size_bytes_max - WRITABLE_SIZE_BYTES_MIN

    def relayed(self, confirmed_lsn: Lsn) -> None:
        self._confirmed_lsn = confirmed_lsn

    def go_on(self, *, has_committed: bool) -> None:
        if self._failure is not None:
            return
        if has_committed:
            self._committed()
        self._carry_out(self._core.go_on())
        self._regulate()

    def _regulate(self) -> None:
        """Backpressure: postgres is read only while the window has room."""
        has_room = self._core.writable_size_bytes >= WRITABLE_SIZE_BYTES_MIN
        if self._client is not None and has_room == self._is_paused:
            self._is_paused = not has_room
            if has_room:
                self._client.resume()
            else:
                self._client.pause()

    # Safekeepers (PeerOwner)

    def peer_connected(self, peer: SafekeeperPeer) -> None:
        self._carry_out(self._core.peer_connected(peer.index))

    def peer_disconnected(self, peer: SafekeeperPeer) -> None:
        if self._failure is None:
            self._carry_out(self._core.peer_disconnected(peer.index))
        if peer.is_hopeless:
            self._changed.set()

    def peer_received(self, peer: SafekeeperPeer, message: AcceptorMessage) -> None:
        if self._failure is not None:
            return
        try:
            self._carry_out(self._core.receive(peer.index, message))
        except RefusedError:
            raise
        except ExcimerError as error:
            self._fail(error)
        if self._is_paused:
            self._regulate()

    def _carry_out(self, effects: Sequence[core.ProposerEffect]) -> None:
        for effect in effects:
            match effect:
                case core.SendWal():
                    self._peers[effect.peer].send_frame(self._append_frame(effect))
                case core.CommitAdvanced():
                    self._committed()
                case core.Send(index, message):
                    self._peers[index].send_frame(encode_proposer_message(message))
                case core.TrimWindow(lsn):
                    self._window.trim(lsn)
                case core.Elected(term, start_lsn, _):
                    self._won(term, start_lsn)
                case core.Renewed(term, renewed_lsn):
                    log.info("elected again", term=term, start_lsn=renewed_lsn)
                case core.RestartWindow(restart_lsn):
                    self._restart_window(restart_lsn)
                case core.ElectionLost():
                    delay_s = self._chance.random() * CAMPAIGN_DELAY_S_MAX
                    asyncio.get_running_loop().call_later(delay_s, self._campaign)
                case core.Fenced(term_seen):
                    self._fail(
                        NewerProposerError(f"another compute writes this timeline in term {term_seen}")
                    )
                case core.PeerStranded(index, missing_lsn):
                    log.error(
                        "no safekeeper has the WAL that one lacks",
                        address=str(self._peers[index].address),
                        missing_lsn=missing_lsn,
                    )
                case _:
                    assert_never(effect)

    def _committed(self) -> None:
        self._confirm()
        if self.board is not None:
            self.board.set_quorum(self._core.commit_lsn)
        if self._announce_timer is None:
            self._announce_later()
        if not self._is_repaired:
            self._is_repaired = True
            self._changed.set()

    def _announce_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._announce_timer = loop.call_later(ANNOUNCE_DELAY_S, self._announce, self._core.commit_lsn)

    def _announce(self, commit_lsn_before: Lsn) -> None:
        self._announce_timer = None
        if self._core.commit_lsn != commit_lsn_before:
            self._announce_later()
        elif self._failure is None:
            self._carry_out(self._core.announce())

    def _append_frame(self, effect: core.SendWal) -> bytes:
        """The same bytes go to every safekeeper that is up to date: made once."""
        if self._frame is not None:
            previous, frame = self._frame
            if (
                previous.term == effect.term
                and previous.begin_lsn == effect.begin_lsn
                and previous.end_lsn == effect.end_lsn
                and previous.commit_lsn == effect.commit_lsn
                and previous.horizon_lsn == effect.horizon_lsn
            ):
                return frame
        wal = self._window.slice(effect.begin_lsn, effect.end_lsn)
        frame = encode_proposer_message(effect.message(wal))
        self._frame = (effect, frame)
        return frame

    def _won(self, term: Term, start_lsn: Lsn) -> None:
        history = self._core.history
        writer = None if history is None else history.writer_of(start_lsn)
        self._election = Election(term, start_lsn, writer)
        self._open_window(start_lsn)
        self._changed.set()

    def _open_window(self, start_lsn: Lsn) -> None:
        identity = self._core.identity
        self._window = WalWindow(start_lsn)
        self._scanner = WalScanner(start_lsn, identity.pg_version, identity.wal_segment_size_bytes)

    def _restart_window(self, start_lsn: Lsn) -> None:
        """Postgres keeps what is not committed for its slot: it is asked for it again."""
        log.warning("safekeepers have lost part of a record: postgres sends it again", start_lsn=start_lsn)
        self._open_window(start_lsn)
        self._close_source()
        self._source_error = WindowRestartedError("WAL is read again")
        self._changed.set()

    def _campaign(self) -> None:
        if self._failure is None:
            self._carry_out(self._core.campaign())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)
            for peer in self._peers:
                peer.check_alive()
            if self._needs.forget_old(asyncio.get_running_loop().time()):
                self._tell_needs()
            if self._failure is None:
                self._carry_out(self._core.tick())

    def _fail(self, error: ExcimerError) -> None:
        if self._failure is None:
            self._failure = error
            self._changed.set()

    def _raise_failure(self) -> None:
        """What ended this proposer, or makes a majority impossible. After the election only that the timeline
        is gone does: other refusals may pass, and a compute that runs still answers reads.
        """
        if self._failure is not None:
            raise self._failure
        refusals = [peer.failure for peer in self._peers if peer.is_hopeless and peer.failure is not None]
        if self._election is not None:
            refusals = [each for each in refusals if isinstance(each, SafekeeperLacksTimelineError)]
        if len(self._peers) - len(refusals) >= majority(len(self._peers)):
            return
        if self._election is None:
            raise refusals[-1]
        raise TimelineGoneError(f"the timeline was deleted: {refusals[-1]}")

    def _describe_failures(self) -> str:
        failures = [str(peer.failure) for peer in self._peers if peer.failure is not None]
        state = f"{self.connected_count} of {len(self._peers)} connected"
        return "; ".join([state, *failures])

    async def _wait_change(self) -> None:
        await self._changed.wait()
        self._changed.clear()
