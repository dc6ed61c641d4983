"""A PostgreSQL of Debian's packages, with a loader and libraries of its own, and what we add to it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from excimer.cli.import_directory_needs import directory_needs
from excimer.cli.import_needs import unmet
from excimer.cli.import_server_needs import server_needs
from excimer.postgres import PostgresBuild, run_initdb
from excimer.postgres.debian_packages import PackagesUnavailableError, has_packages
from tests.kit.builds import NEWEST_VERSION, debian_build
from tests.kit.directories import reachable_directory
from tests.kit.stack import Stack, running_stack
from tests.kit.stock_server import stock_server


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresBuild]:
    """In the user's cache, but in use by this module alone."""
    if not has_packages(NEWEST_VERSION):
        pytest.skip("this machine has no apt")
    try:
        with debian_build(tmp_path_factory.mktemp("config")) as made:
            yield made
    except PackagesUnavailableError as error:
        pytest.skip(f"no mirror of Debian can be reached: {error}")


@pytest.fixture(scope="module")
def stack(build: PostgresBuild) -> Iterator[Stack]:
    with running_stack(build.version, safekeepers=1) as made:
        made.create_main()
        yield made


def test_it_lacks_nothing_but_jit(build: PostgresBuild) -> None:
    assert set(build.features.lacks()) <= {"JIT"}
    assert build.environment() == {}, "programs that PostgreSQL starts must not load its libraries"
    assert "(Debian" in build.full_version


def test_the_programs_of_its_test_suites_run(build: PostgresBuild) -> None:
    assert build.pgxs_dir is not None
    for name in ("regress/pg_regress", "isolation/pg_isolation_regress", "isolation/isolationtester"):
        program = build.pgxs_dir / "src/test" / name
        answer = subprocess.run([program, "-V"], capture_output=True, text=True, check=True)
        assert "PostgreSQL" in answer.stdout


def test_what_a_cluster_of_it_uses_is_seen_before_an_import(build: PostgresBuild) -> None:
    with reachable_directory() as root:
        run_initdb(build, root / "data")
        with stock_server(build, root / "data", {"listen_addresses": "127.0.0.1"}) as server:
            server.sql(
                "create database app template template0 locale_provider icu icu_locale 'de' locale 'C.UTF-8'"
            )
            server.sql('create extension pgcrypto; create collation g (provider = icu, locale = "de")', "app")
            server.sql('create table t (a text compression lz4, x xml, u text collate "de-x-icu")', "app")
            url = f"postgres://postgres@127.0.0.1:{server.port}/postgres"
            asked, refused = server_needs(url), server_needs(url.replace("postgres@", "nobody@"))
        read = directory_needs(root / "data", build.version)
    collations = ("collation de-x-icu in database app", "collation g in database app")
    assert asked.icu == ("database app", *collations)
    assert (asked.lz4, asked.xml) == (("column t.a in database app",), ("column t.x in database app",))
    assert asked.libraries["pgcrypto"] == "database app"
    assert not asked.unseen
    assert 'role "nobody" does not exist' in refused.unseen[0]
    assert (read.icu, read.unseen) == (("database app",), ())
    assert read.libraries.keys() == asked.libraries.keys()
    assert unmet(build, asked) == unmet(build, read) == {}


def test_an_endpoint_runs_on_it_with_all_that_the_default_lacks(stack: Stack) -> None:
    assert "(Debian" in stack.query("select version()")[0][0]
    for extension in ("pgcrypto", '"uuid-ossp"', "vector", "amcheck"):
        stack.query(f"create extension {extension}")
    stack.query("create collation german (provider = icu, locale = 'de-u-co-phonebk')")
    assert stack.query("select 'Ae' < 'Ä' collate german, encode(digest('x', 'md5'), 'hex')") == [
        (True, "9dd4e461268c8034f5c8564e155c67a6")
    ]
    stack.query("create table t as select i, md5(i::text) as text from generate_series(1, 20000) i")
    stack.query("create index on t (text)")
    stack.query("checkpoint")


def test_pages_come_back_and_programs_run_under_it(stack: Stack) -> None:
    """The preloaded library serves pages, its redo workers replay WAL, and a shell is the machine's."""
    before = stack.query("select count(*), sum(hashtext(t::text)::bigint) from t")
    stack.text("endpoint", "stop", "main", "--destroy")
    stack.text("endpoint", "create", "main", "--branch-name", "main")
    stack.text("endpoint", "start", "main")
    stack.forget("main")
    assert stack.query("select count(*), sum(hashtext(t::text)::bigint) from t") == before
    assert stack.query(
        "select count(bt_index_check(indexrelid, true)) from pg_index where indrelid = 't'::regclass"
    ) == [(1,)]
    with stack.connect() as connection, connection.cursor() as cursor:
        cursor.execute("create temporary table said (line text)")
        cursor.execute("copy said from program 'uname -s; sh -c \"echo $0\"'")
        assert cursor.execute("select line from said").fetchall() == [("Linux",), ("sh",)]


def test_tls_is_spoken_by_it(stack: Stack, tmp_path: Path) -> None:
    from tests.kit.certificates import write_certificate

    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    write_certificate(certificate, key, "first")
    files = ("--tls-cert", str(certificate), "--tls-key", str(key))
    stack.text("branch", "create", "--branch-name", "second")
    stack.text("endpoint", "create", "second", "--branch-name", "second", "--listen", "127.0.0.1", *files)
    url = stack.json("endpoint", "start", "second")["url"]
    with psycopg.connect(url) as connection:
        assert connection.pgconn.ssl_in_use
    done = subprocess.run(
        stack.command("psql", "second", "--", "-Atc", "select 1"), capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"
