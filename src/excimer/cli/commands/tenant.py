"""`excimer tenant create | list | size | delete | set-default | config`."""

import math
import secrets
from typing import TYPE_CHECKING, Annotated, Any

import typer

from excimer.cli.branch_options import OptionalTenantArgument, TenantArgument, VersionOption
from excimer.cli.controller_client import ControllerClient
from excimer.cli.errors import UsageError
from excimer.cli.installation import load_installation
from excimer.cli.session import Session, session_of

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(no_args_is_help=True)


@app.command()
def create(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="TENANT", help="A name; none: the id.", show_default=False)
    ] = "",
    set_default: Annotated[
        bool, typer.Option("--set-default", help="Make it the tenant that commands mean.")
    ] = False,
    pg_version: VersionOption = None,
) -> None:
    """Make a tenant with a first branch `main`. The first tenant becomes the default one."""
    session = session_of(context)
    tenant = create_tenant(session, name, pg_version=pg_version, set_default=set_default)
    default = ", now the default" if tenant["is_default"] else ""
    said = f"tenant {tenant['name']} made with branch main{default}"
    client = ControllerClient(load_installation(session.directory))
    role = client.get("tenants", tenant["tenant_id"], "role_passwords")
    if role["password"] is not None:
        said += f"\nthe password of its role {role['role']} is {role['password']}"
    session.say(said, tenant | {"role": role["role"], "password": role["password"]})


def create_tenant(
    session: Session, name: str, *, pg_version: int | None, set_default: bool
) -> dict[str, Any]:
    installation = load_installation(session.directory)
    body = {
        "tenant_id": secrets.token_hex(16),
        "timeline_id": secrets.token_hex(16),
        "name": name,
        "pg_version": pg_version or installation.config.pg_version,
        "set_default": set_default,
    }
    with session.step(f"tenant {name or body['tenant_id']}"):
        tenant: dict[str, Any] = ControllerClient(installation).post("tenants", body=body)
    return tenant


@app.command("list")
def list_tenants(context: typer.Context) -> None:
    """List tenants; * marks the default one."""
    session = session_of(context)
    answer = ControllerClient(load_installation(session.directory)).get("tenants")
    session.answer(answer, lambda console: _show_tenants(console, answer["tenants"]))


def _show_tenants(console: "Console", tenants: list[dict[str, Any]]) -> None:
    from excimer.cli.tables import plain_table, show_table

    if not tenants:
        console.print("no tenants yet: excimer tenant create")
        return
    table = plain_table("", "tenant", "id", "state", "made")
    for tenant in tenants:
        table.add_row(
            "*" if tenant["is_default"] else "",
            tenant["name"],
            tenant["tenant_id"],
            tenant["state"],
            tenant["created_at"][:19].replace("T", " "),
        )
    show_table(console, table)


@app.command()
def size(
    context: typer.Context,
    tenant: OptionalTenantArgument = None,
) -> None:
    """Show a tenant's synthetic size, and the sizes of its branches."""
    session = session_of(context)
    client = ControllerClient(load_installation(session.directory))
    answer = client.get("tenants", tenant_name(client, tenant), "sizes")
    session.answer(answer, lambda console: _show_sizes(console, answer))


def _show_sizes(console: "Console", answer: dict[str, Any]) -> None:
    from excimer.cli.tables import plain_table, show_table

    console.print(f"synthetic size {size_text(answer['synthetic_size_bytes'])}", highlight=False)
    if answer["archived_size_bytes"]:
        console.print(f"archived {size_text(answer['archived_size_bytes'])}", highlight=False)
    sizes = ("logical", "on disk", "in object storage")
    table = plain_table("branch", *sizes, right=sizes)
    for row in answer["branches"]:
        kinds = (row[f"{kind}_size_bytes"] for kind in ("logical", "resident", "remote"))
        table.add_row(row["name"], *("archived" if size is None else size_text(size) for size in kinds))
    show_table(console, table)


def size_text(size_bytes: int) -> str:
    """``7.4 MB``: as PostgreSQL counts, 1 kB = 1024 bytes."""
    size, unit = float(size_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"


@app.command()
def delete(
    context: typer.Context,
    tenant: TenantArgument,
) -> None:
    """Delete a tenant without endpoints, with all its branches."""
    session = session_of(context)
    client = ControllerClient(load_installation(session.directory))
    with session.step(f"deleting tenant {tenant}"):
        answer = client.delete("tenants", tenant)
    session.say(f"tenant {tenant}: {answer['state']}", answer)


@app.command("set-default")
def set_default_tenant(
    context: typer.Context,
    tenant: TenantArgument,
) -> None:
    """Make a tenant the one that commands mean."""
    session = session_of(context)
    client = ControllerClient(load_installation(session.directory))
    answer = client.put("default_tenant", body={"tenant": tenant})
    session.say(f"tenant {answer['name']} is the default now", answer)


@app.command()
def config(
    context: typer.Context,
    tenant: OptionalTenantArgument = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Change a setting; NAME= gives it back to its default."
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Give all that is not --set back to its default.")
    ] = False,
) -> None:
    """Show a tenant's settings, or change some: in force at once."""
    session = session_of(context)
    wanted = parse_settings(changes or [])
    client = ControllerClient(load_installation(session.directory))
    place = ("tenants", tenant_name(client, tenant), "config")
    if replace:
        chosen = {name: value for name, value in wanted.items() if value is not None}
        answer = client.put(*place, body=chosen)
    else:
        answer = client.patch(*place, body=wanted) if wanted else client.get(*place)
    session.answer(answer, lambda console: _show_config(console, answer))


def parse_settings(changes: list[str]) -> dict[str, int | float | None]:
    """``NAME=VALUE`` each. Raises `UsageError`; `TenantSettingsError` for what is no setting or no number."""
    from excimer.storage.format.tenant_settings import TenantSettings, TenantSettingsError, check_overrides

    wanted: dict[str, int | float | None] = {}
    for text in changes:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise UsageError(f"--set {text!r}: write NAME=VALUE, like pitr_interval_s=86400")
        check_overrides({name: getattr(TenantSettings(), name, None)})
        try:
            wanted[name] = None if not value else _number(value)
        except ValueError as error:
            raise TenantSettingsError(f"{name} is a number, not {value!r}") from error
    return wanted


def _number(text: str) -> int | float:
    """Raises ValueError, also for what is not finite."""
    number = int(text) if text.lstrip("-").isdigit() else float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _show_config(console: "Console", answer: dict[str, Any]) -> None:
    from excimer.cli.tables import plain_table, show_table

    table = plain_table("setting", "value", "")
    for name, value in answer["effective"].items():
        table.add_row(
            name,
            f"{value:g}" if isinstance(value, float) else str(value),
            "set for this tenant" if name in answer["overrides"] else "",
        )
    show_table(console, table)
    if answer["problem"]:
        console.print(
            f"{answer['problem']}: set them anew with --replace; until then the defaults are in force and no "
            "history is removed",
            style="red",
            highlight=False,
            soft_wrap=True,
        )


def tenant_name(client: ControllerClient, option: str | None) -> str:
    """The tenant that a command means: the option, or the default one."""
    if option:
        return option
    name: str = client.get("default_tenant")["name"]
    return name
