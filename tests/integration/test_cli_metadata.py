"""Tenants, branches and endpoints from the command line, on real processes.

Broker, safekeepers and controller are real; the pageserver is a fake that speaks its HTTP interface,
because nothing here needs a page. `test_walk` has it all.
"""

import asyncio
import contextlib
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from excimer.cli.__main__ import main
from excimer.cli.errors import ProcessFailedError
from excimer.cli.installation import Installation, create_installation, new_config
from excimer.cli.local_processes import Running, start_parts, stop_parts, stop_supervisor
from excimer.service.http import serving_http
from tests.kit.stack import error_lines
from tests.kit.storage_fakes import FakeNode, pageserver_app


class CommandLine:
    def __init__(self, installation: Installation, pageserver: FakeNode) -> None:
        self.installation = installation
        self.pageserver = pageserver

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """In this process, because importing takes longer than most commands."""
        command = ["excimer", "--dir", str(self.installation.directory), *arguments]
        output, errors = io.StringIO(), io.StringIO()
        with (
            patch.object(sys, "argv", command),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
            pytest.raises(SystemExit) as ended,
        ):
            main()
        code = ended.value.code
        assert isinstance(code, int)
        return subprocess.CompletedProcess(command, code, output.getvalue(), errors.getvalue())

    def json(self, *arguments: str) -> Any:
        done = self.run("--json", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refused(self, *arguments: str) -> tuple[int, str]:
        """Exit code and the one line of an error."""
        done = self.run(*arguments)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        errors = error_lines(done.stderr)
        assert len(errors) == 1, errors
        return done.returncode, errors[0]


class FakePageserver(threading.Thread):
    """The fake on its own event loop."""

    def __init__(self, installation: Installation, node: FakeNode) -> None:
        super().__init__()
        self._listen = f"127.0.0.1:{installation.config.pageserver_http_port}"
        self._app = pageserver_app(node, (installation.keys_dir / "public.pem").read_bytes())
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self.serving = threading.Event()

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        async with serving_http(self._app, self._listen, "fake pageserver"):
            self.serving.set()
            await self._stopping.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self.join(10)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    installation = create_installation(tmp_path_factory.mktemp("cli") / "state", new_config(18, 3))
    node = FakeNode()
    pageserver = FakePageserver(installation, node)
    parts = [part for part in installation.service_parts() if part.name != "pageserver"]
    running = [Running(part.name, part.lock_dir, 10) for part in reversed(parts)]
    pageserver.start()
    try:
        assert pageserver.serving.wait(10)
        start_parts(installation, parts, lambda *_: None)
        yield CommandLine(installation, node)
    finally:
        stop_supervisor(installation, immediate=False)
        stop_parts(installation, running, lambda *_: None, immediate=False)
        pageserver.stop()


def test_a_tenant_with_branches_and_endpoints(line: CommandLine) -> None:
    tenant = line.json("tenant", "create", "shop", "--set-default")
    assert tenant["is_default"]
    assert (tenant["role"], len(tenant["password"])) == ("postgres", 24)
    branch = line.json("timeline", "branch", "--branch-name", "feature/x")
    assert branch["ancestor_lsn"] == "0/1500060"
    line.json("timeline", "branch", "--branch-name", "deep", "--ancestor", "feature/x", "--at", "0/1500060")
    line.json("timeline", "create", "--branch-name", "fresh", "--pg-version", "17")
    names = [row["name"] for row in line.json("timeline", "list")["branches"]]
    assert names == ["main", "feature/x", "deep", "fresh"]
    tree = line.run("timeline", "list").stdout.splitlines()
    assert tree[0] == "tenant shop"
    indents = {name: next(row.index(name) for row in tree if f" {name} " in row) for name in names}
    assert indents["main"] == indents["fresh"] < indents["feature/x"] < indents["deep"]

    made = line.json("endpoint", "create", "ep", "--branch-name", "deep")
    server = f"127.0.0.1:{made['postgres_port']}/postgres?sslmode=disable"
    assert made["url"] == f"postgresql://postgres:{tenant['password']}@{server}"
    line.json("endpoint", "create", "past", "--branch-name", "main", "--lsn", "0/1500060")
    shown = {row["name"]: row for row in line.json("endpoint", "list")["endpoints"]}
    assert [shown["ep"]["state"], shown["ep"]["mode"]] == ["stopped", "primary"]
    assert [shown["past"]["mode"], shown["past"]["lsn"]] == ["static", "0/1500060"]

    assert line.refused("timeline", "delete", "feature/x") == (
        1,
        "excimer: branch 'feature/x' has branches of its own: delete deep first",
    )
    assert "has endpoints: delete ep first" in line.refused("timeline", "delete", "deep")[1]
    assert "has endpoints: delete ep, past first" in line.refused("tenant", "delete", "shop")[1]
    line.json("endpoint", "delete", "past")
    assert line.json("endpoint", "stop", "ep", "--destroy")["deleted"]
    for name in ("deep", "feature/x", "fresh"):
        assert line.json("timeline", "delete", name) == {"state": "deleted"}
    assert line.json("tenant", "delete", "shop") == {"state": "deleted"}
    assert line.pageserver.timelines == {}
    assert line.json("tenant", "list") == {"tenants": []}


def test_the_shell_completes_names(line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    line.json("tenant", "create", "shop", "--set-default")
    line.json("tenant", "create", "other")
    for name in ("feature/a b".replace(" ", "#"), "feature/ä", "fix"):
        line.json("branch", "branch", "--branch-name", name)
    line.json("endpoint", "create", "ep", "--branch-name", "fix")

    def complete(*words: str) -> list[str]:
        words = ("excimer", "--dir", str(line.installation.directory), *words)
        monkeypatch.setenv("_EXCIMER_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        done = line.run()
        monkeypatch.delenv("_EXCIMER_COMPLETE")
        return [row for row in done.stdout.splitlines() if row]

    assert complete("timeline", "delete", "f") == ["feature/a#b", "feature/ä", "fix"]
    assert complete("branch", "archive", "fi") == ["fix"]
    assert complete("timeline", "list", "--tenant", "") == ["other", "shop"]
    assert complete("timeline", "delete", "--tenant", "other", "m") == ["main"]
    assert complete("endpoint", "start", "") == ["ep"]
    assert "controller" in complete("logs", "")
    assert complete("tenant", "delete", "zz") == []
    for name in ("feature/a#b", "feature/ä"):
        assert line.json("timeline", "delete", name) == {"state": "deleted"}
    line.json("endpoint", "delete", "ep")
    for tenant in ("shop", "other"):
        line.json("tenant", "delete", tenant)


def test_lists_show_the_tenant(line: CommandLine) -> None:
    for tenant in ("red", "blue"):
        line.json("tenant", "create", tenant)
        line.json("endpoint", "create", f"in-{tenant}", "--tenant", tenant)
    rows = line.run("endpoint", "list").stdout.splitlines()
    assert [row.split()[:4] for row in rows[1:3]] == [
        ["in-red", "red", "main", "stopped"],
        ["in-blue", "blue", "main", "stopped"],
    ]
    shown = line.json("endpoint", "show", "in-blue")
    assert (shown["tenant"], shown["state"], shown["restart_pending"]) == ("blue", "stopped", [])
    assert "tenant      blue" in line.run("endpoint", "show", "in-blue").stdout
    assert line.refused("endpoint", "logs", "in-blue") == (
        4,
        "excimer: endpoint in-blue has not run yet: excimer endpoint start in-blue",
    )
    assert line.refused("endpoint", "create", "e", "--lsn", "0/1", "--at", "0/1")[0] == 2
    for tenant in ("red", "blue"):
        line.json("endpoint", "delete", f"in-{tenant}")
        line.json("tenant", "delete", tenant)


def test_names_that_do_not_exist_get_suggestions(line: CommandLine) -> None:
    assert line.refused("timeline", "list")[0] == 3
    line.json("tenant", "create", "work")
    line.json("endpoint", "create", "main")
    for arguments, said in (
        (["tenant", "delete", "worx"], "no tenant 'worx'; did you mean 'work'?"),
        (["timeline", "delete", "mainx"], "no branch 'mainx'; did you mean 'main'?"),
        (
            ["timeline", "branch", "--branch-name", "x", "--ancestor", "zzz"],
            "no branch 'zzz'; there are: main",
        ),
        (["endpoint", "start", "mainn"], "no endpoint 'mainn'; did you mean 'main'?"),
        (["endpoint", "stop", "mainn"], "no endpoint 'mainn'; did you mean 'main'?"),
        (["psql", "mainn"], "no endpoint 'mainn'; did you mean 'main'?"),
        (["logs", "safekeper-1"], "no part 'safekeper-1'; did you mean 'safekeeper-1'?"),
    ):
        assert line.refused(*arguments) == (3, f"excimer: {said}")
    for arguments, said in (
        (["tenant", "create", "work"], "there is already a tenant 'work'"),
        (
            ["timeline", "create", "--branch-name", "main"],
            "there is already a branch 'main' in tenant 'work'",
        ),
        (["timeline", "create", "--branch-name", "a b"], "'a b' cannot be a branch name"),
        (
            ["timeline", "create", "--branch-name", "x", "--pg-version", "13"],
            "PostgreSQL 13 is not supported",
        ),
        (["endpoint", "create", "main"], "there is already an endpoint 'main'"),
        (["endpoint", "create", "e", "--pg-version", "17"], "cannot be of 17"),
        (["endpoint", "create", "e", "--lsn", "0/8"], "before branch 'main' begins at 0/1500060"),
    ):
        code, message = line.refused(*arguments)
        assert (code, said in message) == (1, True), message
    code, message = line.refused("psql", "main")
    assert (code, message) == (4, "excimer: endpoint main does not run: excimer endpoint start main")
    line.json("endpoint", "delete", "main")
    line.json("tenant", "delete", "work")


def test_a_service_that_is_down_is_named(line: CommandLine) -> None:
    line.pageserver.failing = True
    code, message = line.refused("tenant", "create", "never")
    line.pageserver.failing = False
    assert (code, message) == (4, "excimer: pageserver 1: out of order")
    assert line.json("tenant", "list") == {"tenants": []}


def test_status_logs_and_a_second_instance(line: CommandLine) -> None:
    shown = line.run("status", "--json")
    rows = {row["part"]: row for row in json.loads(shown.stdout)["parts"]}
    assert shown.returncode == 4
    assert {name: row["state"] for name, row in rows.items()} == {
        "broker": "running",
        "safekeeper-1": "running",
        "safekeeper-2": "running",
        "safekeeper-3": "running",
        "pageserver": "stopped",
        "controller": "running",
        "compute-node": "running",
    }
    logged = line.run("logs", "controller", "--json", "-n", "1000").stdout.splitlines()
    assert any(json.loads(row)["event"] == "tenant created" for row in logged if row.startswith("{"))
    for part in ("broker", "safekeeper-1", "controller"):
        module = f"excimer.{part.removesuffix('-1')}"
        settings = line.installation.run_dir / f"{part}.toml"
        second = subprocess.run(
            [sys.executable, "-m", module, str(settings)],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert second.returncode == 1
        assert f"is in use by process {rows[part]['pid']}" in second.stderr


def test_a_port_is_taken(line: CommandLine, tmp_path: Path) -> None:
    """By another installation, which is well: it must not be taken for the one being started."""
    other = create_installation(tmp_path / "other", line.installation.config)
    try:
        for part in other.service_parts():
            if part.name in ("broker", "controller", "safekeeper-1"):
                said = f"{part.name} did not start .*: port [0-9]+ of 127.0.0.1 is taken by another program"
                with pytest.raises(ProcessFailedError, match=said):
                    start_parts(other, [part], lambda *_: None)
    finally:
        stop_supervisor(other, immediate=True)


def test_an_api_call_without_a_token_is_refused(line: CommandLine, tmp_path: Path) -> None:
    token = line.installation.keys_dir / "admin.token"
    kept = token.read_text()
    token.write_text("not a token")
    try:
        assert line.refused("tenant", "list") == (1, "excimer: the token is not one of this installation")
    finally:
        token.write_text(kept)
