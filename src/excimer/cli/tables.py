"""Tables for people: no lines, and nothing cut off; what does not fit goes on in the next line."""

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def plain_table(*headings: str, right: Collection[str] = ()) -> "Table":
    """A table with these columns; those in `right` have their values at the right, as numbers do."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="right" if heading in right else "left")
    return table
