"""`excimer role create | password | list | drop`: who may log in, on the endpoint of a branch.

Roles are data of the branch: what is changed here is WAL like any change, branches made later inherit it,
and a restore to an earlier moment takes it back. So a running primary is needed.

A password is generated and shown, unless it comes from standard input or a prompt. It never stands on a
command line, which others could read.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import typer

from excimer.base.errors import ConflictError, NotFoundError, RefusedError
from excimer.cli.commands.psql import running_endpoint
from excimer.cli.completion import complete_endpoint
from excimer.cli.controller_client import ControllerClient
from excimer.cli.credentials import (
    Credentials,
    ReadOnlyEndpointError,
    local_access,
    set_password,
    url_of,
)
from excimer.cli.errors import UsageError
from excimer.cli.installation import Installation, load_installation
from excimer.cli.local_server import LocalServer, connected, quote_name, quote_text
from excimer.cli.session import Session, session_of
from excimer.wire.pg_client import PostgresError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(no_args_is_help=True)

RoleArgument = Annotated[str, typer.Argument(metavar="ROLE", help="Name of the role.")]
EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        "-e",
        metavar="ENDPOINT",
        help="Name of the endpoint; default: the only one.",
        show_default=False,
        autocompletion=complete_endpoint,
    ),
]
PromptOption = Annotated[bool, typer.Option("--prompt", help="Ask for the password instead of making one.")]
StdinOption = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from the first line of standard input.")
]

_ERRORS: Final[dict[str, tuple[type[RefusedError], str]]] = {
    "42710": (ConflictError, "there is already a role {role!r}"),
    "42704": (NotFoundError, "{error}"),
    "2BP01": (
        ConflictError,
        "role {role!r} owns things or has rights: in each database first "
        "REASSIGN OWNED BY … TO … and DROP OWNED BY …",
    ),
    "55006": (ConflictError, "role {role!r} is in use"),
    "25006": (ReadOnlyEndpointError, "the endpoint is read-only"),
}
_ROLES_SQL: Final = """
select rolname, rolcanlogin, rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls,
    case when rolpassword is null then '' when rolpassword like 'SCRAM-SHA-256$%' then 'scram' else 'md5' end,
    array_to_json(array(
        select groups.rolname from pg_auth_members m join pg_roles groups on groups.oid = m.roleid
        where m.member = pg_authid.oid order by 1))
from pg_authid where rolname !~ '^pg_' order by 1
"""
_RIGHTS: Final = ("login", "superuser", "createdb", "createrole", "replication", "bypassrls")


class OpenEndpoint(NamedTuple):
    installation: Installation
    client: ControllerClient
    endpoint: dict[str, Any]
    server: LocalServer


@contextlib.contextmanager
def _opened(session: Session, name: str | None, *, to_write: bool) -> Iterator[OpenEndpoint]:
    installation = load_installation(session.directory)
    endpoint = running_endpoint(session, installation, name)
    if to_write and endpoint["mode"] != "primary":
        raise ReadOnlyEndpointError(
            f"endpoint {endpoint['name']} is read-only: change roles on a primary of branch "
            f"{endpoint['branch']}"
        )
    with connected(local_access(installation, endpoint["name"])) as server:
        yield OpenEndpoint(installation, ControllerClient(installation), endpoint, server)


@contextlib.contextmanager
def _explained(role: str) -> Iterator[None]:
    """PostgreSQL's refusals as sentences."""
    try:
        yield
    except PostgresError as error:
        known = _ERRORS.get(error.sqlstate)
        if known is None:
            raise
        kind, sentence = known
        raise kind(sentence.format(role=role, error=error)) from error


@app.command()
def create(
    context: typer.Context,
    role: RoleArgument,
    endpoint: EndpointOption = None,
    superuser: Annotated[bool, typer.Option("--superuser", help="It may do everything.")] = False,
    createdb: Annotated[bool, typer.Option("--createdb", help="It may make databases.")] = False,
    createrole: Annotated[bool, typer.Option("--createrole", help="It may make roles.")] = False,
    replication: Annotated[
        bool, typer.Option("--replication", help="It may be subscribed with (logical replication).")
    ] = False,
    in_role: Annotated[
        list[str] | None,
        typer.Option(
            "--in-role",
            metavar="ROLE",
            help="Member of this role, as pg_read_all_data; repeatable.",
            show_default=False,
        ),
    ] = None,
    prompt: PromptOption = False,
    password_stdin: StdinOption = False,
) -> None:
    """Make a role that can log in. Without options it has no other right than what is granted to it.

    It can connect to every database, read what PUBLIC may read, and own what you give it: make a database of
    its own with --createdb, or `create database app owner app`.
    """
    session = session_of(context)
    chosen = _chosen_password(role, prompt=prompt, password_stdin=password_stdin)
    wanted = {
        "superuser": superuser,
        "createdb": createdb,
        "createrole": createrole,
        "replication": replication,
    }
    rights = ["login", *[name for name, is_wanted in wanted.items() if is_wanted]]
    groups = f" in role {', '.join(map(quote_name, in_role))}" if in_role else ""
    statement = f"create role {quote_name(role)} with {' '.join(rights)}{groups} password"
    with _opened(session, endpoint, to_write=True) as opened, _explained(role):
        password = set_password(
            opened.server,
            opened.client,
            opened.endpoint,
            role,
            is_bootstrap=False,
            chosen=chosen,
            statement=statement,
        )
    _say(session, f"role {role} made", opened, role, password if chosen is None else None)


@app.command("password")
def change_password(
    context: typer.Context,
    role: RoleArgument,
    endpoint: EndpointOption = None,
    prompt: PromptOption = False,
    password_stdin: StdinOption = False,
) -> None:
    """Give a role another password; the old one is no longer accepted. Sessions that are open go on."""
    session = session_of(context)
    chosen = _chosen_password(role, prompt=prompt, password_stdin=password_stdin)
    with _opened(session, endpoint, to_write=True) as opened, _explained(role):
        rows = opened.server.rows(f"select oid = 10 from pg_roles where rolname = {quote_text(role)}")
        if not rows:
            raise NotFoundError(f"there is no role {role!r}")
        password = set_password(
            opened.server,
            opened.client,
            opened.endpoint,
            role,
            is_bootstrap=rows[0][0] == "t",
            chosen=chosen,
        )
    said = f"role {role} has a new password on branch {opened.endpoint['branch']}"
    _say(session, said, opened, role, password if chosen is None else None)


@app.command()
def drop(context: typer.Context, role: RoleArgument, endpoint: EndpointOption = None) -> None:
    """Drop a role that owns nothing."""
    session = session_of(context)
    with _opened(session, endpoint, to_write=True) as opened, _explained(role):
        opened.server.rows(f"drop role {quote_name(role)}")
    session.say(f"role {role} dropped", {"role": role, "dropped": True})


@app.command("list")
def list_roles(context: typer.Context, endpoint: EndpointOption = None) -> None:
    """List the roles of an endpoint's branch with their rights."""
    session = session_of(context)
    with _opened(session, endpoint, to_write=False) as opened:
        rows = [_role_row(row) for row in opened.server.rows(_ROLES_SQL)]
    value = {"endpoint": opened.endpoint["name"], "branch": opened.endpoint["branch"], "roles": rows}
    session.answer(value, lambda console: _show_roles(console, rows))


def _role_row(row: list[str | None]) -> dict[str, Any]:
    name, *flags, password, groups = row
    rights = [right for right, flag in zip(_RIGHTS, flags, strict=True) if flag == "t"]
    return {
        "role": name,
        "rights": rights,
        "password": password or None,
        "member_of": json.loads(groups or "[]"),
    }


def _show_roles(console: "Console", rows: list[dict[str, Any]]) -> None:
    from rich.text import Text

    from excimer.cli.tables import plain_table, show_table

    table = plain_table("role", "rights", "member of", "password")
    shown = {"scram": "yes", None: "none", "md5": "md5: cannot log in, give it a new one"}
    for row in rows:
        groups = ", ".join(row["member_of"])
        cells = row["role"], ", ".join(row["rights"]), groups, shown[row["password"]]
        table.add_row(*map(Text, cells))
    show_table(console, table)


def _say(session: Session, said: str, opened: OpenEndpoint, role: str, password: str | None) -> None:
    url = url_of(opened.installation, opened.endpoint, Credentials(role, password))
    session.say(f"{said}\n{url}", {"role": role, "password": password, "url": url})


def _chosen_password(role: str, *, prompt: bool, password_stdin: bool) -> str | None:
    """None: one is to be generated. Raises `UsageError`."""
    if prompt and password_stdin:
        raise UsageError("--prompt and --password-stdin exclude each other")
    if prompt:
        chosen = typer.prompt(f"Password of {role}", hide_input=True, confirmation_prompt=True, err=True)
    elif password_stdin:
        chosen = sys.stdin.readline().removesuffix("\n").removesuffix("\r")
    else:
        return None
    if not chosen or "\0" in chosen:
        raise UsageError("a password has at least one character, and none of them is NUL")
    return str(chosen)
