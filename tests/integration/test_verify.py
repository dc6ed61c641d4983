"""`excimer verify`: nothing is found where nothing is wrong, whatever goes on, and what is wrong is named.

`EXCIMER_VERIFY_VERSIONS` names versions of PostgreSQL; by default the newest.
"""

import json
import os
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from excimer.base.keys import BLOCK_SIZE_BYTES, Relation, relation_block_key
from excimer.cli import command_line
from excimer.cli.commands import verify as verify_command
from excimer.cli.commands.endpoint import create_endpoint
from excimer.cli.commands.export import access_of
from excimer.cli.installation import load_installation
from excimer.export.page_stream import BranchAccess
from tests.kit import ingest_workload, redo_workload
from tests.kit.builds import NEWEST_VERSION
from tests.kit.directories import reachable_directory
from tests.kit.lying_page_service import Lie, LyingPageService
from tests.kit.stack import Stack, running_stack
from tests.kit.stack_truth import EndpointServer, branch_of

VERSIONS = [int(text) for text in os.environ.get("EXCIMER_VERIFY_VERSIONS", str(NEWEST_VERSION)).split(",")]
SETTINGS = {
    "max_prepared_transactions": "10",
    "track_commit_timestamp": "on",
    "autovacuum_naptime": "2s",
}
IDLE = """
create table idle(id int primary key, note text);
insert into idle select g, repeat('n', 200) from generate_series(1, 2000) g;
vacuum (freeze, analyze) idle;
create unlogged table forgotten as select g from generate_series(1, 100) g;
"""
MIX = """
\\set id random(1, 100000 * :scale)
update pgbench_accounts set abalance = abalance + 1 where aid = :id;
insert into churn(k, note) values (:id, repeat('c', :id % 300));
delete from churn where k = :id - 1;
select nextval('churn_seq');
select count(*) from pgbench_accounts where aid between :id and :id + 200;
"""
VACUUM = """
create index churn_late on churn(note);
drop index churn_late;
vacuum churn;
truncate rewritten;
insert into rewritten select g from generate_series(1, 3000) g;
vacuum full rewritten;
"""


def verified(stack: Stack, name: str = "main") -> dict[str, Any]:
    """The result, whatever the exit code is; 1 is what it must be when there are differences."""
    result = stack.run("--json", "verify", name)
    assert result.stdout, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    assert result.returncode == (1 if answer["differences"] else 0), result.stderr
    return answer


def assert_same(answer: dict[str, Any]) -> None:
    assert answer["differences"] == [], json.dumps(answer["differences"][:10], indent=1)


@contextmanager
def load(stack: Stack, root: Path) -> Iterator["subprocess.Popen[str]"]:
    """Clients that update, insert, delete and read, and one that vacuums, truncates and builds indexes."""
    script = root / "mix.sql"
    script.write_text(MIX)
    process = stack.program("pgbench", "-n", "-c", "3", "-T", "600", "-f", str(script))
    is_over = threading.Event()

    def vacuum() -> None:
        with stack.connect() as connection:
            while not is_over.is_set():
                for statement in VACUUM.strip().split(";\n"):
                    connection.execute(statement.rstrip(";").encode())

    vacuuming = threading.Thread(target=vacuum)
    vacuuming.start()
    try:
        yield process
    finally:
        is_over.set()
        process.terminate()
        process.communicate(timeout=60)
        vacuuming.join(60)


@pytest.fixture(scope="module", params=VERSIONS)
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with running_stack(request.param) as running:
        running.text("tenant", "create", "--set-default")
        body = {
            "name": "main",
            "tenant": "",
            "branch": "main",
            "mode": "primary",
            "lsn": None,
            "pg_version": None,
            "postgres_settings": SETTINGS,
        }
        create_endpoint(load_installation(running.directory), body, None)
        running.text("endpoint", "start", "main")
        with running.connect() as connection:
            for statement in IDLE.strip().split(";\n"):
                connection.execute(statement.rstrip(";").encode())
        yield running


def idle_file(stack: Stack) -> tuple[Path, Relation]:
    """All of it is on the disk, and PostgreSQL writes none of it any more."""
    stack.query("select sum(length(note)) from idle")
    stack.query("vacuum idle")
    stack.query("checkpoint")
    ((path, oid, number),) = stack.query(
        "select pg_relation_filepath('idle'), d.oid, pg_relation_filenode('idle') from pg_database d "
        "where datname = current_database()"
    )
    return stack.data_dir() / path, Relation(1663, oid, number)


@contextmanager
def changed_file(path: Path, offset: int, flip: int) -> Iterator[None]:
    """One byte of a file is another one for a while."""
    with path.open("r+b") as file:
        file.seek(offset)
        (before,) = file.read(1)
        file.seek(offset)
        file.write(bytes((before ^ flip,)))
        file.flush()
        try:
            yield
        finally:
            file.seek(offset)
            file.write(bytes((before,)))


def test_a_page_that_is_damaged_here_is_named(stack: Stack) -> None:
    path, _ = idle_file(stack)
    offset = 3 * BLOCK_SIZE_BYTES + BLOCK_SIZE_BYTES - 50
    with changed_file(path, offset, 0x10):
        (found,) = verified(stack)["differences"]
        told = stack.run("verify", "main")
    assert (found["name"], found["fork"], found["block"]) == ("postgres: public.idle", "main", 3)
    assert found["offset"] == BLOCK_SIZE_BYTES - 50
    assert int(found["here"][:2], 16) ^ int(found["pageserver"][:2], 16) == 0x10
    assert found["here_lsn"] == found["pageserver_lsn"]
    assert told.returncode == 1
    assert f"public.idle ({found['path']}) main block 3: 1 byte differs from byte 8142 on" in told.stdout
    assert "1 difference" in told.stdout
    assert_same(verified(stack))


def test_a_hint_is_no_difference(stack: Stack) -> None:
    """pd_flags, of which the lowest bits are hints; the bits above are none."""
    path, _ = idle_file(stack)
    with changed_file(path, 2 * BLOCK_SIZE_BYTES + 10, 0x02):
        assert_same(verified(stack))
    with changed_file(path, 2 * BLOCK_SIZE_BYTES + 10, 0x10):
        assert [found["offset"] for found in verified(stack)["differences"]] == [10]


def test_a_visibility_map_that_is_wrong_is_named(stack: Stack) -> None:
    path, _ = idle_file(stack)
    with changed_file(path.with_name(f"{path.name}_vm"), 24, 0x02):
        (found,) = verified(stack)["differences"]
    assert (found["fork"], found["block"], found["offset"]) == ("vm", 0, 24)


def test_transaction_status_that_is_wrong_is_named(stack: Stack) -> None:
    path = stack.data_dir() / "pg_xact/0000"
    with changed_file(path, 100, 0x03):
        (found,) = verified(stack)["differences"]
    assert (found["path"], found["block"], found["offset"]) == ("pg_xact/0000", 0, 100)


def test_a_file_that_was_cut_is_named(stack: Stack) -> None:
    path, _ = idle_file(stack)
    content = path.read_bytes()
    os.truncate(path, len(content) - BLOCK_SIZE_BYTES)
    try:
        (found,) = verified(stack)["differences"]
    finally:
        with path.open("r+b") as file:
            file.seek(len(content) - BLOCK_SIZE_BYTES)
            file.write(content[-BLOCK_SIZE_BYTES:])
    blocks = len(content) // BLOCK_SIZE_BYTES
    assert found["name"] == "postgres: public.idle"
    assert found["reason"] == f"{blocks - 1} blocks here, {blocks} blocks at the pageserver"


def lying_verification(
    stack: Stack, lie: Lie, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """The command, which reads from a pageserver whose pages `lie` changes."""
    with LyingPageService(branch_of(stack).page_address, lie) as service:

        def elsewhere(ticket: dict[str, Any]) -> BranchAccess:
            return access_of(ticket | {"page_service_address": service.address})

        monkeypatch.setattr(verify_command, "access_of", elsewhere)
        code = command_line.run(["--dir", str(stack.directory), "--json", "verify", "main"])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == (1 if answer["differences"] else 0)
    return answer


def test_a_page_that_the_pageserver_serves_wrong_is_named(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, relation = idle_file(stack)
    wanted = relation_block_key(relation, 0, 5)

    def lie(key: bytes, page: bytes) -> bytes:
        return page[:4000] + bytes((page[4000] ^ 1,)) + page[4001:] if key == wanted else page

    (found,) = lying_verification(stack, lie, monkeypatch, capsys)["differences"]
    assert (found["name"], found["block"], found["offset"]) == ("postgres: public.idle", 5, 4000)


def test_a_page_that_the_pageserver_serves_too_new_is_named(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its contents are the same, but it claims to have been changed since."""
    _, relation = idle_file(stack)
    wanted = relation_block_key(relation, 0, 1)

    def lie(key: bytes, page: bytes) -> bytes:
        if key != wanted:
            return page
        high, low = struct.unpack_from("<II", page)
        return struct.pack("<II", high, low + 8) + page[8:]

    (found,) = lying_verification(stack, lie, monkeypatch, capsys)["differences"]
    assert "pd_lsn is" in found["reason"]
    assert found["block"] == 1


def test_a_static_endpoint_is_compared_at_its_moment(stack: Stack) -> None:
    ((lsn,),) = stack.query("select pg_current_wal_lsn()::text")
    stack.query("update idle set note = 'later' where id < 100")
    stack.text("endpoint", "create", "past", "--branch-name", "main", "--at", lsn)
    stack.text("endpoint", "start", "past")
    try:
        assert stack.query("select count(*) from idle where note = 'later'", "past") == [(0,)]
        answer = verified(stack, "past")
        assert_same(answer)
        assert answer["pages"] > 100
        assert answer["lsn"] == lsn
    finally:
        stack.text("endpoint", "stop", "past")


def test_an_endpoint_that_does_not_run_cannot_be_verified(stack: Stack) -> None:
    stack.text("endpoint", "create", "idle", "--branch-name", "main", "--at", "-1s")
    result = stack.run("verify", "idle")
    assert (result.returncode, "does not run" in result.stderr) == (4, True), result.stderr
    assert stack.run("verify", "nobody").returncode == 3


@pytest.mark.slow
def test_nothing_differs_whatever_postgresql_does_and_while_it_does_it(stack: Stack) -> None:
    """Every index type, TOAST, sequences, prepared transactions, freezing, truncation, other databases; then
    the same after a restart, where most pages come from the pageserver, and under load.
    """
    with reachable_directory() as root:
        server = EndpointServer(stack, root)
        ingest_workload.run(server)
        first = verified(stack)
        assert_same(first)
        assert first["pages"] > 1000
        assert first["relations"] > 500
        assert first["small_files"] > 5
        assert first["unlogged_files"] >= 1
        assert first["free_space_pages"] > 50

        stack.text("endpoint", "restart", "main")
        after = verified(stack)
        assert_same(after)
        assert after["absent_pages"] > 100

        stack.check_program("pgbench", "-i", "-q", "-s", "1")
        server.sql(
            "create table churn(k int, note text); create index on churn(k); create sequence churn_seq"
        )
        server.sql("create table rewritten(id int primary key)")
        with load(stack, root) as process:
            server.sql(redo_workload.ROUND.format(round=3))
            for _ in range(4):
                assert_same(verified(stack))
                assert process.poll() is None, "the load has ended"
        assert_same(verified(stack))
