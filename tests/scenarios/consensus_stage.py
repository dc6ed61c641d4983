"""A stage for stories about the quorum: commands in, what the parts said and did out, as text.

A story is a text file of blocks: a command, ``----``, what happened. Commands:

=========================  ==========================================================================
``members 3``              new safekeepers 1..n, their timeline begins at LSN 100
``proposer p``             a new proposer p connects to every safekeeper that can be reached
``connect p 2``            p opens a new connection to safekeeper 2
``campaign p``             after a lost election: try again
``deliver``                messages in order until none is left; each disk syncs at once
``deliver p 2``            only what is between p and safekeeper 2 (either may be left out: ``deliver p``)
``step q 1``               only the first of them
``drop p 2``               those messages are lost instead
``write p 60 50``          p's PostgreSQL writes 60 bytes of WAL; the first 50 end a record (0: none ends)
``tick p``                 heartbeats
``slow 2``, ``sync 2``     safekeeper 2's disk stops syncing by itself; syncs now
``crash 2``, ``start 2``   safekeeper 2 dies (losing what is not synced), comes back
``store 3 200``            safekeeper 3 hears that all below 200 is in object storage
``remove 1 200``           safekeeper 1 removes its WAL below 200
``show``                   what every safekeeper has
=========================  ==========================================================================
"""

from collections.abc import Callable
from typing import Any

import msgspec

from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.consensus import acceptor as acceptors
from excimer.consensus import proposer as proposers
from excimer.consensus.wal_window import WalWindow
from excimer.wire import safekeeping as wire

IDENTITY = wire.TimelineIdentity(
    tenant_id=TenantId("aa" * 16),
    timeline_id=TimelineId("bb" * 16),
    pg_version=18,
    system_id=7,
    wal_segment_size_bytes=1 << 24,
)
LIMITS = proposers.ProposerLimits(
    chunk_size_bytes=100,
    repair_chunk_size_bytes=40,
    in_flight_size_bytes_max=400,
    window_size_bytes_max=400,
    trim_size_bytes=0,
)
START_LSN = Lsn(100)
HIDDEN_FIELDS = {
    "version",
    "identity",
    "proposer_id",
    "token",
    "wal_start_lsn",
    "timeline_start_lsn",
    "durable_lsn",
}


class Safekeeper:
    """A disk that stays and an acceptor that comes and goes. Record ends are told, not scanned."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.control = acceptors.AcceptorState.bootstrap(START_LSN)
        self.flushed_lsn = START_LSN
        self.written_lsn = START_LSN
        self.flushes: list[acceptors.FlushWal] = []
        self.slow = False
        self.acceptor: acceptors.Acceptor | None = None


class Compute:
    def __init__(self, name: str, number: int, member_count: int) -> None:
        self.name = name
        self.number = number
        self.window = WalWindow(START_LSN)
        self.core = proposers.Proposer(
            identity=IDENTITY,
            proposer_id=wire.ProposerId(number.to_bytes(16, "big")),
            token="",
            member_count=member_count,
            limits=LIMITS,
        )


class Stage:
    def __init__(self) -> None:
        self.safekeepers: list[Safekeeper] = []
        self.computes: dict[str, Compute] = {}
        self.messages: list[tuple[str, int, wire.ProposerMessage | wire.AcceptorMessage]] = []
        self.record_ends = {START_LSN}
        self.lines: list[str] = []

    def run(self, command: str) -> str:
        """What happened, one line each."""
        self.lines = []
        verb, *arguments = command.split()
        act: Callable[..., None] = getattr(self, f"do_{verb}")
        act(*arguments)
        return "\n".join(line.rstrip() for line in self.lines)

    def do_members(self, count: str) -> None:
        self.safekeepers = [Safekeeper(number) for number in range(1, int(count) + 1)]
        for safekeeper in self.safekeepers:
            self.do_start(str(safekeeper.number))

    def do_proposer(self, name: str) -> None:
        self.computes[name] = Compute(name, len(self.computes) + 1, len(self.safekeepers))
        for safekeeper in self.safekeepers:
            if safekeeper.acceptor is not None:
                self.do_connect(name, str(safekeeper.number))

    def do_connect(self, name: str, number: str) -> None:
        compute = self.computes[name]
        self.run_compute(compute, compute.core.peer_connected(int(number) - 1))

    def do_disconnect(self, name: str, number: str) -> None:
        compute = self.computes[name]
        self.run_compute(compute, compute.core.peer_disconnected(int(number) - 1))

    def do_campaign(self, name: str) -> None:
        self.run_compute(self.computes[name], self.computes[name].core.campaign())

    def do_tick(self, name: str) -> None:
        self.run_compute(self.computes[name], self.computes[name].core.tick())

    def do_write(self, name: str, size: str, record_size: str) -> None:
        compute = self.computes[name]
        record_end_lsn = self.record_end(compute.window.end_lsn)
        if int(record_size):
            record_end_lsn = Lsn(compute.window.end_lsn + int(record_size))
            self.record_ends.add(record_end_lsn)
        compute.window.append(bytes(int(size)))
        self.run_compute(compute, compute.core.wal_appended(compute.window.end_lsn, record_end_lsn))

    def do_slow(self, number: str) -> None:
        self.safekeepers[int(number) - 1].slow = True

    def do_sync(self, number: str) -> None:
        safekeeper = self.safekeepers[int(number) - 1]
        safekeeper.slow = False
        for flush in safekeeper.flushes:
            self.flush(safekeeper, flush)
        safekeeper.flushes.clear()

    def do_crash(self, number: str) -> None:
        safekeeper = self.safekeepers[int(number) - 1]
        safekeeper.acceptor = None
        safekeeper.flushes.clear()
        safekeeper.written_lsn = safekeeper.flushed_lsn
        self.messages = [message for message in self.messages if message[1] != int(number)]
        for name in self.computes:
            self.do_disconnect(name, number)

    def do_start(self, number: str) -> None:
        safekeeper = self.safekeepers[int(number) - 1]
        safekeeper.acceptor = acceptors.Acceptor(
            node_id=NodeId(safekeeper.number),
            identity=IDENTITY,
            timeline_start_lsn=START_LSN,
            state=safekeeper.control,
            recovered_end_lsn=self.record_end(safekeeper.flushed_lsn),
        )
        self.run_safekeeper(safekeeper, safekeeper.acceptor.start())

    def do_deliver(self, *between: str) -> None:
        while (message := self.take(between)) is not None:
            self.deliver(*message)

    def do_store(self, number: str, lsn: str) -> None:
        safekeeper = self.safekeepers[int(number) - 1]
        assert safekeeper.acceptor is not None
        safekeeper.acceptor.durable_lsn = Lsn(int(lsn))

    def do_remove(self, number: str, lsn: str) -> None:
        safekeeper = self.safekeepers[int(number) - 1]
        assert safekeeper.acceptor is not None
        safekeeper.acceptor.wal_start_lsn = Lsn(int(lsn))

    def do_step(self, *between: str) -> None:
        message = self.take(between)
        assert message is not None, f"nothing between {between}"
        self.deliver(*message)

    def do_drop(self, *between: str) -> None:
        while (message := self.take(between)) is not None:
            self.lines.append(f"lost: {describe(message[2])}")

    def do_show(self) -> None:
        for safekeeper in self.safekeepers:
            state = safekeeper.control if safekeeper.acceptor is None else safekeeper.acceptor.state
            history = " ".join(f"{entry.term}@{entry.start_lsn}" for entry in state.history.entries)
            self.lines.append(
                f"{safekeeper.number}{' (down)' if safekeeper.acceptor is None else ''}: promised "
                f"{state.promised_term}, durable to {safekeeper.flushed_lsn}, commit {state.commit_lsn}, "
                f"history {history}"
            )

    def take(
        self, between: tuple[str, ...]
    ) -> tuple[str, int, wire.ProposerMessage | wire.AcceptorMessage] | None:
        for index, (name, number, _) in enumerate(self.messages):
            if all(part in (name, str(number)) for part in between):
                return self.messages.pop(index)
        return None

    def deliver(self, name: str, number: int, message: wire.ProposerMessage | wire.AcceptorMessage) -> None:
        safekeeper, compute = self.safekeepers[number - 1], self.computes[name]
        if not isinstance(message, wire.ProposerMessage):
            self.lines.append(f"{number} -> {name}: {describe(message)}")
            self.run_compute(compute, compute.core.receive(number - 1, message))
        elif safekeeper.acceptor is not None:
            self.lines.append(f"{name} -> {number}: {describe(message)}")
            connection = acceptors.ConnectionId(compute.number)
            self.run_safekeeper(safekeeper, safekeeper.acceptor.receive(connection, message))

    def run_safekeeper(self, safekeeper: Safekeeper, effects: list[acceptors.AcceptorEffect]) -> None:
        for effect in effects:
            match effect:
                case acceptors.Send(connection, message):
                    self.post(self.name_of(connection), safekeeper.number, message)
                case acceptors.ReadWal(connection, term, start_lsn, end_lsn):
                    chunk = wire.WalChunk(term, start_lsn, bytes(end_lsn - start_lsn))
                    self.post(self.name_of(connection), safekeeper.number, chunk)
                case acceptors.FlushWal() if safekeeper.slow:
                    safekeeper.flushes.append(effect)
                case acceptors.FlushWal():
                    self.flush(safekeeper, effect)
                case acceptors.PersistControl(state):
                    safekeeper.control = state
                    self.say(safekeeper, f"persists promise {state.promised_term}")
                case acceptors.TruncateWal(lsn):
                    if lsn < safekeeper.written_lsn:
                        self.say(safekeeper, f"cuts its WAL from {safekeeper.written_lsn} to {lsn}")
                    safekeeper.written_lsn = lsn
                    safekeeper.flushed_lsn = min(lsn, safekeeper.flushed_lsn)
                case acceptors.DiscardWal(state):
                    start_lsn = state.commit_lsn
                    self.say(
                        safekeeper, f"gives up its WAL to {safekeeper.written_lsn}, begins at {start_lsn}"
                    )
                    safekeeper.control = state
                    safekeeper.written_lsn = safekeeper.flushed_lsn = state.commit_lsn
                case acceptors.CommitAdvanced(commit_lsn):
                    self.say(safekeeper, f"shows readers WAL to {commit_lsn}")
                case acceptors.WriteWal(lsn, wal):
                    safekeeper.written_lsn = Lsn(lsn + len(wal))

    def flush(self, safekeeper: Safekeeper, flush: acceptors.FlushWal) -> None:
        if safekeeper.acceptor is not None:
            effects = safekeeper.acceptor.wal_flushed(flush, self.record_end(flush.end_lsn))
            safekeeper.flushed_lsn = safekeeper.acceptor.flush_lsn
            self.run_safekeeper(safekeeper, effects)

    def run_compute(self, compute: Compute, effects: list[proposers.ProposerEffect]) -> None:
        for effect in effects:
            match effect:
                case proposers.Send(peer, message):
                    self.post(compute.name, peer + 1, message)
                case proposers.SendWal():
                    wal = compute.window.slice(effect.begin_lsn, effect.end_lsn)
                    self.post(compute.name, effect.peer + 1, effect.message(wal))
                case proposers.TrimWindow(lsn):
                    compute.window.trim(lsn)
                case proposers.Elected(term, start_lsn, donor):
                    compute.window = WalWindow(start_lsn)
                    self.lines.append(
                        f"  {compute.name} is elected for term {term}, continues at {start_lsn}, "
                        f"from the log of {donor + 1}"
                    )
                case proposers.Renewed(term, start_lsn):
                    self.lines.append(f"  {compute.name} leads on in term {term}, from {start_lsn}")
                case proposers.RestartWindow(start_lsn):
                    compute.window = WalWindow(start_lsn)
                    self.lines.append(f"  {compute.name} reads its PostgreSQL's WAL again from {start_lsn}")
                case proposers.CommitAdvanced(commit_lsn):
                    self.lines.append(f"  {compute.name} commits {commit_lsn}")
                case proposers.Fenced(term_seen):
                    self.lines.append(f"  {compute.name} is fenced by term {term_seen}")
                case proposers.ElectionLost():
                    self.lines.append(f"  {compute.name} has lost the election for term {compute.core.term}")
                case proposers.PeerStranded(peer, missing_from_lsn):
                    self.lines.append(f"  nobody has WAL from {missing_from_lsn} on for {peer + 1}")
        self.announce(compute)

    def announce(self, compute: Compute) -> None:
        """As a shell does that waits no time at all."""
        for effect in compute.core.announce():
            assert isinstance(effect, proposers.Send)
            self.post(compute.name, effect.peer + 1, effect.message)

    def post(self, name: str, number: int, message: wire.ProposerMessage | wire.AcceptorMessage) -> None:
        self.messages.append((name, number, message))

    def name_of(self, connection: acceptors.ConnectionId) -> str:
        return next(compute.name for compute in self.computes.values() if compute.number == connection)

    def record_end(self, lsn: Lsn) -> Lsn:
        return max(end for end in self.record_ends if end <= lsn)

    def say(self, safekeeper: Safekeeper, text: str) -> None:
        self.lines.append(f"  {safekeeper.number} {text}")


def describe(message: msgspec.Struct) -> str:
    fields = {name: getattr(message, name) for name in message.__struct_fields__ if name not in HIDDEN_FIELDS}
    return f"{type(message).__name__} {' '.join(f'{name}={_text(value)}' for name, value in fields.items())}"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{entry.term}@{entry.start_lsn}" for entry in value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return str(value)
