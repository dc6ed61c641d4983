"""Programs run as somebody harmless, and the cache makes each thing once."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from excimer.io import cache, processes
from excimer.io.cache import (
    CacheUnusableError,
    cache_directory,
    cache_entry,
    make_reachable_dir,
    reachable_file,
    reachable_tree,
    remove_reachable_dir,
)
from excimer.io.processes import (
    NoUnprivilegedUserError,
    ProgramFailedError,
    UnreachableError,
    describe_exit,
    make_owned_dir,
    program_environment,
    run,
    spawn,
    unprivileged_user,
)
from tests.kit.directories import reachable_directory

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has somebody else to run programs as")
SHELL = "/bin/sh"


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch) -> object:
    with reachable_directory() as directory:
        monkeypatch.setenv("EXCIMER_CACHE_DIR", str(directory / "cache"))
        yield directory


def expected_uid() -> int:
    user = unprivileged_user()
    return os.geteuid() if user is None else user.uid


def test_programs_do_not_run_as_root() -> None:
    assert expected_uid() != 0
    assert run([SHELL, "-c", "id -u; id -G"]).split()[0] == str(expected_uid())
    assert "0" not in run([SHELL, "-c", "id -G"]).split()
    process = spawn([SHELL, "-c", "id -u"], stdout=subprocess.PIPE)
    output, _ = process.communicate()
    assert int(output) == expected_uid()


@pytest.mark.parametrize("new_session", [True, False])
def test_a_program_has_a_process_group_of_its_own_and_a_session_if_wanted(new_session: bool) -> None:
    process = spawn([SHELL, "-c", "read line"], stdin=subprocess.PIPE, new_session=new_session)
    try:
        assert os.getpgid(process.pid) == process.pid
        assert os.getsid(process.pid) == (process.pid if new_session else os.getsid(0))
    finally:
        process.communicate(b"\n")


def test_programs_see_no_settings_and_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert "secret" not in run([SHELL, "-c", "env"])
    assert program_environment({"PGHOST": "there"})["PGHOST"] == "there"


def test_a_failure_carries_the_programs_last_words() -> None:
    with pytest.raises(ProgramFailedError, match="exited with code 3: it broke") as caught:
        run([SHELL, "-c", "echo it broke >&2; exit 3"])
    assert (caught.value.program, caught.value.code) == ("sh", 3)
    with pytest.raises(ProgramFailedError, match="took more than"):
        run(["/bin/sleep", "30"], timeout_s=0.1)


@as_root
def test_a_wanted_user_must_exist_and_not_be_root(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("root", "no-such-user"):
        monkeypatch.setenv("EXCIMER_USER", name)
        with pytest.raises(NoUnprivilegedUserError, match=name):
            unprivileged_user.__wrapped__()
    monkeypatch.setenv("EXCIMER_USER", "nobody")
    user = unprivileged_user.__wrapped__()
    assert user is not None
    assert user.name == "nobody"


@as_root
def test_without_any_user_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "KNOWN_USERS", ())
    monkeypatch.setattr(processes, "LAST_RESORT", "no-such-user")
    monkeypatch.setattr(processes, "_make_user", lambda: None)
    with pytest.raises(NoUnprivilegedUserError, match="useradd"):
        unprivileged_user.__wrapped__()


@as_root
def test_owned_directories_belong_to_the_user_and_must_be_reachable() -> None:
    with reachable_directory() as root:
        directory = make_owned_dir(root / "a" / "b")
        assert directory.stat().st_uid == expected_uid()
        assert directory.stat().st_mode & 0o777 == 0o700
        run([SHELL, "-c", f"echo x > {directory}/file"])
        (root / "closed").mkdir(mode=0o700)
        with pytest.raises(UnreachableError, match="closed"):
            make_owned_dir(root / "closed" / "data")


@as_root
def test_a_directory_of_somebody_else_is_not_taken() -> None:
    """A name in /tmp that another user made first must not give that user's target away."""
    with reachable_directory() as root:
        (root / "system").mkdir()
        (root / "link").symlink_to(root / "system")
        with pytest.raises(UnreachableError, match="cannot be used"):
            make_owned_dir(root / "link")
        assert (root / "system").stat().st_uid == 0
        (root / "foreign").mkdir()
        os.chown(root / "foreign", 54321, 54321)
        with pytest.raises(UnreachableError, match="somebody else"):
            make_owned_dir(root / "foreign")


@as_root
def test_closed_directories_are_moved_to_where_the_user_gets(own_cache: Path) -> None:
    closed = own_cache / "closed"
    closed.mkdir(mode=0o700)
    place = make_reachable_dir(closed / "endpoint" / "data")
    assert place == make_reachable_dir(closed / "endpoint" / "data")
    run([SHELL, "-c", f"echo x > {place}/file"])
    assert (closed / "endpoint" / "data" / "file").read_text() == "x\n"
    remove_reachable_dir(closed / "endpoint" / "data", place)
    assert not place.exists()
    assert not (closed / "endpoint" / "data").is_symlink()
    assert make_reachable_dir(own_cache / "open") == own_cache / "open"


@as_root
def test_closed_files_are_copied_by_content(own_cache: Path) -> None:
    closed = own_cache / "closed"
    closed.mkdir(mode=0o700)
    library = closed / "lib.so"
    library.write_text("one")
    library.chmod(0o600)
    first = reachable_file(library)
    assert first != library
    assert run(["/bin/cat", first]) == "one"
    assert reachable_file(library) == first
    library.write_text("two")
    assert run(["/bin/cat", reachable_file(library)]) == "two"
    assert first.read_text() == "one"


@as_root
def test_closed_trees_are_copied_with_their_links(own_cache: Path) -> None:
    tree = own_cache / "closed" / "package"
    (tree / "bin").mkdir(parents=True)
    (own_cache / "closed").chmod(0o700)
    (tree / "bin" / "program").write_text("#!/bin/sh\necho ran\n")
    (tree / "bin" / "program").chmod(0o700)
    (tree / "bin" / "link").symlink_to("program")
    place = reachable_tree(tree.parent, ("package", "absent"))
    assert run([place / "package" / "bin" / "link"]) == "ran\n"
    assert reachable_tree(tree.parent, ("package", "absent")) == place


def test_what_is_reachable_stays_where_it_is(own_cache: Path) -> None:
    file = own_cache / "file"
    file.write_text("x")
    assert reachable_file(file) == file
    assert reachable_tree(own_cache, ("file",)) == own_cache


def test_an_entry_is_made_once_by_many(own_cache: Path) -> None:
    made: list[Path] = []

    def make(place: Path) -> None:
        made.append(place)
        (place / "half").write_text("half")
        (place / "whole").write_text("whole")

    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(cache_entry("kind", "key", make))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert set(found) == {cache_directory() / "kind" / "key"}
    assert sorted(path.name for path in found[0].iterdir()) == ["half", "whole"]


@as_root
def test_the_cache_opens_no_directory_that_holds_somebody_s_files(own_cache: Path) -> None:
    """As EXCIMER_CACHE_DIR=/root would name."""
    home = own_cache / "cache"
    home.mkdir(mode=0o700)
    (home / "diary").touch()
    with pytest.raises(UnreachableError, match="cannot be read by the user"):
        cache_directory()
    assert home.stat().st_mode & 0o777 == 0o700
    (home / "diary").unlink()
    assert cache_directory() == home
    assert home.stat().st_mode & 0o777 == 0o755


def test_a_failure_and_a_crash_leave_no_entry(own_cache: Path) -> None:
    def fail(place: Path) -> None:
        (place / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache_entry("kind", "key", fail)
    script = (
        "import os, signal; from excimer.io.cache import cache_entry\n"
        "def die(place):\n"
        "    (place / 'half').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache_entry('kind', 'key', die)"
    )
    died = subprocess.run([sys.executable, "-c", script], check=False)
    assert died.returncode == -9
    entry = cache_entry("kind", "key", lambda place: (place / "whole").touch())
    assert [path.name for path in entry.iterdir()] == ["whole"]


def test_entries_can_be_read_whatever_the_umask(own_cache: Path) -> None:
    """By PostgreSQL's user already while they are made: initdb runs as that."""

    def make(place: Path) -> None:
        assert run(["/bin/ls", place]) == ""
        (place / "file").touch()

    before = os.umask(0o077)
    try:
        entry = cache_entry("kind", "key", make)
    finally:
        os.umask(before)
    assert run(["/bin/ls", entry]) == "file\n"
    assert (entry / "file").stat().st_mode & 0o777 == 0o644


def test_a_cache_that_cannot_be_made_says_how_to_name_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXCIMER_CACHE_DIR", "/dev/null/cache")
    with pytest.raises(CacheUnusableError, match="EXCIMER_CACHE_DIR"):
        cache_directory()


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EXCIMER_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cache._directory_name() == tmp_path / "excimer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache._directory_name() == Path.home() / ".cache" / "excimer"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cache._directory_name() == Path("/var/cache/excimer")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, "exited with code 0"),
        (5, "exited with code 5"),
        (-signal.SIGKILL, "died of SIGKILL"),
        (-signal.SIGSYS, "died of SIGSYS"),
        (-signal.SIGRTMIN, "died of SIGRTMIN"),
        (-(signal.SIGRTMIN + 6), "died of SIGRTMIN+6"),
        (-32, "died of signal 32"),
        (-1000, "died of signal 1000"),
    ],
)
def test_every_end_of_a_process_has_words(code: int, expected: str) -> None:
    """Signals of real time, and those that the C library keeps to itself, have no name in Python."""
    assert describe_exit(code) == expected


def test_each_signal_of_the_kernel_has_words() -> None:
    for number in range(1, 65):
        assert describe_exit(-number).startswith("died of ")
