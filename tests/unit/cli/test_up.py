"""Making an installation: by one command at a time, and whatever an interrupted one has left."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from excimer.cli.commands.installation import make_installation, making
from excimer.cli.commands.up import _say_what_does_nothing
from excimer.cli.errors import StateDirectoryError
from excimer.cli.installation import load_installation
from excimer.cli.session import Session

MAKE = """
import sys
from pathlib import Path
from excimer.cli.commands.installation import make_installation, making
from excimer.cli.installation import CONFIG_NAME
from excimer.cli.session import Session
session = Session(Path(sys.argv[1]))
with making(session):
    if not (session.directory / CONFIG_NAME).exists():
        make_installation(session, 18, 1, force=False)
        print("made")
"""


def begin(directory: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", MAKE, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def make(session: Session) -> None:
    with making(session):
        make_installation(session, 18, 1, force=False)


def test_of_two_at_once_one_makes_it(tmp_path: Path) -> None:
    makers = [begin(tmp_path / "state") for _ in range(2)]
    outputs = [maker.communicate(timeout=60) for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0], outputs
    assert sorted(output for output, _ in outputs) == ["", "made\n"]
    assert load_installation(tmp_path / "state").admin_token()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_one_is_completed_by_the_next(tmp_path: Path, number: signal.Signals) -> None:
    """At many moments, most of them while files are written."""
    states = set()
    maker = begin(tmp_path / "first")
    begun = time.monotonic()
    maker.communicate(timeout=60)
    whole_s = time.monotonic() - begun
    for step in range(8):
        directory = tmp_path / f"{number.name}-{step}"
        maker = begin(directory)
        time.sleep(whole_s * (0.4 + 0.08 * step))
        maker.send_signal(number)
        maker.communicate(timeout=60)
        states.add((directory.exists(), (directory / "config.toml").exists()))
        if not (directory / "config.toml").exists():
            make(Session(directory, as_json=True))
        assert load_installation(directory).admin_token()
    assert len(states) > 1 or (os.cpu_count() or 1) < 4


@pytest.mark.parametrize(
    "left",
    [
        (),
        ("run/making.lock",),
        ("run/cli.lock", "logs", "endpoints", "keys/private.pem", ".config.toml.7.new"),
    ],
)
def test_what_is_half_made_is_completed(tmp_path: Path, left: tuple[str, ...]) -> None:
    directory = tmp_path / "state"
    directory.mkdir()
    for name in left:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix:
            path.touch()
        else:
            path.mkdir()
    make(Session(directory, as_json=True))
    assert load_installation(directory).config.pg_version == 18


@pytest.mark.parametrize("left", ["notes.txt", "pageserver", "run/controller.pid", "endpoints/main"])
def test_what_somebody_needs_is_not_taken_for_half_made(tmp_path: Path, left: str) -> None:
    """An installation that has run and has lost its configuration is not made anew over its data."""
    path = tmp_path / "state" / left
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(StateDirectoryError, match="is not empty"):
        make(Session(tmp_path / "state", as_json=True))
    assert path.exists()


def test_a_directory_of_somebody_else_keeps_its_rights(tmp_path: Path) -> None:
    """As `--dir /` or `--dir /etc` would name: neither closed to others, nor with anything of ours in it."""
    (tmp_path / "passwd").touch()
    (tmp_path / "run").mkdir()
    for path in (tmp_path, tmp_path / "run"):
        path.chmod(0o755)
    with pytest.raises(StateDirectoryError, match="is not empty, and is no installation"):
        make(Session(tmp_path, as_json=True))
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path, tmp_path / "run")} == {
        tmp_path.name: 0o755,
        "run": 0o755,
    }
    assert {path.name for path in tmp_path.iterdir()} == {"passwd", "run"}


def test_if_nothing_is_made_nothing_is_left(tmp_path: Path) -> None:
    session = Session(tmp_path / "state", as_json=True)
    with pytest.raises(KeyboardInterrupt), making(session):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "state").touch()
    with pytest.raises(StateDirectoryError, match="is not a directory"):
        make(session)


def test_options_that_do_nothing_are_said_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(tmp_path / "state")
    with making(session):
        installation = make_installation(session, 18, 1, force=False)
    _say_what_does_nothing(session, installation, None, 1)
    _say_what_does_nothing(session, installation, 18, None)
    assert capsys.readouterr().err == ""
    _say_what_does_nothing(session, installation, 17, 3)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" does nothing here")[0] for line in said] == [
        "--pg-version 17",
        "--safekeepers 3",
    ]
    assert "tenant create NAME --pg-version 17" in said[0]
    _say_what_does_nothing(session, installation, 13, None)
    assert "versions are 14 to 18" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "state")
