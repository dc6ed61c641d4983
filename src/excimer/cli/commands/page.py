"""`excimer page RELATION [FORK] BLOCK`: how a page comes about, layer by layer."""

import re
from typing import Annotated, Any, Final

import typer

from excimer.base.errors import NotFoundError
from excimer.base.keys import DEFAULT_TABLESPACE, GLOBAL_TABLESPACE, SLRU_DIRECTORIES
from excimer.cli.branch_options import POINT, POINT_HELP, BranchOption, TenantOption, branch_point
from excimer.cli.commands.endpoint import is_running
from excimer.cli.commands.tenant import tenant_name
from excimer.cli.controller_client import ControllerClient
from excimer.cli.errors import NotRunningError, UsageError
from excimer.cli.installation import Installation, load_installation
from excimer.cli.session import session_of

app = typer.Typer()

MAIN_FORK: Final = "main"
_PLACE: Final = re.compile(r"(?:(global)|base/(\d+))/(\d+)\Z")


@app.command()
def page(
    context: typer.Context,
    relation: Annotated[
        str,
        typer.Argument(
            metavar="RELATION",
            help="SPC/DB/REL; an SLRU's DIRECTORY/SEGMENT; or a table's or index's name, "
            "which an endpoint that runs on the branch looks up.",
            show_default=False,
        ),
    ],
    where: Annotated[
        list[str],
        typer.Argument(
            metavar="[FORK] BLOCK", help="Fork: main (default), fsm, vm or init.", show_default=False
        ),
    ],
    branch: BranchOption = "main",
    at: Annotated[
        str | None,
        typer.Option("--at", metavar=POINT, help=POINT_HELP + "; default: now.", show_default=False),
    ] = None,
    database: Annotated[
        str, typer.Option("--database", "-d", metavar="DATABASE", help="Where a name is looked up.")
    ] = "postgres",
    tenant: TenantOption = None,
) -> None:
    """Explain how a page is made: every layer a read visits, every value found there, and the outcome."""
    session = session_of(context)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    place = ("tenants", tenant_name(client, tenant))
    if "/" not in relation:
        timeline_id = client.get(*place, "branches", branch)["timeline_id"]
        relation = look_up(installation, client, timeline_id, relation, database)
    query = {"branch": branch, "page": f"{relation} {_fork_and_block(relation, where)}"} | branch_point(at)
    answer = client.get(*place, "explain_page", query=query)
    from excimer.cli.page_text import draw_explanation

    if session.as_json:
        session.answer(answer, lambda _: None)
        return
    for line in draw_explanation(answer):
        print(line)


def _fork_and_block(relation: str, where: list[str]) -> str:
    """Raises `UsageError`. Only relations have forks."""
    if len(where) > 2 or not where[-1].isdecimal():
        raise UsageError("write the fork, if it is not main, and then the number of the block: vm 0")
    if relation.rpartition("/")[0] in SLRU_DIRECTORIES:
        if len(where) == 2:
            raise UsageError("an SLRU has no forks: write only the number of the block")
        return where[0]
    return " ".join(where if len(where) == 2 else (MAIN_FORK, *where))


def look_up(
    installation: Installation, client: ControllerClient, timeline_id: str, name: str, database: str
) -> str:
    """SPC/DB/REL of a relation's name, as an endpoint on the branch has it now. Raises `NotRunningError`,
    `NotFoundError`, `SqlFailedError`.
    """
    from excimer.cli.credentials import local_access
    from excimer.cli.psql_runner import PsqlRunner, psql_environment
    from excimer.postgres import find_build

    endpoints: list[dict[str, Any]] = client.get("endpoints")["endpoints"]
    running = [
        row
        for row in endpoints
        if row["timeline_id"] == timeline_id and is_running(installation, row["name"])
    ]
    if not running:
        raise NotRunningError(
            f"no endpoint on the branch runs to look {name!r} up: start one, or write SPC/DB/REL"
        )
    build = find_build(running[0]["pg_version"])
    access = local_access(installation, running[0]["name"])
    environment = psql_environment(access, build.environment(), database)
    runner = PsqlRunner(build.program("psql"), environment)
    quoted = name.replace("'", "''")
    ((path,),) = runner.rows(f"select pg_relation_filepath('{quoted}'::regclass)")
    found = _PLACE.match(path)
    if found is None:
        raise NotFoundError(f"{name!r} has no storage of its own: name an index or a partition of it")
    if found[1]:
        return f"{GLOBAL_TABLESPACE}/0/{found[3]}"
    return f"{DEFAULT_TABLESPACE}/{found[2]}/{found[3]}"
