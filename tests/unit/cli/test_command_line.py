"""The command line without services: options, help, errors in one line, exit codes, speed of help."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from excimer.base.errors import NotFoundError, RefusedError, RetryableError
from excimer.cli.app import COMMANDS
from excimer.cli.branch_options import branch_point
from excimer.cli.command_line import run
from excimer.cli.commands.endpoint import check_lsn
from excimer.cli.commands.export import sink_for
from excimer.cli.commands.tenant import parse_settings
from excimer.cli.errors import UsageError, exit_code_of
from excimer.cli.session import common_options_first
from excimer.export.ownership import Owner
from excimer.storage.format.tenant_settings import TenantSettingsError

NEED_A_LOOP = {"export", "verify", "wal"}
HEAVY = {"asyncio", "cryptography", "excimer.postgres", "psycopg", "rich"}


def excimer(directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "excimer.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "EXCIMER_DIR": str(directory)},
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["start", "--json"], ["--json", "start"]),
        (["tenant", "list", "--dir", "/x", "-h"], ["--dir", "/x", "tenant", "list", "-h"]),
        (["start", "--dir=/x"], ["--dir=/x", "start"]),
        (["psql", "main", "--", "--json", "--dir", "y"], ["psql", "main", "--", "--json", "--dir", "y"]),
        (["start", "--dir"], ["--dir", "start"]),
        (["timeline", "lsn-at", "main", "-1h", "--json"], ["--json", "timeline", "lsn-at", "main", "now-1h"]),
        (["timeline", "branch", "--at", "-90s"], ["timeline", "branch", "--at", "now-90s"]),
        (["psql", "--", "-5m"], ["psql", "--", "-5m"]),
        (
            ["--json", "pg", "exec", "18", "x", "--json", "-5m"],
            ["--json", "pg", "exec", "18", "x", "--json", "-5m"],
        ),
        ([], []),
    ],
)
def test_common_options_may_stand_anywhere(given: list[str], expected: list[str]) -> None:
    assert common_options_first(given) == expected


def test_what_the_system_refuses_is_said_in_a_line(tmp_path: Path) -> None:
    """As a full disk is: no file may have a byte."""
    directory = tmp_path / "state"
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", sys.executable, "-m", "excimer.cli", "init"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "EXCIMER_DIR": str(directory)},
    )
    assert done.returncode == 1
    assert done.stderr == f"excimer: {directory}/keys/private.pem: File too large\n"


def test_help_lists_every_command_and_is_instant(tmp_path: Path) -> None:
    times = []
    for _ in range(3):
        before = os.times()
        shown = excimer(tmp_path, "--help")
        after = os.times()
        times.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in COMMANDS)
    assert min(times) < 0.4


def test_help_of_every_command_works(tmp_path: Path) -> None:
    from excimer.cli.app import app

    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            app([name, "--help"], prog_name="excimer")
        assert ended.value.code == 0, name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["tenat"], "Did you mean 'tenant'?"),
        (["start", "--bad"], "No such option"),
        (["timeline", "branch"], "Missing argument 'BRANCH'"),
        (["init", "--safekeepers", "many"], "Invalid value for '--safekeepers'"),
        (["init", "--safekeepers", "2"], "must be odd"),
        (["endpoint", "create"], "Missing argument"),
        (["profile"], "Missing argument"),
        (["timeline", "time-of", "main", "-5m"], "'now-5m' is not an LSN like 0/16B3748"),
        (["timeline", "lsn-at", "main", "0/16B3748"], "is not a time like 2026-01-31T12:00:00Z"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = excimer(tmp_path / "none", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith("excimer: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [["start"], ["stop"], ["status"], ["tenant", "list"], ["psql"], ["logs", "x"], ["endpoint", "list"]],
)
def test_without_an_installation(tmp_path: Path, arguments: list[str]) -> None:
    done = excimer(tmp_path / "none", *arguments, "--json")
    assert done.returncode == 1
    assert json.loads(done.stderr)["error"] == "StateDirectoryError"
    assert not (tmp_path / "none").exists()


def test_exit_codes_follow_families() -> None:
    errors = (UsageError("x"), NotFoundError("x"), RetryableError("x"), RefusedError("x"), ValueError())
    assert [exit_code_of(error) for error in errors] == [2, 3, 4, 1, 1]


def test_lsns_are_checked_where_they_are_typed() -> None:
    check_lsn("0/16B3748")
    for text in ("bogus", "16B3748", "0/16B3748 "):
        with pytest.raises(UsageError, match=f"--lsn {text!r} is not an LSN"):
            check_lsn(text)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, typer.Exit(130)])
def test_an_interrupt_is_said_in_one_line(
    raised: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("excimer.cli.commands.installation.load_installation", interrupted)
    assert run(["status"]) == 130
    assert capsys.readouterr().err == "excimer: interrupted; what has started goes on running\n"


@pytest.mark.parametrize(
    "interrupt",
    [
        "raise KeyboardInterrupt",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import os, signal; os.kill(os.getpid(), signal.SIGHUP)",
        "from os import *; from signal import *; signal(SIGINT, SIG_IGN); kill(getpid(), SIGTERM)",
    ],
)
def test_ctrl_c_and_its_kind_during_the_imports_are_no_traceback(tmp_path: Path, interrupt: str) -> None:
    (tmp_path / "typer.py").write_text(f"{interrupt}\n")
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup makes children ignore it
    ended = subprocess.run(
        [sys.executable, "-m", "excimer.cli", "status"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    signal.signal(signal.SIGHUP, before)
    assert (ended.returncode, ended.stderr) == (130, "excimer: interrupted before anything was done\n")


@pytest.mark.parametrize("out", ["", "copy.zip", "copy.tar.xz", "copy.sql.gz"])
def test_what_no_export_can_be_is_refused(out: str) -> None:
    with pytest.raises(UsageError, match="directory"):
        sink_for(out, Owner("postgres", 101, 104))


def test_settings_are_finite_numbers() -> None:
    given = ["compaction_threshold=1", "gc_period_s=1.5", "pitr_interval_s="]
    assert parse_settings(given) == {"compaction_threshold": 1, "gc_period_s": 1.5, "pitr_interval_s": None}
    for text in ("nan", "inf", "-inf", "1e999", "x", "--1"):
        with pytest.raises(TenantSettingsError, match="gc_period_s is a number, not"):
            parse_settings([f"gc_period_s={text}"])
    for text in ("a=b", "a=1"):
        with pytest.raises(TenantSettingsError, match="there is no tenant setting 'a'"):
            parse_settings([text])
    for text in ("a", "=1"):
        with pytest.raises(UsageError, match="write NAME=VALUE"):
            parse_settings([text])


def test_branch_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Etc/GMT-2")
    time.tzset()
    assert branch_point(None) == {}
    assert branch_point("0/16B3748") == {"at_lsn": "0/16B3748"}
    assert branch_point("2026-01-31T12:00:00Z") == {"at_timestamp": "2026-01-31T12:00:00+00:00"}
    assert branch_point("2026-01-31 12:00") == {"at_timestamp": "2026-01-31T10:00:00+00:00"}
    for text in ("-5m", "now-5m", "yesterday 14:00"):
        assert list(branch_point(text)) == ["at_timestamp"]
    edges = ("0001-01-01", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00")
    for text in ("yesteryear", "16B3748", "0/", "2026-13-01", *edges):
        with pytest.raises(UsageError, match="neither an LSN"):
            branch_point(text)
    monkeypatch.undo()
    time.tzset()


def test_commands_do_not_import_what_few_of_them_need() -> None:
    """A user waits for it each time, longer than for most commands."""
    modules = sorted({module for module, _ in COMMANDS.values()} - NEED_A_LOOP)
    program = (
        "import importlib, sys\n"
        f"for module in {modules}: importlib.import_module(f'excimer.cli.commands.{{module}}')\n"
        f"print(*sorted({HEAVY}.intersection(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "\n"
