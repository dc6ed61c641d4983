"""Errors of the disk name the file, whoever raises them."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.io.filesystem import LocalFilesystem


def test_a_write_that_finds_no_room_says_where(tmp_path: Path) -> None:
    def full_disk() -> Iterator[bytes]:
        yield b"some"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*/layer"):
        LocalFilesystem().write_atomically(tmp_path / "layer", full_disk())
    assert list(tmp_path.iterdir()) == []
