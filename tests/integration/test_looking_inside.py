"""`excimer layers`, `page` and `profile` on a real installation, and our words beside PostgreSQL's own."""

import asyncio
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.base.lsn import format_lsn, parse_lsn
from excimer.io.processes import make_owned_dir, run
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.page_header import PageHeader, page_checksum
from excimer.pgformat.record_names import record_name
from excimer.pgformat.wal_prefix import wal_segment_file_name
from excimer.pgformat.wal_reader import WalReader
from excimer.pgformat.wal_record import unpack_record_header
from excimer.postgres import PostgresBuild
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.plain_postgres import PlainPostgres
from tests.kit.rich_cluster import LATER_STATEMENTS, STATEMENTS
from tests.kit.stack import Stack, running_stack

VERSIONS = [int(text) for text in os.environ.get("EXCIMER_EXPORT_VERSIONS", str(NEWEST_VERSION)).split(",")]
SEGMENT_SIZE_BYTES = 16 << 20
DUMPED = re.compile(r"rmgr: (\S+) .*?lsn: (\S+), .*?desc: (\S+(?: \([0-9a-f]+\))?)")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION, safekeepers=1) as running:
        running.create_main()
        running.query("create table t (key int primary key, value text)")
        running.query("insert into t select i, 'x' from generate_series(1, 300) i")
        yield running


def test_layers_in_the_terminal_as_svg_and_as_data(stack: Stack, tmp_path: Path) -> None:
    stack.json("timeline", "branch", "--branch-name", "side")
    text = stack.text("layers")
    assert "◄ branch side" in text
    assert "images: 1 layer" in text
    assert "of every key" in text
    answer = stack.json("layers", "main")
    assert [layer["kind"] for layer in answer["layers"]][-1] == "image"
    assert answer["branches"][0]["name"] == "side"
    picture = tmp_path / "main.svg"
    stack.text("layers", "main", "--svg", str(picture))
    root = ElementTree.parse(picture).getroot()
    assert root.tag.endswith("svg")
    assert answer["layers"][0]["name"] in picture.read_text()
    branch = stack.text("layers", "side")
    assert "branch point" in branch
    assert stack.run("layers", "nobody").returncode == 3


def test_a_page_is_explained_down_to_its_header(stack: Stack) -> None:
    """Each record that touched the table's first page is there, and the header is the page's own."""
    stack.query("update t set value = 'y' where key = 1")
    lsn = stack.query("select pg_current_wal_insert_lsn()::text")[0][0]
    stack.query("update t set value = 'z' where key = 2")
    oid = stack.query("select oid from pg_database where datname = 'postgres'")[0][0]
    filenode = stack.query("select pg_relation_filenode('t')")[0][0]
    answer = stack.json("page", f"1663/{oid}/{filenode}", "main", "0", "--at", lsn)
    texts = [value["text"] for visit in answer["visits"] for value in visit["values"]]
    assert "Heap INSERT+INIT" in texts[-1]
    names = Counter(text.split(",")[0] for text in texts)
    assert names["Heap HOT_UPDATE"] + names["Heap UPDATE"] == 1, "the second update came after that LSN"
    assert names["Heap INSERT"] > 100
    assert answer["visits"][-1]["values"][-1]["starts_chain"]
    newest = answer["visits"][0]["values"][0]["lsn"]
    assert answer["header"]["lsn"] == newest
    assert answer["header"]["computed_checksum"] > 0

    by_name = stack.json("page", "t", "0", "--at", lsn)
    assert by_name == answer
    text = stack.text("page", "t", "0", "--at", lsn)
    assert f"pd_lsn {newest}" in text
    assert "nothing older matters" in text


def test_a_page_of_a_branch_is_found_in_its_ancestor(stack: Stack) -> None:
    stack.text("timeline", "branch", "--branch-name", "reader")
    oid = stack.query("select oid from pg_database where datname = 'postgres'")[0][0]
    filenode = stack.query("select pg_relation_filenode('t')")[0][0]
    answer = stack.json("page", f"1663/{oid}/{filenode}", "0", "--branch", "reader")
    assert "main" in {visit["branch"] for visit in answer["visits"] if visit["values"]}
    slru = stack.text("page", "pg_xact/0000", "0", "--branch", "reader")
    assert "transactions committed" in slru
    assert "no header" in slru


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["1663/5/1", "main", "0"], 1, "does not exist"),
        (["t", "side", "0"], 1, "names no page"),
        (["t", "main"], 2, "number of the block"),
        (["pg_xact/0000", "main", "0"], 2, "no forks"),
        (["missing", "0"], 1, "does not exist"),
        (["t", "0", "--branch", "nobody"], 3, "nobody"),
        (["t", "0", "--at", "FF/0"], 1, "has not reached"),
    ],
)
def test_what_cannot_be_explained_is_refused(
    stack: Stack, arguments: list[str], code: int, says: str
) -> None:
    result = stack.run("page", *arguments)
    assert (result.returncode, says in result.stderr) == (code, True), result.stderr


def test_a_flame_graph_of_the_pageserver(stack: Stack, tmp_path: Path) -> None:
    out = tmp_path / "pageserver.svg"
    result = stack.run("profile", "pageserver", "--seconds", "1", "--idle", "-o", str(out))
    if result.returncode == 1 and "SYS_PTRACE" in result.stderr:
        pytest.skip("this machine does not let a process look into another one")
    assert result.returncode == 0, result.stderr
    assert ElementTree.parse(out).getroot().tag.endswith("svg")
    assert "shell.py" in out.read_text() or "asyncio" in out.read_text()


def test_what_does_not_run_is_not_profiled(stack: Stack) -> None:
    nothing = stack.run("profile", "nothing")
    assert (nothing.returncode, "there are: " in nothing.stderr) == (3, True)


@pytest.mark.parametrize("pg_version", VERSIONS)
def test_records_are_named_as_pg_waldump_names_them(pg_version: int) -> None:
    """And pages have the checksums that pg_checksums gives them."""
    asyncio.run(_compare(pg_version))


async def _compare(pg_version: int) -> None:
    build = build_of(pg_version)
    cluster = PlainPostgres(build)
    make_owned_dir(cluster.root)
    try:
        cluster.create("max_prepared_transactions=2\nwal_level=logical\nwal_keep_size=1GB\n")
        async with cluster.running():
            start = parse_lsn(await cluster.value("select pg_current_wal_insert_lsn()"))
            async with await cluster.connect() as connection:
                for statement in (*STATEMENTS, *LATER_STATEMENTS):
                    await connection.execute(statement.encode())
            assert cluster.process is not None
            await cluster.process.stop()
        _compare_names(build, cluster.data_dir, start, pg_version)
        _compare_checksums(build, cluster.data_dir)
    finally:
        cluster.remove()


def _compare_names(build: PostgresBuild, data_dir: Path, start_lsn: int, pg_version: int) -> None:
    control = ControlFile.unpack((data_dir / "global/pg_control").read_bytes(), pg_version)
    place = ["--path", str(data_dir / "pg_wal")]
    part = ["--start", format_lsn(start_lsn), "--end", format_lsn(control.checkpoint_lsn)]
    output = run(
        [build.program("pg_waldump"), *place, *part],
        environment=build.whole_environment({}),
        timeout_s=60,
    )
    theirs = {parse_lsn(lsn): f"{rmgr} {name.strip(',;')}" for rmgr, lsn, name in DUMPED.findall(output)}
    ours = {}
    reader = WalReader(start_lsn, pg_version, SEGMENT_SIZE_BYTES)
    position = start_lsn
    while position < control.checkpoint_lsn:
        offset = position % SEGMENT_SIZE_BYTES
        segment = (data_dir / "pg_wal" / wal_segment_file_name(position, SEGMENT_SIZE_BYTES)).read_bytes()
        end = min(SEGMENT_SIZE_BYTES, offset + control.checkpoint_lsn - position)
        for record in reader.feed(segment[offset:end]):
            header = unpack_record_header(record.data)
            ours[record.start_lsn] = record_name(header.rmgr, header.info, pg_version)
        position += end - offset
    assert ours == theirs
    assert len(ours) > 5000
    assert len(set(ours.values())) > 30, sorted(set(ours.values()))


def _compare_checksums(build: PostgresBuild, data_dir: Path) -> None:
    run(
        [build.program("pg_checksums"), "--enable", "--no-sync", "--pgdata", data_dir],
        environment=build.whole_environment({}),
        timeout_s=60,
    )
    compared = 0
    for file in sorted((data_dir / "base/5").glob("[0-9]*")) or sorted(data_dir.glob("base/*/[0-9]*")):
        content = file.read_bytes()
        for block in range(0, len(content) // BLOCK_SIZE_BYTES, 3):
            page = content[block * BLOCK_SIZE_BYTES : (block + 1) * BLOCK_SIZE_BYTES]
            header = PageHeader.unpack(page)
            if not header.is_new:
                assert header.checksum == page_checksum(page, block), (file, block)
                compared += 1
    assert compared > 100
