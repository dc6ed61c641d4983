"""An endpoint's files read from outside: what is listed, which blocks are there."""

from pathlib import Path

from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.compute.arena import ArenaFile, ArenaSettings, build_arena
from excimer.verify.local_files import LocalFiles

SETTINGS = ArenaSettings("127.0.0.1:6400", TenantId("ab" * 16), TimelineId("cd" * 16), "a token")
PAGE = b"p" * BLOCK_SIZE_BYTES


def files_in(root: Path, *listed: ArenaFile) -> LocalFiles:
    """The data directory `root/data` with some files made there that the arena does not know."""
    data_dir = root / "data"
    (data_dir / "base/5").mkdir(parents=True)
    (data_dir / "global").mkdir()
    arena = build_arena(root / "arena", files=listed, settings=SETTINGS, data_dir=data_dir)
    arena.place_pages([("base/5/1", 1, PAGE)])
    return LocalFiles(data_dir, arena)


def test_what_is_on_the_disk_and_what_is_still_to_be_made_is_listed(tmp_path: Path) -> None:
    files = files_in(
        tmp_path, ArenaFile("base/5/1", 3), ArenaFile("base/5/2", 7), ArenaFile("pg_xact/0000", 1)
    )
    for name in ("base/5/3", "base/5/t4_17", "base/5/pg_internal.init", "global/pg_control"):
        (tmp_path / "data" / name).write_bytes(PAGE)
    (tmp_path / "data/base/5/pg_filenode.map").write_bytes(b"map")
    listing = files.listing()
    assert listing.page_files == {"base/5/1": 3, "base/5/2": 7, "base/5/3": 1, "pg_xact/0000": 1}
    assert listing.small_files == {"base/5/pg_filenode.map"}
    assert files.small_file("base/5/pg_filenode.map") == b"map"
    assert files.small_file("base/6/pg_filenode.map") is None


def test_blocks_that_were_not_fetched_are_told_from_those_that_are_here(tmp_path: Path) -> None:
    files = files_in(tmp_path, ArenaFile("base/5/1", 3))
    with (tmp_path / "data/base/5/1").open("r+b") as file:
        file.seek(3 * BLOCK_SIZE_BYTES)
        file.write(PAGE + b"half a page")
    assert files.read("base/5/1", 0, 10) == [None, PAGE, None, PAGE]
    assert files.read("base/5/1", 3, 1) == [PAGE]
    assert files.read("base/5/1", 9, 1) == []


def test_a_file_that_is_not_made_yet_has_nothing_here(tmp_path: Path) -> None:
    files = files_in(tmp_path, ArenaFile("base/5/1", 3), ArenaFile("base/5/2", 7))
    assert files.read("base/5/2", 0, 7) == []
    assert files.read("base/5/99", 0, 7) == []
