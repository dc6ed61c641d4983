"""A branch whose manifest is damaged, on a whole installation: it is named everywhere, all else goes on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, error_lines, running_stack


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION, safekeepers=1) as running:
        running.create_main()
        yield running


def one_line(stack: Stack, *arguments: str) -> str:
    """What a command says that must fail."""
    done = stack.run(*arguments)
    assert done.returncode, done
    assert len(error_lines(done.stderr)) == 1, done.stderr
    return done.stderr


def restart(stack: Stack) -> None:
    stack.text("stop")
    stack.text("start")


def newest_manifest(stack: Stack, timeline_id: str) -> Path:
    return max(stack.directory.glob(f"**/timelines/{timeline_id}/index-*"))


def ask(stack: Stack, method: str, path: str) -> httpx.Response:
    """The pageserver itself."""
    row = next(row for row in stack.json("status")["parts"] if row["part"] == "pageserver")
    token = (stack.directory / "keys" / "admin.token").read_text().strip()
    url = f"http://{row['http']}{path}"
    return httpx.request(method, url, headers={"Authorization": f"Bearer {token}"}, timeout=30)


def sample(stack: Stack, name: str) -> float:
    lines = ask(stack, "GET", "/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name}{{")).split()[-1])


def check_named(stack: Stack, manifest: str, tenant: str, ids: dict[str, str]) -> None:
    """By everything that tells how things are."""
    assert manifest in stack.text("status")
    assert manifest in one_or_more(stack, "doctor")
    listed = stack.text("timeline", "list")
    assert listed.count("damaged") >= 4
    assert manifest in listed
    damage = {row["name"]: row["damage"] for row in stack.json("timeline", "list")["branches"]}
    assert {name for name, reason in damage.items() if reason} == {"dev", "child"}
    details = ask(stack, "GET", f"/v1/tenant/{tenant}/timeline").json()
    assert {row["timeline_id"]: row["is_damaged"] for row in details} == {
        each: name in ("dev", "child") for name, each in ids.items()
    }
    detail = ask(stack, "GET", f"/v1/tenant/{tenant}/timeline/{ids['child']}").json()
    assert manifest in detail["problem"]
    assert sample(stack, "excimer_tenant_damaged_timelines") == 2


def check_refusals(stack: Stack, manifest: str, tenant: str, main: str) -> None:
    """What needs it, or all branches, is refused in a line."""
    assert manifest in one_line(stack, "endpoint", "start", "dev")
    for refused in (
        ("timeline", "gc", "main"),
        ("timeline", "detach-ancestor", "other"),
        ("timeline", "archive", "other"),
        ("timeline", "archive", "child"),
        ("timeline", "branch", "--branch-name", "never", "--ancestor", "dev"),
    ):
        assert manifest in one_line(stack, *refused)
    answer = ask(stack, "PUT", f"/v1/tenant/{tenant}/timeline/{main}/do_gc")
    assert (answer.status_code, answer.json()["kind"]) == (409, "GcStandsStillError")
    assert sample(stack, "excimer_tenant_gc_stands_still") == 1


def test_a_damaged_branch(stack: Stack) -> None:
    stack.query("create table notes as select generate_series(1, 1000) as number")
    stack.branch("dev")
    stack.query("insert into notes select generate_series(1, 10)", "dev")
    stack.text("timeline", "branch", "--branch-name", "child", "--ancestor", "dev")
    stack.text("timeline", "branch", "--branch-name", "other")
    rows = {row["name"]: row for row in stack.json("timeline", "list")["branches"]}
    tenant, ids = rows["dev"]["tenant_id"], {name: row["timeline_id"] for name, row in rows.items()}

    stack.text("stop")
    manifest = newest_manifest(stack, ids["dev"])
    data = manifest.read_bytes()
    manifest.write_bytes(data.replace(b'"layers"', b'"layfrs"'))
    stack.text("start")

    check_named(stack, manifest.name, tenant, ids)

    # Everything else works.
    stack.text("endpoint", "start", "main")
    stack.query("insert into notes values (0)")
    assert stack.query("select count(*) from notes") == [(1001,)]
    stack.branch("new")
    assert stack.query("select count(*) from notes", "new") == [(1001,)]

    check_refusals(stack, manifest.name, tenant, ids["main"])

    # Repaired, it is served again, with every commit.
    manifest.write_bytes(data)
    restart(stack)
    assert "damaged" not in stack.text("timeline", "list")
    stack.text("endpoint", "start", "dev")
    assert stack.query("select count(*) from notes", "dev") == [(1010,)]
    assert sample(stack, "excimer_tenant_gc_stands_still") == 0

    # Given up, it is gone, and the others are as before.
    stack.text("endpoint", "stop", "dev", "--destroy")
    stack.text("stop")
    newest_manifest(stack, ids["dev"]).write_bytes(b"")
    stack.text("start")
    for name in ("child", "dev"):
        stack.text("timeline", "delete", name)
    stack.wait_until(lambda: sample(stack, "excimer_tenant_damaged_timelines") == 0, "their deletion")
    assert "a moment ago" in one_line(stack, "timeline", "gc", "main")
    stack.text("timeline", "detach-ancestor", "other")
    stack.text("endpoint", "start", "main")
    assert stack.query("select count(*) from notes") == [(1001,)]
    assert manifest.name not in stack.text("status")


def one_or_more(stack: Stack, *arguments: str) -> Any:
    done = stack.run(*arguments)
    assert done.returncode == 1
    return done.stdout


def test_a_tenant_with_a_damaged_branch_can_be_deleted(stack: Stack) -> None:
    stack.text("timeline", "branch", "--branch-name", "dev")
    stack.text("timeline", "branch", "--branch-name", "other")
    rows = {row["name"]: row for row in stack.json("timeline", "list")["branches"]}
    stack.text("stop")
    newest_manifest(stack, rows["dev"]["timeline_id"]).write_bytes(json.dumps({}).encode())
    stack.text("start")
    stack.text("endpoint", "delete", "main")
    stack.text("tenant", "delete", rows["dev"]["tenant_id"])
    assert not list(stack.directory.glob(f"**/tenants/{rows['dev']['tenant_id']}/**/index-*"))
