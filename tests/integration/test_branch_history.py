"""Restore, reset, archive and detach as a user does them, on a whole installation with real PostgreSQL."""

import json
from collections.abc import Iterator

import pytest

from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, error_lines, running_stack


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION, safekeepers=1) as running:
        running.create_main()
        yield running


def notes(stack: Stack, endpoint: str) -> list[str]:
    return [str(row[0]) for row in stack.query("select note from notes order by note", endpoint)]


def write(stack: Stack, endpoint: str, *texts: str) -> str:
    """One commit per text; the LSN behind the last."""
    for text in texts:
        stack.query(f"insert into notes select '{text}'", endpoint)
    return str(stack.query("select pg_current_wal_flush_lsn()", endpoint)[0][0])


def refused(stack: Stack, *arguments: str) -> str:
    done = stack.run(*arguments)
    assert done.returncode == 1, done
    assert len(error_lines(done.stderr)) == 1, done.stderr
    return done.stderr


def parents(stack: Stack) -> dict[str, str | None]:
    rows = stack.json("timeline", "list")["branches"]
    names = {row["timeline_id"]: row["name"] for row in rows}
    return {row["name"]: names.get(row["ancestor_timeline_id"]) for row in rows}


def test_restore_reset_detach_archive(stack: Stack) -> None:
    stack.query("create table notes (note text)")
    good_lsn = write(stack, "main", "a", "b")
    moment = stack.json("timeline", "time-of", "main", good_lsn)["timestamp"]
    found = stack.json("timeline", "lsn-at", "main", moment)["lsn"]
    # It may be later than the good LSN by what background processes wrote, never by a commit.
    assert stack.json("timeline", "time-of", "main", found)["timestamp"] == moment
    write(stack, "main", "mistake")

    # Back to before the mistake: the endpoint stays on the name, the mistake on another.
    assert "runs on branch main" in refused(stack, "timeline", "restore", "main", "--to", good_lsn)
    said = stack.json("timeline", "restore", "main", "--to", good_lsn, "--stop-endpoints")
    assert said["stopped_endpoints"] == ["main"]
    old = said["old_branch"]["name"]
    stack.text("endpoint", "start", "main")
    assert notes(stack, "main") == ["a", "b"]
    assert parents(stack) == {old: None, "main": old}
    write(stack, "main", "c")
    stack.text("endpoint", "create", "old", "--branch-name", old)
    stack.text("endpoint", "start", "old")
    assert notes(stack, "old") == ["a", "b", "mistake"]
    stack.text("endpoint", "stop", "old", "--destroy")

    # A branch goes its way, and comes back to its parent.
    stack.branch("dev")
    write(stack, "dev", "experiment")
    write(stack, "main", "d")
    stack.text("timeline", "reset", "dev", "--stop-endpoints")
    stack.text("endpoint", "start", "dev")
    assert notes(stack, "dev") == ["a", "b", "c", "d"]
    write(stack, "dev", "e")

    # It stands alone, while it runs; what is older than it comes along.
    stack.text("timeline", "branch", "--branch-name", "early", "--at", good_lsn)
    assert stack.json("timeline", "detach-ancestor", "dev")["ancestor_timeline_id"] is None
    assert parents(stack) == {old: None, "main": old, "dev": None, "early": "dev"}
    write(stack, "dev", "f")
    assert notes(stack, "dev") == ["a", "b", "c", "d", "e", "f"]
    stack.text("endpoint", "stop", "dev")
    stack.text("endpoint", "start", "dev")
    assert notes(stack, "dev") == ["a", "b", "c", "d", "e", "f"]
    stack.text("endpoint", "create", "early", "--branch-name", "early")
    stack.text("endpoint", "start", "early")
    assert notes(stack, "early") == ["a", "b"]

    # Put away: nothing starts on it; and back.
    told = error_lines(stack.run("timeline", "archive", "dev", "--stop-endpoints").stderr)
    assert told[0] == "endpoint dev was stopped and stays so: excimer endpoint start dev"
    assert "archive early first" in told[1]
    for name in ("early", "dev"):
        stack.json("timeline", "archive", name, "--stop-endpoints")
    assert "unarchive dev" in refused(stack, "endpoint", "start", "dev")
    assert "unarchive dev first" in refused(stack, "timeline", "unarchive", "early")
    states = {row["name"]: row for row in stack.json("timeline", "list")["branches"]}
    assert states["dev"]["state"] == "archived"
    assert states["dev"]["remote_size_bytes"] > 0 == states["dev"]["resident_size_bytes"]
    assert states["main"]["logical_size_bytes"] > 1 << 20
    sizes = stack.json("tenant", "size")
    assert sizes["archived_size_bytes"] > 0 < sizes["synthetic_size_bytes"]
    stack.text("timeline", "unarchive", "dev")
    stack.text("endpoint", "start", "dev")
    assert notes(stack, "dev") == ["a", "b", "c", "d", "e", "f"]

    # The former ancestors are free to go.
    stack.text("endpoint", "stop", "main", "--destroy")
    for name in ("main", old):
        assert json.loads(stack.text("--json", "timeline", "delete", name))["state"] == "deleted"
    assert notes(stack, "dev") == ["a", "b", "c", "d", "e", "f"]
