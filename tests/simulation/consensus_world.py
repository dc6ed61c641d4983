"""A seeded world for the quorum: network, disks, crashing processes, competing proposers.

Everything that can go wrong is drawn from one `random.Random(seed)`: messages are delayed, reordered,
duplicated, dropped, cut off by partitions; acceptors crash between any two effects and lose or tear
unsynced writes; proposers start, compete, lose connections and die; one disk may be lost for good.
At the end everything is healed and one more proposer must be elected and commit.

Run one seed and print its story::

    PYTHONPATH=src python -m tests.simulation.consensus_world SEED
"""

import hashlib
import random
import sys
from collections.abc import Sequence
from itertools import accumulate

from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.consensus import acceptor as acceptors
from excimer.consensus import proposer as proposers
from excimer.consensus.acceptor import (
    Acceptor,
    AcceptorState,
    ConnectionId,
    DiscardWal,
    PersistControl,
    TruncateWal,
)
from excimer.consensus.proposer import Phase, Proposer, ProposerLimits
from excimer.consensus.wal_window import WalWindow
from excimer.wire.safekeeping import (
    AcceptorMessage,
    AppendRequest,
    ElectedResponse,
    ProposerId,
    ProposerMessage,
    TimelineIdentity,
    VoteResponse,
    WalChunk,
)
from tests.simulation.consensus_checker import Checker, ViolationError, require
from tests.simulation.consensus_disk import SimulatedDisk
from tests.simulation.toy_wal import LONG_SIZES, MIXED_SIZES, UNIFORM_SIZES, make_record, scan

START_LSN = Lsn(64)
STEPS = 1500
HEALED_STEPS_MAX = 4000
IDENTITY = TimelineIdentity(
    tenant_id=TenantId("a1" * 16),
    timeline_id=TimelineId("b2" * 16),
    pg_version=18,
    system_id=99,
    wal_segment_size_bytes=1 << 24,
)
LIMITS = ProposerLimits(
    chunk_size_bytes=40,
    repair_chunk_size_bytes=24,
    in_flight_size_bytes_max=160,
    window_size_bytes_max=256,
    trim_size_bytes=64,
    renewal_tick_count=1,
)
DELIVERY_SIZE_BYTES_MAX = 120
"""Most WAL that PostgreSQL's walsender delivers at once."""
WINDOW_SIZE_BYTES_BOUND = LIMITS.window_size_bytes_max + 2 * DELIVERY_SIZE_BYTES_MAX
"""One delivery may come when there is little room, and a window keeps whole deliveries."""

Message = ProposerMessage | AcceptorMessage


class Node:
    """One safekeeper: a disk that stays, an acceptor that comes and goes."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.disk = SimulatedDisk(AcceptorState.bootstrap(START_LSN), bytes(START_LSN))
        self.acceptor: Acceptor | None = None
        self.wal_start_lsn = START_LSN
        """It does not serve WAL below, having removed it."""
        self.lost = False
        """Its disk is gone; it never comes back."""
        self.record_end_lsn = START_LSN
        self.flushes: list[tuple[acceptors.FlushWal, Lsn, int]] = []
        """Asked for and not done: the effect, the last record's end, unsynced writes it covers."""


class Candidate:
    """One compute: a proposer, the window of recent WAL, and the log as PostgreSQL would have it."""

    def __init__(self, index: int, core: Proposer) -> None:
        self.index = index
        self.core = core
        self.alive = True
        self.window = WalWindow(START_LSN)
        self.log = bytearray()
        """All WAL from LSN 0 that the proposer has inherited or written."""
        self.unsent = b""
        """What PostgreSQL has written and the walsender has not delivered yet."""
        self.record_end_lsn = START_LSN
        self.commit_lsn = Lsn(0)
        self.led_term = 0
        """Of the last election won."""

    def pending_wal(self) -> bytes:
        """What the walsender delivers next: from the window's end on, which may have been set back."""
        return bytes(self.log[self.window.end_lsn :]) + self.unsent


class World:
    def __init__(
        self,
        seed: int,
        *,
        acceptor_type: type[Acceptor] = Acceptor,
        proposer_type: type[Proposer] = Proposer,
        outcomes_only: bool = False,
    ) -> None:
        self.chance = random.Random(seed)
        self.acceptor_type = acceptor_type
        self.proposer_type = proposer_type
        self.trace: list[tuple[object, ...]] = []
        self.nodes = [Node(index) for index in range(1 if seed % 16 == 1 else 5 if seed % 8 == 0 else 3)]
        self.candidates: list[Candidate] = []
        self.messages: list[tuple[int, int, Message]] = []
        """(candidate, node, message) in flight; the message's type tells its direction."""
        self.blocked: set[tuple[int, int]] = set()
        self.votes: dict[tuple[int, int, int], bytes] = {}
        """(node, candidate, term) -> the voter's log when it voted."""
        self.checker = Checker(START_LSN, [node.disk for node in self.nodes], outcomes_only=outcomes_only)
        choice = self.chance.choice
        self.crash_probability = choice((0.0, 0.002, 0.01, 0.05))
        """Before any effect; ten times as likely around a change of promise or a cut."""
        self.drop_probability = choice((0.0, 0.01, 0.05))
        self.duplicate_probability = choice((0.0, 0.05, 0.2))
        self.reorder_probability = choice((0.0, 0.1, 0.5))
        self.limit_probability = choice((0.0, 0.3, 1.0, 1.0))
        """That removal does not wait for members that lag."""
        self.body_sizes = choice((UNIFORM_SIZES, MIXED_SIZES, LONG_SIZES))
        self.actions = (
            (self._deliver, choice((40, 60, 80))),
            (self._flush_some, choice((3, 10, 20))),
            (self._write_wal, choice((5, 15))),
            (self._reconnect_some, choice((1, 3, 6))),
            (self._tick, 4),
            (self._start_or_crash, choice((1, 3, 9))),
            (self._store_some, choice((2, 6))),
            (self._remove_some, choice((0, 3, 9))),
            (self._change_partition, choice((0, 1, 2))),
            (self._change_candidates, choice((0.3, 1, 3))),
        )
        self.weights = tuple(accumulate(weight for _, weight in self.actions))

    def run(self) -> "World":
        """Raises `ViolationError`, or the `CorruptionError` with which a core noticed by itself."""
        for node in self.nodes:
            self._start_node(node)
        self._start_candidate()
        actions = [action for action, _ in self.actions]
        for action in self.chance.choices(actions, cum_weights=self.weights, k=STEPS):
            action()
        self._heal()
        return self

    def trace_hash(self) -> str:
        return hashlib.blake2b(repr(self.trace).encode(), digest_size=16).hexdigest()

    # Network

    def _post(self, candidate: int, node: int, message: Message) -> None:
        draw = self.chance.random()
        if draw < self.drop_probability:
            return
        self.messages.append((candidate, node, message))
        if draw > 1 - self.duplicate_probability:
            self.messages.append((candidate, node, message))

    def _deliver(self) -> None:
        if not self.messages:
            return
        reorder = self.chance.random() < self.reorder_probability
        candidate, node, message = self.messages.pop(
            self.chance.randrange(len(self.messages)) if reorder else 0
        )
        if (candidate, node) in self.blocked:
            return
        self.trace.append(("deliver", candidate, node, message))
        if isinstance(message, ProposerMessage):
            self._deliver_to_node(self.nodes[node], candidate, message)
        else:
            self._deliver_to_candidate(self.candidates[candidate], node, message)

    def _deliver_to_node(self, node: Node, candidate: int, message: ProposerMessage) -> None:
        if node.acceptor is not None:
            effects = node.acceptor.receive(ConnectionId(candidate), message)
            self._run_node(node, effects, message)

    def _deliver_to_candidate(self, candidate: Candidate, node: int, message: AcceptorMessage) -> None:
        if candidate.alive:
            self._run_candidate(candidate, candidate.core.receive(node, message))

    def _change_partition(self) -> None:
        draw = self.chance.random()
        if draw < 0.5:
            self.blocked.clear()
        elif draw < 0.75:
            node = self.chance.randrange(len(self.nodes))
            self.blocked |= {
                (candidate.index, node) for candidate in self.candidates if self.chance.random() < 0.7
            }
        else:
            candidate = self._some_candidate()
            friend = self.chance.randrange(len(self.nodes))
            self.blocked |= {(candidate.index, node.index) for node in self.nodes if node.index != friend}
            self._start_candidate()
        self.trace.append(("partition", sorted(self.blocked)))

    # Safekeepers

    def _start_node(self, node: Node) -> None:
        disk = node.disk
        disk.sync(len(disk.unsynced))
        if len(disk.durable) < disk.control.commit_lsn == node.wal_start_lsn:
            disk.discard(node.wal_start_lsn)  # it crashed before it had discarded all
        end_lsn = Lsn(scan(disk.durable, disk.control.commit_lsn))
        node.record_end_lsn = end_lsn
        node.acceptor = self.acceptor_type(
            node_id=NodeId(node.index + 1),
            identity=IDENTITY,
            timeline_start_lsn=START_LSN,
            state=disk.control,
            recovered_end_lsn=end_lsn,
            wal_start_lsn=node.wal_start_lsn,
            durable_lsn=Lsn(disk.durable_lsn),
        )
        self.trace.append(("start", node.index, end_lsn, disk.control.promised_term))
        self._run_node(node, node.acceptor.start(), None)

    def _crash_node(self, node: Node) -> None:
        """The machine loses power, or only the process is killed: then the system still has its writes."""
        node.acceptor = None
        node.flushes.clear()
        killed = self.chance.random() < 0.15
        if not killed:
            node.disk.crash(self.chance)
        self.trace.append(("kill" if killed else "crash", node.index))

    def _start_or_crash(self) -> None:
        node = self.chance.choice(self.nodes)
        if node.lost:
            return
        if node.acceptor is None:
            self._start_node(node)
        elif self.chance.random() < 0.3:
            self._crash_node(node)
            node.lost = self.chance.random() < 0.1 and self._may_lose_a_disk()
        else:
            node.disk.control = node.acceptor.state
            node.disk.durable_lsn = node.acceptor.durable_lsn
            if self.chance.random() < 0.5:
                self._remove_wal(node, node.acceptor)

    def _remove_wal(self, node: Node, acceptor: Acceptor) -> None:
        """What no other member can need goes, or, when that is too much, what object storage has."""
        state = acceptor.state
        lsn = state.horizon_lsn
        self.checker.horizon_claimed(lsn)
        if self.chance.random() < self.limit_probability:
            lsn = max(lsn, min(acceptor.durable_lsn, state.commit_lsn))
        node.wal_start_lsn = acceptor.wal_start_lsn = max(node.wal_start_lsn, lsn)
        self.trace.append(("removed", node.index, node.wal_start_lsn))

    def _remove_some(self) -> None:
        """Of all safekeepers that run, as they look once a second, after a pageserver has told them all."""
        for node in self.nodes:
            if node.acceptor is not None:
                self._confirm_durable(node)
                node.disk.durable_lsn = node.acceptor.durable_lsn
                node.disk.control = node.acceptor.state
                self._remove_wal(node, node.acceptor)

    def _store_some(self) -> None:
        """A pageserver makes durable what a safekeeper shows it, and tells another one."""
        node = self.chance.choice(self.nodes)
        if node.acceptor is not None and self.chance.random() < 0.5:
            self.checker.stored_lsn = max(self.checker.stored_lsn, node.acceptor.state.commit_lsn)
            self.trace.append(("stored", self.checker.stored_lsn))
        self._confirm_durable(self.chance.choice(self.nodes))

    def _confirm_durable(self, node: Node) -> None:
        if node.acceptor is not None:
            node.acceptor.durable_lsn = Lsn(self.checker.stored_lsn)

    def _may_lose_a_disk(self) -> bool:
        return sum(node.lost for node in self.nodes) < (len(self.nodes) - 1) // 2

    def _flush_some(self) -> None:
        self._flush(self.chance.choice(self.nodes))

    def _flush(self, node: Node) -> None:
        """The disk has done one of the flushes; it may take the newest, which stands for all."""
        if not node.flushes or node.acceptor is None:
            return
        chosen = self.chance.choice((0, len(node.flushes) - 1))
        flush, record_end_lsn, write_count = node.flushes[chosen]
        node.disk.sync(write_count)
        node.flushes = [
            (later, end_lsn, max(0, count - write_count))
            for later, end_lsn, count in node.flushes[chosen + 1 :]
        ]
        self.trace.append(("flushed", node.index, flush.end_lsn))
        self._run_node(node, node.acceptor.wal_flushed(flush, record_end_lsn), None)

    def _run_node(
        self, node: Node, effects: Sequence[acceptors.AcceptorEffect], cause: ProposerMessage | None
    ) -> None:
        turning = any(isinstance(effect, PersistControl | TruncateWal | DiscardWal) for effect in effects)
        probability = self.crash_probability * 10 if turning else self.crash_probability
        for effect in effects:
            if self.chance.random() < probability:
                self._crash_node(node)
            if node.acceptor is None:
                return
            self._run_node_effect(node, effect, cause)

    def _run_node_effect(
        self, node: Node, effect: acceptors.AcceptorEffect, cause: ProposerMessage | None
    ) -> None:
        match effect:
            case acceptors.WriteWal(lsn, wal):
                if isinstance(cause, AppendRequest):
                    self.checker.wal_written(node.index, cause.term)
                require(lsn <= len(node.disk.live), f"node {node.index} leaves a gap below {lsn}")
                node.disk.write(lsn, bytes(wal))
                node.record_end_lsn = Lsn(scan(node.disk.live[: lsn + len(wal)], node.record_end_lsn))
            case acceptors.FlushWal():
                node.flushes.append((effect, node.record_end_lsn, len(node.disk.unsynced)))
            case acceptors.Send(connection, message):
                self._speak(node, connection, message)
            case acceptors.CommitAdvanced(commit_lsn):
                self.checker.acceptor_committed(node.index, commit_lsn)
            case acceptors.PersistControl(state):
                node.disk.control = state
            case acceptors.TruncateWal(lsn):
                self.trace.append(("truncate", node.index, lsn, len(node.disk.live)))
                self.checker.truncated(node.index, lsn)
                node.disk.truncate(lsn)
                node.record_end_lsn = lsn
                node.flushes = [(flush, end_lsn, 0) for flush, end_lsn, _ in node.flushes]
            case acceptors.DiscardWal(state):
                self._discard(node, state)
            case acceptors.ReadWal(connection, term, start_lsn, end_lsn):
                wal = bytes(node.disk.live[start_lsn:end_lsn])
                self._post(connection, node.index, WalChunk(term, start_lsn, wal))

    def _discard(self, node: Node, state: AcceptorState) -> None:
        """The control file first; a crash in between leaves WAL below its start."""
        lsn = state.commit_lsn
        self.trace.append(("skip", node.index, lsn, len(node.disk.live)))
        self.checker.skipped(node.index, lsn, len(node.disk.live))
        node.disk.control = state
        node.wal_start_lsn = lsn
        if self.chance.random() < self.crash_probability * 10:
            self._crash_node(node)
            return
        node.disk.discard(lsn)
        node.record_end_lsn = lsn
        node.flushes = [(flush, end_lsn, 0) for flush, end_lsn, _ in node.flushes]

    def _speak(self, node: Node, connection: ConnectionId, message: AcceptorMessage) -> None:
        match message:
            case VoteResponse(term=term, granted=True):
                self.votes[node.index, connection, term] = self.checker.whole_log(
                    node.index, message.flush_lsn
                )
                self.checker.promise_spoken(node.index, term)
            case ElectedResponse(term=term):
                self.checker.promise_spoken(node.index, term)
        self._post(connection, node.index, message)

    # Computes

    def _start_candidate(self) -> Candidate:
        index = len(self.candidates)
        core = self.proposer_type(
            identity=IDENTITY,
            proposer_id=ProposerId(index.to_bytes(16, "big")),
            token="",
            member_count=len(self.nodes),
            limits=LIMITS,
        )
        candidate = Candidate(index, core)
        self.candidates.append(candidate)
        self.trace.append(("candidate", index))
        for node in self.nodes:
            self._reconnect(candidate, node)
        return candidate

    def _change_candidates(self) -> None:
        alive = [candidate for candidate in self.candidates if candidate.alive]
        if len(alive) < 2 or (len(alive) < 3 and self.chance.random() < 0.3):
            self._start_candidate()
        else:
            self.chance.choice(alive).alive = False

    def _some_candidate(self) -> Candidate:
        alive = [candidate for candidate in self.candidates if candidate.alive]
        return self.chance.choice(alive or self.candidates)

    def _reconnect_some(self) -> None:
        self._reconnect(self._some_candidate(), self.chance.choice(self.nodes))

    def _reconnect(self, candidate: Candidate, node: Node) -> None:
        if not candidate.alive:
            return
        if node.acceptor is None:
            self._run_candidate(candidate, candidate.core.peer_disconnected(node.index))
            return
        if self.chance.random() < 0.5:
            node.acceptor.disconnected(ConnectionId(candidate.index))
        self._run_candidate(candidate, candidate.core.peer_connected(node.index))

    def _tick(self) -> None:
        candidate = self._some_candidate()
        if candidate.alive:
            effects = (
                candidate.core.campaign() if candidate.core.phase is Phase.LOST else candidate.core.tick()
            )
            self._run_candidate(candidate, effects)

    def _write_wal(self) -> None:
        """PostgreSQL writes some records; the walsender delivers up to any byte of them."""
        candidate = self._some_candidate()
        core = candidate.core
        if not candidate.alive or candidate.commit_lsn == 0 or core.writable_size_bytes == 0:
            return
        if len(candidate.unsent) < DELIVERY_SIZE_BYTES_MAX:
            for _ in range(self.chance.randrange(1, 4)):
                lsn = len(candidate.log) + len(candidate.unsent)
                candidate.unsent += make_record(self.chance, lsn, self.body_sizes)
        pending = candidate.pending_wal()[:DELIVERY_SIZE_BYTES_MAX]
        self._deliver_wal(candidate, pending[: self.chance.randrange(len(pending) // 2, len(pending)) + 1])

    def _deliver_wal(self, candidate: Candidate, wal: bytes) -> None:
        end_lsn = candidate.window.append(wal)
        held = end_lsn - candidate.window.start_lsn
        require(held <= WINDOW_SIZE_BYTES_BOUND, f"a window of {held} bytes")
        new_size_bytes = max(0, end_lsn - len(candidate.log))
        candidate.log += candidate.unsent[:new_size_bytes]
        candidate.unsent = candidate.unsent[new_size_bytes:]
        candidate.record_end_lsn = Lsn(scan(candidate.log[:end_lsn], candidate.record_end_lsn))
        self.trace.append(("write", candidate.index, end_lsn, candidate.record_end_lsn))
        self._run_candidate(candidate, candidate.core.wal_appended(end_lsn, candidate.record_end_lsn))

    def _run_candidate(self, candidate: Candidate, effects: Sequence[proposers.ProposerEffect]) -> None:
        for effect in [*effects, *candidate.core.announce()]:
            match effect:
                case proposers.SendWal():
                    wal = candidate.window.slice(effect.begin_lsn, effect.end_lsn)
                    self._post(candidate.index, effect.peer, effect.message(wal))
                case proposers.Send(peer, message):
                    self._post(candidate.index, peer, message)
                case proposers.CommitAdvanced(commit_lsn):
                    self.trace.append(("commit", candidate.index, commit_lsn))
                    term = candidate.core.term
                    self.checker.proposer_committed(term, candidate.log, candidate.commit_lsn, commit_lsn)
                    candidate.commit_lsn = commit_lsn
                case proposers.TrimWindow(lsn):
                    candidate.window.trim(lsn)
                case proposers.Elected(term, start_lsn, donor):
                    self.trace.append(("elected", candidate.index, term, start_lsn))
                    candidate.led_term = term
                    candidate.log = bytearray(self.votes[donor, candidate.index, term][:start_lsn])
                    candidate.window = WalWindow(start_lsn)
                    candidate.record_end_lsn = start_lsn
                    self.checker.elected(candidate.index, term, candidate.log)
                case proposers.Renewed(term, start_lsn):
                    self.trace.append(("renewed", candidate.index, term, start_lsn))
                    candidate.led_term = term
                    self.checker.elected(candidate.index, term, candidate.log[:start_lsn])
                case proposers.RestartWindow(start_lsn):
                    self.trace.append(("window restarted", candidate.index, start_lsn))
                    candidate.window = WalWindow(start_lsn)
                    candidate.record_end_lsn = start_lsn
                case proposers.Fenced(term_seen):
                    self.trace.append(("fenced", candidate.index, term_seen))
                    self.checker.fenced(candidate.index, candidate.led_term, candidate.core.term)
                case proposers.ElectionLost() | proposers.PeerStranded():
                    pass

    # The end

    def _heal(self) -> None:
        """Liveness: with all faults gone, and nobody who competes, every record must be committed everywhere.

        First by the newest leader, if it still lives, unless it has been succeeded, which the checker
        verifies; then by a new proposer, which nothing may fence: whatever its members have promised.
        """
        self.trace.append(("heal",))
        self.crash_probability = self.drop_probability = 0.0
        self.blocked.clear()
        alive = [node for node in self.nodes if not node.lost]
        for node in alive:
            if node.acceptor is None:
                self._start_node(node)
        leader = self._newest_leader()
        if leader is not None:
            self._leave_alone(leader)
            for node in self.nodes:
                self._reconnect(leader, node)
            self._carry_through(leader, alive)
        self._leave_alone(None)
        last = self._start_candidate()
        require(self._carry_through(last, alive), f"proposer {last.index} is fenced by nobody")
        self.checker.survived(last.log, [node.index for node in alive])

    def _newest_leader(self) -> Candidate | None:
        leading = [
            candidate
            for candidate in self.candidates
            if candidate.alive
            and candidate.commit_lsn
            and candidate.core.phase in (Phase.LEADING, Phase.RENEWING)
        ]
        return max(leading, key=lambda candidate: candidate.led_term, default=None)

    def _leave_alone(self, kept: Candidate | None) -> None:
        """All other computes die, and their connections with them."""
        for candidate in self.candidates:
            candidate.alive = candidate is kept
        self.messages = [each for each in self.messages if self.candidates[each[0]].alive]

    def _carry_through(self, candidate: Candidate, alive: Sequence[Node]) -> bool:
        """Whether all WAL of the candidate, and a new record, got to all nodes; False when it was fenced."""
        has_written = False
        for step in range(HEALED_STEPS_MAX):
            self._deliver()
            for node in alive:
                self._flush(node)
            if step % 64 == 63:
                self._tick()
                self._store_some()
                for node in alive:
                    self._confirm_durable(node)
            if candidate.core.phase is Phase.FENCED:
                return False
            if candidate.commit_lsn and not has_written:
                has_written = True
                lsn = len(candidate.log) + len(candidate.unsent)
                candidate.unsent += make_record(self.chance, lsn, self.body_sizes)
            pending = candidate.pending_wal() if has_written and candidate.core.writable_size_bytes else b""
            if pending:
                self._deliver_wal(candidate, pending[:DELIVERY_SIZE_BYTES_MAX])
            if has_written and all(self._caught_up(node, candidate) for node in alive):
                return True
        core = candidate.core
        raise ViolationError(f"stuck after healing: {core.phase} of term {core.term}")

    def _caught_up(self, node: Node, candidate: Candidate) -> bool:
        return (
            node.acceptor is not None
            and not candidate.unsent
            and node.acceptor.flush_lsn == len(candidate.log)
            and node.acceptor.state.commit_lsn == len(candidate.log)
        )


def main(arguments: Sequence[str]) -> None:
    world = World(int(arguments[0]))
    try:
        world.run()
    finally:
        print("\n".join(" ".join(str(part) for part in line) for line in world.trace))
        print("trace", world.trace_hash())


if __name__ == "__main__":
    main(sys.argv[1:])
