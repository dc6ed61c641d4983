"""The arena as the manager sees it: built, opened again, changed, refused."""

import itertools
import mmap
import multiprocessing
import os
import struct
import time
from pathlib import Path

import pytest

from excimer._native import arena_file
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import MAX_LSN, Lsn
from excimer.compute.arena import (
    Arena,
    ArenaFile,
    ArenaSettings,
    BadArenaError,
    BadArenaFileError,
    build_arena,
    numeric_address,
)

SETTINGS = ArenaSettings(
    "127.0.0.1:6400", TenantId("ab" * 16), TimelineId("cd" * 16), "a token", MAX_LSN, Lsn(7)
)


def build(root: Path, *files: ArenaFile) -> Arena:
    (root / "data").mkdir(exist_ok=True)
    return build_arena(root / "arena", files=files, settings=SETTINGS, data_dir=root / "data")


def test_settings_are_read_back(tmp_path: Path) -> None:
    arena = build(tmp_path, ArenaFile("base/5/1", 1))
    arena.set_lsn(Lsn(11), Lsn(10))
    arena.set_token("another")
    arena.set_pageserver("/run/pageserver.sock")
    opened = Arena.open(tmp_path / "arena")
    assert opened.settings == arena.settings
    assert opened.settings == SETTINGS._replace(
        lsn=Lsn(11), not_modified_since=Lsn(10), token="another", pageserver_address="/run/pageserver.sock"
    )
    assert opened.data_dir == tmp_path / "data"
    opened.close()
    arena.close()


def test_what_start_up_looks_for_is_made_at_once(tmp_path: Path) -> None:
    names = [
        "base/5/1",
        "base/5/2_init",
        "base/6/3_fsm",
        "global/4.12",
        "pg_xact/0001",
        "pg_multixact/offsets/00FF",
    ]
    arena = build(tmp_path, *[ArenaFile(name, 3) for name in names], ArenaFile("base/5/9", 2, local=True))
    made = {str(p.relative_to(tmp_path / "data")) for p in (tmp_path / "data").rglob("*") if p.is_file()}
    assert made == {"base/5/2_init", "pg_xact/0001", "pg_multixact/offsets/00FF", "base/5/9"}
    assert (tmp_path / "data/pg_xact/0001").stat().st_size == 3 * 8192
    assert (tmp_path / "data/base/6").is_dir()
    arena.close()


@pytest.mark.parametrize(
    "path",
    [
        *("", "base", "base/", "base/5", "base/5/", "base/5/x", "base/5/1_vmx", "base/5/1_vm_fsm"),
        *("base/5/1.", "base//1", "base/5/1.x", "base/5/1.32768", "base/4294967296/1", "base/5/PG_VERSION"),
        *("global", "global/pg_control", "/base/5/1", "pg_xact/1", "pg_xact/000g", "pg_xact/00ab"),
        *("pg_xact/123456789", "pg_wal/000000010000000000000001", "pg_notify/0000"),
        *("pg_tblspc/16400/PG_18_202506291/5/1", "base/5/1" + "0" * 60, "base/5/1\0", "../base/5/1"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(BadArenaFileError):
        build(tmp_path, ArenaFile(path, 1))


def test_impossible_manifests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArenaFileError, match="twice"):
        build(tmp_path, ArenaFile("base/5/1", 1), ArenaFile("base/5/1", 2))
    with pytest.raises(BadArenaFileError, match="131073"):
        build(tmp_path, ArenaFile("base/5/1", 131_073))


def test_pages_are_placed_only_where_they_belong(tmp_path: Path) -> None:
    arena = build(tmp_path, ArenaFile("base/5/1", 4))
    assert arena.place_pages([("base/5/1", 1, b"x" * 16384), ("base/5/1", 3, b"y" * 8192)]) == 3
    assert arena.present_blocks("base/5/1") == [False, True, True, True]
    content = (tmp_path / "data/base/5/1").read_bytes()
    assert content == bytes(8192) + b"x" * 16384 + b"y" * 8192
    with pytest.raises(BadArenaFileError):
        arena.place_pages([("base/5/2", 0, b"x" * 8192)])
    with pytest.raises(ValueError, match="past the end"):
        arena.place_pages([("base/5/1", 4, b"x" * 8192)])
    assert os.path.getsize(tmp_path / "data/base/5/1") == 4 * 8192
    with pytest.raises(ValueError, match="whole pages"):
        arena.place_pages([("base/5/1", 0, b"x" * 100)])
    arena.close()


def _read_settings_for_a_while(path: Path, seen: "multiprocessing.Queue[str | int]") -> None:
    """In a process of its own, as PostgreSQL's are: the token must be the one of its LSN, every time."""
    memory = mmap.mmap(os.open(path, os.O_RDWR), 0)
    distinct: set[int] = set()
    seen.put("reading")
    while len(distinct) < DISTINCT_TOKENS:
        lsn, *_, token = arena_file.read_settings(memory)
        if token != token_of(lsn):
            seen.put(f"LSN {lsn} with the token {token[:20]!r}… of {len(token)} bytes")
            return
        distinct.add(lsn)
    seen.put(len(distinct))


DISTINCT_TOKENS = 1000


def token_of(lsn: int) -> bytes:
    return b"%d " % lsn * (1 + lsn % 500)


def test_a_token_is_swapped_whole_under_readers(tmp_path: Path) -> None:
    build(tmp_path, ArenaFile("base/5/1", 1)).close()
    memory = mmap.mmap(os.open(tmp_path / "arena", os.O_RDWR), 0)

    def publish(lsn: int) -> None:
        arena_file.publish_settings(
            memory, lsn, 7, 1, 1, 1, b"t" * 16, b"l" * 16, b"1.2.3.4:5", token_of(lsn)
        )

    publish(1)
    spawning = multiprocessing.get_context("spawn")
    seen: multiprocessing.Queue[str | int] = spawning.Queue()
    reader = spawning.Process(target=_read_settings_for_a_while, args=(tmp_path / "arena", seen))
    reader.start()
    assert seen.get(timeout=60) == "reading"
    deadline = time.monotonic() + 60
    for lsn in itertools.count(2):
        publish(lsn)
        if lsn % 100 == 0 and (not seen.empty() or time.monotonic() > deadline):
            break
    assert seen.get(timeout=1) == DISTINCT_TOKENS
    reader.join(timeout=60)


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 20_000])
def test_other_bytes_are_no_arena(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "arena").write_bytes(content or b"\0")
    with pytest.raises(BadArenaError):
        Arena.open(tmp_path / "arena")


def test_a_cut_arena_is_refused(tmp_path: Path) -> None:
    build(tmp_path, ArenaFile("base/5/1", 100_000)).close()
    os.truncate(tmp_path / "arena", (tmp_path / "arena").stat().st_size - 8192)
    with pytest.raises(BadArenaError, match="size"):
        Arena.open(tmp_path / "arena")


@pytest.mark.parametrize(
    "change",
    [
        {"token": "x" * 5000},
        {"pageserver_address": "1.2.3.4"},
        {"pageserver_address": "1.2.3.4:port"},
        {"pageserver_address": "/" + "x" * 300},
        {"tenant_id": "abcd"},
    ],
)
def test_settings_that_do_not_fit_change_nothing(tmp_path: Path, change: dict[str, str]) -> None:
    arena = build(tmp_path, ArenaFile("base/5/1", 1))
    with pytest.raises(ValueError, match=r"."):
        arena.change(SETTINGS._replace(**change))  # type: ignore[arg-type]
    assert arena.settings == SETTINGS
    opened = Arena.open(tmp_path / "arena")
    assert opened.settings == SETTINGS
    opened.close()
    arena.close()


def test_addresses_become_numbers() -> None:
    assert numeric_address("10.0.0.1:5") == "10.0.0.1:5"
    assert numeric_address("[::1]:5") == "[::1]:5"
    assert numeric_address("/a/socket") == "/a/socket"
    assert numeric_address("localhost:5") in ("127.0.0.1:5", "[::1]:5")


def test_ten_thousand_files_are_listed_and_not_made(tmp_path: Path) -> None:
    files = [ArenaFile(f"base/{5 + number // 2500}/{16384 + number}", 3) for number in range(10_000)]
    arena = build(tmp_path, *files)
    arena.close()
    directories = {f"base/{database}" for database in (5, 6, 7, 8)} | {"base"}
    assert {
        str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("*")
    } == directories
    assert (tmp_path / "arena").stat().st_size > len(files) * 32


HEADER_FIELDS = {
    "version": (8, "<I"),
    "file_count": (12, "<I"),
    "bucket_count": (16, "<I"),
    "miss_capacity": (20, "<I"),
    "buckets_offset": (24, "<Q"),
    "misses_offset": (32, "<Q"),
    "map_offset": (40, "<Q"),
    "total_size": (48, "<Q"),
}
FILES_OFFSET = 16384


def damaged_arena(tmp_path: Path, offset: int, bytes_: bytes) -> Path:
    build(tmp_path, ArenaFile("base/5/1", 100), ArenaFile("base/5/2", 7)).close()
    path = tmp_path / "arena"
    content = bytearray(path.read_bytes())
    assert content[offset : offset + len(bytes_)] != bytes_
    content[offset : offset + len(bytes_)] = bytes_
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("field", HEADER_FIELDS)
@pytest.mark.parametrize("value", [0, 77, 1 << 20, (1 << 32) - 1, (1 << 64) - 8])
def test_an_offset_or_count_that_leads_out_of_the_arena_is_refused(
    tmp_path: Path, field: str, value: int
) -> None:
    """Each of them, too small or too large, also where a sum would overflow."""
    offset, kind = HEADER_FIELDS[field]
    value = min(value, (1 << 8 * struct.calcsize(kind)) - 1)
    path = damaged_arena(tmp_path, offset, struct.pack(kind, value))
    if field == "miss_capacity" and value in (0, 77):  # fewer misses than there is room for harm nobody
        Arena.open(path).close()
        return
    with pytest.raises(BadArenaError):
        Arena.open(path)


@pytest.mark.parametrize(
    ("offset", "bytes_", "fault"),
    [
        (FILES_OFFSET + 48, struct.pack("<I", 1 << 30), "files is damaged"),  # its blocks
        (FILES_OFFSET + 72, struct.pack("<Q", 1 << 40), "files is damaged"),  # where they are in the map
        (FILES_OFFSET + 72, struct.pack("<Q", (1 << 64) - 1), "files is damaged"),
        (FILES_OFFSET, b"x" * 48, "files is damaged"),  # a path without an end
        (FILES_OFFSET + 2 * 160, struct.pack("<I", 3), "table of paths is damaged"),
    ],
)
def test_a_file_or_path_that_leads_out_of_the_arena_is_refused(
    tmp_path: Path, offset: int, bytes_: bytes, fault: str
) -> None:
    with pytest.raises(BadArenaError, match=fault):
        Arena.open(damaged_arena(tmp_path, offset, bytes_))


def test_a_table_without_an_empty_bucket_is_refused(tmp_path: Path) -> None:
    """A search for a path that is not in it would not end."""
    build(tmp_path, ArenaFile("base/5/1", 100)).close()
    content = bytearray((tmp_path / "arena").read_bytes())
    (buckets,) = struct.unpack_from("<I", content, 16)
    content[FILES_OFFSET + 160 : FILES_OFFSET + 160 + 4 * buckets] = struct.pack("<I", 1) * buckets
    (tmp_path / "arena").write_bytes(content)
    with pytest.raises(BadArenaError, match="full"):
        Arena.open(tmp_path / "arena")


def test_what_is_here_stays_when_an_arena_is_renewed(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    built = build_arena(
        tmp_path / "arena",
        files=[ArenaFile("base/5/1", 3)],
        settings=SETTINGS,
        data_dir=root,
        directory_id=bytes(range(16)),
    )
    built.place_pages([("base/5/1", 1, bytes(8192))])
    built.set_ready()
    built.throttle(5, 6)
    built.close()
    arena = Arena.open(tmp_path / "arena")
    assert arena.directory_id == bytes(range(16))
    arena.renew()
    arena.change(SETTINGS._replace(token="of the new life"))
    assert arena.present_blocks("base/5/1") == [False, True, False]
    assert arena.settings.token == "of the new life"
    assert (arena.bulk_bytes(), arena.written_lsn(), arena.waiting_for_room()) == (0, 0, 0)
    assert not any(arena.statistics())
    arena.close()
