"""A1: what a superuser's SQL finds: it looks where PostgreSQL's user may, and tries all of it at every door.

PostgreSQL is another user than Excimer only when Excimer is started as root, as CI and containers do; else
its user may read the installation's keys, which docs/architecture/rights.md says.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from excimer.base.address import Address
from excimer.base.errors import ExcimerError, RefusedError
from excimer.cli.installation import HOST
from excimer.compute.arena import Arena
from excimer.service.replication_client import connect_replication
from excimer.wire.auth import AuthError, Claims, Right, TokenVerifier
from excimer.wire.replication import format_options
from excimer.wire.safekeeping import ErrorCode, ErrorResponse
from tests.kit.builds import NEWEST_VERSION
from tests.kit.page_client import connect_pages
from tests.kit.raw_proposer import RawProposer
from tests.kit.stack import Stack, running_stack
from tests.kit.stack_truth import Branch, branch_of

pytestmark = pytest.mark.timeout(300)
TOKEN_LIFE_S = 10
HEAD_OF_A_TOKEN = "eyJ"
"""Of each JWT: base64 of what a JSON object begins with."""

SEARCH = r"""
{{ find {directories} -xdev -type f -readable -size -40M -print0 2>/dev/null
  find /tmp /var/tmp -xdev -maxdepth 2 -type f -newer {directory} -readable -size -40M -print0 2>/dev/null
  find {processes} -maxdepth 2 -print0 2>/dev/null
}} | timeout 60 xargs -0 grep -D skip -aohE '{head}[A-Za-z0-9_-]{{10,}}[.][A-Za-z0-9_-]+[.][A-Za-z0-9_-]+' \
  2>/dev/null | sort -u
for path in {closed}; do
  (cat "$path" | head -c 1000) 2>/dev/null | grep -q . && echo "readable: $path"
done
true
"""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION, starts=False) as made:
        config = made.directory / "config.toml"
        config.write_text(f"token_life_s = {TOKEN_LIFE_S}\n" + config.read_text())
        made.text("start")
        made.create_main()
        made.branch("other")
        yield made


def find_as_postgres(stack: Stack, closed: list[Path]) -> list[str]:
    """Lines that a shell finds which a superuser's SQL has started: tokens, and what ought to be closed."""
    directories = {str(stack.directory), str(stack.data_dir().parent), "/run", "/dev/shm"}
    parts = (stack.directory / "run").glob("*.pid")
    pids = {stack.pid(part.stem) for part in parts} | {stack.postmaster_pid()}
    command = SEARCH.format(
        directory=stack.directory / "config.toml",
        directories=" ".join(sorted(directories)),
        processes=" ".join(f"/proc/{pid}/{what}" for pid in pids for what in ("environ", "cmdline", "fd")),
        head=HEAD_OF_A_TOKEN,
        closed=" ".join(map(str, closed)),
    )
    with stack.connect() as connection:
        connection.execute("create temporary table found (line text)")
        quoted = command.replace("'", "''").encode()
        connection.execute(b"copy found from program '" + quoted + b"'")
        return [row[0] for row in connection.execute("select line from found").fetchall()]


@pytest.mark.skipif(os.geteuid() != 0, reason="PostgreSQL's user is then Excimer's, who may read the keys")
def test_what_sql_can_read_opens_the_pages_of_its_branch_and_nothing_else(stack: Stack) -> None:
    branch, other = branch_of(stack), branch_of(stack, "other")
    managers = [stack.pid(f"endpoint-{name}") for name in ("main", "other")]
    closed = [
        *(stack.directory / "keys").iterdir(),
        stack.directory / "config.toml",
        *(stack.directory / "run").iterdir(),
        *(stack.directory / "pageserver").rglob("*"),
        *(Path(f"/proc/{pid}/{name}") for pid in managers for name in ("environ", "mem", "maps", "fd/0")),
    ]
    found = find_as_postgres(stack, closed)
    assert [line for line in found if line.startswith("readable:")] == []
    verifier = TokenVerifier((branch.installation.keys_dir / "public.pem").read_bytes())
    ours: list[Claims] = []
    for token in found:
        try:
            ours.append(verifier.verify(token, 0))
        except AuthError:
            continue  # of another installation on this machine
    assert any(claims.timeline_id == branch.timeline_id for claims in ours), "the arena has one"
    for claims in ours:
        assert list(claims.rights) == [Right.READ_PAGES], claims
        assert claims.timeline_id in (branch.timeline_id, other.timeline_id), claims
        assert claims.exp is not None
        assert claims.exp <= time.time() + TOKEN_LIFE_S
    asyncio.run(open_pages(branch, branch, token_in_arena(stack)))
    with pytest.raises(RefusedError, match="another timeline"):
        asyncio.run(open_pages(branch, other, token_in_arena(stack)))
    for target in (branch, other):
        asyncio.run(nothing_else_opens(target, token_in_arena(stack)))


def token_in_arena(stack: Stack) -> str:
    """The newest of those that SQL finds: they live only seconds here."""
    arena = Arena.open(stack.data_dir().parent / "arena")
    try:
        return arena.settings.token
    finally:
        arena.close()


async def open_pages(branch: Branch, target: Branch, token: str) -> None:
    async with connect_pages(branch.page_address) as client:
        await client.hello(target.tenant_id, target.timeline_id, token)


async def nothing_else_opens(branch: Branch, token: str) -> None:
    config = branch.installation.config
    headers = {"Authorization": f"Bearer {token}"}
    timeline = f"/v1/tenant/{branch.tenant_id}/timeline/{branch.timeline_id}"
    async with httpx.AsyncClient(headers=headers) as client:
        for method, port, path in (
            ("GET", config.pageserver_http_port, timeline),
            ("DELETE", config.pageserver_http_port, timeline),
            ("GET", config.pageserver_http_port, "/v1/tenant"),
            ("DELETE", config.safekeepers[0].http, timeline),
            ("POST", config.controller_port, "/v1/endpoints/main/tokens"),
            ("PATCH", config.controller_port, "/v1/endpoints/main/settings"),
            ("GET", config.controller_port, "/v1/endpoints"),
            ("GET", config.controller_port, "/v1/endpoints/main/spec"),
            ("DELETE", config.controller_port, "/v1/endpoints/main"),
            (
                "POST",
                config.controller_port,
                f"/v1/tenants/{branch.tenant_id}/timelines/{branch.timeline_id}/wal_access",
            ),
        ):
            answer = await client.request(method, f"http://{HOST}:{port}{path}")
            assert answer.status_code == 403, (method, path, answer.text)
    with pytest.raises(ExcimerError, match="28P01"):
        await connect_replication(
            Address(HOST, config.safekeepers[0].replication),
            user="thief",
            application_name="thief",
            password=token,
            options=format_options(branch.tenant_id, branch.timeline_id),
        )
    with RawProposer(Address(HOST, config.safekeepers[0].proposer)) as proposer:
        refusal = proposer.greet(branch.tenant_id, branch.timeline_id, token)
        assert isinstance(refusal, ErrorResponse)
        assert (refusal.code, "write_wal" in refusal.text) == (ErrorCode.REFUSED, True)


def test_a_compute_outlives_many_tokens_and_waits_when_there_are_none(stack: Stack) -> None:
    """Commits go on over renewals, and wait while the controller is away for longer than tokens live."""
    stack.query("create table t as select g, repeat('x', 200) as filler from generate_series(1, 50000) g")
    begun = time.monotonic()
    log = stack.directory / "logs" / "endpoint-main.log"
    count = 0
    while time.monotonic() - begun < TOKEN_LIFE_S * 1.2:
        stack.query("insert into t values (0, 'x')")
        count += 1
        time.sleep(0.5)
    assert "tokens have run out" not in log.read_text()
    stack.kill("controller")
    stack.query("insert into t values (0, 'x')")
    stack.wait_until(lambda: "about to run out" in log.read_text(), "a warning", TOKEN_LIFE_S * 2.0)
    stack.wait_until(lambda: "tokens have run out" in log.read_text(), "the end of the tokens", TOKEN_LIFE_S)
    time.sleep(5.0)  # safekeepers look each second
    waiting = stack.program("psql", "-c", "insert into t values (-1, 'x')")
    time.sleep(3.0)
    assert waiting.poll() is None, "without a token nothing is committed"
    stack.text("start")
    assert "INSERT 0 1" in waiting.communicate(timeout=60)[0]
    assert stack.query("select count(*) from t where g <= 0") == [(count + 2,)]


def test_a_compute_whose_timeline_is_deleted_over_http_ends_and_says_so(stack: Stack) -> None:
    other = branch_of(stack, "other")
    config = other.installation.config
    headers = {"Authorization": f"Bearer {other.installation.admin_token()}"}
    pid = stack.pid("endpoint-other")
    for port in (*(each.http for each in config.safekeepers), config.pageserver_http_port):
        answer = httpx.delete(f"http://{HOST}:{port}/v1{other.path}", headers=headers, timeout=60)
        assert answer.is_success, answer.text
    stack.wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the compute", 30.0)
    [row] = [each for each in stack.json("endpoint", "list")["endpoints"] if each["name"] == "other"]
    assert (row["state"], "the timeline was deleted" in row["reason"]) == ("ended", True), row
    assert "ended: the timeline was deleted" in stack.text("endpoint", "list")
    assert stack.accepts("main"), "the other branch goes on"
