"""Existing clusters brought in, from a directory and from a running server, compared by pg_dumpall."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from excimer.base.lsn import Lsn, parse_lsn
from excimer.cli.errors import EXIT_UNAVAILABLE
from excimer.io.processes import make_owned_dir, spawn
from excimer.io.processes import run as run_program
from excimer.postgres import run_initdb
from excimer.wire.auth import Right
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.page_client import connect_pages
from tests.kit.page_truth import Comparer, Comparison
from tests.kit.rich_cluster import AMCHECK_OPTIONS, DUMP_OPTIONS, comparable, fill
from tests.kit.stack import Stack, running_stack
from tests.kit.stack_truth import StackView, branch_of
from tests.kit.stock_server import StockServer, stock_server

VERSIONS = [int(text) for text in os.environ.get("EXCIMER_IMPORT_VERSIONS", str(NEWEST_VERSION)).split(",")]
LISTEN = {"listen_addresses": "127.0.0.1", "max_prepared_transactions": "5"}

PAGES_COMPARED = 1000
WAL_AHEAD_BYTES = 64 << 20
FILLER_BYTES = 1_000_000
CHURN = """
create temp table if not exists own (n int);
insert into churn select n, repeat('c', 300) from generate_series(1, 200) n;
create table churn_:client_id as select n, md5(n::text) as word from generate_series(1, 300) n;
create index on churn_:client_id (word);
update churn_:client_id set word = 'x' where n % 2 = 0;
truncate churn_:client_id;
insert into churn_:client_id select n, 'again' from generate_series(1, 100) n;
drop table churn_:client_id;
delete from churn where n % 3 = 0;
"""


@pytest.fixture(scope="module", params=VERSIONS)
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with running_stack(request.param, safekeepers=1) as made:
        made.text("tenant", "create", "--set-default")
        yield made


@pytest.fixture
def root() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="excimer-import-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@contextlib.contextmanager
def source(stack: Stack, data_dir: Path) -> Iterator[StockServer]:
    with stock_server(build_of(stack.pg_version), data_dir, LISTEN) as server:
        yield server


def url_of(server: StockServer) -> str:
    return f"postgres://postgres@127.0.0.1:{server.port}/postgres"


def dump_of(server: StockServer) -> str:
    arguments = ["-h", str(server.socket_dir), "-p", str(server.port), "-U", "postgres", *DUMP_OPTIONS]
    environment = server.build.whole_environment()
    return comparable(
        run_program([server.build.program("pg_dumpall"), *arguments], environment=environment, timeout_s=120)
    )


def serve(stack: Stack, branch: str) -> None:
    """An endpoint of the branch's name, running."""
    stack.text("endpoint", "create", branch, "--branch-name", branch)
    stack.text("endpoint", "start", branch)


def check_whole(stack: Stack, branch: str, expected_dump: str) -> None:
    """The branch is the source's equal, its storage sound, and it is good for ordinary work."""
    assert comparable(stack.check_program("pg_dumpall", *DUMP_OPTIONS, name=branch)) == expected_dump
    assert stack.query("select count(*) from volatile", branch) == [(0,)]
    stack.check_program("pg_amcheck", *AMCHECK_OPTIONS, name=branch)
    stack.query("insert into volatile values (1, 'works')", branch)
    stack.query("insert into plain select n, 'new' from generate_series(9001, 9500) n", branch)
    stack.query("update words set tags = tags || 1 where tags[1] % 3 = 0", branch)
    stack.branch(f"{branch}-child", ancestor=branch)
    stack.query("delete from plain where key <= 4000", branch)
    stack.stop_and_forget(branch)
    stack.text("endpoint", "start", branch)
    assert stack.query("select count(*) from plain", branch) == [(500,)]
    assert stack.query("select count(*) from plain", f"{branch}-child") == [(3700,)]
    stack.check_program("pg_amcheck", *AMCHECK_OPTIONS, name=f"{branch}-child")
    for name in (branch, f"{branch}-child"):
        stack.text("endpoint", "stop", name)


def test_a_stopped_directory_becomes_a_branch(stack: Stack, root: Path) -> None:
    data_dir = root / "data"
    run_initdb(build_of(stack.pg_version), data_dir, options=["--data-checksums"])
    with source(stack, data_dir) as server:
        fill(server)
        server.sql("begin; insert into plain values (-1, 'two phases'); prepare transaction 'p'")
        dump = dump_of(server)
    made = stack.json("import", str(data_dir), "--branch-name", "directory")
    assert (made["name"], made["pg_version"]) == ("directory", stack.pg_version)
    compared = asyncio.run(compare_pages(stack, "directory", data_dir, parse_lsn(made["start_lsn"])))
    assert not compared.wrong
    assert compared.compared["page"] == PAGES_COMPARED
    serve(stack, "directory")
    assert stack.query("select gid from pg_prepared_xacts", "directory") == [("p",)]
    stack.query("rollback prepared 'p'", "directory")
    assert stack.query("show data_checksums", "directory") == [("off",)]
    check_whole(stack, "directory", dump)


def test_a_running_server_becomes_a_branch_while_it_is_written_to(stack: Stack, root: Path) -> None:
    """The branch is what the server was at `--to`; tables come, go and are emptied while files are copied."""
    data_dir = root / "data"
    run_initdb(build_of(stack.pg_version), data_dir, wal_segment_size_mib=4)
    with source(stack, data_dir) as server:
        fill(server)
        server.sql("checkpoint")
        (target,) = server.sql(f"select pg_current_wal_lsn() + {WAL_AHEAD_BYTES}")[0]
        with busy(server, root):
            command = stack.command(
                "--json", "import", url_of(server), "--branch-name", "live", "--to", target
            )
            importing = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            stack.wait_until(
                lambda: wal_is_streamed(server) or importing.poll() is not None, "copying the files"
            )
        dump = dump_of(server)
        while server.sql(f"select pg_current_wal_lsn() <= '{target}'")[0] == ["t"]:
            server.sql(f"select pg_logical_emit_message(false, 'filler', repeat('x', {FILLER_BYTES}))")
        server.sql("select pg_switch_wal()")
        output, errors = importing.communicate(timeout=60)
        assert importing.returncode == 0, errors
        made = json.loads(output)
        system_id = server.sql("select system_identifier from pg_control_system()")[0][0]
        assert server.sql("select count(*) from pg_replication_slots") == [["0"]]
    assert parse_lsn(made["readable_from"]) < parse_lsn(made["start_lsn"]) <= parse_lsn(target)
    assert parse_lsn(target) - parse_lsn(made["start_lsn"]) < 2 * FILLER_BYTES
    serve(stack, "live")
    assert stack.query("select system_identifier::text from pg_control_system()", "live") == [(system_id,)]
    assert stack.query("show wal_segment_size", "live") == [("4MB",)]
    history = "select count(*) > 0, sum(delta)::int8 from pgbench_history"
    balances = "select true, sum(abalance)::int8 from pgbench_accounts"
    assert stack.query(history, "live") == stack.query(balances, "live")
    check_whole(stack, "live", dump)
    past = stack.run("endpoint", "create", "early", "--branch-name", "live", "--lsn", "0/1000000")
    assert past.returncode != 0


def test_what_the_build_here_lacks_is_refused_before_anything_is_copied(stack: Stack, root: Path) -> None:
    data_dir = root / "data"
    run_initdb(build_of(stack.pg_version), data_dir)
    with source(stack, data_dir) as server:
        server.sql("create extension pageinspect; create extension amcheck")
        server.sql("update pg_proc set probin = '$libdir/gone' where probin like '%/pageinspect'")
        server.sql("update pg_proc set probin = '$libdir/dropped' where probin like '%/amcheck'")
        server.sql("drop extension amcheck")
        refused = stack.run("import", url_of(server), "--branch-name", "lacking")
        assert refused.returncode == 1
        assert "the cluster uses gone (database postgres), which PostgreSQL" in refused.stderr
        assert "excimer pg add PG_CONFIG" in refused.stderr
        assert server.sql("select count(*) from pg_stat_progress_basebackup") == [["0"]]
    refused = stack.run("import", str(data_dir), "--branch-name", "lacking")
    assert "the cluster uses gone (the database in base/" in refused.stderr
    assert "dropped" not in refused.stderr
    assert "lacking" not in {row["name"] for row in stack.json("timeline", "list")["branches"]}
    stack.text("import", str(data_dir), "--branch-name", "lacking", "--allow-lacking")
    serve(stack, "lacking")
    refused = stack.run("import", stack.url("lacking"), "--branch-name", "again")
    assert refused.returncode == 1
    assert "is an endpoint of Excimer" in refused.stderr
    assert "excimer export" in refused.stderr
    stack.text("endpoint", "stop", "lacking")


def test_a_backup_of_a_promoted_standby_and_that_server_itself(stack: Stack, root: Path) -> None:
    """PostgreSQL's timeline 2, data checksums, and the directory that pg_basebackup leaves."""
    build = build_of(stack.pg_version)
    run_initdb(build, root / "first", options=["--data-checksums"])
    with source(stack, root / "first") as server:
        server.sql("create table t as select n from generate_series(1, 1000) n")
        take_backup(server, root / "second", "--write-recovery-conf")
    with source(stack, root / "second") as server:
        server.sql("select pg_promote()")
        fill(server)
        take_backup(server, root / "backup")
        dump = dump_of(server)
        stack.json("import", url_of(server), "--branch-name", "promoted")
    imported = stack.json("import", str(root / "backup"), "--branch-name", "backup")
    assert imported["readable_from"] <= imported["start_lsn"]
    serve(stack, "promoted")
    check_whole(stack, "promoted", dump)
    serve(stack, "backup")
    assert comparable(stack.check_program("pg_dumpall", *DUMP_OPTIONS, name="backup")) == dump
    stack.check_program("pg_amcheck", *AMCHECK_OPTIONS, name="backup")
    stack.text("endpoint", "stop", "backup")


def test_a_password_is_asked_for_with_scram_and_never_shown(stack: Stack, root: Path) -> None:
    data_dir = root / "data"
    run_initdb(build_of(stack.pg_version), data_dir)
    (data_dir / "pg_hba.conf").write_text(
        "local all all trust\nhost replication all 127.0.0.1/32 scram-sha-256\n"
    )
    with source(stack, data_dir) as server:
        server.sql("create role mover replication login password 'correct horse'")
        for password in ("wrong-secret", None):
            shown = f":{password}" if password else ""
            url = f"postgres://mover{shown}@127.0.0.1:{server.port}/"
            failed = stack.run("import", url, "--branch-name", "scram")
            assert failed.returncode != 0
            assert "password" in failed.stderr
            assert "wrong-secret" not in failed.stderr + failed.stdout
        broken = stack.run("import", "postgres://mover:wrong-secret@host:port/x?y", "--branch-name", "scram")
        assert broken.returncode != 0
        assert "wrong-secret" not in broken.stderr
        stack.json(
            "import", f"postgres://mover:correct%20horse@127.0.0.1:{server.port}/", "--branch-name", "scram"
        )
    for log in (stack.directory / "logs").glob("*.log"):
        assert "horse" not in log.read_text()
        assert "wrong-secret" not in log.read_text()


def test_killed_in_the_middle_nothing_is_left_and_a_second_try_works(stack: Stack, root: Path) -> None:
    data_dir = root / "data"
    run_initdb(build_of(stack.pg_version), data_dir)
    with source(stack, data_dir) as server:
        server.sql("create table t as select n from generate_series(1, 1000) n")
        before = stored(stack)
        for victim in ("command line", "pageserver"):
            far = server.sql("select pg_current_wal_lsn() + 1000000000")[0][0]
            command = stack.command("import", url_of(server), "--branch-name", "again", "--to", far)
            importing = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            stack.wait_until(
                lambda: wal_is_streamed(server) and bool(stored(stack) - before), "copying the files"
            )
            taken = stack.run("import", url_of(server), "--branch-name", "again")
            assert "is being imported" in taken.stderr
            if victim == "pageserver":
                stack.kill("pageserver")
                stack.text("start")
                assert importing.wait(timeout=60) == EXIT_UNAVAILABLE
            importing.kill()
            importing.communicate()
            names = [row["name"] for row in stack.json("timeline", "list")["branches"]]
            assert "again" not in names
            stack.wait_until(lambda: not stored(stack) - before, "removing what was half made")
        stack.json("import", url_of(server), "--branch-name", "again")
    serve(stack, "again")
    assert stack.query("select count(*) from t", "again") == [(1000,)]
    stack.text("endpoint", "stop", "again")


@contextlib.contextmanager
def busy(server: StockServer, root: Path) -> Iterator[None]:
    """Writes of all kinds before, during and shortly after the block; all are committed at its end."""
    server.sql("create table churn (n int, filler text)")
    arguments = ["-h", str(server.socket_dir), "-p", str(server.port), "-U", "postgres"]
    program, environment = server.build.program("pgbench"), server.build.whole_environment()
    run_program([program, *arguments, "-i", "-q", "-s", "1", "postgres"], environment=environment)
    script = root / "churn.sql"
    script.write_text(CHURN)
    script.chmod(0o644)
    work = ["-n", "-c", "2", "-T", "600", "-b", "tpcb-like@5", "-f", f"{script}@1", "postgres"]
    process = spawn([program, *arguments, *work], environment=environment, stdout=subprocess.DEVNULL)
    try:
        while server.sql("select count(*) from pgbench_history") == [["0"]]:
            assert process.poll() is None
        yield
        server.sql("vacuum churn")
    finally:
        process.terminate()
        process.wait()
        while server.sql("select count(*) from pg_stat_activity where application_name = 'pgbench'") != [
            ["0"]
        ]:
            time.sleep(0.01)


def wal_is_streamed(server: StockServer) -> bool:
    """Whether an import has all files and follows the WAL."""
    rows = server.sql("select count(*) from pg_stat_replication where state in ('streaming', 'catchup')")
    return rows != [["0"]]


def take_backup(server: StockServer, target: Path, *options: str) -> None:
    arguments = ["-h", str(server.socket_dir), "-p", str(server.port), "-U", "postgres", "-D", str(target)]
    environment = server.build.whole_environment()
    make_owned_dir(target)
    run_program(
        [server.build.program("pg_basebackup"), *arguments, "--checkpoint=fast", *options],
        environment=environment,
    )


async def compare_pages(stack: Stack, name: str, data_dir: Path, lsn: Lsn) -> Comparison:
    """What the page service says against the stopped cluster's files, byte for byte."""
    branch = branch_of(stack, name)
    async with connect_pages(branch.page_address) as client:
        await client.hello(branch.tenant_id, branch.timeline_id, branch.token(Right.READ_PAGES))
        view = StackView(client, await client.get_basebackup(lsn))
        return await Comparer(view, lsn, data_dir, Random(1)).compare(PAGES_COMPARED)


def stored(stack: Stack) -> set[str]:
    """Timelines that object storage has anything of."""
    objects = (stack.directory / "object_store").glob("tenants/*/timelines/**/*")
    return {str(path).partition("/timelines/")[2].split("/")[0] for path in objects if path.is_file()}
