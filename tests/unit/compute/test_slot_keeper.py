"""What is kept of replication slots at each renaming, and the WAL that is laid for them after a crash."""

import asyncio
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from excimer.base.errors import RetryableError
from excimer.base.lsn import Lsn
from excimer.compute import slot_keeper
from excimer.compute.slot_keeper import SlotKeeper, parse_change
from excimer.compute.slot_wal import SlotWal, lay_slot_wal, write_back
from excimer.compute.state_keeper import StateOwner
from excimer.pgformat.kept_slots import snapshot_path, unpack_slots
from excimer.pgformat.rewrite_mappings import find_mappings
from excimer.pgformat.wal_prefix import wal_segment_file_name
from excimer.service.http_client import HttpClient
from excimer.wire.endpoint_tokens import EndpointTokens
from tests.kit.ports import free_port
from tests.kit.wal_builder import WalBuilder
from tests.unit.compute.test_saved_state import TENANT, TIMELINE, slot_file

SEGMENT = 16 << 20
PAGE = 8192


def test_renamings_of_slots() -> None:
    assert parse_change("pg_replslot/a/state.tmp pg_replslot/a/state") == ("a", "pg_replslot/a/state.tmp")
    assert parse_change("pg_replslot/a.tmp pg_replslot/a") == ("a", "pg_replslot/a.tmp/state")
    assert parse_change("pg_replslot/a pg_replslot/a.tmp") == ("a", None)
    for other in ("", "pg_replslot/a pg_replslot/b.tmp", "pg_replslot/../a pg_replslot/../a.tmp", "a b"):
        assert parse_change(other) is None


@pytest.mark.parametrize("name", ["a", "b"])
def test_slots_are_kept_as_they_are_going_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    put_file(tmp_path, "pg_replslot/a/state", slot_file("a", 100))
    put_file(tmp_path, "pg_replslot/excimer_proposer/state", slot_file("excimer_proposer", 100, database=0))
    put_file(tmp_path, "pg_replslot/session/state", slot_file("session", 100, persistency=2))
    put_file(tmp_path, "pg_replslot/begun/state", slot_file("begun", 0, persistency=1))
    put_file(tmp_path, "pg_replslot/gone.tmp/state", slot_file("gone", 100))
    put_file(tmp_path, f"pg_replslot/{name}/state.tmp", slot_file(name, 0x1_0000_0200))
    put_file(tmp_path, snapshot_path(Lsn(0x1_0000_0200)), b"snapshot")
    assert snapshot_path(Lsn(0x1_0000_0200)) == "pg_logical/snapshots/1-200.snap"
    new = (name, 0x1_0000_0200, b"snapshot")
    old = [] if name == "a" else [("a", 100, None)]
    keep = keep_into(tmp_path, monkeypatch)
    assert keep(f"pg_replslot/{name}/state.tmp pg_replslot/{name}/state") == [*old, new]
    assert keep("pg_replslot/a pg_replslot/a.tmp") == ([new] if name == "b" else [])


def test_an_answer_counts_before_its_renaming_has_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another slot is saved between the two: else it would bring back what PostgreSQL is about to let go."""
    for name in ("a", "b", "c"):
        put_file(tmp_path, f"pg_replslot/{name}/state", slot_file(name, 100))
    put_file(tmp_path, "pg_replslot/a/state.tmp", slot_file("a", 200))
    put_file(tmp_path, "pg_replslot/d.tmp/state", slot_file("d", 200))
    put_file(tmp_path, "pg_replslot/b/state.tmp", slot_file("b", 300))
    a, b, d = ("a", 200, None), ("b", 100, None), ("d", 200, None)
    keep = keep_into(tmp_path, monkeypatch)
    assert keep("pg_replslot/a/state.tmp pg_replslot/a/state") == [a, b, ("c", 100, None)]
    assert keep("pg_replslot/c pg_replslot/c.tmp") == [a, b]
    assert keep("pg_replslot/d.tmp pg_replslot/d") == [a, b, d]
    assert keep("pg_replslot/b/state.tmp pg_replslot/b/state") == [a, ("b", 300, None), d]
    # They happen, and what is in the directory counts again.
    (tmp_path / "pg_replslot/a/state.tmp").replace(tmp_path / "pg_replslot/a/state")
    (tmp_path / "pg_replslot/b/state.tmp").replace(tmp_path / "pg_replslot/b/state")
    (tmp_path / "pg_replslot/c").rename(tmp_path / "pg_replslot/c.tmp")
    (tmp_path / "pg_replslot/d.tmp").rename(tmp_path / "pg_replslot/d")
    put_file(tmp_path, "pg_replslot/b/state.tmp", slot_file("b", 400))
    monkeypatch.setattr(slot_keeper, "RENAMING_S", 0.0)
    assert keep("pg_replslot/b/state.tmp pg_replslot/b/state") == [a, ("b", 400, None), d]
    put_file(tmp_path, "pg_replslot/d/state", slot_file("d", 500))
    # One whose process was killed before its renaming is not waited for without end.
    put_file(tmp_path, "pg_replslot/a/state.tmp", slot_file("a", 600))
    kept = keep("pg_replslot/a/state.tmp pg_replslot/a/state")
    assert kept == [("a", 600, None), ("b", 300, None), ("d", 500, None)]


def test_a_slot_that_is_being_made_is_kept_and_dropped_by_who_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its WAL must be there when it is made. A restart of PostgreSQL drops it, and its WAL is let go."""
    put_file(tmp_path, "pg_replslot/a/state", slot_file("a", 300))
    put_file(tmp_path, "pg_replslot/new/state.tmp", slot_file("new", 200, persistency=1))
    kept: list[bytes] = []

    async def put_bytes(_client: HttpClient, _path: str, packed: bytes) -> None:
        kept.append(packed)

    async def post_for_bytes(_client: HttpClient, _path: str) -> bytes:
        return kept[-1]

    monkeypatch.setattr(HttpClient, "put_bytes", put_bytes)
    monkeypatch.setattr(HttpClient, "post_for_bytes", post_for_bytes)
    keeper = keeper_of(tmp_path, "127.0.0.1:1")
    keeper.begin(7)
    assert asyncio.run(keeper.keep("pg_replslot/new/state.tmp pg_replslot/new/state")) == "kept"
    assert unpack_slots(kept[-1], "the body").needed_lsn(Lsn(1000)) == 200
    keeper.begin(8)
    taken = asyncio.run(keeper.take_over())
    assert taken is not None
    assert [slot.name for slot, _ in taken.parsed()] == ["a"]
    assert unpack_slots(kept[-1], "the body").needed_lsn(Lsn(1000)) == 300
    assert len(kept) == 2


def put_file(data_dir: Path, path: str, content: bytes) -> None:
    (data_dir / path).parent.mkdir(parents=True, exist_ok=True)
    (data_dir / path).write_bytes(content)


def keep_into(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[tuple[str, int, bytes | None]]]:
    """A keeper whose pageserver keeps everything: allows a renaming, returns what is kept then."""
    kept: list[bytes] = []

    async def put_bytes(_client: HttpClient, _path: str, packed: bytes) -> None:
        kept.append(packed)

    monkeypatch.setattr(HttpClient, "put_bytes", put_bytes)
    keeper = keeper_of(data_dir, "127.0.0.1:1")
    keeper.begin(7)

    def keep(text: str) -> list[tuple[str, int, bytes | None]]:
        assert asyncio.run(keeper.keep(text)) == "kept"
        parsed = unpack_slots(kept[-1], "the body").parsed()
        return [(slot.name, slot.restart_lsn, one.snapshot) for slot, one in parsed]

    return keep


def mapping_record(offset: int, entries: bytes, *, xid: int = 9) -> bytes:
    return struct.pack("<IIIxxxxQIxxxxQ", xid, 5, 1259, offset, len(entries) // 36, 0x1_2345_6789) + entries


@pytest.mark.parametrize("before", range(0, 9000, 376))
def test_mappings_are_found_wherever_in_a_page_their_record_begins(before: int) -> None:
    """Also where its head is cut by the end of a page; not in what only looks like one."""
    builder = WalBuilder(3 * SEGMENT, segment_size_bytes=SEGMENT)
    builder.add(0, 0x20, (bytes(24) + b"\x00\x09" + bytes(6)).ljust(before + 64, b"\0"))
    builder.add(9, 0x00, mapping_record(0, b"m" * 36 * 3))
    builder.add(9, 0x00, mapping_record(108, b"n" * 36 * 400))
    builder.add(9, 0x10, mapping_record(0, b"x" * 36))
    wal = bytes(builder.stream)

    def read(lsn: int, size: int) -> bytes:
        assert lsn >= 3 * SEGMENT
        return wal[lsn - 3 * SEGMENT :][:size]

    parts = list(find_mappings(read, 3 * SEGMENT, 3 * SEGMENT + len(wal), 18, SEGMENT))
    assert [(part.offset, part.data) for part in parts] == [(0, b"m" * 108), (108, b"n" * 14400)]
    assert {part.path for part in parts} == {"pg_logical/mappings/map-5-4eb-1_23456789-9-0"}


def test_real_wal_lies_under_the_prefix_and_is_put_back(tmp_path: Path) -> None:
    """The prefix reaches back over the beginning of a segment, and of the WAL that is needed."""
    first, second = (wal_segment_file_name(number * SEGMENT, SEGMENT) for number in (3, 4))
    folder, data_dir = tmp_path / "slot_wal", tmp_path / "pgdata"
    folder.mkdir()
    (data_dir / "pg_wal").mkdir(parents=True)
    start, end = 4 * SEGMENT - PAGE, 4 * SEGMENT + 100
    real = bytes(range(1, 251)) * 40
    (folder / first).write_bytes(bytes(SEGMENT - PAGE) + real[:PAGE])
    (folder / second).write_bytes(real[PAGE : PAGE + 100].ljust(SEGMENT, b"\0"))
    made = [(Lsn(start - 50), b"p" * 50), (Lsn(start + 8), b"q" * 60), (Lsn(4 * SEGMENT), b"r" * 100)]
    for lsn, data in made:
        path = data_dir / "pg_wal" / wal_segment_file_name(lsn, SEGMENT)
        path.write_bytes(data)
    wal = SlotWal(folder, Lsn(start), Lsn(end), [], [])
    replaced = lay_slot_wal(data_dir, wal, made, SEGMENT)
    assert not folder.exists()
    assert replaced.page_end_lsn == 4 * SEGMENT + PAGE

    def read(lsn: int, size: int) -> bytes:
        content = (data_dir / "pg_wal" / wal_segment_file_name(lsn, SEGMENT)).read_bytes()
        return content[lsn % SEGMENT :][:size]

    for lsn, data in made:
        assert read(lsn, len(data)) == data
    write_back(replaced)
    assert read(start, PAGE) == real[:PAGE]
    assert read(4 * SEGMENT, 100) == real[PAGE : PAGE + 100]
    assert read(start - 50, 50) == b"p" * 50, "nobody needs what is before"
    assert read(end, 1000) == bytes(1000)


def keeper_of(tmp_path: Path, address: str) -> SlotKeeper:
    tokens = EndpointTokens(read_pages="r", write_wal="w", renewal="n", valid_for_s=600)
    return SlotKeeper(StateOwner(TENANT, TIMELINE, 18, address), tmp_path, 0, lambda: tokens)


def test_changes_fail_while_slots_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those after it fail at once: a checkpoint saves one slot after the other, and a stop gets on."""
    monkeypatch.setattr(slot_keeper, "KEEP_LIMIT_S", 0.3)
    (tmp_path / "pg_replslot/a").mkdir(parents=True)
    (tmp_path / "pg_replslot/a/state.tmp").write_bytes(slot_file("a", 100))
    changed = "pg_replslot/a/state.tmp pg_replslot/a/state"

    async def scenario() -> None:
        keeper = keeper_of(tmp_path, f"127.0.0.1:{free_port()}")
        assert await keeper.keep(changed) == "kept", "before the election there is no PostgreSQL of ours"
        keeper.begin(7)
        assert await keeper.keep("pg_replslot/a pg_replslot/b") == "kept"
        failed = await keeper.keep(changed)
        assert failed.startswith("failed: the pageserver has not answered within 0.3 s")
        started = time.monotonic()
        assert (await keeper.keep(changed)).startswith("failed: ")
        assert time.monotonic() - started < 0.2
        with pytest.raises(RetryableError):
            await keeper.take_over()

    asyncio.run(scenario())
