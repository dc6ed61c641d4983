"""Secrets are nobody else's to read, not for a moment, whatever the umask and whatever was there before."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.io.private_files import (
    ForeignDirectoryError,
    claim_private_dir,
    make_private_dir,
    touch_private,
    write_private,
)
from excimer.io.processes import unprivileged_user


@pytest.fixture(params=[0, 0o022, 0o077, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("before", ["nothing", "open file", "link"])
def test_a_secret_is_never_readable_by_others(
    tmp_path: Path, umask: int, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, elsewhere = tmp_path / "secret", tmp_path / "elsewhere"
    elsewhere.write_text("not ours to change")
    if before == "open file":
        path.write_text("older")
        path.chmod(0o666)
    elif before == "link":
        path.symlink_to(elsewhere)
    seen: list[int] = []
    real_write = os.write

    def write(descriptor: int, data: bytes) -> int:
        """A byte at a time; the mode of every file that holds one of them."""
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        seen.extend(mode_of(each) for each in tmp_path.iterdir() if b"hush" in _content(each))
        return real_write(descriptor, bytes(data)[:1])

    monkeypatch.setattr(os, "write", write)
    write_private(path, b"hush, hush")
    monkeypatch.undo()
    assert path.read_bytes() == b"hush, hush"
    assert set(seen) == {0o600}
    assert mode_of(path) == 0o600
    assert not path.is_symlink()
    assert elsewhere.read_text() == "not ours to change"
    assert {each.name for each in tmp_path.iterdir()} == {"secret", "elsewhere"}


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_the_old_secret_stays_when_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    write_private(path, b"old")

    def full(_descriptor: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        write_private(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_temporary_file_of_a_dead_process_is_not_used(tmp_path: Path) -> None:
    left = tmp_path / f".secret.{os.getpid()}.new"
    left.write_text("left behind")
    left.chmod(0o666)
    write_private(tmp_path / "secret", b"new")
    assert mode_of(tmp_path / "secret") == 0o600
    assert not left.exists()


def test_a_library_s_file_is_closed_before_it_is_opened(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "database"
    touch_private(path)
    assert mode_of(path) == 0o600
    path.chmod(0o644)
    touch_private(path)
    assert mode_of(path) == 0o600


def test_directories(tmp_path: Path, umask: int) -> None:
    private = make_private_dir(tmp_path / "a" / "b")
    assert (mode_of(private), mode_of(private.parent)) == (0o700, 0o700)
    private.chmod(0o777)
    make_private_dir(private)
    assert mode_of(private) == 0o700
    passable = make_private_dir(tmp_path / "c", passable=True)
    user = unprivileged_user()
    assert mode_of(passable) == (0o700 if user is None else 0o710)
    assert passable.stat().st_gid == (passable.stat().st_gid if user is None else user.gid)


def test_a_directory_of_others_that_was_named_is_not_touched(tmp_path: Path) -> None:
    """Once `--dir /etc` closed /etc to everybody but root."""
    for name in ("taken", "ours", "empty"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o755)
    (tmp_path / "taken" / "passwd").touch()
    (tmp_path / "ours" / "LOCK").touch()
    with pytest.raises(ForeignDirectoryError, match="taken is not empty"):
        claim_private_dir(tmp_path / "taken", ("LOCK",), passable=True)
    assert mode_of(tmp_path / "taken") == 0o755
    for name in ("ours", "empty", "missing"):
        claim_private_dir(tmp_path / name, ("LOCK",))
        assert mode_of(tmp_path / name) == 0o700, name
