"""Saved states: what was packed comes back, and whatever else the bytes are, the error is a clear one."""

import string

import google_crc32c
import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.base.lsn import WAL_PAGE_SIZE_BYTES
from excimer.pgformat.control_file import CONTROL_FILE_SIZE_BYTES
from excimer.pgformat.saved_state import (
    DamagedStateError,
    SavedState,
    StateFile,
    StateFork,
    StateRun,
    pack_state,
    slot_name,
    unpack_header,
    unpack_state,
)

TENANT, TIMELINE = TenantId("ab" * 16), TimelineId("cd" * 16)
OIDS = st.integers(1, (1 << 32) - 1)
NAMES = st.text(string.ascii_lowercase + string.digits + "_", min_size=1, max_size=63)
CONTENT = st.binary(max_size=300)


def pages(count: int, seed: int) -> bytes:
    return bytes([seed % 256]) * (count * BLOCK_SIZE_BYTES)


@st.composite
def forks(draw: st.DrawFn, suffix: str, *, whole: bool) -> StateFork:
    path = f"base/{draw(OIDS)}/{draw(OIDS)}{suffix}"
    if draw(st.booleans()):
        path += f".{draw(st.integers(1, 5))}"
    runs, end = [], 0
    for _ in range(draw(st.integers(1 if whole else 0, 2))):
        block = end if whole else end + draw(st.integers(0, 9))
        count = draw(st.integers(1, 2))
        runs.append(StateRun(block, pages(count, draw(st.integers(0, 255)))))
        end = block + count
    return StateFork(path, end if whole else end + draw(st.integers(0, 100)), runs)


def unique(strategy: st.SearchStrategy[StateFork]) -> st.SearchStrategy[list[StateFork]]:
    return st.lists(strategy, max_size=3, unique_by=lambda fork: fork.path)


@st.composite
def states(draw: st.DrawFn) -> tuple[int, SavedState]:
    wal = draw(st.binary(min_size=1, max_size=200))
    wal_lsn = draw(st.integers(1, 1 << 40)) * WAL_PAGE_SIZE_BYTES
    slots = draw(st.lists(NAMES, max_size=3, unique=True))
    statistics = draw(st.sets(st.sampled_from(["pgstat.stat", "pg_stat_statements.stat", "global.stat"])))
    state = SavedState(
        control=draw(st.binary(min_size=8, max_size=8)).ljust(CONTROL_FILE_SIZE_BYTES, b"\0"),
        wal_lsn=wal_lsn,
        wal=wal,
        free_space=draw(unique(forks("_fsm", whole=False))),
        statistics=[StateFile(f"pg_stat/{name}", draw(CONTENT)) for name in sorted(statistics)],
        slots=[StateFile(f"pg_replslot/{name}/state", draw(CONTENT)) for name in slots],
        decoding=[StateFile("pg_logical/snapshots/0-1A2B3C.snap", draw(CONTENT))],
        sequences=draw(unique(forks("", whole=True))),
        unlogged=draw(unique(forks("_vm", whole=True))),
        left_out=draw(st.lists(st.text(max_size=20), max_size=2)),
    )
    return wal_lsn + len(wal), state


@given(states(), st.sampled_from([14, 15, 16, 17, 18]))
def test_what_was_packed_comes_back(made: tuple[int, SavedState], pg_version: int) -> None:
    lsn, state = made
    data = pack_state(TENANT, TIMELINE, lsn, pg_version, state)
    header, unpacked = unpack_state(data, "x")
    assert unpacked == state
    assert (header.tenant_id, header.timeline_id, header.lsn) == (TENANT, TIMELINE, lsn)
    assert header.pg_version == pg_version
    assert unpack_header(data, "x") == header


@given(st.binary(max_size=400), st.booleans())
def test_random_bytes_are_an_error(noise: bytes, has_right_line: bool) -> None:
    if has_right_line:  # gets past the checksum, and must still be nothing
        noise = b"excimer saved state 1 %08x\n" % google_crc32c.value(noise) + noise
    for unpack in (unpack_state, unpack_header):
        with pytest.raises(DamagedStateError, match="saved state x "):
            unpack(noise, "x")


@given(states(), st.data())
def test_a_torn_or_flipped_state_is_an_error(made: tuple[int, SavedState], data: st.DataObject) -> None:
    lsn, state = made
    packed = pack_state(TENANT, TIMELINE, lsn, 18, state)
    torn = packed[: data.draw(st.integers(0, len(packed) - 1))]
    flipped = bytearray(packed)
    flipped[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    for damaged in (torn, bytes(flipped), packed + b"\0"):
        for unpack in (unpack_state, unpack_header):
            with pytest.raises(DamagedStateError, match="saved state x "):
                unpack(damaged, "x")


def repacked(lsn: int, content: bytes, content_size_bytes: int) -> bytes:
    """An object whose checksum is right although its content is somebody's invention."""
    header = msgspec.msgpack.encode(
        {
            "tenant_id": TENANT,
            "timeline_id": TIMELINE,
            "lsn": lsn,
            "pg_version": 18,
            "content_size_bytes": content_size_bytes,
        }
    )
    body = len(header).to_bytes(4, "little") + header + content
    return b"excimer saved state 1 %08x\n" % google_crc32c.value(body) + body


@given(states(), st.data())
def test_whatever_a_content_says_it_is_checked(made: tuple[int, SavedState], data: st.DataObject) -> None:
    lsn, state = made
    content = bytearray(msgspec.msgpack.encode(state))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    frame = zstandard.ZstdCompressor().compress(bytes(content))
    try:
        _, unpacked = unpack_state(repacked(lsn, frame, len(content)), "x")
    except DamagedStateError:
        return
    small = [file.path for file in (*unpacked.statistics, *unpacked.slots, *unpacked.decoding)]
    assert all(path.startswith(("pg_stat/", "pg_replslot/", "pg_logical/")) for path in small)
    forks = [fork.path for fork in (*unpacked.free_space, *unpacked.sequences, *unpacked.unlogged)]
    assert all(path.startswith(("base/", "global/")) for path in forks)
    assert not any(".." in path for path in (*small, *forks))


def a_state(**changes: object) -> tuple[int, SavedState]:
    state = SavedState(control=bytes(CONTROL_FILE_SIZE_BYTES), wal_lsn=8192, wal=b"wal")
    return 8195, msgspec.structs.replace(state, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"control": b"short"},
        {"wal_lsn": 8191},
        {"wal": b""},
        {"wal": b"too long"},
        {"statistics": [StateFile("pg_stat/../../etc/passwd", b"")]},
        {"statistics": [StateFile("postgresql.conf", b"")]},
        {"statistics": [StateFile("pg_replslot/x/state", b"")]},
        {"slots": [StateFile("pg_stat/pgstat.stat", b"")]},
        {"slots": [StateFile("pg_replslot/a/state", b"")] * 2},
        {"decoding": [StateFile("pg_logical/replorigin_checkpoint", b"")]},
        {"free_space": [StateFork("base/5/7", 0, [])]},
        {"free_space": [StateFork("base/5/07_fsm", 0, [])]},
        {"free_space": [StateFork("base/5/7_fsm.0", 0, [])]},
        {"free_space": [StateFork("base/5/7_fsm", 1, [StateRun(0, pages(2, 0))])]},
        {"free_space": [StateFork("base/5/7_fsm", 9, [StateRun(4, pages(2, 0)), StateRun(5, pages(1, 0))])]},
        {"free_space": [StateFork("base/5/7_fsm", 9, [StateRun(0, b"half")])]},
        {"free_space": [StateFork("base/5/7_fsm", -1, [])]},
        {"free_space": [StateFork("base/5/7_fsm", 1 << 40, [])]},
        {"sequences": [StateFork("base/5/7", 1, [])]},
        {"sequences": [StateFork("global/pg_control", 0, [])]},
        {"unlogged": [StateFork("base/5/7_init", 0, [])]},
        {"unlogged": [StateFork("base/5/7", 0, [])], "sequences": [StateFork("base/5/7", 0, [])]},
    ],
)
def test_what_no_data_directory_has_is_refused(changes: dict[str, object]) -> None:
    lsn, state = a_state(**changes)
    with pytest.raises(DamagedStateError):
        pack_state(TENANT, TIMELINE, lsn, 18, state)
    content = msgspec.msgpack.encode(state)
    frame = zstandard.ZstdCompressor().compress(content)
    with pytest.raises(DamagedStateError):
        unpack_state(repacked(lsn, frame, len(content)), "x")


def test_a_frame_that_unpacks_to_something_else_is_refused_before_it_is_unpacked() -> None:
    lsn, state = a_state()
    content = msgspec.msgpack.encode(state)
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    with pytest.raises(DamagedStateError, match="has not"):
        unpack_state(repacked(lsn, bomb, len(content)), "x")
    with pytest.raises(DamagedStateError, match="unpacks to"):
        unpack_state(repacked(lsn, bomb, 1 << 40), "x")
    frame = zstandard.ZstdCompressor().compress(content)
    assert unpack_state(repacked(lsn, frame, len(content)), "x")[1] == state
    newer = b"excimer saved state 2 00000000\n"
    with pytest.raises(DamagedStateError, match="version 2"):
        unpack_state(newer, "x")


def test_slots_by_their_files() -> None:
    assert slot_name("pg_replslot/mine/state") == "mine"
    assert slot_name("pg_replslot/mine/xid-1.spill") is None
