"""What a stop collects from a directory, and what a start makes of it, without a PostgreSQL."""

import struct
from collections.abc import Mapping
from pathlib import Path

import google_crc32c
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES, Fork, Relation, relation_block_key
from excimer.base.lsn import Lsn
from excimer.compute.state_collection import (
    CollectedState,
    StateLimits,
    StateUnreadableError,
    collect_state,
    fit,
)
from excimer.compute.state_resumption import Resumption, UnusableStateError, plan_resumption
from excimer.pgformat.basebackup import Basebackup, InlinePage, RelationFork, pack_relation_forks
from excimer.pgformat.clean_start import UncleanError
from excimer.pgformat.control_file import ClusterState, ControlFile
from excimer.pgformat.replication_slot import SLOT_MAGIC, DamagedSlotError, unpack_slot
from excimer.pgformat.saved_state import StateHeader
from excimer.pgformat.sequence_page import log_count
from excimer.pgformat.wal_prefix import wal_segment_file_name
from tests.kit.control_files import CHECKPOINT, CONTROL, SEGMENT
from tests.kit.wal_builder import WalBuilder

TENANT, TIMELINE, CHILD = TenantId("ab" * 16), TimelineId("cd" * 16), TimelineId("ce" * 16)
PLENTY = StateLimits(64 << 20, 16 << 20)
START = 3 * SEGMENT
XLOG, NOOP = 0, 0x20


def sequence_page(log_cnt: int) -> bytes:
    page = bytearray(BLOCK_SIZE_BYTES)
    struct.pack_into("<HHH", page, 12, 28, 8100, 8184)
    struct.pack_into("<I", page, 24, 8100)
    page[8100 + 22] = 24
    struct.pack_into("<qqB", page, 8124, 5, log_cnt, 1)
    struct.pack_into("<I", page, 8184, 0x1717)
    return bytes(page)


def slot_file(
    name: str, restart_lsn: int, *, database: int = 5, persistency: int = 0, invalid: int = 0
) -> bytes:
    head = name.encode(), database, persistency, 0, 0, restart_lsn, invalid
    rest = struct.pack("<64sIIIIQI", *head).ljust(184, b"\0")
    checked = struct.pack("<II", 5, len(rest)) + rest
    return struct.pack("<II", SLOT_MAGIC, google_crc32c.value(checked)) + checked


class Stopped:
    """A directory after a clean shutdown, with some pages of WAL before the checkpoint."""

    def __init__(self, root: Path, *, noops: int = 0) -> None:
        self.root = root
        builder = WalBuilder(START, segment_size_bytes=SEGMENT)
        for _ in range(noops):
            builder.add(XLOG, NOOP, bytes(8000))
        self.end_lsn = builder.add(XLOG, 0, CHECKPOINT.pack())
        self.checkpoint_lsn = builder.starts[-1]
        checkpoint = msgspec.structs.replace(CHECKPOINT, redo=self.checkpoint_lsn)
        self.control = msgspec.structs.replace(
            CONTROL,
            state=ClusterState.SHUTDOWNED,
            checkpoint_lsn=self.checkpoint_lsn,
            checkpoint=checkpoint,
        )
        (root / "base/5").mkdir(parents=True)
        self.put("global/pg_control", self.control.pack())
        wal = bytes(builder.stream)
        for offset in range(0, len(wal), SEGMENT):
            name = wal_segment_file_name(START + offset, SEGMENT)
            self.put(f"pg_wal/{name}", wal[offset : offset + SEGMENT].ljust(SEGMENT, b"\0"))

    def put(self, path: str, content: bytes) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(content)

    def collect(
        self, limits: StateLimits = PLENTY, presence: Mapping[str, bytes] | None = None
    ) -> CollectedState:
        return collect_state(self.root, (presence or {}).get, 18, limits, {"excimer_proposer"})

    def backup(self, forks: list[RelationFork] | None = None, **changes: object) -> Basebackup:
        known = forks or []
        backup = Basebackup(
            pg_version=18,
            lsn=self.end_lsn,
            prev_lsn=self.checkpoint_lsn,
            control_file=CONTROL.pack(),
            checkpoint=CHECKPOINT.pack(),
            files=[],
            relation_forks=pack_relation_forks(known),
            slru_segments=b"",
            pages=[
                InlinePage(
                    relation_block_key(Relation(*fork[:3]), fork.fork, block), bytes([7]) * BLOCK_SIZE_BYTES
                )
                for fork in known
                if fork.fork == Fork.INIT
                for block in range(fork.blocks)
            ],
        )
        return msgspec.structs.replace(backup, **changes)

    def resume(
        self, backup: Basebackup, timeline: TimelineId = TIMELINE, lsn: int | None = None
    ) -> Resumption:
        collected = self.collect()
        header = StateHeader(
            tenant_id=TENANT,
            timeline_id=TIMELINE,
            lsn=self.end_lsn if lsn is None else lsn,
            pg_version=18,
            content_size_bytes=1,
        )
        return plan_resumption(header, collected.state, backup, timeline)


def page(text: bytes) -> bytes:
    return text.ljust(BLOCK_SIZE_BYTES, b".")


@pytest.fixture
def stopped(tmp_path: Path) -> Stopped:
    stopped = Stopped(tmp_path)
    stopped.put("base/5/16384", page(b"a table's rows"))
    stopped.put("base/5/16384_fsm", page(b"0") + page(b"1") + page(b"2"))
    stopped.put("base/5/16384_vm", page(b"v"))
    stopped.put("base/5/t3_16384_fsm", page(b"a temporary table"))
    stopped.put("base/pgsql_tmp/x", b"x")
    stopped.put("base/5/16390", sequence_page(26))
    stopped.put("base/5/16391", sequence_page(0))
    stopped.put("base/5/16400", page(b"u0") + page(b"u1"))
    stopped.put("base/5/16400_fsm", page(b"uf"))
    stopped.put("base/5/16400_init", b"")
    stopped.put("pg_stat/pgstat.stat", b"statistics")
    stopped.put("pg_stat/pgstat.tmp", b"half")
    stopped.put("pg_replslot/bytes/state", slot_file("bytes", 0, database=0))
    stopped.put("pg_replslot/excimer_proposer/state", slot_file("excimer_proposer", 0, database=0))
    return stopped


def test_what_wal_does_not_carry_is_collected(stopped: Stopped) -> None:
    lsn, state = stopped.collect()
    assert lsn == stopped.end_lsn
    assert state.wal_lsn == stopped.checkpoint_lsn // 8192 * 8192
    assert ControlFile.unpack(state.control, 18) == stopped.control
    assert [fork.path for fork in state.free_space] == ["base/5/16384_fsm"]
    assert [fork.path for fork in state.sequences] == ["base/5/16390"]
    assert [fork.path for fork in state.unlogged] == ["base/5/16400", "base/5/16400_fsm"]
    assert [(file.path, file.content) for file in state.statistics] == [
        ("pg_stat/pgstat.stat", b"statistics")
    ]
    assert [file.path for file in state.slots] == ["pg_replslot/bytes/state"]
    assert (state.decoding, state.left_out) == ([], [])


def test_blocks_that_are_not_here_are_not_read(stopped: Stopped) -> None:
    presence = {"base/5/16384_fsm": b"\1\0", "base/5/16390": b"\0", "base/5/16400": b"\1\0"}
    state = stopped.collect(presence=presence).state
    [fork] = state.free_space
    assert fork.blocks == 3
    assert [(run.block, run.data[:1]) for run in fork.runs] == [(0, b"0"), (2, b"2")]
    assert state.sequences == []
    assert state.unlogged == []
    assert "a part of it is not here" in state.left_out[0]


def test_what_is_too_much_is_left_out_in_the_order_of_its_worth(stopped: Stopped) -> None:
    least = 8192 + stopped.end_lsn % 8192
    with pytest.raises(StateUnreadableError, match="needs more"):
        stopped.collect(StateLimits(least - 1, 0))
    state = stopped.collect(StateLimits(least, 0)).state
    assert not [*state.free_space, *state.statistics, *state.slots, *state.sequences, *state.unlogged]
    told = " ".join(state.left_out)
    for name in (
        "free space maps base/5/16384_fsm",
        "statistics pg_stat/",
        "sequences",
        "unlogged",
    ):
        assert name in told
    state = stopped.collect(StateLimits(least + 3 * BLOCK_SIZE_BYTES + 1000, 16 << 20)).state
    assert len(state.free_space) == len(state.statistics) == len(state.slots) == 1
    assert not [*state.sequences, *state.unlogged]
    state = stopped.collect(StateLimits(64 << 20, 3 * BLOCK_SIZE_BYTES - 1)).state
    assert len(state.sequences) == 1
    assert not state.unlogged


@given(st.lists(st.integers(0, 50), max_size=10), st.integers(0, 200))
def test_the_smallest_fit(sizes: list[int], budget: int) -> None:
    taken, left = fit(list(enumerate(sizes)), budget)
    assert sorted([*taken, *(item for item, _ in left)]) == list(range(len(sizes)))
    used = sum(sizes[item] for item in taken)
    assert used <= budget
    assert all(used + size > budget for _, size in left[:1])
    assert all(sizes[item] <= size for item in taken for _, size in left)


@pytest.mark.parametrize(
    "changes",
    [{"state": ClusterState.IN_PRODUCTION}, {"state": ClusterState.SHUTDOWNING}, {"checkpoint": CHECKPOINT}],
)
def test_an_unclean_directory_gives_nothing(stopped: Stopped, changes: dict[str, object]) -> None:
    stopped.put("global/pg_control", msgspec.structs.replace(stopped.control, **changes).pack())
    with pytest.raises(UncleanError):
        stopped.collect()


def test_a_checkpoint_that_is_not_whole_gives_nothing(stopped: Stopped) -> None:
    segment = stopped.root / "pg_wal" / wal_segment_file_name(START, SEGMENT)
    content = bytearray(segment.read_bytes())
    content[stopped.end_lsn % SEGMENT - 20] ^= 1
    segment.write_bytes(content)
    with pytest.raises(UncleanError):
        stopped.collect()


def test_each_slot_brings_the_wal_that_it_needs(tmp_path: Path) -> None:
    stopped = Stopped(tmp_path, noops=140)  # into a second segment
    near, far = START + SEGMENT + 100, START + 3 * 8192 + 56
    stopped.put("pg_replslot/far/state", slot_file("far", far))
    stopped.put("pg_replslot/near/state", slot_file("near", near))
    stopped.put("pg_replslot/given_up/state", slot_file("given_up", START, invalid=1))
    stopped.put("pg_replslot/broken/state", b"broken")
    stopped.put("pg_logical/snapshots/0-3000100.snap", b"snapshot")
    lsn, state = stopped.collect()
    assert {file.path.split("/")[1] for file in state.slots} == {"far", "near", "given_up"}
    assert (state.wal_lsn, state.wal_lsn + len(state.wal)) == (START + 3 * 8192, lsn)
    assert [file.content for file in state.decoding] == [b"snapshot"]
    assert "broken" in state.left_out[0]
    limited = stopped.collect(StateLimits(8192 + (lsn - near) + 20000, 0)).state
    assert {file.path.split("/")[1] for file in limited.slots} == {"near", "given_up"}
    assert limited.wal_lsn == near // 8192 * 8192
    assert "slot far" not in " ".join(limited.left_out), "it is kept elsewhere"
    (stopped.root / "pg_wal" / wal_segment_file_name(START, SEGMENT)).unlink()
    gone = stopped.collect().state
    assert {file.path.split("/")[1] for file in gone.slots} == {"near", "given_up"}
    assert "slot far (1.0 MiB): its WAL is no longer here" in " ".join(gone.left_out)


def test_a_logical_slot_goes_with_all_its_snapshots_or_not_at_all(tmp_path: Path) -> None:
    stopped = Stopped(tmp_path)
    stopped.put("pg_replslot/logical/state", slot_file("logical", stopped.checkpoint_lsn))
    stopped.put("pg_replslot/physical/state", slot_file("physical", stopped.checkpoint_lsn, database=0))
    stopped.put("pg_logical/snapshots/0-3000100.snap", bytes(100_000))
    state = stopped.collect(StateLimits(50_000, 0)).state
    assert [file.path for file in state.slots] == ["pg_replslot/physical/state"]
    assert state.decoding == []
    assert "slots logical" in state.left_out[0]


def test_slot_files() -> None:
    data = slot_file("mine", 77)
    assert unpack_slot(data, 18) == ("mine", True, 77, False, True, False)
    for persistency, lasts in ((1, (False, True)), (2, (False, False))):
        assert unpack_slot(slot_file("mine", 77, persistency=persistency), 18)[-2:] == lasts
    for damaged in (data[:-1], data[:50], bytes(200), data[:20] + b"x" + data[21:]):
        with pytest.raises(DamagedSlotError):
            unpack_slot(damaged, 18)
    with pytest.raises(DamagedSlotError, match="version 5"):
        unpack_slot(data, 16)


@given(st.binary(max_size=100), st.integers(0, 8191), st.integers(0, 255))
def test_pages_that_are_no_sequences(noise: bytes, place: int, value: int) -> None:
    assert log_count(noise.ljust(BLOCK_SIZE_BYTES, b"\0")) is None
    changed = bytearray(sequence_page(3))
    changed[place] = value
    log_count(bytes(changed))  # whatever it is, it is no error
    assert (log_count(sequence_page(3)), log_count(sequence_page(0))) == (3, 0)


FORKS = [
    RelationFork(1663, 5, 16384, Fork.MAIN, 9),
    RelationFork(1663, 5, 16400, Fork.INIT, 0),
    RelationFork(1663, 5, 16410, Fork.INIT, 1),
]


def test_a_branchs_own_state_comes_back_whole(stopped: Stopped) -> None:
    resumption = stopped.resume(stopped.backup(FORKS))
    assert resumption.prefix.checkpoint_lsn == stopped.checkpoint_lsn
    assert ControlFile.unpack(resumption.prefix.control_file, 18).state == ClusterState.SHUTDOWNED
    files = dict(resumption.carried.files)
    assert set(files) == {
        "pg_stat/pgstat.stat",
        "pg_replslot/bytes/state",
        "base/5/16384_fsm",
        "base/5/16390",
        "base/5/16400",
        "base/5/16400_fsm",
        "base/5/16410",  # an unlogged relation that was not carried begins as its init fork says
    }
    assert files["base/5/16410"] == bytes([7]) * BLOCK_SIZE_BYTES
    assert not resumption.is_inherited


def test_an_ancestors_state_comes_without_slots_and_unlogged_rows(stopped: Stopped) -> None:
    resumption = stopped.resume(stopped.backup(FORKS), CHILD)
    files = dict(resumption.carried.files)
    assert set(files) == {
        "pg_stat/pgstat.stat",
        "base/5/16384_fsm",
        "base/5/16390",
        "base/5/16400",
        "base/5/16410",
    }
    assert files["base/5/16400"] == b""
    assert resumption.is_inherited


@pytest.mark.parametrize(
    ("backup", "lsn"),
    [
        ({"lsn": START + SEGMENT}, None),
        ({"prev_lsn": START + 48}, None),
        ({}, START + SEGMENT),
        ({"control_file": msgspec.structs.replace(CONTROL, system_id=77).pack()}, None),
        ({"control_file": msgspec.structs.replace(CONTROL, catalog_version=77).pack()}, None),
        ({"pages": []}, None),
    ],
)
def test_what_does_not_fit_is_not_used(stopped: Stopped, backup: dict[str, object], lsn: int | None) -> None:
    with pytest.raises((UnusableStateError, UncleanError)):
        stopped.resume(stopped.backup(FORKS, **backup), lsn=lsn)


def test_wal_of_a_start_covers_its_segments(tmp_path: Path) -> None:
    stopped = Stopped(tmp_path, noops=140)
    stopped.put("pg_replslot/far/state", slot_file("far", START + 3 * 8192 + 56))
    chunks = stopped.resume(stopped.backup()).prefix.chunks
    assert [lsn for lsn, _ in chunks] == [START, START + 3 * 8192, START + SEGMENT]
    assert len(chunks[0][1]) == 40
    assert chunks[-1][0] + len(chunks[-1][1]) == stopped.end_lsn
    assert Lsn(chunks[1][0] + len(chunks[1][1])) == START + SEGMENT
