"""What is said while something does not come, and what is answered without it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from excimer.base.errors import RefusedError, RetryableError
from excimer.cli import part_state, service_silence
from excimer.cli.installation import HOST, Installation, create_installation, new_config
from excimer.cli.local_processes import Probed
from excimer.cli.part_state import with_names
from excimer.cli.service_silence import (
    Asked,
    ask_service,
    at_once,
    early_word,
    early_word_of,
    silent_services,
)
from excimer.cli.session import Session
from excimer.service.process_records import ProcessRecord

ME = ProcessRecord(pid=os.getpid(), start_ticks=0, boot_id="")
LIMIT_S = 60
SILENT = "pageserver (process 7) does not answer"


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return create_installation(tmp_path / "state", new_config(18, 3))


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATIENCE_S", "EARLY_WORD_S", "AGAIN_S"):
        monkeypatch.setattr(service_silence, name, 0.02)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Lets threads end that wait for it."""
    event = threading.Event()
    yield event
    event.set()


def hear(capsys: pytest.CaptureFixture[str], words: str) -> str:
    """Standard error, as soon as `words` are in it."""
    heard, deadline = "", time.monotonic() + LIMIT_S
    while words not in heard:
        assert time.monotonic() < deadline, f"{words!r} is not said; heard: {heard!r}"
        time.sleep(0.01)
        heard += capsys.readouterr().err
    return heard


def test_an_answer_is_not_waited_for_when_its_service_is_silent(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    monkeypatch.setattr(service_silence, "silent_services", lambda *_: [SILENT])
    assert ask_service(installation, "pageserver", released.wait) == Asked(None, SILENT)


def test_a_service_that_lives_has_all_the_time_it_takes(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    asked = 0

    def none_is_silent(*_: object) -> list[str]:
        nonlocal asked
        asked += 1
        if asked == 5:
            released.set()
        return []

    monkeypatch.setattr(service_silence, "silent_services", none_is_silent)
    assert ask_service(installation, "pageserver", released.wait) == Asked(True, None)
    assert asked >= 5


def test_why_there_is_no_answer(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Callable[[], Any]:
        def call() -> Any:
            raise error

        return call

    away = fail(RetryableError("pageserver 1 cannot be reached"))
    monkeypatch.setattr(service_silence, "silent_services", lambda *_: [])
    assert ask_service(installation, "pageserver", away).problem == "pageserver 1 cannot be reached"
    monkeypatch.setattr(service_silence, "silent_services", lambda *_: ["pageserver does not run"])
    assert ask_service(installation, "pageserver", away).problem == "pageserver does not run"
    with pytest.raises(RefusedError):
        ask_service(installation, "pageserver", fail(RefusedError("no")))


def test_a_service_that_takes_connections_and_says_nothing_is_silent(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_silence, "PROBE_LIMIT_S", 0.1)
    monkeypatch.setattr(
        service_silence, "find_process", lambda _, part, __: ME if part == "pageserver" else None
    )
    with socket.create_server((HOST, installation.config.pageserver_http_port)):
        said = silent_services(installation)
        assert f"pageserver (process {ME.pid}) does not answer" in said
        assert "controller does not run" in said
        assert len(said) == len(installation.service_parts())
        assert silent_services(installation, ["controller"]) == ["controller does not run"]


def test_who_waits_for_the_controller_hears_which_services_are_silent(
    installation: Installation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_silence, "silent_services", lambda *_: [SILENT])
    Session(installation.directory).make_current()
    with early_word(installation, "the controller"):
        heard = hear(capsys, "\n")
        time.sleep(0.1)
    assert heard + capsys.readouterr().err == f"waiting for the controller: {SILENT} …\n", "once"
    Session(installation.directory, as_json=True).make_current()
    with early_word(installation, "the controller"):
        time.sleep(0.1)
    assert capsys.readouterr().err == "", "with --json, standard error is for errors"


def test_who_waits_for_a_start_hears_what_the_part_waits_for(
    installation: Installation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = installation.service_parts()[0]
    port = installation.config.safekeepers[1].proposer
    words = [f"start: waits for a majority of safekeepers: safekeeper {HOST}:{port} does not answer"]
    monkeypatch.setattr(service_silence, "find_process", lambda *_: ME)
    monkeypatch.setattr(part_state, "probe_health", lambda *_: Probed(503, words, {}))
    with early_word_of(Session(installation.directory), installation, [part]):
        heard = hear(capsys, "\n")
        assert heard == (
            "broker is not ready yet: start: waits for a majority of safekeepers: "
            "safekeeper-2 does not answer …\n"
        )
        words[0] = "start: waits for PostgreSQL to accept connections"
        hear(capsys, "PostgreSQL to accept connections …\n")
        monkeypatch.setattr(part_state, "probe_health", lambda *_: Probed(200, [], {}))
        monkeypatch.setattr(part_state, "probe_health", lambda *_: Probed(0, [], {}))
        monkeypatch.setattr(part_state, "_age_s", lambda _: 0.0)
        monkeypatch.setattr(service_silence, "WORDLESS_S", 0.0)
        hear(capsys, f"process {ME.pid} has said nothing yet …\n")


def test_a_halted_process_is_silent_at_once_and_another_one_with_time(installation: Installation) -> None:
    nobody = Probed(0, [], {})
    assert part_state.part_state(installation, ME, nobody).state == "silent"
    with open("/proc/self/stat", "rb") as file:
        ticks = int(file.read().rpartition(b")")[2].split()[19])
    hz = os.sysconf("SC_CLK_TCK")
    now = int(time.clock_gettime(time.CLOCK_BOOTTIME) * hz)
    young = ProcessRecord(pid=os.getpid(), start_ticks=now, boot_id="")
    assert ticks <= now
    assert part_state.part_state(installation, young, nobody) == ("starting", [], {})
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        try:
            child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
            halted = part_state.part_state(installation, young.__class__(child.pid, now, ""), nobody)
            assert halted.state == "silent"
            assert "is halted and does not answer" in halted.words[0]
        finally:
            child.kill()


def test_safekeepers_are_called_by_their_names(installation: Installation) -> None:
    ports = [each.proposer for each in installation.config.safekeepers]
    said = f"safekeeper {HOST}:{ports[0]} and safekeeper {HOST}:{ports[2]}; safekeeper {HOST}:1 is foreign"
    expected = f"safekeeper-1 and safekeeper-3; safekeeper {HOST}:1 is foreign"
    assert with_names(installation, said) == expected


def test_all_at_once_in_order_with_their_errors() -> None:
    barrier = threading.Barrier(3, timeout=LIMIT_S)

    def work(item: int) -> int:
        barrier.wait()
        return item * 2

    assert at_once(work, [1, 2, 3]) == [2, 4, 6]
    assert at_once(work, []) == []
    with pytest.raises(ValueError, match="no number"):
        at_once(lambda text: int(text) if text else _refuse(), ["1", ""])


def _refuse() -> int:
    raise ValueError("no number")
