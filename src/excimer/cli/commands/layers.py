"""`excimer layers BRANCH`: the layer map of a branch as a picture."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from excimer.base.errors import RefusedError
from excimer.cli.branch_options import BranchArgument, TenantOption
from excimer.cli.commands.tenant import tenant_name
from excimer.cli.controller_client import ControllerClient
from excimer.cli.installation import load_installation
from excimer.cli.session import session_of

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer()


class PictureNotWrittenError(RefusedError):
    """The file cannot be written."""


@app.command()
def layers(
    context: typer.Context,
    branch: BranchArgument = "main",
    svg: Annotated[
        Path | None,
        typer.Option(
            "--svg", metavar="FILE", help="Write the picture to this file as SVG.", show_default=False
        ),
    ] = None,
    tenant: TenantOption = None,
) -> None:
    """Draw the layers of a branch: LSNs up, keys across; with --json as data."""
    from excimer.cli.layer_chart import build_chart

    session = session_of(context)
    client = ControllerClient(load_installation(session.directory))
    answer = client.get("tenants", tenant_name(client, tenant), "layer_map", query={"branch": branch})
    chart = build_chart(answer)
    if svg is None:
        session.answer(answer, lambda console: _show(console, answer, chart))
        return
    from excimer.cli.layer_svg import draw_svg

    try:
        svg.write_text(draw_svg(chart, f"branch {answer['branch']}: layers at {answer['last_record_lsn']}"))
    except OSError as error:
        raise PictureNotWrittenError(f"{svg} cannot be written: {error.strerror}") from error
    session.say(f"{svg} shows {len(answer['layers'])} layers of branch {answer['branch']}", answer)


def _show(console: "Console", answer: dict[str, Any], chart: Any) -> None:
    from excimer.cli.layer_text import draw_text

    width = shutil.get_terminal_size((120, 24)).columns
    print(f"branch {answer['branch']}, at {answer['last_record_lsn']}")
    for line in draw_text(chart, width):
        print(line)
