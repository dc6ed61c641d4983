"""Bad input to a whole installation: it is refused in one clear sentence, and everything is well afterwards.

What single processes make of bad input is shown where they are tested alone; here is what only shows when
all of them run together, driven by the command line and by whatever reaches their ports.
"""

import asyncio
import contextlib
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import psycopg
import pytest

from excimer.base.errors import RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.cli.installation import HOST, free_ports
from excimer.wire.auth import Claims, Right, encode_token, generate_key_pair
from excimer.wire.endpoint_tokens import EndpointTokens
from excimer.wire.page_service import Hello, encode_client_message
from tests.kit.builds import NEWEST_VERSION
from tests.kit.page_client import connect_pages
from tests.kit.stack import Stack, error_lines, running_stack
from tests.kit.stack_truth import Branch, branch_of

FUTURE = "7/0"
UNKNOWN = "0" * 32
MEMORY_GROWTH_BYTES_MAX = 150 << 20
IDLE_CONNECTIONS = 40
FILL = "insert into filled select {batch}, repeat(md5(g::text), 30) from generate_series(1, 1000) g"
EXIT_REFUSED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_UNAVAILABLE = 1, 2, 3, 4


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION) as stack:
        stack.create_main()
        stack.query("create table kept as select g, md5(g::text) from generate_series(1, 1000) g")
        yield stack


@pytest.fixture
def well(stack: Stack) -> Iterator[Stack]:
    """The installation, which must be well after the test."""
    yield stack
    assert_well(stack)


def assert_well(stack: Stack) -> None:
    parts = {row["part"]: row["state"] for row in stack.json("status")["parts"]}
    assert set(parts.values()) == {"running"}, parts
    assert stack.query("select count(*) from kept") == [(1000,)]


def refused(stack: Stack, *arguments: str) -> tuple[int, str]:
    """Exit code and message of a command that must fail: one line of a bearable length."""
    result = stack.run(*arguments)
    assert result.returncode in (EXIT_REFUSED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_UNAVAILABLE), result
    assert result.stderr.startswith("excimer: "), result.stderr
    assert len(error_lines(result.stderr)) == 1
    assert len(result.stderr) < 500
    return result.returncode, result.stderr.removeprefix("excimer: ").strip()


@pytest.mark.parametrize(
    ("at", "code", "said"),
    [
        (FUTURE, EXIT_REFUSED, f"branch 'main' has not reached LSN {FUTURE}: it is at 0/"),
        ("0/8", EXIT_REFUSED, "cannot branch at 0/8: its history reaches from 0/"),
        ("0/1", EXIT_REFUSED, "cannot branch at 0/1: its history reaches from 0/"),
        ("2999-01-01T00:00:00Z", EXIT_REFUSED, "the timestamp lies in the future"),
        ("2001-01-01T00:00:00Z", EXIT_REFUSED, "before the history that this timeline keeps"),
        ("0/FFFFFFFFF", EXIT_USAGE, "neither an LSN like"),
        ("yesterday", EXIT_REFUSED, "before the history that this timeline keeps"),
        ("tomorrow", EXIT_USAGE, "neither an LSN like"),
    ],
)
def test_moments_outside_the_history_leave_no_branch(well: Stack, at: str, code: int, said: str) -> None:
    told = refused(well, "timeline", "branch", "--branch-name", "nowhere", "--at", at)
    assert (told[0], said in told[1]) == (code, True), told
    assert [row["name"] for row in well.json("timeline", "list")["branches"]] == ["main"]


def test_an_endpoint_before_the_history_is_refused(well: Stack) -> None:
    code, said = refused(well, "endpoint", "create", "past", "--lsn", "0/8")
    assert (code, "LSN 0/8 is before branch 'main' begins at 0/" in said) == (EXIT_REFUSED, True), said


def test_an_endpoint_in_the_future_is_refused(well: Stack) -> None:
    code, said = refused(well, "endpoint", "create", "future", "--lsn", FUTURE)
    assert (code, f"branch 'main' has not reached LSN {FUTURE}: it is at 0/" in said) == (
        EXIT_REFUSED,
        True,
    ), said
    assert [row["name"] for row in well.json("endpoint", "list")["endpoints"]] == ["main"]


def test_an_endpoint_whose_port_is_taken_says_so_at_once(well: Stack) -> None:
    well.text("timeline", "branch", "--branch-name", "other")
    with socket.socket() as taken:
        [port] = free_ports(1)
        taken.bind((HOST, port))
        taken.listen()
        well.text("endpoint", "create", "squeezed", "--branch-name", "other", "--pg-port", str(port))
        code, said = refused(well, "endpoint", "start", "squeezed")
    assert code == EXIT_REFUSED
    assert f"port {port} of {HOST} is taken by another program" in said
    well.text("endpoint", "start", "squeezed")
    assert well.query("select count(*) from kept", "squeezed") == [(1000,)]
    well.text("endpoint", "stop", "squeezed", "--destroy")
    well.text("timeline", "delete", "other")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["init"], EXIT_REFUSED, "is not empty"),
        (["init", "--pg-version", "13"], EXIT_REFUSED, "PostgreSQL 13 is not supported"),
        (["init", "--pg-version", "-18"], EXIT_REFUSED, "PostgreSQL -18 is not supported"),
        (["init", "--pg-version", "9" * 100], EXIT_REFUSED, "is not supported"),
        (["init", "--safekeepers", "0"], EXIT_USAGE, "must be odd"),
        (["init", "--safekeepers", "99999999999999999999"], EXIT_USAGE, "must be odd"),
        (["endpoint", "create", "e", "--pg-version", "17"], EXIT_REFUSED, "cannot be of 17"),
        (["endpoint", "create", "e", "--pg-port", "65536"], EXIT_REFUSED, "less than or equal to 65535"),
        (["endpoint", "create", "e", "--pg-port", "-1"], EXIT_REFUSED, "greater than or equal to 1"),
        (["endpoint", "create", "../../e"], EXIT_REFUSED, "cannot be an endpoint name"),
        (["endpoint", "create", ""], EXIT_REFUSED, "cannot be an endpoint name"),
        (["endpoint", "create", "x" * 5000], EXIT_REFUSED, "cannot be an endpoint name"),
        (["tenant", "create", "two\nlines"], EXIT_REFUSED, r"'two\nlines' cannot be a tenant name"),
        (["tenant", "create", "it's; drop table tenants"], EXIT_REFUSED, "cannot be a tenant name"),
        (["tenant", "delete", UNKNOWN], EXIT_NOT_FOUND, "no tenant"),
        (["timeline", "list", "--tenant", UNKNOWN], EXIT_NOT_FOUND, "no tenant"),
        (["timeline", "branch", "--branch-name", "../x"], EXIT_REFUSED, "cannot be a branch name"),
        (
            ["timeline", "branch", "--branch-name", "x", "--ancestor", UNKNOWN],
            EXIT_NOT_FOUND,
            "no branch",
        ),
        (["logs", "../../../../etc/passwd"], EXIT_NOT_FOUND, "no part"),
        (["endpoint", "stop", "x" * 5000], EXIT_NOT_FOUND, "no endpoint"),
    ],
)
def test_absurd_arguments(stack: Stack, arguments: list[str], code: int, said: str) -> None:
    told = refused(stack, *arguments)
    assert (told[0], said in told[1]) == (code, True), told


def test_nothing_absurd_was_done(stack: Stack) -> None:
    assert [row["name"] for row in stack.json("endpoint", "list")["endpoints"]] == ["main"]
    assert len(stack.json("tenant", "list")["tenants"]) == 1
    assert_well(stack)


def test_tokens_that_grant_nothing(well: Stack) -> None:
    branch = branch_of(well)
    forged = generate_key_pair().private_pem
    pages = frozenset({Right.READ_PAGES})
    tenant = Claims(holder="test", rights=pages, tenant_id=branch.tenant_id)
    other = Claims(holder="test", rights=pages, tenant_id=TenantId("1" * 32))

    everyone = Claims(holder="test", rights=pages)

    async def hello(token: str, tenant_id: TenantId, timeline_id: TimelineId) -> None:
        async with connect_pages(branch.page_address) as client:
            await client.hello(tenant_id, timeline_id, token)

    right = branch.token(Right.READ_PAGES)
    for token, tenant_id, timeline_id, why in (
        ("", branch.tenant_id, branch.timeline_id, "token"),
        (encode_token(forged, tenant), branch.tenant_id, branch.timeline_id, "not one of this installation"),
        (branch.signed(other), branch.tenant_id, branch.timeline_id, "another tenant"),
        (right, TenantId(UNKNOWN), branch.timeline_id, "another tenant"),
        (right, branch.tenant_id, TimelineId(UNKNOWN), "another timeline"),
        (branch.signed(tenant), branch.tenant_id, TimelineId(UNKNOWN), "has no timeline"),
        (branch.token(Right.MANAGE), branch.tenant_id, branch.timeline_id, "does not have the right"),
        (branch.signed(everyone), TenantId(UNKNOWN), branch.timeline_id, "not attached"),
    ):
        # A tenant that is not there may be attached again in a moment, so a compute is told to try again.
        family = RetryableError if why == "not attached" else RefusedError
        with pytest.raises(family, match=why):
            asyncio.run(hello(token, tenant_id, timeline_id))
    forged_admin = encode_token(forged, Claims(holder="cli", rights=frozenset(Right) - {Right.WRITE_WAL}))
    controller = f"http://{branch.installation.controller_address}/v1/tenants"
    statuses = {
        httpx.get(controller, headers={"Authorization": text}).status_code
        for text in ("", "Bearer a.b.c", "Basic eDp5", f"Bearer {forged_admin}")
    }
    assert statuses == {401}
    assert httpx.get(controller, headers={"Authorization": f"Bearer {right}"}).status_code == 403


def test_the_broker_wants_its_password(well: Stack) -> None:
    port = branch_of(well).installation.config.broker_port
    with socket.create_connection((HOST, port), timeout=5) as connection:
        connection.sendall(b'CONNECT {"user":"excimer","pass":"wrong"}\r\nPING\r\n')
        heard = b""
        while data := connection.recv(4096):
            heard += data
    assert b"Authorization Violation" in heard


def test_a_second_compute_on_the_same_directory_is_refused(well: Stack) -> None:
    settings = well.directory / "run" / "endpoint-main.toml"
    command = [sys.executable, "-m", "excimer.compute", str(settings)]
    without_tokens = subprocess.run(
        command, input="", capture_output=True, text=True, timeout=60, check=False
    )
    assert (without_tokens.returncode, "no tokens came" in without_tokens.stderr) == (2, True)
    tokens = EndpointTokens(read_pages="a.b.c", write_wal="a.b.c", renewal="a.b.c", valid_for_s=60)
    second = subprocess.run(
        command,
        input=msgspec.json.encode(tokens).decode(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 1
    assert f"is in use by process {well.pid('endpoint-main')}" in second.stderr


def test_garbage_on_every_port(well: Stack) -> None:
    branch = branch_of(well)
    ports = ports_of(well, branch)
    assert len(ports) == 16
    hello = encode_client_message(Hello(branch.tenant_id, branch.timeline_id, branch.token(Right.READ_PAGES)))
    memory = memory_of(well)
    with contextlib.ExitStack() as idle:
        for port in ports:
            for chunk in garbage(random.Random(port), hello):
                say(port, chunk)
            for _ in range(IDLE_CONNECTIONS):
                connection = idle.enter_context(socket.create_connection((HOST, port), timeout=5))
                connection.sendall(struct.pack("<IB", 15 << 20, ord("H")) + b"x" * 1000)
        assert_well(well)
    grown = {part: size - memory[part] for part, size in memory_of(well).items()}
    assert all(growth < MEMORY_GROWTH_BYTES_MAX for growth in grown.values()), grown
    assert set(memory) == set(grown)


def ports_of(stack: Stack, branch: Branch) -> list[int]:
    """Every port of the installation."""
    config = branch.installation.config
    endpoint = stack.endpoint("main")
    return [
        *(config.broker_port, config.broker_http_port, config.controller_port),
        *(config.page_service_port, config.pageserver_http_port),
        *(port for each in config.safekeepers for port in (each.proposer, each.replication, each.http)),
        *(endpoint["postgres_port"], endpoint["http_port"]),
    ]


def garbage(chance: random.Random, hello: bytes) -> Iterator[bytes]:
    """Truncated frames of every protocol, frames that lie about their length, and noise."""
    yield from (b"", b"\0", b"\xff" * 4096)
    yield from (hello[: chance.randrange(1, len(hello))] for _ in range(3))
    yield hello + hello[:7]
    yield hello + struct.pack("<IBQ", 0xFFFFFFFF, ord("G"), 1) + chance.randbytes(5000)
    yield struct.pack("<IB", 0, 0) * 1000
    yield struct.pack("<IB", 20, ord("A")) + chance.randbytes(19)
    yield struct.pack(">II", 0x7FFFFFFF, 3 << 16)
    yield struct.pack(">II", 8, 80877103) + chance.randbytes(50)
    yield b"\x00\x00\x00\x13\x00\x03\x00\x00user\x00x\x00\x00Q\x00\x00\x00\x08abc\x00"
    yield b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n"
    yield b"POST /v1/tenants HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{"
    yield b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(5000)) + b"\r\n"
    yield b"PUB excimer.safekeeper.x.y 99999999\r\n" + b"z" * 1000
    yield from (chance.randbytes(chance.randrange(1, 20_000)) for _ in range(5))


def say(port: int, data: bytes) -> None:
    """Sends, and hears the answer out for a moment; a reset is as good an answer as any."""
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass


def memory_of(stack: Stack) -> dict[str, int]:
    """Resident bytes by part."""
    found = {}
    for record in (stack.directory / "run").glob("*.pid"):
        lines = Path(f"/proc/{stack.pid(record.stem)}/status").read_text().splitlines()
        size = next(line.split()[1] for line in lines if line.startswith("VmRSS"))
        found[record.stem] = int(size) << 10
    return found


def test_a_damaged_layer_is_named_and_never_served(well: Stack) -> None:
    branch = branch_of(well)
    branch.flush()
    before = set(layer_files(well))
    well.query("create table victim as select g, repeat(md5(g::text), 8) v from generate_series(1, 20000) g")
    expected = well.query("select count(*), md5(string_agg(v, '' order by g)) from victim")
    branch.flush()
    well.query("create table other as select g from generate_series(1, 1000) g")
    well.stop_and_forget()
    layer = max(set(layer_files(well)) - before, key=lambda path: path.stat().st_size)
    copies = [path for path in well.directory.rglob(layer.name) if path.is_file()]
    assert {path.relative_to(well.directory).parts[0] for path in copies} == {"object_store", "pageserver"}
    whole = layer.read_bytes()
    place = len(whole) * 6 // 10
    damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    well.kill("pageserver")
    for path in copies:
        path.write_bytes(damaged)
    well.text("start")
    well.text("endpoint", "start", "main")
    with pytest.raises(psycopg.errors.IoError, match="could not read"):
        well.query("select count(v) from victim")
    assert layer.name in (well.directory / "logs" / "pageserver.log").read_text()
    assert well.query("select count(*) from other") == [(1000,)]
    assert well.query("insert into kept values (0, 'more'); delete from kept where g = 0") == []
    for path in copies:
        path.write_bytes(whole)
    assert well.query("select count(*), md5(string_agg(v, '' order by g)) from victim") == expected


def layer_files(stack: Stack) -> list[Path]:
    return [path for path in (stack.directory / "pageserver").rglob("delta-*") if path.is_file()]


@pytest.fixture
def small_disk_stack() -> Iterator[Stack]:
    """An installation whose one safekeeper has a file system of 40 MiB."""
    with running_stack(NEWEST_VERSION, safekeepers=1) as stack:
        stack.text("stop")
        directory = stack.directory / "safekeepers" / "1"
        mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(directory)]
        if (
            shutil.which("mount") is None
            or subprocess.run(mount, capture_output=True, check=False).returncode
        ):
            pytest.skip("file systems cannot be mounted here; tests/faults has the same with a faulty disk")
        try:
            stack.text("start")
            stack.create_main()
            yield stack
        finally:
            stack.run("stop", "--immediate")
            subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.slow
def test_a_full_disk_blocks_commits_and_loses_nothing(small_disk_stack: Stack) -> None:
    stack = small_disk_stack
    stack.query("create table filled(g int, v text)")
    acknowledged: list[int] = []
    finished = threading.Event()

    def write() -> None:
        with stack.connect() as connection:
            for batch in range(40):
                connection.execute(FILL.format(batch=batch).encode())
                acknowledged.append(batch)
        finished.set()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    log = stack.directory / "logs" / "safekeeper-1.log"
    stack.wait_until(
        lambda: "no space" in log.read_text().lower(), "the safekeeper says that its disk is full"
    )
    assert not finished.wait(3), "40 MB were acknowledged by a disk of 40 MB"
    known = len(acknowledged)
    assert not finished.wait(1)
    assert len(acknowledged) == known, "a commit was acknowledged that is on no disk (D1)"
    disk = stack.directory / "safekeepers" / "1"
    subprocess.run(["mount", "-o", "remount,size=400m", disk], check=True)
    assert finished.wait(60), "commits go on when there is room again"
    expected = [(40, 40_000)]
    assert stack.query("select count(distinct g), count(*) from filled") == expected
    stack.stop_and_forget()
    stack.text("endpoint", "start", "main")
    assert stack.query("select count(distinct g), count(*) from filled") == expected
