"""State directory, process records and log files: what is damaged or foreign is named and left alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from excimer.base.errors import ExcimerError
from excimer.cli import local_processes
from excimer.cli.commands.installation import make_installation, making
from excimer.cli.errors import BusyError, ProcessFailedError, StateDirectoryError, StillRunningError
from excimer.cli.installation import (
    PORTS,
    Installation,
    Part,
    complete_installation,
    create_installation,
    free_ports,
    load_installation,
    new_config,
)
from excimer.cli.local_processes import (
    Running,
    exclusive,
    find_process,
    start_parts,
    stop_parts,
)
from excimer.cli.session import Session
from excimer.cli.supervision import interrupts_later, program_path_environment
from excimer.compute.admission import Admission
from excimer.compute.endpoint_remains import remove_remains
from excimer.compute.places import find_places
from excimer.compute.server_certificate import CertificatePair, install_pair
from excimer.pageserver.settings import PageserverSettings
from excimer.service.log_lines import last_error, pretty, tail
from excimer.service.process_records import ProcessRecord, boot_id, start_ticks, write_record
from tests.kit.directories import reachable_directory
from tests.kit.small_service import part_of, small_installation


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    yield from small_installation(tmp_path, monkeypatch)


def stop(
    installation: Installation, part: Part, limit_s: float = 10, *, immediate: bool = False
) -> list[str]:
    running = Running(part.name, part.lock_dir, limit_s)
    return stop_parts(installation, [running], lambda *_: None, immediate=immediate)


def test_start_is_idempotent_and_stop_too(installation: Installation) -> None:
    part = part_of(installation)
    heard: list[str] = []
    assert start_parts(installation, [part], lambda name, _: heard.append(name)) == ["small"]
    first = find_process(installation, "small", part.lock_dir)
    assert start_parts(installation, [part], lambda name, _: heard.append(name)) == []
    assert find_process(installation, "small", part.lock_dir) == first
    assert heard == ["small"]
    assert stop(installation, part) == ["small"]
    assert stop(installation, part) == []
    assert find_process(installation, "small", part.lock_dir) is None


SLOW = """
import signal, sys, time, pathlib
told, beat, end = [], pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
print("ready", flush=True)
while not told:
    time.sleep(0.01)
while not end.exists():
    told.append(1)
    beat.write_text(str(len(told)))
    time.sleep(0.05)
"""


@pytest.mark.parametrize("gets_on", [True, False])
def test_who_gets_on_with_its_end_is_waited_for(installation: Installation, gets_on: bool) -> None:
    """Far beyond the limit, which holds for one that does not."""
    limit_s, end = 1.5, installation.run_dir / "end"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(installation.run_dir / "beat"), str(end)], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            write_record(installation.run_dir, "slow", process.pid)
            reaper = threading.Thread(target=process.wait)
            reaper.start()
            allow = threading.Timer(2 * limit_s, end.touch)
            allow.start()
            running = Running("slow", installation.run_dir, limit_s, "beat" if gets_on else None)
            assert stop_parts(installation, [running], lambda *_: None, immediate=False) == ["slow"]
            allow.cancel()
            reaper.join()
            assert process.returncode == (0 if gets_on else -signal.SIGKILL)
        finally:
            process.kill()


def test_a_killed_part_is_started_again(installation: Installation) -> None:
    part = part_of(installation)
    start_parts(installation, [part], lambda *_: None)
    first = find_process(installation, "small", part.lock_dir)
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    while first.is_alive():
        time.sleep(0.01)
    assert start_parts(installation, [part], lambda *_: None) == ["small"]
    assert stop(installation, part, immediate=True) == ["small"]


def test_a_process_without_a_record_is_found_by_its_lock(installation: Installation) -> None:
    """As after a CLI that was killed between starting a process and recording it."""
    part = part_of(installation)
    start_parts(installation, [part], lambda *_: None)
    record = installation.run_dir / "small.pid"
    known = find_process(installation, "small", part.lock_dir)
    for damaged in (b"", b"garbage", msgspec.json.encode({"pid": os.getpid()})):
        record.write_bytes(damaged)
        assert find_process(installation, "small", part.lock_dir) == known
    record.unlink()
    assert start_parts(installation, [part], lambda *_: None) == []
    assert stop(installation, part) == ["small"]


def test_a_pid_of_somebody_else_is_not_ours(installation: Installation) -> None:
    part = part_of(installation)
    path = installation.run_dir / "small.pid"
    own_ticks = start_ticks(os.getpid())
    assert own_ticks is not None
    for record in (
        ProcessRecord(os.getpid(), own_ticks + 1, boot_id()),
        ProcessRecord(os.getpid(), own_ticks, "another boot"),
        ProcessRecord(2**22 + 5, own_ticks, boot_id()),
    ):
        path.write_bytes(msgspec.json.encode(record))
        assert find_process(installation, "small", part.lock_dir) is None
        assert stop(installation, part) == []


def test_a_stubborn_process_is_killed(installation: Installation) -> None:
    part = part_of(installation, "stubborn")
    start_parts(installation, [part], lambda *_: None)
    assert stop(installation, part, limit_s=0.3) == ["small"]
    assert find_process(installation, "small", part.lock_dir) is None


def test_failures_show_what_the_service_said(installation: Installation) -> None:
    with pytest.raises(
        ProcessFailedError,
        match=r"small did not start \(exited with code 1\): .*port 5 of 127.0.0.1 is taken",
    ):
        start_parts(installation, [part_of(installation, "refuse")], lambda *_: None)
    begun = installation.logs_dir / "waits.log"
    begun.write_text('{"level": "error", "event": "the trouble of yesterday"}\n')
    waits = part_of(installation, "never ready", "waits")
    with pytest.raises(ExcimerError, match="waits runs but does not become ready: its log"):
        start_parts(installation, [waits], lambda *_: None, limit_s=1.5)
    assert stop(installation, waits) == ["waits"]
    with pytest.raises(ProcessFailedError, match="small was stopped while it started, perhaps by another"):
        start_parts(installation, [part_of(installation, "stopped")], lambda *_: None)
    unwell = part_of(installation, "unwell", "unwell")
    with pytest.raises(ExcimerError, match="unwell runs but does not become ready: disk: it is on fire; see"):
        start_parts(installation, [unwell], lambda *_: None, limit_s=1.5)
    assert stop(installation, unwell) == ["unwell"]


def test_one_command_at_a_time(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_processes, "BUSY_LIMIT_S", 0.2)
    notes: list[str] = []
    with (
        exclusive(installation, notes.append),
        pytest.raises(BusyError),
        exclusive(installation, notes.append),
    ):
        pass
    assert len(notes) == 1
    with exclusive(installation, notes.append):
        pass


def test_an_interrupt_while_starting_is_not_lost(installation: Installation) -> None:
    def start_and_interrupt() -> None:
        with interrupts_later():
            os.kill(os.getpid(), signal.SIGINT)
            recorded.append("process started and recorded")

    recorded: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        start_and_interrupt()
    assert recorded


def test_init_refuses_what_is_not_empty_or_not_ours(tmp_path: Path) -> None:
    session = Session(tmp_path / "state")
    made = make_installation(session, 18, 3, force=False)
    assert load_installation(made.directory) == made
    assert (made.keys_dir / "private.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(StateDirectoryError, match="is not empty"):
        make_installation(session, 18, 3, force=False)
    again = make_installation(session, 18, 1, force=True)
    assert len(again.config.safekeepers) == 1
    (made.directory / "thesis.txt").write_text("years of work")
    with pytest.raises(StateDirectoryError, match=r"holds 'thesis\.txt', which is not Excimer's"):
        make_installation(session, 18, 3, force=True)
    assert load_installation(made.directory) == again


@pytest.mark.parametrize("name", [b"\xff", b"two\nlines"])
def test_init_refuses_a_path_that_no_file_can_name(tmp_path: Path, name: bytes) -> None:
    directory = tmp_path / os.fsdecode(name)
    with pytest.raises(StateDirectoryError, match="cannot hold an installation"), making(Session(directory)):
        pass
    assert not directory.exists()


def test_an_init_that_fails_leaves_an_empty_directory_as_it_was(tmp_path: Path) -> None:
    directory = tmp_path / "mount"
    directory.mkdir()
    directory.chmod(0o1777)
    before = directory.stat()
    with pytest.raises(BusyError), making(Session(directory)):
        raise BusyError
    after = directory.stat()
    assert (after.st_mode, after.st_gid) == (before.st_mode, before.st_gid)
    assert list(directory.iterdir()) == []


def test_init_does_not_pull_the_ground_from_a_running_part(installation: Installation) -> None:
    part = part_of(installation, name="broker")
    start_parts(installation, [part], lambda *_: None)
    with pytest.raises(StillRunningError, match="broker runs in"):
        make_installation(Session(installation.directory), 18, 3, force=True)
    stop(installation, part)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("pg_version = ", "not valid TOML"),
        ("pg_version = 'x'", "pg_version: expected int"),
        ("", "missing required field"),
    ],
)
def test_a_damaged_configuration_is_named(installation: Installation, text: str, problem: str) -> None:
    path = installation.directory / "config.toml"
    path.write_text(text)
    with pytest.raises(StateDirectoryError, match=problem) as caught:
        load_installation(installation.directory)
    assert str(path) in str(caught.value)
    assert "--force" in str(caught.value)


@pytest.mark.parametrize(("line", "expected"), [("", 10240), ("local_disk_max_mib = 64\n", 64)])
def test_the_local_disk_is_bounded_by_the_configuration(
    installation: Installation, line: str, expected: int
) -> None:
    path = installation.directory / "config.toml"
    path.write_text(line + path.read_text())
    parts = {part.name: part for part in load_installation(installation.directory).service_parts()}
    settings = parts["pageserver"].settings
    assert isinstance(settings, PageserverSettings)
    assert settings.local_disk_max_mib == expected
    path.write_text("local_disk_max_mib = -1\n" + path.read_text().removeprefix(line))
    with pytest.raises(StateDirectoryError, match="local_disk_max_mib"):
        load_installation(installation.directory)


def test_an_installation_that_an_older_excimer_made_gets_a_compute_node(tmp_path: Path) -> None:
    made = create_installation(tmp_path / "state", new_config(18, 1))
    config = made.directory / "config.toml"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("compute_node_")))
    (made.keys_dir / "compute_node-1.token").unlink()
    older = load_installation(made.directory)
    assert "compute-node" not in [part.name for part in older.service_parts()]
    completed = complete_installation(older)
    assert "compute-node" in [part.name for part in completed.service_parts()]
    assert (made.keys_dir / "compute_node-1.token").exists()
    assert load_installation(made.directory).config == completed.config, "it keeps its port"
    port = completed.config.compute_node_http_port
    assert completed.config == msgspec.structs.replace(older.config, compute_node_http_port=port)
    assert complete_installation(completed) == completed


def test_unconfined_redo_can_be_refused_by_the_configuration(installation: Installation) -> None:
    path = installation.directory / "config.toml"
    for text, expected in [("false", False), ("true", True)]:
        line = "redo_confinement_required = "
        path.write_text(path.read_text().replace(f"{line}false", f"{line}{text}"))
        parts = {part.name: part for part in load_installation(installation.directory).service_parts()}
        settings = parts["pageserver"].settings
        assert isinstance(settings, PageserverSettings)
        assert settings.redo_confinement_required is expected


def test_free_ports_are_distinct_and_avoid_the_known() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(port in PORTS for port in ports)
    assert not set(free_ports(50, frozenset(ports))) & set(ports)


def test_log_lines(tmp_path: Path) -> None:
    path = tmp_path / "part.log"
    assert tail(path, 5) == []
    assert last_error(path) == "its log is empty"
    line = {"time": "2026-01-31T12:00:01.5Z", "level": "info", "service": "x", "event": "ready", "port": 5}
    error = {**line, "level": "error", "event": "x failed: it broke", "traceback": "Traceback\n  boom"}
    path.write_text("chatter\n" + json.dumps(error) + "\n" + json.dumps(line) + "\n{broken\n")
    assert last_error(path) == "x failed: it broke"
    assert last_error(path, path.stat().st_size) == "its log is empty"
    with path.open("a") as file:
        file.write(json.dumps({**line, "level": "warning", "event": "tried", "reason": "no page"}) + "\n")
    assert last_error(path, path.read_text().index("{broken")) == "tried: no page"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert pretty(json.dumps(line)) == "12:00:01 info    ready port=5"
    assert pretty(json.dumps(error)).endswith("\nTraceback\n  boom")
    assert pretty("{broken") == "{broken"
    path.write_text("".join(f"line {number}\n" for number in range(100_000)))
    assert tail(path, 3) == ["line 99997", "line 99998", "line 99999"]
    assert tail(path, 0) == []
    assert len(tail(path, 50_000)) == 50_000
    assert last_error(path) == "line 99999"


def test_children_find_this_excimer() -> None:
    code = "import excimer; print(excimer.__file__)"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env=program_path_environment(),
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    import excimer

    assert shown.stdout.strip() == excimer.__file__


def test_a_process_that_somebody_has_halted_is_not_waited_for(installation: Installation) -> None:
    part = part_of(installation)
    start_parts(installation, [part], lambda *_: None)
    process = find_process(installation, "small", part.lock_dir)
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    begun = time.monotonic()
    assert stop(installation, part, limit_s=60) == ["small"]
    assert time.monotonic() - begun < 10
    assert not process.is_alive()


def test_what_a_killed_compute_left_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    with reachable_directory() as endpoint, reachable_directory() as temporary:
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        remove_remains(endpoint)
        assert not list(endpoint.iterdir()), "nothing is made where nothing was"
        places = find_places(endpoint)
        places.data_dir.mkdir()
        (places.data_dir / "base").touch()
        places.arena.touch()
        install_pair(CertificatePair(b"certificate", b"key"), places.run_dir)
        Admission.make(places.run_dir).close()
        left = subprocess.Popen(["sleep", "100"], cwd=places.data_dir)
        remove_remains(endpoint)
        assert left.wait(10) == -signal.SIGKILL
        assert not list(temporary.iterdir())
        assert not list(places.run_dir.iterdir())
