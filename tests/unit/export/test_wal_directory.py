"""A directory of received WAL: whole segments appear whole, and what was begun is gone on with."""

from pathlib import Path

import pytest

from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.export.ownership import Owner
from excimer.export.wal_directory import MARK_NAME, WalDirectory, WalDirectoryError

SEGMENT = 1 << 20
TENANT = TenantId("ab" * 16)
TIMELINE = TimelineId("cd" * 16)
NOBODY = Owner("nobody", 65534, 65534)


def opened(path: Path, timeline_id: TimelineId = TIMELINE) -> WalDirectory:
    return WalDirectory(path, TENANT, timeline_id, SEGMENT, NOBODY)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.name != MARK_NAME}


def wal(size: int, seed: int) -> bytes:
    return bytes([seed]) * size


def test_segments_become_whole_and_the_last_is_padded(tmp_path: Path) -> None:
    with opened(tmp_path / "wal") as directory:
        start = directory.begin(Lsn(3 * SEGMENT + 500))
        assert start == 3 * SEGMENT
        directory.write(start, wal(SEGMENT - 10, 1))
        directory.write(Lsn(start + SEGMENT - 10), wal(2 * SEGMENT, 2))
    assert files(tmp_path / "wal") == {
        "000000010000000000000003": wal(SEGMENT - 10, 1) + wal(10, 2),
        "000000010000000000000004": wal(SEGMENT, 2),
        "000000010000000000000005.partial": wal(SEGMENT - 10, 2) + bytes(10),
    }


def test_who_comes_again_goes_on_at_the_partial_segment_though_whole_ones_are_gone(tmp_path: Path) -> None:
    with opened(tmp_path / "wal") as directory:
        directory.write(directory.begin(Lsn(3 * SEGMENT)), wal(SEGMENT + 10, 1))
    (tmp_path / "wal" / "000000010000000000000003").unlink()
    for _ in range(2):
        with opened(tmp_path / "wal") as directory:
            assert directory.begin(Lsn(9 * SEGMENT)) == 4 * SEGMENT
    with opened(tmp_path / "wal") as directory:
        directory.write(directory.begin(Lsn(9 * SEGMENT)), wal(10, 1) + wal(5, 2))
        assert directory.begin(Lsn(9 * SEGMENT)) == 4 * SEGMENT, "a lost stream begins the segment anew, too"
    assert files(tmp_path / "wal") == {
        "000000010000000000000004.partial": wal(10, 1) + wal(5, 2) + bytes(SEGMENT - 15)
    }


def test_one_that_never_got_a_byte_is_gone_on_with_where_it_began(tmp_path: Path) -> None:
    with opened(tmp_path / "wal") as directory:
        directory.begin(Lsn(7 * SEGMENT))
    with opened(tmp_path / "wal") as directory:
        assert directory.begin(Lsn(9 * SEGMENT)) == 7 * SEGMENT


def test_no_gap_is_ever_written(tmp_path: Path) -> None:
    with opened(tmp_path / "wal") as directory:
        start = directory.begin(Lsn(3 * SEGMENT))
        for wrong in (start + 1, start + SEGMENT, start - SEGMENT):
            with pytest.raises(ValueError, match="does not continue"):
                directory.write(Lsn(wrong), b"x")


def test_what_is_not_this_branchs_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "wal") as directory:
        directory.begin(Lsn(SEGMENT))
        with pytest.raises(WalDirectoryError, match="is in use"):
            opened(tmp_path / "wal")
    with pytest.raises(WalDirectoryError, match="has WAL of another branch"):
        opened(tmp_path / "wal", TimelineId("ef" * 16))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo").touch()
    with pytest.raises(WalDirectoryError, match="holds other things"):
        opened(tmp_path / "other")
    assert not (tmp_path / "other" / MARK_NAME).exists()
