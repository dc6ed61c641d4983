"""A whole installation whose data lives in an S3 server, and whose pageserver loses its disk."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.io.obstore_object_store import ObstoreObjectStore
from tests.kit.builds import NEWEST_VERSION
from tests.kit.ports import free_port
from tests.kit.s3_server import S3Server, running_s3_server
from tests.kit.stack import Stack, running_stack

URL = "s3://excimer/first/installation"
SUMS = "select count(*), md5(string_agg(v, '' order by g)) from things"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    with running_s3_server(tmp_path / "s3.log") as server:
        server.create_bucket("excimer")
        yield server


def store_options(server: S3Server) -> list[str]:
    words = [("--object-store-option", f"{key}={value}") for key, value in server.options().items()]
    return ["--object-store", URL, *(word for pair in words for word in pair)]


@pytest.mark.slow
def test_data_outlives_the_pageservers_disk(server: S3Server) -> None:
    with running_stack(NEWEST_VERSION, safekeepers=1, options=store_options(server)) as stack:
        stack.create_main()
        stack.query("create extension amcheck")
        stack.query("create table things as select g, md5(g::text) v from generate_series(1, 30000) g")
        stack.query("create index on things(v)")
        stack.branch("fork")
        stack.query("insert into things select g, 'new' from generate_series(1, 500) g", "fork")
        stack.query("delete from things where g % 3 = 0")
        expected = {name: stack.query(SUMS, name) for name in ("main", "fork")}
        stack.text("stop")  # which makes durable what little is in memory
        assert not (stack.directory / "object_store").exists()
        assert ObstoreObjectStore(URL, server.options()).list("tenants")
        shutil.rmtree(stack.directory / "pageserver")  # copies of layers, and which tenants it had
        stack.text("start")
        for name in ("main", "fork"):
            start_when_attached(stack, name)
            assert stack.query(SUMS, name) == expected[name]
            checked = stack.query(
                "select bool_and(bt_index_check(c.oid, true) is not null) from pg_class c join pg_am a on "
                "a.oid = relam where amname = 'btree' and relkind = 'i' and relpersistence <> 't'",
                name,
            )
            assert checked == [(True,)]
        shutil.rmtree(stack.directory / "pageserver" / "layers")  # and while it runs
        stack.stop_and_forget()
        stack.text("endpoint", "start", "main")
        assert stack.query(SUMS) == expected["main"]
        stack.query("insert into things values (0, 'more')")
        more = stack.query(SUMS)
        stack.stop_and_forget()
        stack.text("endpoint", "start", "main")
        stack.kill("pageserver")  # in the middle, and a compute with hardly a page of its own waits for it
        shutil.rmtree(stack.directory / "pageserver")
        stack.text("start")
        assert stack.query(SUMS) == more


def start_when_attached(stack: Stack, name: str) -> None:
    """The controller finds out within seconds that its pageserver has forgotten its tenants."""
    stack.wait_until(lambda: stack.run("endpoint", "start", name).returncode == 0, f"{name} starts")


def test_init_says_what_is_wrong_with_a_store(server: S3Server, tmp_path: Path) -> None:
    stack = Stack(tmp_path, NEWEST_VERSION)
    wrong = {
        "InvalidAccessKeyId": ["--object-store-option", "access_key_id=nobody"],
        "could not be written": ["--object-store-option", f"endpoint=http://127.0.0.1:{free_port()}"],
        "colour": ["--object-store-option", "colour=red"],
        "NoSuchBucket": ["--object-store", "s3://nothing/"],
        "KEY=VALUE": ["--object-store-option", "nothing"],
    }
    for complaint, options in wrong.items():
        result = stack.run("init", *store_options(server), *options)
        assert result.returncode in (1, 2, 4), complaint
        assert complaint in result.stderr
        assert len(result.stderr.splitlines()) < 8
        assert not stack.directory.exists(), "nothing is made for a store that cannot be used"
