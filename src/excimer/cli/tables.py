"""Tables for people: no lines, nothing cut off, and words stay whole, so that they can be copied.

What is wider than the terminal goes on in its next line: the terminal wraps it.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH_MAX: Final = 10_000


def plain_table(*headings: str, right: Collection[str] = ()) -> "Table":
    """A table with these columns; those in `right` have their values at the right, as numbers do."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="right" if heading in right else "left")
    return table


def show_table(console: "Console", table: "Table") -> None:
    """In columns as wide as their contents, whatever the terminal's width is."""
    console.width = WIDTH_MAX
    with console.capture() as captured:
        console.print(table)
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
