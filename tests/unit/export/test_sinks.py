"""Where an export goes: the same cluster in a directory and in a tar, and nothing after an abandonment."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.export.directory_sink import DirectorySink
from excimer.export.ownership import SUDO_UID_VARIABLE, Owner, export_owner
from excimer.export.sink import ExportSink, OutputRefusedError
from excimer.export.tar_sink import TarSink

OWNER = Owner.of_uid(os.geteuid())
ZEROS = bytes(BLOCK_SIZE_BYTES)
ONES = b"\x01" * BLOCK_SIZE_BYTES
PAGES = ONES + ZEROS * 30 + ONES + ONES + ZEROS


def _fill(sink: ExportSink) -> None:
    sink.begin()
    sink.add_directory("base")
    sink.add_directory("base/5")
    sink.add_file("PG_VERSION", b"18\n")
    sink.open_file("base/5/1", 2 * len(PAGES))
    sink.write(PAGES)
    sink.write(PAGES)
    sink.close_file()
    sink.open_file("base/5/2", 4096)
    sink.skip(1000)
    sink.write(b"record")
    sink.close_file()
    sink.add_file("base/5/3", b"")


EXPECTED = {
    "PG_VERSION": b"18\n",
    "base/5/1": PAGES + PAGES,
    "base/5/2": bytes(1000) + b"record" + bytes(4096 - 1006),
    "base/5/3": b"",
}


def test_a_directory_has_the_files_and_holes_for_zeros(tmp_path: Path) -> None:
    root = tmp_path / "out"
    sink = DirectorySink(root, OWNER)
    _fill(sink)
    sink.finish()
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert found == EXPECTED
    assert {path.stat().st_mode & 0o777 for path in root.rglob("*") if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in [root, root / "base/5"]} == {0o700}
    assert (root / "base/5/1").stat().st_blocks * 512 < len(PAGES)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_a_tar_has_the_same_files(tmp_path: Path, name: str) -> None:
    sink = TarSink(OWNER, 1_700_000_000, place=tmp_path / name)
    _fill(sink)
    assert not (tmp_path / name).exists(), "it gets its name when it is whole"
    sink.finish()
    with tarfile.open(tmp_path / name) as tar:
        found = {}
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                found[member.name.removeprefix("./")] = file.read()
            assert (member.uid, member.mtime) == (OWNER.uid, 1_700_000_000)
    assert found == EXPECTED
    assert [path.name for path in tmp_path.iterdir()] == [name]


SINKS: dict[str, Callable[[Path], ExportSink]] = {
    "new directory": lambda place: DirectorySink(place / "new", OWNER),
    "empty directory": lambda place: DirectorySink(place, OWNER),
    "tar": lambda place: TarSink(OWNER, 0, place=place / "a.tar"),
    "zst": lambda place: TarSink(OWNER, 0, place=place / "a.tar.zst"),
}


@pytest.mark.parametrize("kind", SINKS)
@pytest.mark.parametrize("when", ["before", "begun", "open", "filled", "finished"])
def test_an_abandoned_export_leaves_nothing(tmp_path: Path, kind: str, when: str) -> None:
    sink = SINKS[kind](tmp_path)
    if when in ("begun", "open"):
        sink.begin()
    if when == "open":
        sink.open_file("x", 100_000)
        sink.write(b"part")
    if when in ("filled", "finished"):
        _fill(sink)
    if when == "finished":
        sink.finish()
    sink.abandon()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_there", [True, False])
def test_two_exports_do_not_share_a_directory(tmp_path: Path, is_there: bool) -> None:
    root = tmp_path / "out"
    if is_there:
        root.mkdir()
    first, second, third = (DirectorySink(root, OWNER) for _ in range(3))
    first.begin()
    with pytest.raises(OutputRefusedError, match="another export"):
        second.begin()
    second.abandon()
    first.add_file("PG_VERSION", b"18\n")
    first.finish()
    with pytest.raises(OutputRefusedError, match="not empty"):
        third.begin()
    third.abandon()
    assert [path.name for path in root.iterdir()] == ["PG_VERSION"]


@pytest.mark.parametrize("kind", ["empty directory", "tar", "zst"])
def test_what_was_there_is_refused_and_survives_the_abandonment(tmp_path: Path, kind: str) -> None:
    for name in ("a.tar", "a.tar.zst"):
        (tmp_path / name).write_text("mine")
    sink = SINKS[kind](tmp_path)
    with pytest.raises(OutputRefusedError):
        sink.begin()
    sink.abandon()
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["mine", "mine"]


def test_a_partial_tar_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "a.tar.partial").write_text("theirs")
    sink = TarSink(OWNER, 0, place=tmp_path / "a.tar")
    with pytest.raises(OutputRefusedError, match="another export writes it"):
        sink.begin()
    sink.abandon()
    assert (tmp_path / "a.tar.partial").read_text() == "theirs"


def test_an_export_is_never_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SUDO_UID_VARIABLE, raising=False)
    assert export_owner().uid != 0
    monkeypatch.setenv(SUDO_UID_VARIABLE, "0")
    assert export_owner().uid != 0
    monkeypatch.setenv(SUDO_UID_VARIABLE, "12345")
    assert export_owner().uid == (12345 if os.geteuid() == 0 else os.geteuid())
