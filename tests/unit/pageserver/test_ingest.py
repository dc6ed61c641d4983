"""What single records become: sizes, chains, visibility bits, transactions, and the rare ones."""

import struct

import msgspec
import pytest

from excimer.base.keys import (
    Fork,
    KeyKind,
    Relation,
    Slru,
    make_key,
    origin_key,
    relation_block_key,
    relation_size_key,
    slru_block_key,
    slru_size_key,
    two_phase_key,
)
from excimer.base.lsn import Lsn
from excimer.pageserver.ingest import CheckpointMissingError, WalGapError, WalIngest
from excimer.pageserver.special_records import UnsupportedRecordError
from excimer.pgformat import native_records
from excimer.pgformat.checkpoint_state import CheckpointState, stored_next_xid
from excimer.pgformat.native_records import XactStatus
from excimer.pgformat.wal_record import Rmgr
from excimer.pgformat.wal_segment import InvalidWalError
from excimer.storage.format.relation_size import (
    RelationSize,
    truncation_notes,
    unpack_relation_size,
)
from excimer.storage.format.values import Value, ValueKind
from tests.kit.value_timeline import ValueTimeline, make_state
from tests.kit.wal_builder import WalBuilder, build_block

START = Lsn(0x100028)
REL = Relation(1663, 5, 16384)
MAIN_SIZE = relation_size_key(REL, Fork.MAIN)
VM_SIZE = relation_size_key(REL, Fork.VM)
WILL_INIT = 0x40
PER_MAP_PAGE = native_records.HEAP_BLOCKS_PER_VM_PAGE


class World:
    """A timeline, its ingest, and a WAL that is fed record by record."""

    def __init__(self, pg_version: int = 18, state: CheckpointState | None = None) -> None:
        self.timeline = ValueTimeline(START, state or make_state(), pg_version)
        self.wal = WalBuilder(START, pg_version)
        self.ingest = self.new_ingest()
        self.reads: list[tuple[bytes, int, int]] = []

    def new_ingest(self) -> WalIngest:
        return WalIngest(self.timeline, read_pages=self.read_pages)

    def read_pages(self, key: bytes, count: int, lsn: Lsn) -> bytes:
        self.reads.append((key, count, lsn))
        return b"".join(bytes([block + 1]) * 8192 for block in range(count - 1)) + bytes(8192)

    def add(self, rmgr: int, info: int, main_data: bytes = b"", **parts: object) -> list[Value]:
        """Ingests one record; what it put."""
        before, at = len(self.timeline.values), len(self.wal.stream)
        end = self.wal.add(rmgr, info, main_data, **parts)  # type: ignore[arg-type]
        chunk = bytes(self.wal.stream[at:])
        assert self.ingest.ingest(chunk, Lsn(START + at)) == end == self.timeline.last_record_lsn
        return self.timeline.values[before:]

    def insert(self, block: int, *, flags: int = 0, init: bool = False, more: tuple = ()) -> list[Value]:  # type: ignore[type-arg]
        reference = build_block(0, REL, block, flags=WILL_INIT if init else 0, data=b"tuple")
        info = 0x80 if init else 0
        return self.add(Rmgr.HEAP, info, struct.pack("<HB", 1, flags), blocks=(reference, *more), xid=1000)


def test_first_touch_creates_and_leaves_a_gap_without_values() -> None:
    world = World()
    values = world.insert(2, init=True)
    end = world.timeline.last_record_lsn
    state = make_key(KeyKind.CHECKPOINT)
    assert [(v.key, v.lsn, v.kind, v.starts_chain) for v in values if v.key != state] == [
        (MAIN_SIZE, end, ValueKind.IMAGE, True),
        (relation_block_key(REL, 0, 2), end, ValueKind.WAL_RECORD, True),
    ]
    assert unpack_relation_size(values[0].payload) == RelationSize(3, born_lsn=end - 1)
    record = values[1].payload
    assert struct.unpack_from("<Q", record)[0] == world.wal.starts[-1]
    assert record[8:] == bytes(world.wal.stream[-((len(record) - 8 + 7) & ~7) :])[: len(record) - 8]


def test_a_truncation_is_noted_and_one_to_nothing_is_a_new_birth() -> None:
    world = World()
    world.insert(9, init=True)
    born_lsn = world.timeline.last_record_lsn - 1
    values = world.add(Rmgr.SMGR, 0x20, truncate(4, 1))
    cut_lsn = world.timeline.last_record_lsn
    notes = [(v.key, v.payload) for v in values if v.key[0] == KeyKind.RELATION_TRUNCATION]
    assert notes == truncation_notes(MAIN_SIZE, 4, cut_lsn)
    (size,) = [v.payload for v in values if v.key == MAIN_SIZE]
    assert unpack_relation_size(size) == RelationSize(4, born_lsn, cut_lsn)
    (grown,) = [v.payload for v in world.insert(100, init=True) if v.key == MAIN_SIZE]
    assert unpack_relation_size(grown) == RelationSize(101, born_lsn, cut_lsn)
    values = world.add(Rmgr.SMGR, 0x20, truncate(0, 1))
    assert [(v.key, unpack_relation_size(v.payload)) for v in values] == [
        (MAIN_SIZE, RelationSize(0, world.timeline.last_record_lsn + 1))
    ]


def test_a_number_that_is_used_again_is_born_again() -> None:
    world = World()
    world.insert(5, init=True)
    world.add(Rmgr.XACT, 0x80, commit(relations=(REL,)), xid=1000)
    (size,) = [v.payload for v in world.insert(3, init=True) if v.key == MAIN_SIZE]
    assert unpack_relation_size(size) == RelationSize(4, world.timeline.last_record_lsn - 1)


def test_known_size_is_looked_up_once_and_not_written_again() -> None:
    world = World()
    world.timeline.set_size(MAIN_SIZE, 10)
    assert [v.kind for v in world.insert(4) if v.key[0] == 0] == [ValueKind.WAL_RECORD]
    world.insert(5)
    assert world.timeline.lookups.count(MAIN_SIZE) == 1
    assert world.timeline.size(MAIN_SIZE) == 10


def test_a_record_that_does_not_initialise_its_new_page_builds_on_zeros() -> None:
    """What a truncation left there before must not show through."""
    world = World()
    values = [v for v in world.insert(0) if v.key == relation_block_key(REL, 0, 0)]
    assert [(v.kind, v.starts_chain) for v in values] == [
        (ValueKind.ZERO_PAGE, True),
        (ValueKind.WAL_RECORD, False),
    ]
    assert values[0].lsn == values[1].lsn - 1


@pytest.mark.parametrize(
    ("rmgr", "kind"),
    [
        (Rmgr.BTREE, ValueKind.PAGE_IMAGE),
        (Rmgr.HASH, ValueKind.WAL_RECORD),
        (Rmgr.GIST, ValueKind.WAL_RECORD),
    ],
)
def test_full_page_images(rmgr: int, kind: ValueKind) -> None:
    """GiST's and hash's redo change a page after restoring it, so their images stay in the record."""
    world = World()
    image = build_block(0, REL, 0, image=b"\x07" * 8192)
    (value,) = [v for v in world.add(rmgr, 0, b"x", blocks=(image,)) if v.key[0] == 0]
    assert (value.kind, value.starts_chain) == (kind, True)
    if kind is ValueKind.PAGE_IMAGE:
        assert value.payload == bytes(6) + b"\x07" * 8192


def test_insert_clears_visibility_without_naming_the_map() -> None:
    world = World()
    world.timeline.set_size(MAIN_SIZE, PER_MAP_PAGE + 5)
    world.timeline.set_size(VM_SIZE, 2)
    block = PER_MAP_PAGE + 1
    (value,) = [v for v in world.insert(block, flags=1) if v.kind is ValueKind.NATIVE]
    assert value.key == relation_block_key(REL, Fork.VM, 1)
    assert value.payload == native_records.encode_vm_clear([(block, 3)], sets_lsn=False)
    assert not [v for v in world.insert(block) if v.kind is ValueKind.NATIVE]


def test_insert_clears_visibility_of_a_map_it_names() -> None:
    world = World()
    world.timeline.set_size(MAIN_SIZE, 5)
    world.timeline.set_size(VM_SIZE, 1)
    values = world.insert(3, flags=1, more=(build_block(1, None, 0, fork=Fork.VM),))
    assert [(v.key, v.payload) for v in values if v.kind is ValueKind.NATIVE] == [
        (relation_block_key(REL, Fork.VM, 0), native_records.encode_vm_clear([(3, 3)], sets_lsn=True))
    ]
    assert [v.key for v in values if v.kind is ValueKind.WAL_RECORD] == [relation_block_key(REL, 0, 3)]
    image = world.insert(3, flags=1, more=(build_block(1, None, 0, fork=Fork.VM, image=b"\x01" * 8192),))
    assert [v.kind for v in image if v.key == relation_block_key(REL, Fork.VM, 0)] == [ValueKind.PAGE_IMAGE]


@pytest.mark.parametrize(
    ("old_block", "keys"), [(4, [0]), (PER_MAP_PAGE + 4, [0, 1])], ids=["one map page", "two map pages"]
)
def test_update_clears_both_pages_bits(old_block: int, keys: list[int]) -> None:
    world = World()
    world.timeline.set_size(MAIN_SIZE, PER_MAP_PAGE + 9)
    world.timeline.set_size(VM_SIZE, 2)
    blocks = (build_block(0, REL, 2, data=b"new"), build_block(1, None, old_block))
    values = world.add(Rmgr.HEAP, 0x20, struct.pack("<IHBBIH", 9, 1, 0, 3, 0, 1), blocks=blocks)
    native = {v.key: v.payload for v in values if v.kind is ValueKind.NATIVE}
    assert list(native) == [relation_block_key(REL, Fork.VM, page) for page in keys]
    if len(keys) == 1:
        (payload,) = native.values()
        assert payload == native_records.encode_vm_clear([(2, 3), (old_block, 3)], sets_lsn=False)


@pytest.mark.parametrize(("rmgr", "info"), [(Rmgr.HEAP, 0x60), (Rmgr.HEAP2, 0x60)])
def test_locks_clear_only_the_frozen_bit(rmgr: Rmgr, info: int) -> None:
    world = World()
    world.timeline.set_size(MAIN_SIZE, 5)
    world.timeline.set_size(VM_SIZE, 1)
    values = world.add(rmgr, info, struct.pack("<IHBB", 9, 1, 0, 1), blocks=(build_block(0, REL, 2),))
    (native,) = [v for v in values if v.kind is ValueKind.NATIVE]
    assert native.payload == native_records.encode_vm_clear([(2, 2)], sets_lsn=False)


def test_visible_sets_bits() -> None:
    world = World()
    world.timeline.set_size(MAIN_SIZE, 5)
    blocks = (build_block(0, REL, 0, fork=Fork.VM), build_block(1, None, 4))
    values = world.add(Rmgr.HEAP2, 0x40, struct.pack("<IB", 9, 0x07), blocks=blocks)
    (native,) = [v for v in values if v.kind is ValueKind.NATIVE]
    assert native.payload == native_records.encode_vm_set(4, 3)
    assert world.timeline.size(VM_SIZE) == 1


def truncate(blocks: int, flags: int) -> bytes:
    return struct.pack("<IIIIi", blocks, *REL, flags)


def test_truncation_cuts_every_fork_as_redo_does() -> None:
    world = World()
    world.timeline.set_size(MAIN_SIZE, 3 * PER_MAP_PAGE)
    world.timeline.set_size(VM_SIZE, 3)
    world.timeline.set_size(relation_size_key(REL, Fork.FSM), 4)
    values = world.add(Rmgr.SMGR, 0x20, truncate(PER_MAP_PAGE + 7, 7))
    assert world.timeline.size(MAIN_SIZE) == PER_MAP_PAGE + 7
    assert world.timeline.size(VM_SIZE) == 2
    assert world.timeline.size(relation_size_key(REL, Fork.FSM)) == 0
    (native,) = [v for v in values if v.kind is ValueKind.NATIVE]
    assert native.key == relation_block_key(REL, Fork.VM, 1)
    assert native.payload == native_records.encode_vm_truncate(PER_MAP_PAGE + 7)
    world.add(Rmgr.SMGR, 0x20, truncate(PER_MAP_PAGE, 7))
    assert world.timeline.size(VM_SIZE) == 1
    assert not world.add(Rmgr.SMGR, 0x20, truncate(2 * PER_MAP_PAGE, 7)), "longer than it is: nothing"


def commit(
    subxacts: tuple[int, ...] = (),
    relations: tuple[Relation, ...] = (),
    time: int = 10**15,
    origin_lsn: int | None = None,
) -> bytes:
    flags = (2 if subxacts else 0) | (4 if relations else 0) | (0 if origin_lsn is None else 32)
    data = struct.pack("<qI", time, flags)
    if subxacts:
        data += struct.pack(f"<I{len(subxacts)}I", len(subxacts), *subxacts)
    if relations:
        data += struct.pack("<I", len(relations)) + b"".join(struct.pack("<III", *r) for r in relations)
    return data if origin_lsn is None else data + struct.pack("<Qq", origin_lsn, time)


def test_commit_marks_every_xid_on_its_page() -> None:
    world = World(state=make_state(next_xid=32_760))
    world.timeline.set_size(slru_size_key(Slru.XACT, 0), 1)
    values = world.add(Rmgr.XACT, 0x80, commit((32_766, 32_768, 32_769)), xid=32_765)
    native = {v.key: v.payload for v in values if v.kind is ValueKind.NATIVE}
    assert native == {
        slru_block_key(Slru.XACT, 0, 0): native_records.encode_clog_status(
            XactStatus.COMMITTED, [32_765, 32_766]
        ),
        slru_block_key(Slru.XACT, 0, 1): native_records.encode_clog_status(
            XactStatus.COMMITTED, [32_768, 32_769]
        ),
    }
    assert world.timeline.size(slru_size_key(Slru.XACT, 0)) == 2
    assert world.ingest.checkpoint_state.checkpoint.next_xid == 32_770
    stored = world.timeline.get_value(make_key(KeyKind.CHECKPOINT), world.timeline.last_record_lsn)
    assert stored is not None
    assert CheckpointState.unpack(stored).checkpoint.next_xid == stored_next_xid(32_770) == 33_579


@pytest.mark.parametrize("xid", [3, 817, 818, 819, 32_766, 32_767, 32_768, 2**32 - 12, 2**32 - 1])
def test_next_xid_is_stored_as_the_first_of_a_page(xid: int) -> None:
    world = World(state=make_state(next_xid=(7 << 32) + xid))
    world.add(Rmgr.XACT, 0x80, commit(), xid=xid)
    exact = world.ingest.checkpoint_state.checkpoint.next_xid
    assert exact == (8 << 32) + 3 if xid == 2**32 - 1 else (7 << 32) + xid + 1
    stored = world.timeline.get_value(make_key(KeyKind.CHECKPOINT), world.timeline.last_record_lsn)
    assert stored is not None
    assert CheckpointState.unpack(stored).checkpoint.next_xid == stored_next_xid(exact)


def test_abort_drops_what_the_transaction_created() -> None:
    world = World()
    world.add(Rmgr.SMGR, 0x10, struct.pack("<IIIi", *REL, 0), xid=1000)
    assert world.timeline.size(MAIN_SIZE) == 0
    values = world.add(Rmgr.XACT, 0xA0, commit(relations=(REL,)), xid=1000)
    assert world.timeline.size(MAIN_SIZE) is None
    (status,) = [v for v in values if v.kind is ValueKind.NATIVE]
    assert status.payload == native_records.encode_clog_status(XactStatus.ABORTED, [1000])
    values = world.insert(0, init=True)
    assert world.timeline.size(MAIN_SIZE) == 1, "the same number can be used again"


def test_commit_times_are_kept_when_tracked_and_thinned() -> None:
    state = make_state()
    settings = msgspec.structs.replace(state.settings, track_commit_timestamp=True)
    world = World(state=msgspec.structs.replace(state, settings=settings))
    key = make_key(KeyKind.COMMIT_TIME)
    counts = []
    for number, time in enumerate((10**15, 10**15 + 9_999, 10**15 + 10_000, 10**15 - 50_000)):
        values = world.add(Rmgr.XACT, 0x80, commit(time=time), xid=1000 + number, origin=None)
        counts.append(sum(v.key == key for v in values))
        times = [v.payload for v in values if v.key[:5] == slru_block_key(Slru.COMMIT_TS, 0, 0)[:5]]
        assert native_records.encode_commit_times(time, 0, [1000 + number]) in times
    assert counts == [1, 0, 1, 1]
    assert world.ingest.checkpoint_state.checkpoint.newest_commit_ts_xid == 1003


def test_multixact_writes_its_own_and_the_next_offset() -> None:
    world = World(state=make_state(next_multi=2047, next_multi_offset=1635))
    data = struct.pack("<IIi", 2047, 1635, 2) + struct.pack("<IIII", 900, 1, 1500, 5)
    values = world.add(Rmgr.MULTIXACT, 0x20, data, xid=1000)
    native = {v.key: v.payload for v in values if v.kind is ValueKind.NATIVE}
    assert native == {
        slru_block_key(Slru.MULTIXACT_OFFSETS, 0, 0): native_records.encode_offsets([(2047, 1635)]),
        slru_block_key(Slru.MULTIXACT_OFFSETS, 0, 1): native_records.encode_offsets([(2048, 1637)]),
        slru_block_key(Slru.MULTIXACT_MEMBERS, 0, 0): native_records.encode_members([(1635, 900, 1)]),
        slru_block_key(Slru.MULTIXACT_MEMBERS, 0, 1): native_records.encode_members([(1636, 1500, 5)]),
    }
    checkpoint = world.ingest.checkpoint_state.checkpoint
    assert (checkpoint.next_multi, checkpoint.next_multi_offset, checkpoint.next_xid) == (2048, 1637, 1501)


@pytest.mark.parametrize("pg_version", [16, 18])
def test_slru_truncation(pg_version: int) -> None:
    world = World(pg_version, make_state(next_xid=3_000_000))
    page = "<I" if pg_version < 17 else "<Q"
    for segment in (0, 1):
        world.timeline.set_size(slru_size_key(Slru.XACT, segment), 32)
        world.timeline.set_size(slru_size_key(Slru.MULTIXACT_OFFSETS, segment), 32)
        world.timeline.set_size(slru_size_key(Slru.MULTIXACT_MEMBERS, segment), 32)
    world.add(Rmgr.CLOG, 0x10, struct.pack(page, 31) + struct.pack("<II", 1_000_000, 1))
    assert world.timeline.size(slru_size_key(Slru.XACT, 0)) == 32
    world.add(Rmgr.CLOG, 0x10, struct.pack(page, 32) + struct.pack("<II", 1_048_576, 1))
    assert world.timeline.size(slru_size_key(Slru.XACT, 0)) is None
    assert world.timeline.size(slru_size_key(Slru.XACT, 1)) == 32
    oldest = 2048 * 32 + 1
    data = struct.pack("<IIIII", 5, 1, oldest, 10, 1636 * 32 + 3)
    world.add(Rmgr.MULTIXACT, 0x30, data)
    assert world.timeline.size(slru_size_key(Slru.MULTIXACT_MEMBERS, 0)) is None
    assert world.timeline.size(slru_size_key(Slru.MULTIXACT_OFFSETS, 0)) is None
    assert world.timeline.size(slru_size_key(Slru.MULTIXACT_MEMBERS, 1)) == 32
    checkpoint = world.ingest.checkpoint_state.checkpoint
    assert (checkpoint.oldest_multi, checkpoint.oldest_multi_db) == (oldest, 5)
    world.add(Rmgr.CLOG, 0x00, struct.pack(page, 2))
    assert world.timeline.size(slru_size_key(Slru.XACT, 0)) == 3


def test_two_phase_file_comes_and_goes() -> None:
    world = World(state=make_state(next_xid=(5 << 32) + 1000))
    head = struct.pack("<IIIIqIiiiiiiBxHQq", 0x57F94534, 200, 1000, 5, 7, 10, 2, 0, 0, 0, 0, 0, 0, 3, 0, 0)
    data = head + b"gx\0".ljust(8, b"\0") + struct.pack("<II", 1001, 1002)
    world.add(Rmgr.XACT, 0x10, data, xid=1000)
    key = two_phase_key((5 << 32) + 1000)
    content = world.timeline.get_value(key, world.timeline.last_record_lsn)
    assert content is not None
    assert content[:-4] == data
    assert world.ingest.checkpoint_state.checkpoint.next_xid == (5 << 32) + 1003
    end = struct.pack("<qIIII", 10**15, 2 | 16, 2, 1001, 1002) + struct.pack("<I", 1000)
    values = world.add(Rmgr.XACT, 0x80 | 0x30, end)
    assert world.timeline.get_value(key, world.timeline.last_record_lsn) is None
    (status,) = [v for v in values if v.kind is ValueKind.NATIVE]
    assert status.payload == native_records.encode_clog_status(XactStatus.COMMITTED, [1000, 1001, 1002])


class OriginWorld(World):
    """Only what becomes of replication origins."""

    def end(self, origin: int, origin_lsn: int, *, info: int = 0x80) -> list[bytes]:
        """A transaction of `origin` ends; what was put."""
        values = self.add(Rmgr.XACT, info, commit(origin_lsn=origin_lsn), xid=1000, origin=origin)
        return [value.payload for value in values if value.key == origin_key(origin)]

    def progress(self, origin: int) -> int | None:
        value = self.timeline.get_value(origin_key(origin), self.timeline.last_record_lsn)
        return None if value is None else int.from_bytes(value, "little")


@pytest.mark.parametrize("info", [0x80, 0xA0, 0xB0, 0xC0])
def test_ends_of_transactions_move_their_origin_and_never_back(info: int) -> None:
    """Commits and aborts, of prepared transactions too."""
    world = OriginWorld()
    assert world.end(3, 500, info=info) == [(500).to_bytes(8, "little")]
    assert world.end(3, 400, info=info) == []
    assert world.end(7, 1 << 40, info=info)
    assert (world.progress(3), world.progress(7)) == (500, 1 << 40)


def test_an_ingest_that_starts_again_knows_the_origins() -> None:
    world = OriginWorld()
    world.end(3, 500)
    world.ingest = world.new_ingest()
    before, at = len(world.timeline.values), len(world.wal.stream)
    world.wal.add(Rmgr.XACT, 0x80, commit(origin_lsn=450), xid=1001, origin=3)
    world.ingest.ingest(bytes(world.wal.stream[at:]), Lsn(START + at))
    assert origin_key(3) not in [value.key for value in world.timeline.values[before:]]
    assert world.progress(3) == 500


def test_what_is_no_origin_has_no_progress() -> None:
    """InvalidRepOriginId and DoNotReplicateId, natively and in the rare records."""
    world = OriginWorld()
    for origin in (0, 0xFFFF):
        assert world.end(origin, 500) == []
        world.add(Rmgr.REPLORIGIN, 0x00, struct.pack("<QH?", 800, origin, True))
        assert world.progress(origin) is None


def test_origins_are_set_and_dropped() -> None:
    world = OriginWorld()
    world.end(3, 500)
    for remote_lsn, may_go_back, expected in ((450, False, 500), (450, True, 450), (600, False, 600)):
        world.add(Rmgr.REPLORIGIN, 0x00, struct.pack("<QH?5x", remote_lsn, 3, may_go_back))
        assert world.progress(3) == expected
    world.add(Rmgr.REPLORIGIN, 0x10, struct.pack("<H", 3))
    assert world.progress(3) is None
    assert world.end(3, 100) == [(100).to_bytes(8, "little")], "the number can be used again"


@pytest.mark.parametrize("pg_version", [14, 18])
def test_a_prepared_transaction_moves_its_origin(pg_version: int) -> None:
    world = OriginWorld(pg_version)
    counts = (0,) * (4 if pg_version == 14 else 6)
    layout = f"<IIIIqI{len(counts)}iBxHQq"
    data = struct.pack(layout, 0x57F94534, 200, 1000, 5, 7, 10, *counts, 0, 3, 700, 9)
    data += b"gx\0".ljust(8, b"\0")
    world.add(Rmgr.XACT, 0x10, data, xid=1000, origin=3)
    assert world.progress(3) == 700


def test_file_copy_takes_pages_as_of_the_record_before() -> None:
    world = World()
    world.timeline.set_size(MAIN_SIZE, 130)
    world.insert(0)
    before = world.timeline.last_record_lsn
    values = world.add(Rmgr.DBASE, 0x00, struct.pack("<IIII", 77, 1663, 5, 1663))
    copied = Relation(1663, 77, REL.rel)
    assert world.timeline.size(relation_size_key(copied, Fork.MAIN)) == 130
    assert world.reads == [
        (relation_block_key(REL, 0, 0), 128, before),
        (relation_block_key(REL, 0, 128), 2, before),
    ]
    pages = {v.key: v for v in values if v.key[0] == 0}
    assert len(pages) == 128, "a page of zeros needs no value"
    assert relation_block_key(copied, 0, 129) not in pages
    assert pages[relation_block_key(copied, 0, 126)].payload == bytes([127]) * 8192
    world.add(Rmgr.DBASE, 0x20, struct.pack("<IiI", 77, 1, 1663))
    assert world.timeline.size(relation_size_key(copied, Fork.MAIN)) is None
    assert world.timeline.size(MAIN_SIZE) == 130


def test_version_14_numbers_drop_database_differently() -> None:
    world = World(14)
    world.timeline.set_size(MAIN_SIZE, 1)
    world.add(Rmgr.DBASE, 0x10, struct.pack("<IiI", 5, 1, 1663))
    assert world.timeline.size(MAIN_SIZE) is None


@pytest.mark.parametrize(
    ("rmgr", "info"),
    [(60, 0), (Rmgr.XLOG, 0xC0), (Rmgr.SMGR, 0x30), (Rmgr.CLOG, 0x40), (Rmgr.REPLORIGIN, 0x20)],
)
def test_what_nobody_knows_stops_ingest(rmgr: int, info: int) -> None:
    world = World()
    world.insert(0)
    before = world.timeline.last_record_lsn
    with pytest.raises(UnsupportedRecordError, match="is not known"):
        world.add(rmgr, info, bytes(40))
    assert world.timeline.last_record_lsn == before


@pytest.mark.parametrize(
    ("rmgr", "info", "data"),
    [
        (Rmgr.SMGR, 0x20, b"short"),
        (Rmgr.SMGR, 0x10, b"short"),
        (Rmgr.XLOG, 0x10, b"short"),
        (Rmgr.XACT, 0x80, commit((1,))[:-2]),
        (Rmgr.MULTIXACT, 0x20, struct.pack("<IIi", 1, 1, 3)),
        (Rmgr.RELMAP, 0x00, struct.pack("<IIi", 5, 1663, 512)),
        (Rmgr.HEAP, 0x10, b"x"),
        (Rmgr.REPLORIGIN, 0x00, b"short"),
    ],
)
def test_records_shorter_than_they_must_be_stop_ingest(rmgr: int, info: int, data: bytes) -> None:
    world = World()
    world.insert(0)
    before = world.timeline.last_record_lsn
    with pytest.raises(InvalidWalError):
        world.add(rmgr, info, data, xid=5)
    assert world.timeline.last_record_lsn == before


def test_values_of_a_record_that_fails_are_not_put() -> None:
    world = World()
    world.timeline.set_size(MAIN_SIZE, 1)
    at = len(world.wal.stream)
    good = world.wal.add(Rmgr.SMGR, 0x10, struct.pack("<IIIi", *REL._replace(rel=99), 0))
    world.wal.add(60, 0, b"of a resource manager that nobody knows")
    with pytest.raises(UnsupportedRecordError):
        world.ingest.ingest(bytes(world.wal.stream[at:]), Lsn(START + at))
    assert world.timeline.last_record_lsn == good
    assert world.timeline.size(MAIN_SIZE) == 1


def test_gaps_and_missing_state_are_refused() -> None:
    world = World()
    with pytest.raises(WalGapError, match="continues at 0/100028"):
        world.ingest.ingest(b"x", Lsn(START + 8))
    empty = ValueTimeline(START, make_state())
    empty._newest.clear()
    with pytest.raises(CheckpointMissingError):
        WalIngest(empty, read_pages=world.read_pages)


@pytest.mark.parametrize("chunk_bytes", [1, 13, 8192, 1 << 20])
def test_chunks_do_not_matter(chunk_bytes: int) -> None:
    def build() -> bytes:
        wal = WalBuilder(START)
        for number in range(60):
            block = build_block(0, REL, number % 9, data=b"d" * (number * 37 % 900))
            wal.add(Rmgr.HEAP, 0, struct.pack("<HB", 1, number % 2), blocks=(block,), xid=1000 + number)
            wal.add(Rmgr.XACT, 0x80, commit((1000 + number,)), xid=2000 + number)
            if number % 20 == 7:
                wal.add(Rmgr.SMGR, 0x20, truncate(number % 5, 7))
                wal.add(Rmgr.XLOG, 0x40)
        return bytes(wal.stream)

    stream = build()
    whole, parts = World(), World()
    whole.ingest.ingest(stream, START)
    for at in range(0, len(stream), chunk_bytes):
        if at and at % (17 * chunk_bytes) == 0 and parts.timeline.last_record_lsn == START + at:
            parts.ingest = parts.new_ingest()
        parts.ingest.ingest(stream[at : at + chunk_bytes], Lsn(START + at))
    assert parts.timeline.values == whole.timeline.values
    ours, theirs = parts.ingest.checkpoint_state.checkpoint, whole.ingest.checkpoint_state.checkpoint
    assert 0 <= ours.next_xid - theirs.next_xid < 819, "a restart knows it rounded up"
    assert msgspec.structs.replace(ours, next_xid=theirs.next_xid) == theirs
