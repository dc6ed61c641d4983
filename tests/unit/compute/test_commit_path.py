"""Commits that never meet the interpreter, on sockets whose other ends are held here."""

import contextlib
import select
import socket
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excimer._native import arena_file
from excimer._native.commit_path import CommitPath, Link
from excimer._native.openssl import TlsConnection, TlsContext
from excimer._native.wal_scanner import WalScanner
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import INVALID_LSN, MAX_LSN, Lsn
from excimer.compute.arena import Arena, ArenaSettings, build_arena
from excimer.consensus.leader_state import LeaderState, Member
from excimer.consensus.proposer import ProposerLimits
from excimer.consensus.term_history import TermHistory
from excimer.service.tls import Tls
from excimer.wire.pg_messages import encode_message
from excimer.wire.replication import (
    Keepalive,
    StandbyStatus,
    decode_from_client,
    encode_keepalive,
    wal_data_head,
)
from excimer.wire.safekeeping import (
    AppendRejected,
    AppendRequest,
    AppendResponse,
    ProposerMessageParser,
    Term,
    TermStart,
    encode_acceptor_message,
)
from tests.kit.tls import new_tls
from tests.kit.wal_builder import WalBuilder

TERM = Term(7)
START = Lsn(0x3000028)
SEGMENT_SIZE_BYTES = 1 << 20
SERVER_END = Lsn(1 << 40)
SOON_MS = 60_000
"""Longer than any wait here takes: they end because of what comes."""


def build_wal(record_count: int) -> WalBuilder:
    builder = WalBuilder(START, 18, SEGMENT_SIZE_BYTES)
    for number in range(record_count):
        builder.add(10, 0x10, b"x" * (60 + number * 37 % 900))
    return builder


def wal_message(start_lsn: Lsn, wal: bytes) -> bytes:
    return encode_message(b"d", wal_data_head(start_lsn, SERVER_END, 0) + wal)


def answer(flush_lsn: Lsn, term: Term = TERM, commit_lsn: Lsn = INVALID_LSN) -> bytes:
    return encode_acceptor_message(AppendResponse(term, flush_lsn, commit_lsn))


def whole_answer(member: "Safekeeper") -> bytes:
    """To all that was sent to it."""
    assert member.state.sent_lsn is not None
    return answer(member.state.sent_lsn)


class Safekeeper:
    """The far end of one link; in TLS if it has a session."""

    def __init__(self, member: Member, tls: TlsConnection | None = None) -> None:
        self.state = member
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.far.setblocking(False)
        self._tls = tls
        self._parser = ProposerMessageParser()
        self._parser.is_greeted = True
        self.wal = b""
        self.appends: list[AppendRequest] = []

    def say(self, data: bytes) -> None:
        self.far.sendall(data if self._tls is None else self._tls.encrypt(data))

    def hear(self, extra: bytes = b"") -> list[AppendRequest]:
        """What has come since, as messages; `extra` is what a transport would send after it."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            while part := self.far.recv(1 << 20):
                data += part
        data += extra
        if self._tls is not None and data:
            data = self._tls.decrypt(data)
        messages = self._parser.feed(data)
        assert all(isinstance(message, AppendRequest) for message in messages)
        appends = [message for message in messages if isinstance(message, AppendRequest)]
        for append in appends:
            assert append.begin_lsn == START + len(self.wal), "in order, without gaps, once"
            self.wal += append.wal
        self.appends += appends
        return appends

    def close(self) -> None:
        self.near.close()
        self.far.close()


class World:
    """A leader with its members, and the walsender's end of its source."""

    def __init__(
        self, count: int = 3, sessions: Sequence[tuple[TlsConnection | None, TlsConnection | None]] = ()
    ) -> None:
        members = [Member(index) for index in range(count)]
        for member in members:
            member.connected = member.adopted = True
            member.sent_lsn = member.flush_lsn = START
        limits = ProposerLimits()
        self.leader = LeaderState(
            members,
            start_lsn=START,
            history=TermHistory((TermStart(TERM, START),)),
            chunk_size_bytes=limits.chunk_size_bytes,
            in_flight_size_bytes_max=limits.in_flight_size_bytes_max,
        )
        assert self.leader.advance_commit()
        self.source, self.walsender = socket.socketpair()
        self.source.setblocking(False)
        self.walsender.setblocking(False)
        self.scanner = WalScanner(START, 18, SEGMENT_SIZE_BYTES)
        pairs = sessions or [(None, None)] * count
        self.safekeepers = [
            Safekeeper(member, server) for member, (server, _) in zip(members, pairs, strict=True)
        ]
        self.links = [
            Link(each.near.fileno(), each.state, client)
            for each, (_, client) in zip(self.safekeepers, pairs, strict=True)
        ]
        self.path = CommitPath(
            self.leader, self.scanner, self.links, source_fd=self.source.fileno(), term=TERM
        )
        self.epoll = select.epoll()
        self.timer, self.other = socket.socketpair()  # whatever else the loop waits for
        for each in (self.source, self.timer, *(safekeeper.near for safekeeper in self.safekeepers)):
            self.epoll.register(each.fileno(), select.EPOLLIN)
        self.window = b""
        self.confirmed_lsn = self.leader.commit_lsn
        self.confirm_limit_lsn = MAX_LSN
        self.left: tuple[bytes, list[bytes | None]] = (b"", [])
        self.unsent: tuple[bytes, list[bytes]] = (b"", [])
        self.heard: list[bool] = []

    def wait(
        self, timeout_ms: int = 0, *, returns_at_commit: bool = False, arena: Arena | None = None
    ) -> list[tuple[int, int]]:
        lsns = [each.state.sent_lsn for each in self.safekeepers if each.state.sent_lsn is not None]
        self.path.start(
            self.window[min(lsns) - START :],
            server_end_lsn=INVALID_LSN,
            confirmed_lsn=self.confirmed_lsn,
            confirm_limit_lsn=self.confirm_limit_lsn,
            window_size_max=31 << 20,
            returns_at_commit=returns_at_commit,
            arena=None if arena is None else arena.memory,
        )
        events = self.path.wait(self.epoll.fileno(), timeout_ms)
        wal, source_left, source_unsent = self.path.take_results()
        self.window += wal
        self.confirmed_lsn = self.path.confirmed_lsn
        results = [link.take_results() for link in self.links]
        self.heard = [heard for heard, _, _ in results]
        self.left = source_left, [left for _, left, _ in results]
        self.unsent = source_unsent, [unsent for _, _, unsent in results]
        assert self.leader.window_end_lsn == START + len(self.window)
        return events

    def told(self) -> list[Lsn]:
        """Confirmed to postgres since, each as written, flushed and applied."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            while part := self.walsender.recv(1 << 16):
                data += part
        lsns = []
        while data:
            status = decode_from_client(data[5:39])
            assert isinstance(status, StandbyStatus)
            assert status.write_lsn == status.flush_lsn == status.apply_lsn
            assert not status.is_reply_requested
            lsns.append(status.flush_lsn)
            data = data[39:]
        return lsns

    def close(self) -> None:
        self.epoll.close()
        for each in (self.source, self.walsender, self.timer, self.other):
            each.close()
        for safekeeper in self.safekeepers:
            safekeeper.close()


@pytest.fixture
def world() -> Iterator[World]:
    with contextlib.closing(World()) as world:
        yield world


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return Tls(new_tls(tmp_path_factory.mktemp("commit-path") / "tls"))


def session(contexts: Tls) -> tuple[TlsConnection, TlsConnection]:
    """Server and client after their handshake."""
    return shake_hands(contexts.native_server(), contexts.native_client())


def shake_hands(
    server_context: TlsContext, client_context: TlsContext
) -> tuple[TlsConnection, TlsConnection]:
    server = TlsConnection(server_context)
    client = TlsConnection(client_context, "localhost")
    is_done = client.handshake()
    while not is_done:
        server.handshake(client.take_output())
        is_done = client.handshake(server.take_output())
    assert server.handshake(client.take_output())
    assert client.decrypt(server.take_output()) == b""
    return server, client


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_a_commit_goes_out_comes_back_and_is_confirmed(contexts: Tls, is_encrypted: bool) -> None:
    sessions = [session(contexts) for _ in range(3)] if is_encrypted else []
    builder = build_wal(1)
    wal = bytes(builder.stream)
    end_lsn = builder.ends[-1]
    with contextlib.closing(World(sessions=sessions)) as world:
        world.walsender.sendall(wal_message(START, wal))
        assert world.wait() == []
        for safekeeper in world.safekeepers:
            assert safekeeper.hear() == [AppendRequest(TERM, START, START, INVALID_LSN, wal)]
        assert (world.window, world.told()) == (wal, [])
        assert world.path.server_end_lsn == SERVER_END
        world.safekeepers[1].say(answer(end_lsn))
        world.wait()
        assert (world.heard, world.told()) == ([False, True, False], [])
        world.safekeepers[2].say(answer(end_lsn, commit_lsn=START))
        world.wait()
        assert world.told() == [end_lsn]
        assert world.path.has_committed
        assert world.leader.commit_lsn == world.confirmed_lsn == end_lsn
        assert world.safekeepers[2].state.commit_lsn == START
        world.safekeepers[0].say(answer(end_lsn))
        world.wait()
        assert (world.told(), world.path.has_committed) == ([], False)
        assert [each.state.flush_lsn for each in world.safekeepers] == [end_lsn] * 3
        assert world.left == (b"", [None] * 3)


def test_it_waits_for_commits_only_until_a_timer_is_due_or_somebody_wants_to_know(world: World) -> None:
    builder = build_wal(1)
    world.walsender.sendall(wal_message(START, bytes(builder.stream)))
    assert world.wait(1) == []
    for safekeeper in world.safekeepers[:2]:
        safekeeper.say(whole_answer(safekeeper))
    assert world.wait(SOON_MS, returns_at_commit=True) == []
    assert world.path.has_committed
    world.other.send(b"!")
    assert world.wait(SOON_MS) == [(world.timer.fileno(), select.EPOLLIN)]
    assert world.wait(-1) == [(world.timer.fileno(), select.EPOLLIN)]


def test_the_arena_hears_of_each_commit(world: World, tmp_path: Path) -> None:
    """Who decodes WAL for logical replication waits for it."""
    (tmp_path / "data").mkdir()
    settings = ArenaSettings("127.0.0.1:1", TenantId("ab" * 16), TimelineId("cd" * 16), "")
    arena = build_arena(tmp_path / "arena", files=[], settings=settings, data_dir=tmp_path / "data")
    arena.set_quorum(START)
    builder = build_wal(1)
    expected = bytearray(arena.memory)
    world.walsender.sendall(wal_message(START, bytes(builder.stream)))
    world.wait(arena=arena)
    assert bytes(arena.memory) == expected
    for safekeeper in world.safekeepers[:2]:
        safekeeper.say(whole_answer(safekeeper))
    world.wait(arena=arena)
    arena_file.publish_quorum(expected, builder.ends[0])
    assert bytes(arena.memory) == expected
    arena.close()  # nobody holds it between waits


def test_what_backpressure_holds_is_not_confirmed(world: World) -> None:
    builder = build_wal(2)
    world.confirm_limit_lsn = builder.ends[0]
    world.walsender.sendall(wal_message(START, bytes(builder.stream)))
    world.wait()
    for safekeeper in world.safekeepers:
        safekeeper.say(whole_answer(safekeeper))
    world.wait()
    assert world.told() == [builder.ends[0]]
    assert world.leader.commit_lsn == builder.ends[1]


def keepalive() -> bytes:
    return encode_message(b"d", encode_keepalive(Keepalive(START, 0, True)))


@pytest.mark.parametrize(
    "rest",
    [keepalive(), keepalive()[:3], encode_message(b"c"), wal_message(Lsn(START + 8), b"gap")],
    ids=["keepalive", "a part of one", "end of copy", "gap"],
)
def test_what_is_not_wal_in_a_row_is_left_to_the_protocol(world: World, rest: bytes) -> None:
    wal = bytes(build_wal(1).stream)
    world.walsender.sendall(wal_message(START, wal) + rest)
    world.wait(0 if len(rest) == 3 else SOON_MS)
    assert world.window == wal
    assert world.left == (rest, [None] * 3)


def test_a_message_in_parts_is_taken_when_it_is_whole(world: World) -> None:
    """Or left, as far as it has come, when the wait ends before."""
    builder = build_wal(2)
    wal, size = bytes(builder.stream), builder.ends[0] - START
    first, second = wal[:size], wal[size:]
    message = wal_message(START, first)
    world.walsender.sendall(message[:100])
    assert world.wait() == []
    assert world.left[0] == message[:100]
    world.walsender.sendall(wal_message(START, first) + wal_message(builder.ends[0], second)[:50])
    world.wait()
    assert world.window == first
    assert world.left[0] == wal_message(builder.ends[0], second)[:50]


def test_what_is_not_wal_reaches_nobody(world: World) -> None:
    wal = bytearray(build_wal(1).stream)
    wal[40] ^= 1
    message = wal_message(START, bytes(wal))
    world.walsender.sendall(message)
    world.wait(SOON_MS)
    assert world.left[0] == message, "whose protocol finds the same"
    assert world.path.is_failed
    assert world.window == b""
    assert [each.hear() for each in world.safekeepers] == [[], [], []]


@pytest.mark.parametrize("is_encrypted", [False, True])
@pytest.mark.parametrize(
    "rest",
    [
        encode_acceptor_message(AppendRejected(TERM, START)),
        answer(Lsn(START + 999), Term(TERM + 1)),
        answer(Lsn(START + 999))[:11],
    ],
    ids=["rejected", "other term", "a part of an answer"],
)
def test_what_is_not_an_answer_to_this_leader_is_left_to_the_protocol(
    contexts: Tls, is_encrypted: bool, rest: bytes
) -> None:
    sessions = [session(contexts) for _ in range(3)] if is_encrypted else []
    builder = build_wal(1)
    with contextlib.closing(World(sessions=sessions)) as world:
        world.walsender.sendall(wal_message(START, bytes(builder.stream)))
        world.wait()
        world.safekeepers[1].say(answer(builder.ends[0]) + rest)
        world.wait(SOON_MS)
        assert world.left == (b"", [None, rest, None])
        assert world.safekeepers[1].state.flush_lsn == builder.ends[0]
        assert world.leader.commit_lsn == START


def test_answers_of_a_member_without_this_terms_history_are_left(world: World) -> None:
    world.safekeepers[0].state.adopted = False
    world.safekeepers[0].say(answer(START))
    world.wait(SOON_MS)
    assert world.left[1] == [answer(START), None, None]


def test_an_end_is_the_protocols(world: World) -> None:
    world.safekeepers[2].far.close()
    fd = world.safekeepers[2].near.fileno()
    assert [event[0] for event in world.wait(SOON_MS)] == [fd]
    world.epoll.unregister(fd)
    world.walsender.close()
    assert [event[0] for event in world.wait(SOON_MS)] == [world.source.fileno()]


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_what_a_full_socket_does_not_take_is_returned(contexts: Tls, is_encrypted: bool) -> None:
    """The others get theirs; nothing more goes to this one before its transport has sent the rest."""
    sessions = [session(contexts) for _ in range(3)] if is_encrypted else []
    builder = build_wal(600)
    wal = bytes(builder.stream)
    with contextlib.closing(World(sessions=sessions)) as world:
        slow, *others = world.safekeepers
        slow.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        position = 0
        while not world.unsent[1] or not world.unsent[1][0]:
            piece = wal[position : position + 40_000]
            assert piece, "it takes all"
            world.walsender.sendall(wal_message(Lsn(START + position), piece))
            position += len(piece)
            world.wait()
            for each in others:
                each.hear()
                each.say(whole_answer(each))
        assert world.path.is_left
        slow.hear(world.unsent[1][0])
        assert slow.state.sent_lsn == START + len(slow.wal)
        assert all(each.wal == wal[:position] for each in others)
        assert slow.wal == wal[: len(slow.wal)]


def test_a_damaged_record_ends_its_link_alone(contexts: Tls) -> None:
    builder = build_wal(2)
    wal, first = bytes(builder.stream), builder.ends[0]
    sessions = [session(contexts) for _ in range(3)]
    with contextlib.closing(World(sessions=sessions)) as world:
        world.walsender.sendall(wal_message(START, wal[: first - START]))
        world.wait()
        assert len(world.safekeepers[1].hear()) == 1
        server, client = sessions[1]
        record = bytearray(server.encrypt(answer(first)))
        record[-1] ^= 1
        world.safekeepers[1].far.sendall(record)
        world.wait(SOON_MS)
        assert world.left == (b"", [None, b"", None]), "its protocol looks, and finds the same"
        with pytest.raises(ssl.SSLError, match="bad record mac"):
            client.decrypt(b"")
        with pytest.raises(ssl.SSLError, match="alert bad record mac"):
            world.safekeepers[1].hear(client.take_output())
        assert (world.safekeepers[1].state.flush_lsn, world.told()) == (START, [])
        for each in (world.safekeepers[0], world.safekeepers[2]):
            each.hear()
            each.say(whole_answer(each))
        world.wait()
        assert world.told() == [first], "the others are a majority"
        world.walsender.sendall(wal_message(first, wal[first - START :]))
        world.wait()
        assert (world.left[1], world.unsent[1]) == ([None] * 3, [b""] * 3)
        assert world.safekeepers[1].hear() == [], "nothing more goes there"
        assert all(each.hear() for each in (world.safekeepers[0], world.safekeepers[2]))


def test_commits_go_on_when_keys_are_used_up(tmp_path: Path) -> None:
    files = new_tls(tmp_path)
    server = TlsContext(is_server=True, certificate=files.certificate, key=files.key, records_per_key=2)
    client = TlsContext(is_server=False, ca=files.ca, records_per_key=3)
    builder = build_wal(20)
    wal = bytes(builder.stream)
    with contextlib.closing(World(sessions=[shake_hands(server, client) for _ in range(3)])) as world:
        begin = START
        for end in builder.ends:
            world.walsender.sendall(wal_message(begin, wal[begin - START : end - START]))
            world.wait()
            for each in world.safekeepers:
                each.hear()
                each.say(whole_answer(each))
            world.wait()
            assert world.told() == [end]
            assert world.left == (b"", [None] * 3)
            begin = end
        assert all(each.wal == wal for each in world.safekeepers)


@settings(deadline=None, max_examples=60)
@given(
    record_count=st.integers(1, 60),
    cuts=st.lists(st.integers(1, 3000), min_size=1, max_size=20),
    choices=st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(1, 4000)), max_size=80),
)
def test_all_wal_arrives_and_nothing_is_confirmed_that_a_majority_lacks(
    record_count: int, cuts: list[int], choices: list[tuple[int, bool, int]]
) -> None:
    """Whatever the order of messages and answers, and wherever postgres cuts its WAL."""
    builder = build_wal(record_count)
    wal = bytes(builder.stream)
    with contextlib.closing(World()) as world:
        position = 0
        confirmed = [START]

        def answer_up_to(safekeeper: Safekeeper, lsn: Lsn) -> None:
            safekeeper.hear()
            if safekeeper.state.flush_lsn < lsn:
                safekeeper.say(answer(lsn))

        def check() -> None:
            confirmed.extend(world.told())
            held = sorted((START + len(each.wal) for each in world.safekeepers), reverse=True)
            answered = sorted((each.state.flush_lsn for each in world.safekeepers), reverse=True)
            assert confirmed == sorted(set(confirmed))
            assert confirmed[-1] == world.leader.commit_lsn
            assert confirmed[-1] <= answered[1] <= held[1]
            assert confirmed[-1] in (START, *builder.ends)
            assert world.left == (b"", [None] * 3)

        for number, (index, is_wal, amount) in enumerate(choices):
            if is_wal and position < len(wal):
                piece = wal[position : position + cuts[number % len(cuts)]]
                world.walsender.sendall(wal_message(Lsn(START + position), piece))
                position += len(piece)
            else:
                safekeeper = world.safekeepers[index]
                safekeeper.hear()
                answer_up_to(safekeeper, Lsn(START + min(len(safekeeper.wal), amount)))
            if amount % 2:  # or several events come at once
                world.wait()
                check()
        world.walsender.sendall(wal_message(Lsn(START + position), wal[position:]))
        while any(each.state.flush_lsn < builder.ends[-1] for each in world.safekeepers):
            world.wait()
            for each in world.safekeepers:
                each.hear()
                answer_up_to(each, Lsn(START + len(each.wal)))
        check()
        assert all(each.wal == wal for each in world.safekeepers)
        assert world.window == wal
        assert confirmed[-1] == builder.ends[-1]
