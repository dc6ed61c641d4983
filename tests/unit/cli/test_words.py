"""What the command line says and how it looks: suggestions, narrow terminals, colours, what documents say."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from excimer.cli.app import COMMANDS
from excimer.cli.command_line import run
from excimer.cli.commands import endpoint_promotion
from excimer.cli.commands.endpoint import _show_endpoints
from excimer.cli.commands.installation import _show_status
from excimer.cli.commands.tenant import _show_tenants
from excimer.cli.commands.timeline import _show_tree
from excimer.cli.commands.timeline_history import running_sentence, stopped_sentence
from excimer.cli.page_text import draw_explanation
from excimer.cli.session import Session, find_directory, is_styled
from excimer.service.log_lines import as_json_line, failure
from excimer.storage.format.tenant_settings import TenantSettings

ROOT = Path(__file__).resolve().parents[3]
NAME = "a-name-that-goes-on-and-on-and-on-and-on-and-on-and-on"


@pytest.mark.parametrize(
    ("wrong", "suggested"),
    [("bogus", None), ("nonsense", None), ("tenat", "tenant"), ("endpoit", "endpoint"), ("sop", "stop")],
)
def test_only_what_is_alike_is_suggested(
    wrong: str, suggested: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([wrong]) == 2
    said = capsys.readouterr().err
    assert ("Did you mean" in said) == (suggested is not None)
    assert suggested is None or f"Did you mean {suggested!r}?" in said


@pytest.mark.parametrize("arguments", [["--json", "--version"], ["--version", "--json"]])
def test_the_version_as_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["version"]
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("excimer ")


def test_branch_is_timeline(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for name in ("timeline", "branch"):
        with pytest.raises(SystemExit) as ended:
            _run_help(name)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        shown.append(re.findall(r"^│ ([a-z-]+) ", text, re.MULTILINE))
    assert shown[0] == shown[1]
    assert {"list", "branch", "restore"} <= set(shown[0])


def _run_help(name: str) -> None:
    from excimer.cli.app import app

    app([name, "--help"], prog_name="excimer")


def test_everything_that_is_to_be_stopped_is_named() -> None:
    assert running_sentence(["main"], "b").startswith("main runs on branch b: excimer endpoint stop main, or")
    assert running_sentence(["main", "ro"], "b") == (
        "main, ro run on branch b: excimer endpoint stop main, excimer endpoint stop ro, "
        "or pass --stop-endpoints"
    )


def test_endpoints_that_were_stopped_for_a_change_are_named_with_the_way_back() -> None:
    assert stopped_sentence(["main"]) == (
        "endpoint main was stopped and stays so: excimer endpoint start main"
    )
    assert stopped_sentence(["a", "b"]) == (
        "endpoints a, b were stopped and stay so: excimer endpoint start a, excimer endpoint start b"
    )
    assert "unarchive the branch, then excimer endpoint start a" in stopped_sentence(["a"], is_archived=True)


def test_log_lines_as_json_are_json_whatever_was_written() -> None:
    line = '{"event": "ready", "level": "info"}'
    assert as_json_line(line) == line
    for other in ('Traceback "x"', "", '{"no": "event"}', "{broken"):
        assert json.loads(as_json_line(other)) == {"event": other}


def test_a_part_failed_when_an_error_was_its_last_word(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert failure(log) is None
    error = '{"event": "compute failed: no such setting", "level": "error"}\n'
    log.write_text(f'{{"event": "ready", "level": "info"}}\n{error}')
    assert failure(log) == "compute failed: no such setting"
    log.write_text(f'{error}{{"event": "compute stopped", "level": "info"}}\n')
    assert failure(log) is None


NO_LIMITS = dict.fromkeys(("cpu_min_milli", "cpu_max_milli", "memory_min_mib", "memory_max_mib"), 0)
USE: dict[str, Any] = {
    "last_active_at": None,
    "suspend_delay_s": 300,
    "cache_size_mib": 0,
    "limits": NO_LIMITS,
}


def _endpoint(**changes: Any) -> dict[str, Any]:
    row = dict.fromkeys(("name", "tenant", "branch"), NAME) | {
        "state": "running",
        "mode": "primary",
        "lsn": None,
    }
    return row | {"pg_version": 18, "url": f"postgres://{NAME}", "lsn": None, "reason": None} | USE | changes


@pytest.mark.parametrize(
    "show",
    [
        lambda console: _show_endpoints(console, [_endpoint()]),
        lambda console: _show_status(
            console, [{"part": NAME, "state": "running", "pid": 7, "http": "x", "warnings": []}], None
        ),
        lambda console: _show_tenants(
            console,
            [
                {
                    "name": NAME,
                    "tenant_id": "f" * 32,
                    "state": "active",
                    "is_default": True,
                    "created_at": "x" * 20,
                }
            ],
        ),
        lambda console: _show_tree(
            console,
            "shop",
            [
                dict.fromkeys(("ancestor_timeline_id", "ancestor_lsn", "damage", "logical_size_bytes"))
                | {"name": NAME, "timeline_id": "f" * 32, "pg_version": 18, "state": "active"}
            ],
            [],
        ),
    ],
)
def test_names_are_whole_on_a_narrow_terminal(show: Callable[[Console], None]) -> None:
    """Folded into columns, or on one line that the terminal wraps."""
    stream = io.StringIO()
    show(Console(file=stream, width=40, soft_wrap=True, color_system=None))
    lines = stream.getvalue().splitlines()
    left = min(line.find(NAME[:3]) for line in lines if NAME[:3] in line)
    column = "".join(line[left:].split(" ")[0] for line in lines if len(line) > left)
    assert NAME in column or NAME in stream.getvalue(), lines
    assert "…" not in stream.getvalue()


def test_words_in_tables_stay_whole_and_lines_have_no_tail() -> None:
    stream = io.StringIO()
    url = "postgresql://postgres@127.0.0.1:16959/postgres?sslmode=disable"
    _show_endpoints(Console(file=stream, width=40, color_system=None), [_endpoint(url=url), _endpoint()])
    heading, first, *_ = stream.getvalue().splitlines()
    assert heading.split() == [
        *("endpoint", "tenant", "branch", "state", "used", "suspends", "cache", "size", "mode", "pg", "url")
    ]
    assert first.split() == [NAME, NAME, NAME, "running", "5m", "unlimited", "primary", "18", url]
    assert heading == heading.rstrip()


def test_a_page_with_thousands_of_values_is_explained_in_a_few_lines() -> None:
    def explain(count: int) -> list[str]:
        values = [
            {"lsn": f"0/{lsn:X}", "text": "change", "size_bytes": 8, "starts_chain": lsn == 1}
            for lsn in range(count, 0, -1)
        ]
        visit = {"layer": None, "kind": "memory", "branch": "main", "low_lsn": "0/0", "high_lsn": "0/F"}
        answer = {"page": "p", "lsn": "0/F", "pg_version": 18, "problem": None, "header": None}
        return list(draw_explanation(answer | {"visits": [visit | {"values": values}]}))

    shown = [line.strip() for line in explain(3000)]
    assert len(shown) < 40
    assert {"0/BB8  change (8 B)", "…  2,975 more; --json has them all"} <= set(shown)
    assert "0/1  change (8 B), nothing older matters" in shown
    assert len(explain(26)) == len(explain(25)) + 1, "one value takes no more room than its absence"


def test_no_color_leaves_no_style(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal, ours = pty.openpty()
    for value, styled in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", value)
        with os.fdopen(os.dup(ours), "w") as stream:
            assert is_styled(stream) == styled
            monkeypatch.setattr(sys, "stdout", stream)
            monkeypatch.setenv("TERM", "xterm")
            session = Session(tmp_path)
            session.done("a step", 1.0)
            session.console().print("[bold]bold[/bold] [red]red[/red] end")
            monkeypatch.undo()
        shown = b""
        while b"end" not in shown:
            shown += os.read(terminal, 4096)
        assert (b"\x1b[" in shown) == styled
    child = subprocess.Popen(
        [sys.executable, "-m", "excimer.cli", "--help"],
        stdout=ours,
        stderr=ours,
        env={**os.environ, "NO_COLOR": "1", "TERM": "xterm"},
    )
    os.close(ours)
    shown = b""
    try:
        while part := os.read(terminal, 65536):
            shown += part
    except OSError:  # the end of a terminal
        pass
    os.close(terminal)
    assert child.wait() == 0
    assert b"endpoint" in shown
    assert b"\x1b[" not in shown


def test_an_installation_is_found_from_below_like_gits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EXCIMER_DIR", raising=False)
    below = tmp_path / "code" / "deep"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert find_directory() == below / ".excimer"
    state = tmp_path / ".excimer"
    state.mkdir()
    assert find_directory() == below / ".excimer", "a directory without a configuration is no installation"
    (state / "config.toml").touch()
    assert find_directory() == state
    nearer = tmp_path / "code" / ".excimer"
    nearer.mkdir()
    (nearer / "config.toml").touch()
    assert find_directory() == nearer
    if os.geteuid() == 0:
        os.chown(nearer / "config.toml", 65534, 65534)
        assert find_directory() == state, "somebody else's installation is not entered by standing in it"
    monkeypatch.setenv("EXCIMER_DIR", "named")
    assert find_directory() == below / "named"


def test_the_documented_defaults_of_tenants_are_the_codes() -> None:
    units = {"days": 86400, "hour": 3600, "minutes": 60, "minute": 60, "MiB": 1 << 20, "": 1}
    page = (ROOT / "docs" / "operating" / "retention.md").read_text()
    documented: dict[str, float] = {}
    for names, values in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]+) \|", page, re.MULTILINE):
        for name, value in zip(re.findall(r"\w+", names), values.split(", "), strict=True):
            number, _, unit = value.strip().partition(" ")
            documented[name] = float(number) * units[unit]
    defaults = TenantSettings()
    assert documented == {name: getattr(defaults, name) for name in TenantSettings.__struct_fields__}


def test_every_command_is_documented() -> None:
    page = (ROOT / "docs" / "operating" / "local.md").read_text()
    missing = [name for name in COMMANDS if not re.search(rf"`excimer {name}\b|`{name}[ `\[]", page)]
    assert not missing


def test_every_command_on_endpoints_is_documented() -> None:
    page = (ROOT / "docs" / "operating" / "local.md").read_text()
    names = [
        command.name or command.callback.__name__
        for command in endpoint_promotion.app.registered_commands
        if command.callback
    ]
    missing = [name for name in names if not re.search(rf"`excimer endpoint {name}\b|`{name}[ `\[]", page)]
    assert len(names) > 10
    assert not missing
