"""Appends that never meet the interpreter: they end as the others do, and are refused as the others are."""

import asyncio
import socket
import threading
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from excimer._native.append_path import CommitMark
from excimer._native.channel import Channel, TlsChannel
from excimer._native.native_lock import NativeLock
from excimer._native.openssl import TlsConnection
from excimer.base.lsn import INVALID_LSN, Lsn
from excimer.consensus.acceptor import ConnectionId
from excimer.pgformat.wal_segment import InvalidWalError
from excimer.safekeeper.disk import Disk
from excimer.safekeeper.metrics import SafekeeperMetrics
from excimer.safekeeper.timeline import SafekeeperTimeline
from excimer.service.tls import Tls
from excimer.wire.safekeeping import (
    AppendRejected,
    AppendRequest,
    AppendResponse,
    CommitAnnounce,
    ProposerMessage,
    Term,
    VoteRequest,
    VoteResponse,
    encode_acceptor_message,
    encode_proposer_message,
)
from excimer.wire.safekeeping_frames import MalformedFrameError
from tests.kit.acceptor_driver import CONNECTION, SEGMENT_SIZE_BYTES, START, Driver, create_timeline, opened
from tests.kit.append_stream import StreamDriver
from tests.kit.tls import new_tls
from tests.kit.wal_builder import WalBuilder


def build_wal(size_bytes: int) -> WalBuilder:
    builder = WalBuilder(START, 18, SEGMENT_SIZE_BYTES)
    while len(builder.stream) < size_bytes:
        builder.add(10, 0x10, b"x" * (60 + len(builder.ends) * 37 % 900))
    return builder


WAL = build_wal(SEGMENT_SIZE_BYTES // 4 + 20_000)
NEAR_SIZE_BYTES = SEGMENT_SIZE_BYTES // 4 - 30_000
"""From here it is not far to where the next segment is prepared, which is not the append path's."""
SMALL = build_wal(20_000)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    created = tmp_path / "tenant" / "timeline"
    create_timeline(created)
    return created


def appends(builder: WalBuilder, term: Term, cuts: list[int], begin: int = 0) -> list[ProposerMessage]:
    """The builder's WAL in pieces of these sizes, over and over; each tells all before it as committed."""
    messages: list[ProposerMessage] = []
    wal = bytes(builder.stream)
    while begin < len(wal):
        size = cuts[len(messages) % len(cuts)]
        lsn = Lsn(START + begin)
        whole = bisect_right(builder.ends, lsn)
        commit_lsn = builder.ends[whole - 1] if whole else START
        messages.append(AppendRequest(term, lsn, commit_lsn, START, wal[begin : begin + size]))
        begin += size
    return messages


def test_appends_in_a_row_are_native_but_for_a_few_in_each_segment(directory: Path) -> None:
    builder = build_wal(SEGMENT_SIZE_BYTES * 2)
    with opened(directory) as timeline:
        driver = StreamDriver(timeline)
        driver.win()
        driver.handled.clear()
        driver.buffer_size_bytes = 4000
        messages = appends(builder, driver.term, [700, 90, 1500])
        answers = driver.say(*messages)
        assert len(messages) > 2000
        assert len(driver.handled) < 60, "the append path was not used"
        lsns = [answer.flush_lsn for answer in answers if isinstance(answer, AppendResponse)]
        assert lsns == sorted(lsns)
        assert lsns[-1] == builder.lsn == timeline.flush_lsn
        assert timeline.commit_lsn in builder.ends
        assert timeline.read_wal(START, Lsn(builder.lsn)) == bytes(builder.stream)
    with opened(directory) as timeline:
        assert timeline.flush_lsn == builder.lsn
        assert timeline.read_wal(START, Lsn(builder.lsn)) == bytes(builder.stream)


INTERRUPTIONS = st.lists(
    st.tuples(st.integers(0, 400), st.sampled_from(["beat", "announce", "again", "gap", "overlap"])),
    max_size=12,
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(200, 6000), min_size=1, max_size=6), st.integers(64, 9000), INTERRUPTIONS)
def test_it_ends_as_the_plain_way_does(
    tmp_path_factory: pytest.TempPathFactory,
    cuts: list[int],
    buffer_size_bytes: int,
    interruptions: list[tuple[int, str]],
) -> None:
    outcomes = []
    for kind in (Driver, StreamDriver):
        directory = tmp_path_factory.mktemp("append-path") / "timeline"
        create_timeline(directory)
        with opened(directory) as timeline:
            driver = kind(timeline)
            driver.win()
            if isinstance(driver, StreamDriver):
                driver.buffer_size_bytes = buffer_size_bytes
            driver.append(START, bytes(WAL.stream)[:NEAR_SIZE_BYTES])
            messages = _interrupted(appends(WAL, driver.term, cuts, NEAR_SIZE_BYTES), interruptions)
            answers = driver.say(*messages)
            rejected = [answer for answer in answers if isinstance(answer, AppendRejected)]
            last = [answer for answer in answers if isinstance(answer, AppendResponse)][-1]
            stored = timeline.read_wal(START, Lsn(WAL.lsn))
            outcomes.append((timeline.flush_lsn, timeline.commit_lsn, stored, rejected, last.flush_lsn))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == WAL.lsn


def _interrupted(
    messages: list[ProposerMessage], interruptions: list[tuple[int, str]]
) -> list[ProposerMessage]:
    mixed = list(messages)
    for position, what in sorted(interruptions, reverse=True):
        at = position % len(messages)
        here = messages[at]
        assert isinstance(here, AppendRequest)
        beat = AppendRequest(here.term, here.begin_lsn, here.commit_lsn, START, b"")
        added: dict[str, list[ProposerMessage]] = {
            "beat": [beat],
            "announce": [CommitAnnounce(here.term, here.commit_lsn, START)],
            "again": [here, beat],
            "gap": [AppendRequest(here.term, Lsn(here.begin_lsn + (1 << 30)), START, START, b"beyond")],
            "overlap": [
                AppendRequest(here.term, here.begin_lsn, START, START, here.wal[: len(here.wal) // 2])
            ],
        }
        mixed[at:at] = added[what]
    return mixed


class WatchedDisk(Disk):
    """Notes what is done, and what an observer sees at that moment."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.look: Callable[[], str] = lambda: ""

    def pwrite(self, fd: int, data: bytes, offset: int) -> None:
        self.done.append("write" + self.look())
        super().pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        self.done.append("sync" + self.look())
        super().fdatasync(fd)


def test_an_answer_comes_after_the_disk_has_done_it(directory: Path) -> None:
    """D1; and appends that came together share one sync."""
    disk = WatchedDisk()
    with opened(directory, disk) as timeline:
        driver = StreamDriver(timeline)
        driver.win()
        first, *others = appends(SMALL, driver.term, [500])
        driver.say(first)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.setblocking(False)
            theirs.sendall(b"".join(encode_proposer_message(message) for message in others[:3]))
            theirs.shutdown(socket.SHUT_WR)
            disk.done.clear()
            disk.look = lambda: "" if _is_silent(theirs) else ", answered"
            assert timeline.serve(CONNECTION, Channel(ours.fileno()), bytearray(1 << 16), 0) == 0
            assert disk.done == ["write", "write", "write", "sync"]
            answer = AppendResponse(driver.term, Lsn(START + 2000), Lsn(timeline.commit_lsn))
            assert theirs.recv(100) == encode_acceptor_message(answer)


def test_appends_over_tls_are_answered_without_the_interpreter(tmp_path: Path, directory: Path) -> None:
    """Python's own TLS on the other side: its bytes, in records of its making, go through the append path."""
    contexts = Tls(new_tls(tmp_path / "tls"))
    left: list[int] = []
    with opened(directory) as timeline:
        driver = StreamDriver(timeline)
        driver.win()
        first, *others = appends(SMALL, driver.term, [500])
        driver.say(first)
        handled = len(driver.handled)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            channel = TlsChannel(ours.fileno(), TlsConnection(contexts.native_server()))

            def serve() -> None:
                channel.handshake()
                left.append(timeline.serve(CONNECTION, channel, bytearray(1 << 16), 0))

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            with contexts.client().wrap_socket(theirs, server_hostname="localhost") as secure:
                secure.settimeout(60)
                for count, message in enumerate(others[:4], 2):
                    secure.sendall(encode_proposer_message(message))
                    answer = AppendResponse(driver.term, Lsn(START + 500 * count), Lsn(0))
                    told = secure.recv(100)
                    assert told[:-8] == encode_acceptor_message(answer)[:-8], "but for the commit LSN"
                    assert timeline.flush_lsn == START + 500 * count
            thread.join(60)
            assert left == [0], "all was taken, then the peer closed"
            assert len(driver.handled) == handled


def _is_silent(opened_socket: socket.socket) -> bool:
    try:
        opened_socket.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    return False


def test_a_newer_term_shuts_the_older_one_out(directory: Path) -> None:
    """C1: the append path was open to the first proposer when the second one was voted for."""
    with opened(directory) as timeline:
        first = StreamDriver(timeline)
        first.win()
        messages = appends(SMALL, first.term, [1000])
        first.say(*messages[:4])
        second = Driver(timeline, 2)
        second.term = Term(first.term + 1)
        (_, vote) = timeline.handle(ConnectionId(2), [VoteRequest(second.term, second.id)])[0]
        assert isinstance(vote, VoteResponse)
        assert vote.granted
        (answer,) = first.say(messages[4])
        assert answer == AppendResponse(second.term, Lsn(START + 4000), timeline.commit_lsn)
        assert timeline.flush_lsn == START + 4000


def test_a_second_connection_of_the_term_takes_the_append_path_over(directory: Path) -> None:
    with opened(directory) as timeline:
        first = StreamDriver(timeline)
        first.win()
        again = StreamDriver(timeline)
        again.connection = ConnectionId(2)
        again.term = first.term
        messages = appends(SMALL, first.term, [1000])
        first.say(*messages[:3])
        again.handled.clear()
        again.say(*messages[3:6])
        first.say(*messages[6:])
        timeline.disconnected(ConnectionId(2))
        assert timeline.flush_lsn == SMALL.lsn
        assert timeline.read_wal(START, Lsn(SMALL.lsn)) == bytes(SMALL.stream)


def test_what_is_not_wal_is_not_stored(directory: Path) -> None:
    wal = bytes(SMALL.stream)
    with opened(directory) as timeline:
        driver = StreamDriver(timeline)
        driver.win()
        whole = SMALL.ends[3]
        driver.append(START, wal[: whole - START])
        bad = AppendRequest(driver.term, whole, INVALID_LSN, INVALID_LSN, b"\x30\0\0\0" + b"\xff" * 100)
        with pytest.raises(InvalidWalError):
            driver.say(bad)
        assert timeline.flush_lsn == whole
        assert not any(timeline.read_wal(whole, Lsn(whole + 200)))
        assert driver.win() == whole
        driver.append(whole, wal[whole - START :])
        assert timeline.flush_lsn == SMALL.lsn


@pytest.mark.parametrize("junk", [b"A" * 40, b"\x05\0\0\0Axxxx", b"\xff\xff\xff\xffA" + b"x" * 40])
def test_junk_is_left_to_the_parser(directory: Path, junk: bytes) -> None:
    with opened(directory) as timeline:
        driver = StreamDriver(timeline)
        driver.win()
        driver.append(START, bytes(SMALL.stream)[:1000])
        with pytest.raises(MalformedFrameError):
            driver.send(junk)
        assert timeline.flush_lsn == START + 1000


def test_a_waiting_reader_hears_of_a_commit(tmp_path: Path) -> None:
    create_timeline(tmp_path / "timeline")

    async def read() -> None:
        with ThreadPoolExecutor(1) as preparer:
            metrics = SafekeeperMetrics(CollectorRegistry())
            timeline = SafekeeperTimeline(
                tmp_path / "timeline", disk=Disk(), preparer=preparer, metrics=metrics
            )
            driver = StreamDriver(timeline)
            await asyncio.to_thread(driver.win)
            messages = appends(SMALL, driver.term, [1000])
            await asyncio.to_thread(driver.say, *messages[:2])
            before_lsn = timeline.commit_lsn
            waiting = asyncio.ensure_future(timeline.commits.wait_beyond(before_lsn, 60))
            await asyncio.sleep(0)
            driver.handled.clear()
            await asyncio.to_thread(driver.say, *messages[2:6])
            assert await waiting
            assert timeline.commit_lsn > before_lsn
            assert driver.handled == []

    asyncio.run(read())


def test_what_the_append_path_made_durable_is_measured(tmp_path: Path) -> None:
    create_timeline(tmp_path / "timeline")
    registry = CollectorRegistry()
    with opened(tmp_path / "timeline", metrics=SafekeeperMetrics(registry)) as timeline:
        driver = StreamDriver(timeline)
        driver.win()
        messages = appends(SMALL, driver.term, [1000])
        for message in messages:
            driver.say(message)
        timeline.disconnected(CONNECTION)
    assert registry.get_sample_value("excimer_safekeeper_wal_bytes_total") == len(SMALL.stream)
    assert registry.get_sample_value("excimer_safekeeper_flush_seconds_count") == len(messages)


def test_a_mark_tells_each_wait_once() -> None:
    mark = CommitMark(100)
    assert not mark.advance(110), "nobody waits"
    mark.wait_next()
    assert not mark.advance(110), "it has not risen"
    assert mark.advance(120)
    assert not mark.advance(130)
    assert mark.commit_lsn == 130


def test_a_native_lock_keeps_others_out() -> None:
    lock = NativeLock()
    order: list[str] = []
    with lock:
        other = threading.Thread(target=lambda: _note(lock, order))
        other.start()
        order.append("first")
    other.join()
    assert order == ["first", "second"]


def _note(lock: NativeLock, order: list[str]) -> None:
    with lock:
        order.append("second")
