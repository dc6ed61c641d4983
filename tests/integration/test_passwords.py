"""Who gets into an endpoint and who does not: passwords, roles, socket, branches, imports, certificates.

On the newest version; on others by EXCIMER_PASSWORD_VERSIONS (like 14,15,16,17,18) in a sweep.
"""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from excimer.io.processes import give_to_user, make_owned_dir, program_environment, run, unprivileged_user
from excimer.postgres import run_initdb
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.certificates import write_certificate
from tests.kit.scram_login import failed_login
from tests.kit.stack import CommandFailedError, Stack, error_lines, running_stack

STRANGE_ROLE = 'a "strange" rôle/%40'
STRANGE_PASSWORD = "p@ss:/?#[]%41 'w\"ö\\rd"
TLS_VERSION = 14
"""A version whose usual build has TLS."""

VERSIONS = [int(text) for text in os.environ.get("EXCIMER_PASSWORD_VERSIONS", str(NEWEST_VERSION)).split(",")]


@pytest.fixture(scope="module", params=VERSIONS)
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with running_stack(request.param, safekeepers=1) as made:
        made.create_main()
        made.query("alter system set log_statement = 'all'")
        made.query("select pg_reload_conf()")
        yield made


def psql(url: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    build = build_of(NEWEST_VERSION)
    return subprocess.run(
        [str(build.program("psql")), "-X", "-w", "-A", "-t", *arguments, url],
        env=program_environment(build.environment() | environment),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refusal(stack: Stack, *arguments: str, stdin: str | None = None) -> tuple[int, str]:
    """Exit code and the one line of an error."""
    done = subprocess.run(
        stack.command(*arguments), input=stdin, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0, done.stdout
    assert len(error_lines(done.stderr)) == 1, done.stderr
    return done.returncode, done.stderr


def said_by_psql(stack: Stack, *arguments: str, **environment: str) -> str:
    """What `excimer psql` writes."""
    done = subprocess.run(
        stack.command("psql", *arguments),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def who(url: str) -> tuple[Any, ...]:
    with psycopg.connect(url) as connection:
        row = connection.execute("select current_user, current_database()").fetchone()
        assert row is not None
        return row


def test_the_printed_url_gets_in_and_nothing_else_does(stack: Stack) -> None:
    endpoint = stack.endpoint("main")
    url = stack.text("endpoint", "url", "main").strip()
    assert url == stack.json("endpoint", "start", "main")["url"] == stack.json("up")["url"]
    assert who(url) == ("postgres", "postgres")
    assert psql(url, "-c", "select 1").stdout == "1\n"
    password = endpoint["password"]
    wrong = psql(url.replace(password, "x" + password[1:]), "-c", "select 1")
    assert 'password authentication failed for user "postgres"' in wrong.stderr
    without = psql(stack.text("endpoint", "url", "main", "--no-password").strip(), "-c", "select 1")
    assert "no password supplied" in without.stderr
    fields = failed_login(endpoint["host"], endpoint["port"], "postgres")
    assert (fields["C"], fields["S"]) == ("28P01", "FATAL")
    for role in ("nobody-of-this-name", "pg_monitor"):
        assert failed_login(endpoint["host"], endpoint["port"], role)["C"] == "28P01", role
    listed = stack.json("endpoint", "list")["endpoints"]
    assert password not in str(listed)
    assert [row["url"] for row in listed] == [
        f"postgresql://postgres@127.0.0.1:{endpoint['port']}/postgres?sslmode=disable"
    ]


def test_physical_replication_needs_the_right_and_the_password(stack: Stack) -> None:
    stack.query("create role plain login password 'of plain'")
    with psycopg.connect(stack.url() + "&replication=true", autocommit=True) as connection:
        assert connection.info.user == "postgres"
    endpoint = stack.endpoint("main")
    place = f"host={endpoint['host']} port={endpoint['port']} dbname=postgres replication=true"
    with pytest.raises(psycopg.OperationalError, match=r"to start WAL sender|replication role"):
        psycopg.connect(f"{place} user=plain password='of plain'")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(f"{place} user=postgres password=wrong")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_socket_is_for_the_installations_user(stack: Stack) -> None:
    assert stack.query("select 1") == [(1,)]
    socket_dir = stack.query("show unix_socket_directories")[0][0]
    url = f"host={socket_dir} port={stack.endpoint('main')['port']} user=postgres dbname=postgres"
    assert psql(url, "-c", "select current_user").stdout == "postgres\n", "we are the installation's user"
    server_user = unprivileged_user()
    assert server_user is not None
    for name, said in ((server_user.name, "Peer authentication failed"), ("nobody", "Permission denied")):
        user = pwd.getpwnam(name)
        if name == "nobody" and user.pw_uid == server_user.uid:
            continue
        build = build_of(stack.pg_version)
        done = subprocess.run(
            [str(build.program("psql")), "-X", "-w", "-c", "select 1", url],
            env=program_environment(build.environment()),
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode != 0
        assert said in done.stderr


def test_psql_connects_as_any_role_to_this_server_always(stack: Stack) -> None:
    stack.text("role", "create", "app", "--createdb")
    password = stack.json("role", "password", "app")["password"]
    stack.query("create database db owner app")
    ask = ("-X", "-A", "-t", "-w", "-c", "select current_user, current_database()")
    misleading = {"PGHOSTADDR": "192.0.2.1", "PGSERVICE": "other", "PGSSLMODE": "verify-full"}
    assert said_by_psql(stack, "main", "--", *ask, **misleading) == "postgres|postgres"
    for arguments in (("-U", "app", "-d", "db"), ("-d", "dbname=db user=app"), ("db", "app")):
        said = said_by_psql(stack, "main", "--", *ask, *arguments, PGPASSWORD=password)
        assert said == "app|db", arguments
    assert said_by_psql(stack, "--", *ask, "-d", "db") == "postgres|db"
    code, said = refusal(stack, "psql", "main", "--", *ask, "-U", "app", "-d", "db")
    assert (code, "no password supplied" in said) == (2, True), "the superuser's password is not for others"


def test_roles_are_made_listed_changed_and_dropped(stack: Stack) -> None:
    made = stack.json("role", "create", "reader", "--in-role", "pg_read_all_data")
    assert who(made["url"]) == ("reader", "postgres")
    with psycopg.connect(made["url"]) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("create role worse superuser")
    listed = {row["role"]: row for row in stack.json("role", "list")["roles"]}
    assert listed["reader"] == {
        "role": "reader",
        "rights": ["login"],
        "password": "scram",
        "member_of": ["pg_read_all_data"],
    }
    assert "superuser" in listed["postgres"]["rights"]
    changed = stack.json("role", "password", "reader")
    assert changed["password"] != made["password"]
    assert who(changed["url"]) == ("reader", "postgres")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(made["url"])
    assert stack.json("endpoint", "url", "main", "--role", "reader")["url"] == changed["url"]
    stack.query("create table owned(a int)")
    stack.query("alter table owned owner to reader")
    assert "owns things or has rights" in refusal(stack, "role", "drop", "reader")[1]
    stack.query("drop table owned")
    stack.text("role", "drop", "reader")
    for arguments, code, said in (
        (("create", "postgres"), 1, "there is already a role 'postgres'"),
        (("create", "pg_mine"), 1, "reserved"),
        (("create", "x", "--in-role", "gone"), 3, '"gone" does not exist'),
        (("password", "gone"), 3, "there is no role 'gone'"),
        (("drop", "gone"), 3, '"gone" does not exist'),
        (("create", "x", "--prompt", "--password-stdin"), 2, "exclude each other"),
        (("list", "--endpoint", "mainx"), 3, "did you mean 'main'?"),
    ):
        assert (found := refusal(stack, "role", *arguments))[0] == code, found
        assert said in found[1]
    assert refusal(stack, "endpoint", "url", "main", "-U", "gone")[0] == 3


def test_strange_names_and_passwords_work_in_urls(stack: Stack) -> None:
    command = stack.command("--json", "role", "create", STRANGE_ROLE, "--password-stdin")
    text = f"{STRANGE_PASSWORD}\n"
    subprocess.run(command, input=text, text=True, check=True, capture_output=True, timeout=120)
    found = stack.json("endpoint", "url", "main", "-U", STRANGE_ROLE, "-d", "postgres")
    assert found["password"] is None, "a password that somebody chose is not kept"
    assert "was chosen by its owner" in found["problem"]
    from excimer.cli.credentials import Credentials, url_of
    from excimer.cli.installation import load_installation

    installation = load_installation(stack.directory)
    url = url_of(installation, stack.endpoint("main"), Credentials(STRANGE_ROLE, STRANGE_PASSWORD))
    assert who(url) == (STRANGE_ROLE, "postgres")
    assert psql(url, "-c", "select current_user").stdout.strip() == STRANGE_ROLE
    assert refusal(stack, "role", "create", "empty", "--password-stdin", stdin="\n")[0] == 2


def test_a_branch_has_the_passwords_of_its_moment(stack: Stack) -> None:
    first = stack.endpoint("main")["password"]
    past_lsn = stack.query("select pg_current_wal_flush_lsn()::text")[0][0]
    second = stack.json("role", "password", "postgres")["password"]
    assert second != first
    assert stack.json("endpoint", "url", "main")["password"] == second
    stack.forget("main")
    stack.branch("dev")
    assert stack.endpoint("dev")["password"] == second
    changed = stack.json("role", "password", "postgres", "--endpoint", "dev")["password"]
    stack.forget("dev")
    assert stack.json("endpoint", "url", "main")["password"] == second, "a branch is another database"
    made = stack.json("endpoint", "create", "past", "--lsn", past_lsn)
    assert f":{first}@" in made["url"], "known before it runs"
    assert stack.json("endpoint", "start", "past")["url"] == made["url"]
    assert who(made["url"]) == ("postgres", "postgres")
    assert "read-only" in refusal(stack, "role", "create", "x", "--endpoint", "past")[1]
    assert said_by_psql(stack, "past", "--", "-Atc", "select pg_is_in_recovery()") == "t"
    stack.text("endpoint", "stop", "past", "--destroy")
    _restore_and_reset(stack, first, second, changed)


def _restore_and_reset(stack: Stack, first: str, second: str, changed: str) -> None:
    """Of the branch dev, whose password is `changed` at first."""
    before = stack.query("select pg_current_wal_flush_lsn()::text", "dev")[0][0]
    last = stack.json("role", "password", "postgres", "--endpoint", "dev")["password"]
    stack.text("timeline", "restore", "dev", "--to", before, "--stop-endpoints")
    assert stack.json("endpoint", "url", "dev")["password"] == changed, "known before it runs"
    assert f":{changed}@" in stack.json("endpoint", "start", "dev")["url"]
    stack.forget("dev")
    assert stack.query("select 1", "dev") == [(1,)]
    stack.text("timeline", "detach-ancestor", "dev")
    stack.text("endpoint", "stop", "dev", "--destroy")
    assert f":{changed}@" in stack.json("endpoint", "create", "dev", "--branch-name", "dev")["url"]
    stack.branch("dev2")
    stack.json("role", "password", "postgres", "--endpoint", "dev2")
    stack.text("timeline", "reset", "dev2", "--stop-endpoints")
    assert f":{second}@" in stack.json("endpoint", "start", "dev2")["url"]
    assert len({first, second, changed, last}) == 4
    for name in ("dev", "dev2"):
        stack.text("endpoint", "stop", name, "--destroy", "--immediate")


def test_the_superuser_cannot_lock_the_manager_out(stack: Stack) -> None:
    stack.query("alter role postgres nologin connection limit 0")
    stack.text("endpoint", "restart", "main")
    with pytest.raises(psycopg.OperationalError, match="not permitted to log in"):
        stack.query("select 1")
    assert (
        "login" not in {row["role"]: row for row in stack.json("role", "list")["roles"]}["postgres"]["rights"]
    )
    taken = "update pg_authid set rolsuper = false, rolreplication = false where oid = 10"
    said_by_psql(stack, "main", "--", "-c", taken)
    stack.text("endpoint", "restart", "main")
    said_by_psql(stack, "main", "--", "-c", "create table written_after_the_lockout(a int)")
    given = "alter role postgres superuser login replication connection limit -1"
    said_by_psql(stack, "main", "--", "-c", given)
    assert stack.query("select rolsuper and rolcanlogin from pg_roles where oid = 10") == [(True,)]


def test_an_imported_cluster_keeps_its_roles_whatever_they_are_called(stack: Stack) -> None:
    build = build_of(stack.pg_version)
    root = make_owned_dir(Path(tempfile.mkdtemp(prefix="excimer-import-")))
    try:
        password_file = root / "password"
        password_file.write_text("chosen long ago")
        give_to_user(password_file)
        run_initdb(build, root / "without", superuser="alice smith")
        run_initdb(build, root / "with", superuser="bob", options=[f"--pwfile={password_file}"])
        run(
            [build.postgres, "--single", "-D", root / "with", "postgres"],
            environment=build.whole_environment(),
            stdin=b"alter role bob nologin\n",
        )
        for name in ("without", "with"):
            stack.text("import", str(root / name), "--branch-name", name)
            stack.text("endpoint", "create", name, "--branch-name", name)
    finally:
        shutil.rmtree(root)
    url = stack.json("endpoint", "start", "without")["url"]
    assert url.startswith("postgresql://alice%20smith:")
    assert who(url) == ("alice smith", "postgres")
    stack.forget("without")
    stack.query("create table written(a int)", "without")
    assert said_by_psql(stack, "without", "--", "-Atc", "select current_user") == "alice smith"
    started = stack.run("endpoint", "start", "with")
    url = started.stdout.splitlines()[-1]
    assert url.startswith("postgresql://bob@127.0.0.1:")
    assert "the password of role bob was chosen by its owner" in started.stderr
    with pytest.raises(psycopg.OperationalError, match="not permitted to log in"):
        who(url.replace("bob@", "bob:chosen%20long%20ago@"))
    said_by_psql(stack, "with", "--", "-c", "alter role bob login")
    assert who(url.replace("bob@", "bob:chosen%20long%20ago@"))[0] == "bob"
    assert said_by_psql(stack, "with", "--", "-Atc", "select current_user") == "bob"
    stack.text("endpoint", "stop", "with")
    assert stack.json("endpoint", "url", "with")["role"] == "bob", "its name is remembered"
    stack.text("endpoint", "stop", "without", "--destroy")


def data_of(path: Path) -> Iterator[bytes]:
    """What is in a file, without its holes: workers have files of gigabytes in which nothing is."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        end = 0
        while True:
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)  # fails behind the last byte
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield os.pread(file.fileno(), end - start, start)


def test_passwords_are_nowhere_but_in_the_controllers_database(stack: Stack) -> None:
    stack.text("role", "create", "seen", "--endpoint", "main")
    stack.query("create table seen_by_the_log(a int)")
    passwords = {
        stack.json("endpoint", "url", "main", "-U", role)["password"] for role in ("postgres", "seen")
    }
    assert None not in passwords
    stack.text("endpoint", "stop", "main")
    stack.text("endpoint", "start", "main")
    needles = [word.encode() for word in [*passwords, STRANGE_PASSWORD]]
    holders = [
        path
        for path in stack.directory.rglob("*")
        if path.is_file() and any(needle in data for data in data_of(path) for needle in needles)
    ]
    assert {path.name.partition("-")[0] for path in holders} == {"metadata.sqlite"}, holders
    assert {path.stat().st_mode & 0o077 for path in holders} == {0}
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                held = (process / name).read_bytes()
            except OSError:
                continue
            assert not any(needle in held for needle in needles), (process / "cmdline").read_bytes()
    log = next(stack.directory.glob("endpoints/main/postgres.log")).read_text()
    assert "create table seen_by_the_log" in log, "statements are logged"
    assert "SCRAM-SHA-256" not in log, "not even verifiers are"


def test_without_tls_an_endpoint_stays_on_loopback(stack: Stack) -> None:
    if build_of(stack.pg_version).features.tls:
        pytest.skip("this build has TLS")
    for arguments in (
        ("endpoint", "create", "wide", "--listen", "0.0.0.0"),
        ("endpoint", "listen", "main", "0.0.0.0:5432"),
    ):
        code, said = refusal(stack, *arguments)
        assert code == 1
        assert "was built without TLS" in said
        assert "proxy" in said
    assert "endpoints listen on loopback only" in stack.text("pg", "list")
    assert "without TLS: endpoints listen on loopback only" in stack.run("doctor").stdout
    moved = stack.json("endpoint", "listen", "main", f"127.0.0.1:{stack.endpoint('main')['port']}")
    assert moved["listen_host"] == "127.0.0.1"


def test_an_endpoint_with_a_certificate_speaks_tls_and_takes_up_a_new_one(
    stack: Stack, tmp_path: Path
) -> None:
    build_of(TLS_VERSION)
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    write_certificate(certificate, key, "first")
    stack.text("tenant", "create", "old", "--pg-version", str(TLS_VERSION))
    files = ("--tls-cert", str(certificate), "--tls-key", str(key))
    assert (
        "without TLS"
        in refusal(stack, "endpoint", "create", "tls", "--tenant", "old", "--listen", "0.0.0.0")[1]
    )
    stack.text("endpoint", "create", "tls", "--tenant", "old", "--listen", "127.0.0.1", *files)
    url = stack.json("endpoint", "start", "tls")["url"]
    assert url.endswith("?sslmode=require")
    trusted = tmp_path / "trusted.crt"
    verified = url.replace("sslmode=require", f"sslmode=verify-full&sslrootcert={trusted}")

    def is_trusted() -> bool:
        """Whether the endpoint shows the certificate that is in the file now."""
        trusted.write_bytes(certificate.read_bytes())
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(verified) as connection:
            return bool(connection.pgconn.ssl_in_use)
        return False

    assert is_trusted()
    write_certificate(certificate, key, "second")
    stack.wait_until(is_trusted, "the new certificate is in use")
    installed_key = (stack.data_dir("tls").parent / "server.key").stat()
    assert installed_key.st_mode & 0o777 == 0o600
    stack.text("endpoint", "stop", "tls", "--destroy")


def test_trust_local_is_a_choice_that_status_names(stack: Stack) -> None:
    assert stack.json("status")["trust_local"] is False
    stack.text("stop", "--immediate")
    config = stack.directory / "config.toml"
    config.write_text(config.read_text().replace("trust_local = false", "trust_local = true"))
    stack.text("start")
    started = stack.json("endpoint", "start", "main")
    assert (
        started["url"]
        == f"postgresql://postgres@127.0.0.1:{started['postgres_port']}/postgres?sslmode=disable"
    )
    assert who(started["url"]) == ("postgres", "postgres")
    assert said_by_psql(stack, "main", "--", "-Atc", "select current_user") == "postgres"
    assert "every user of this machine can connect as any role" in stack.text("status")
    assert stack.json("status")["trust_local"] is True
    with pytest.raises(CommandFailedError):
        stack.json("endpoint", "url", "gone")
