"""Long commits, aborts and prepares: taken in parts they do what they do as a whole, however WAL is cut."""

import itertools
import random
import struct
from typing import NamedTuple

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from excimer.base.keys import Relation, Slru, relation_size_key, slru_size_key
from excimer.base.lsn import Lsn
from excimer.pageserver.ingest import WalIngest
from excimer.pgformat import transaction_records as xact
from excimer.pgformat.checkpoint_state import CheckpointState
from excimer.pgformat.native_records import NativeOp
from excimer.pgformat.slru import COMMIT_TIMES_PER_PAGE, XACTS_PER_PAGE
from excimer.pgformat.wal_record import Rmgr
from excimer.pgformat.wal_segment import InvalidWalError
from excimer.storage.format.values import Value, ValueKind
from tests.kit.value_timeline import ValueTimeline, make_state
from tests.kit.wal_builder import WalBuilder

START = Lsn(0x100028)
WHOLE, IN_PARTS = 1 << 30, 0
VERSIONS = st.sampled_from([14, 15, 17, 18])
OPERATIONS = st.sampled_from(
    [
        xact.XACT_COMMIT,
        xact.XACT_ABORT,
        xact.XACT_COMMIT_PREPARED,
        xact.XACT_ABORT_PREPARED,
        xact.XACT_PREPARE,
    ]
)
CUTS = st.lists(st.floats(0, 1), max_size=25)
RELATIONS = [(1663, 5, 16384 + number) for number in range(40)]


class Xids(NamedTuple):
    """`length` of them from `start` on, one in `step`; then some `strewn` behind `start` in any order.

    As in PostgreSQL all lie within half of the numbers: which of two is newer is not known otherwise.
    """

    start: int
    step: int
    length: int
    strewn: tuple[int, ...]

    @property
    def all(self) -> list[int]:
        return [
            *(self.start + self.step * index & 0xFFFFFFFF for index in range(self.length)),
            *(self.start + offset & 0xFFFFFFFF for offset in self.strewn),
        ]


XIDS = st.builds(
    Xids,
    st.sampled_from([3, 740, 32_760, 819 * 40 - 3, 2**30, 2**32 - 9_000]),
    st.sampled_from([1, 1, 2, 17, 700, 5_003]),
    st.integers(0, 12_000),
    st.lists(st.integers(0, 2**26), max_size=4).map(tuple),
)


def xact_end(operation: int, xids: list[int], pg_version: int, chance: random.Random) -> tuple[int, bytes]:
    """Info and main data of a commit or abort with any of the parts that one may have."""
    has_info = bool(xids) or chance.random() < 0.9
    flags = chance.getrandbits(9) & ~xact.HAS_SUBXACTS if has_info else 0
    flags |= xact.HAS_SUBXACTS if xids else 0
    parts = [struct.pack("<q", 700_000_000_000 + chance.getrandbits(30))]
    if has_info:
        parts.append(struct.pack("<I", flags))
    if flags & xact.HAS_DBINFO:
        parts.append(chance.randbytes(8))
    if flags & xact.HAS_SUBXACTS:
        parts.append(struct.pack(f"<I{len(xids)}I", len(xids), *xids))
    if flags & xact.HAS_RELATIONS:
        dropped = chance.sample(RELATIONS, chance.randrange(len(RELATIONS)))
        parts.append(struct.pack("<I", len(dropped)) + b"".join(struct.pack("<III", *rel) for rel in dropped))
    if flags & xact.HAS_DROPPED_STATS:
        count = chance.randrange(900)
        parts.append(struct.pack("<I", count) + chance.randbytes(count * (16 if pg_version >= 18 else 12)))
    if flags & xact.HAS_INVALS:
        count = chance.randrange(2_000)
        parts.append(struct.pack("<I", count) + chance.randbytes(16 * count))
    if flags & xact.HAS_TWOPHASE:
        parts.append(struct.pack("<I", chance.choice([900, 33_000, 70_000])))
        parts.append(b"name of it\0" if flags & xact.HAS_GID else b"")
    if flags & xact.HAS_ORIGIN:
        parts.append(struct.pack("<Qq", chance.getrandbits(40), chance.getrandbits(50)))
    return operation | (xact.XACT_HAS_INFO if has_info else 0), b"".join(parts)


def prepare(xids: list[int], pg_version: int, chance: random.Random) -> bytes:
    more = 8 if pg_version >= 15 else 0
    name = b"transfer\0" * chance.randrange(1, 20)
    head = bytearray(64 + more)
    struct.pack_into("<IIIIqIi", head, 0, 0x57F94534, 0, 901, 5, 77, 10, len(xids))
    struct.pack_into("<H", head, 46 + more, len(name))
    struct.pack_into("<Q", head, 48 + more, chance.getrandbits(40))
    body = name + bytes(-len(name) % 8) + struct.pack(f"<{len(xids)}I", *xids)
    return bytes(head) + body + chance.randbytes(chance.randrange(20_000))


def build(operation: int, xids: Xids, pg_version: int, seed: int, cut_off: int) -> WalBuilder:
    """A commit of no length, the record, and another commit, which shows that all goes on behind it."""
    chance = random.Random(seed)
    wal = WalBuilder(START, pg_version)
    wal.add(Rmgr.XACT, 0, struct.pack("<q", 5) + bytes(chance.randrange(7_000)), xid=800)
    if operation == xact.XACT_PREPARE:
        info, data = operation, prepare(xids.all, pg_version, chance)
    else:
        info, data = xact_end(operation, xids.all, pg_version, chance)
    origin = chance.choice([None, 3, 0xFFFF])
    wal.add(Rmgr.XACT, info, data[: len(data) - cut_off], xid=chance.choice([850, 40_000]), origin=origin)
    wal.add(Rmgr.XACT, 0, struct.pack("<q", 800_000_000_000), xid=852)
    return wal


def new_timeline(pg_version: int, seed: int, *, keeps_times: bool) -> ValueTimeline:
    """Some segments and relations exist already, shorter or longer than what the records touch."""
    chance = random.Random(seed)
    state = make_state()
    kept = msgspec.structs.replace(state.settings, track_commit_timestamp=keeps_times)
    timeline = ValueTimeline(START, CheckpointState(state.checkpoint, kept), pg_version)
    for slru in (Slru.XACT, Slru.COMMIT_TS):
        for segment in range(3):
            if chance.random() < 0.7:
                timeline.set_size(slru_size_key(slru, segment), chance.randrange(33))
    for relation in RELATIONS:
        for fork in (0, 2):
            if chance.random() < 0.5:
                timeline.set_size(relation_size_key(Relation(*relation), fork), 9)
    return timeline


def ingest_cut(
    wal: WalBuilder, timeline: ValueTimeline, cuts: list[float], size_bytes: int
) -> tuple[WalIngest, InvalidWalError | None]:
    ingest = WalIngest(timeline, read_pages=lambda *_: b"", long_xact_size_bytes=size_bytes)
    stream = bytes(wal.stream)
    edges = sorted({0, len(stream), *(int(cut * len(stream)) for cut in cuts)})
    try:
        for start, end in itertools.pairwise(edges):
            ingest.ingest(stream[start:end], Lsn(START + start))
    except InvalidWalError as error:
        return ingest, error
    return ingest, None


def meaning(value: Value) -> tuple[object, ...]:
    """Two native records that change the same entries alike mean the same."""
    if value.kind is not ValueKind.NATIVE:
        return (value.key, value.lsn, value.kind, value.payload)
    op, status, count = struct.unpack_from("<BBH", value.payload)
    head = 4 if op in (NativeOp.CLOG_STATUS, NativeOp.CLOG_STATUS_SET) else 14
    is_set = op in (NativeOp.CLOG_STATUS_SET, NativeOp.COMMIT_TIMES_SET)
    rest = value.payload[head:]
    if is_set:
        bits = int.from_bytes(rest, "little")
        entries = {at for at in range(8 * len(rest)) if bits >> at & 1}
        assert len(entries) == count
    else:
        entries = {entry for (entry,) in struct.iter_unpack("<H", rest)}
    limit = XACTS_PER_PAGE if head == 4 else COMMIT_TIMES_PER_PAGE
    assert max(entries) < limit
    return (value.key, value.lsn, value.kind, status, value.payload[4:head], frozenset(entries))


@settings(max_examples=60, deadline=None)
@given(VERSIONS, OPERATIONS, XIDS, st.integers(0, 10_000), CUTS, st.booleans())
def test_in_parts_a_record_does_what_it_does_as_a_whole(
    pg_version: int, operation: int, xids: Xids, seed: int, cuts: list[float], keeps_times: bool
) -> None:
    wal = build(operation, xids, pg_version, seed, 0)
    timelines = [new_timeline(pg_version, seed, keeps_times=keeps_times) for _ in range(2)]
    whole, error = ingest_cut(wal, timelines[0], [], WHOLE)
    assert error is None
    parts, error = ingest_cut(wal, timelines[1], cuts, IN_PARTS)
    assert error is None
    meant = [sorted(map(meaning, timeline.values), key=repr) for timeline in timelines]
    assert meant[0] == meant[1]
    assert parts.last_record_lsn == whole.last_record_lsn == wal.ends[-1]
    assert parts.checkpoint_state == whole.checkpoint_state
    for relation in RELATIONS:
        key = relation_size_key(Relation(*relation), 0)
        assert parts.size(key) == whole.size(key)


@settings(max_examples=60, deadline=None)
@given(VERSIONS, OPERATIONS, XIDS, st.integers(0, 10_000), CUTS, st.integers(1, 30))
def test_a_record_that_is_shorter_than_it_says_is_refused_as_a_whole_one_is(
    pg_version: int, operation: int, xids: Xids, seed: int, cuts: list[float], cut_off: int
) -> None:
    wal = build(operation, xids, pg_version, seed, cut_off)
    timelines = [new_timeline(pg_version, seed, keeps_times=True) for _ in range(2)]
    _, expected = ingest_cut(wal, timelines[0], [], WHOLE)
    _, found = ingest_cut(wal, timelines[1], cuts, IN_PARTS)
    assert (found is None) == (expected is None), (found, expected)
    if found is not None and expected is not None:
        assert (found.lsn, str(found)) == (expected.lsn, str(expected))
    assert timelines[0].last_record_lsn == timelines[1].last_record_lsn


@settings(max_examples=30, deadline=None)
@given(OPERATIONS, st.floats(0, 1, exclude_max=True), st.integers(1, 255), CUTS)
def test_a_flipped_byte_puts_nothing(operation: int, place: float, change: int, cuts: list[float]) -> None:
    wal = build(operation, Xids(740, 1, 9_000, ()), 18, 7, 0)
    start = wal.starts[1] - START + 30
    stream_at = start + int(place * (wal.ends[1] - START - 16 - start))
    wal.stream[stream_at] ^= change
    timeline = new_timeline(18, 7, keeps_times=True)
    _, error = ingest_cut(wal, timeline, cuts, IN_PARTS)
    assert error is not None
    assert timeline.last_record_lsn == wal.ends[0]
    assert not [value for value in timeline.values if value.lsn > wal.ends[0]]


def test_a_record_that_refers_to_blocks_is_refused() -> None:
    wal = WalBuilder(START)
    header = struct.pack("<BBHIIII", 0, 0, 0, 1663, 5, 16384, 7)
    wal.add(Rmgr.XACT, 0, bytes(20_000), xid=5, blocks=((header, b""),))
    _, error = ingest_cut(wal, new_timeline(18, 1, keeps_times=False), [], IN_PARTS)
    assert error is not None
    assert "not the sum of its parts" in str(error)


def test_ids_that_follow_each_other_cost_a_bit_each() -> None:
    wal = WalBuilder(START)
    count = 3 * XACTS_PER_PAGE
    data = struct.pack(f"<qII{count}I", 5, xact.HAS_SUBXACTS, count, *range(1_000, 1_000 + count))
    wal.add(Rmgr.XACT, xact.XACT_COMMIT | xact.XACT_HAS_INFO, data, xid=999)
    timeline = new_timeline(18, 1, keeps_times=False)
    ingest_cut(wal, timeline, [], 1 << 16)
    native = [value for value in timeline.values if value.kind is ValueKind.NATIVE]
    assert [value.payload[0] for value in native] == [*[NativeOp.CLOG_STATUS_SET] * 3, NativeOp.CLOG_STATUS]
    assert sum(len(value.payload) for value in native) < count // 8 + 2 * 1_000 + 100
