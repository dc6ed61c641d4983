"""The whole stack under clumsy hands: started twice at once, interrupted, killed, damaged, and the demo."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from excimer.base.lsn import parse_lsn

COMMAND_TIMEOUT_S = 120
DEMO = "excimer-demo"
SERVICES = ("broker", "compute-node", "controller", "pageserver", "safekeeper-1")


class Stack:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def begin(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "excimer.cli", "--dir", str(self.directory), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.begin(*arguments)
        output, errors = process.communicate(timeout=COMMAND_TIMEOUT_S)
        return process.returncode, output, errors

    def json(self, *arguments: str) -> Any:
        code, output, errors = self.run("--json", *arguments)
        assert code == 0, errors
        return json.loads(output)

    def sql(self, statement: str, endpoint: str = "main", database: str = "excimer_demo") -> str:
        connect = ("-c", f"\\connect {database}")
        code, output, errors = self.run(
            "psql", endpoint, "--", "-X", "-q", "-A", "-t", *connect, "-c", statement
        )
        assert code == 0, errors
        return output.strip()

    def states(self) -> dict[str, tuple[str, int | None]]:
        _, output, _ = self.run("--json", "status")
        return {row["part"]: (row["state"], row["pid"]) for row in json.loads(output)["parts"]}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    root = Path(tempfile.mkdtemp(prefix="excimer-cli-"))
    root.chmod(0o755)
    made = Stack(root / "state")
    try:
        yield made
    finally:
        made.run("stop", "--immediate")
        shutil.rmtree(root)


def wait_for_main(command: "subprocess.Popen[str]") -> None:
    """Until the command line has taken over signals: before that, an interrupted Python has its own words."""
    while command.poll() is None:
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{command.pid}/status").read_text().splitlines()
        )
        if int(status.get("SigCgt", "0"), 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.005)


def test_up_comes_up_however_often_it_was_interrupted(stack: Stack) -> None:
    """Each goes on with what the one before has left; at last two at once."""
    for step, wait_s in enumerate((0.4, 0.8, 1.3, 1.9, 2.6, 3.4)):
        begun = stack.begin("up", "--safekeepers", "1")
        wait_for_main(begun)
        time.sleep(wait_s)
        begun.send_signal(signal.SIGKILL if step % 2 else signal.SIGINT)
        _, errors = begun.communicate(timeout=COMMAND_TIMEOUT_S)
        assert "Traceback" not in errors
    both = [stack.begin("--json", "up", "--safekeepers", "1") for _ in range(2)]
    outputs = [each.communicate(timeout=COMMAND_TIMEOUT_S) for each in both]
    assert [each.returncode for each in both] == [0, 0], outputs
    assert len({json.loads(output)["url"] for output, _ in outputs}) == 1
    assert [row["name"] for row in stack.json("tenant", "list")["tenants"]] == ["default"]
    assert sorted(stack.states()) == sorted((*SERVICES, "endpoint-main"))
    for option, value in (("--pg-version", "17"), ("--safekeepers", "3")):
        code, _, errors = stack.run("up", option, value)
        assert (code, f"{option} {value} does nothing here" in errors) == (0, True)
    assert sorted(stack.states()) == sorted((*SERVICES, "endpoint-main"))


def test_the_demo_shows_no_difference_and_may_be_repeated(stack: Stack) -> None:
    code, output, errors = stack.run("up", "--demo", "--safekeepers", "1")
    assert code == 0, errors
    url = output.splitlines()[-1]
    assert url.startswith("postgresql://postgres:")
    rows = [line.split() for line in output.splitlines() if "336,776" in line or "278,111" in line]
    fingerprints = [row[-1] for row in rows]
    assert len(rows) == 6
    assert fingerprints[0] == fingerprints[1]
    assert fingerprints[2] == fingerprints[4]
    assert fingerprints[3] == fingerprints[5]
    before = stack.states()
    assert stack.json("up")["url"] == url
    assert stack.states() == before
    assert stack.sql("select count(*) from flights", DEMO) == "278111"


def test_the_demo_touches_nothing_of_others(stack: Stack) -> None:
    stack.sql("comment on database excimer_demo is 'mine'")
    code, _, errors = stack.run("up", "--demo")
    assert (code, "there is a database excimer_demo that is not the demo's" in errors) == (1, True)
    assert stack.sql("select count(*) from flights", DEMO) == "278111"
    stack.sql("alter database excimer_demo rename to mine", database="postgres")
    code, _, errors = stack.run("up", "--demo")
    assert (code, f"there is a branch {DEMO} that is not the demo's" in errors) == (1, True)
    assert stack.sql("select count(*) from flights", DEMO) == "278111"
    stack.sql("alter database mine rename to excimer_demo", database="postgres")


def test_two_starts_at_once_start_everything_once(stack: Stack) -> None:
    stack.json("stop")
    starts = [stack.begin("--json", "start") for _ in range(2)]
    outputs = [start.communicate(timeout=COMMAND_TIMEOUT_S) for start in starts]
    assert [start.returncode for start in starts] == [0, 0], outputs
    started = sorted(name for output, _ in outputs for name in json.loads(output)["started"])
    assert started == sorted(SERVICES)
    starts = [stack.begin("--json", "endpoint", "start", name) for name in ("main", DEMO, DEMO)]
    outputs = [start.communicate(timeout=COMMAND_TIMEOUT_S) for start in starts]
    assert [start.returncode for start in starts] == [0, 0, 0], outputs
    assert sum(json.loads(output)["started"] for output, _ in outputs) == 2
    assert {state for state, _ in stack.states().values()} == {"running"}


def test_an_interrupted_start_is_repaired_by_the_next(stack: Stack) -> None:
    for wait_s in (0.1, 0.6):
        stack.json("stop")
        start = stack.begin("start")
        wait_for_main(start)
        time.sleep(wait_s)
        start.send_signal(signal.SIGINT)
        _, errors = start.communicate(timeout=COMMAND_TIMEOUT_S)
        assert start.returncode in (130, 0), errors
        assert "Traceback" not in errors
        stack.json("start")
    assert "no endpoint runs: `excimer endpoint start NAME`" in stack.run("start")[2]
    assert stack.json("endpoint", "start", "main")["started"]
    assert "no endpoint runs" not in stack.run("start")[2]
    assert stack.sql("select count(*) from flights") == "336776"


def test_who_waits_is_told_for_what(stack: Stack) -> None:
    """A halted safekeeper is not waited for in silence; a halted pageserver does not keep a list back."""
    pids = {part: pid for part, (_, pid) in stack.states().items()}
    stack.json("endpoint", "stop", "main")
    missing = "waits for a majority of safekeepers: safekeeper-1 does not answer"
    with halted(pids["safekeeper-1"]):
        start = stack.begin("endpoint", "start", "main")
        assert start.stderr is not None
        assert any(missing in line for line in start.stderr), "the start ended without a word of it"
        assert missing in stack.run("status")[1]
        assert stack.states()["safekeeper-1"][0] == "silent"
    _, errors = start.communicate(timeout=COMMAND_TIMEOUT_S)
    assert start.returncode == 0, errors
    with halted(pids["pageserver"]):
        begun = time.monotonic()
        code, output, errors = stack.run("timeline", "list")
        elapsed_s = time.monotonic() - begun
        listed = stack.json("timeline", "list")
    silent = f"pageserver (process {pids['pageserver']}) does not answer"
    assert (code, f"{silent}: sizes (?) and damage are not known" in errors) == (0, True)
    assert "main" in output
    assert " ?" in output
    assert elapsed_s < 20, "the controller gives the pageserver 30 s"
    assert listed["problem"] == silent
    assert {row["logical_size_bytes"] for row in listed["branches"]} == {None}
    assert stack.json("timeline", "list")["problem"] is None


@contextlib.contextmanager
def halted(pid: int | None) -> Iterator[None]:
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_what_was_killed_comes_back_and_the_rest_is_left_alone(stack: Stack) -> None:
    """Services by themselves; an endpoint when it is started."""
    before = stack.states()
    for part in ("pageserver", "broker", "endpoint-main"):
        pid = before[part][1]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while not all(
        stack.states()[part][0] == "running" and stack.states()[part][1] != before[part][1]
        for part in ("pageserver", "broker")
    ):
        assert time.monotonic() < deadline, stack.states()
        time.sleep(0.1)
    assert stack.json("start")["started"] == []
    rows = {row["part"]: row for row in json.loads(stack.run("--json", "status")[1])["parts"]}
    assert (rows["broker"]["restarts"], rows["broker"]["last_end"]) == (1, "died of SIGKILL")
    assert rows["controller"]["restarts"] == 0
    assert "restarted once, the last one died of SIGKILL" in stack.run("status")[1]
    assert stack.json("endpoint", "start", "main")["started"]
    after = stack.states()
    assert all(state == "running" for part, (state, _) in after.items() if part != f"endpoint-{DEMO}")
    assert after["controller"] == before["controller"]
    assert stack.sql("select count(*) from flights") == "336776"


def test_status_shows_endpoints_without_a_controller(stack: Stack) -> None:
    before = stack.states()
    assert stack.json("stop", "controller", "--immediate")["stopped"] == ["controller"]
    assert stack.json("stop", "controller")["stopped"] == []
    code, _, errors = stack.run("stop", "endpoint-main")
    assert (code, "no service 'endpoint-main'; there are: broker, " in errors) == (3, True)
    assert stack.states()["endpoint-main"] == ("unknown", before["endpoint-main"][1])
    stack.json("start")
    assert stack.states()["endpoint-main"] == before["endpoint-main"]


def test_a_branch_cannot_have_two_running_primaries(stack: Stack) -> None:
    stack.json("endpoint", "create", "rival")
    code, _, errors = stack.run("endpoint", "start", "rival")
    assert code == 1
    assert "branch main has a running primary, endpoint main" in errors
    stack.json("endpoint", "delete", "rival")


def test_a_static_endpoint_shows_the_past(stack: Stack) -> None:
    lsn = stack.sql("select pg_current_wal_flush_lsn()")
    stack.sql("delete from flights")
    stack.json("endpoint", "create", "past", "--lsn", lsn)
    assert stack.json("endpoint", "start", "past")["started"]
    held = collect_all_but_leases(stack, lsn)
    assert stack.sql("select count(*) from flights", "past") == "336776"
    assert stack.sql("select count(*) from flights") == "0"
    assert stack.json("endpoint", "stop", "past")["stopped"]
    stack.json("tenant", "config", "--set", "lsn_lease_length_s=0")  # or it would be too early to collect
    assert stack.json("timeline", "gc")["held_points"] == held - 1, "its moment was given back"
    stack.json("tenant", "config", "--set", "lsn_lease_length_s=")
    assert stack.json("endpoint", "stop", "past", "--destroy")["deleted"]


def collect_all_but_leases(stack: Stack, leased_lsn: str) -> int:
    """With windows of nothing: only what the endpoint in the past and branches hold stays of history; how
    many points.
    """
    settings = ("pitr_interval_s", "gc_horizon_bytes", "lsn_lease_length_s")
    stack.sql("checkpoint")
    changed = stack.json("tenant", "config", *(part for name in settings for part in ("--set", f"{name}=0")))
    assert changed["overrides"] == dict.fromkeys(settings, 0)
    collected = stack.json("timeline", "gc")
    assert collected["held_points"] >= 1
    stack.json("timeline", "compact")
    code, _, errors = stack.run("timeline", "branch", "--branch-name", "too-late", "--at", "0/2000000")
    assert (code, "its history reaches from" in errors) == (1, True)
    assert parse_lsn(collected["cutoff_lsn"]) > parse_lsn(leased_lsn)
    given_back = stack.json(
        "tenant", "config", *(part for name in settings for part in ("--set", f"{name}="))
    )
    assert given_back["overrides"] == {}
    return int(collected["held_points"])


def test_a_damaged_database_of_the_controller_is_named(stack: Stack) -> None:
    stack.json("stop")
    database = stack.directory / "controller" / "metadata.sqlite"
    kept = database.read_bytes()
    database.write_bytes(b"damage" * 1000)
    code, _, errors = stack.run("start")
    assert code == 1
    assert (
        f"controller did not start (exited with code 1): controller failed: {database} is damaged" in errors
    )
    database.write_bytes(kept)
    assert stack.json("start")["started"] == ["controller"]
    assert len(stack.json("timeline", "list")["branches"]) == 2
