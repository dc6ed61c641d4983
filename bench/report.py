"""The table a person reads and the file a program reads."""

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from bench.model import GOALS, Result


def print_table(console: Console, results: Sequence[Result]) -> None:
    table = Table(title="Excimer, medians", title_justify="left")
    table.add_column("figure")
    for column in ("value", "goal", "spread"):
        table.add_column(column, justify="right")
    table.add_column("")
    for column in ("met", "what"):
        table.add_column(column)
    for result in results:
        goal = GOALS[result.id]
        sign = "≥" if result.higher_is_better else "≤"
        met = "[green]yes[/]" if goal.is_met_by(result.value) else "[red]no[/]"
        numbers = f"{result.value:g}", f"{sign} {result.goal:g}", f"{result.spread:g}"
        table.add_row(result.id, *numbers, result.unit, met, goal.what)
    console.print(table)


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Replaces the figures that were measured; others stay as they were."""
    known: dict[str, Result] = {}
    if path.exists():
        known = {result.id: result for result in msgspec.json.decode(path.read_bytes(), type=list[Result])}
    known |= {result.id: result for result in results}
    rows = [msgspec.to_builtins(known[figure]) for figure in GOALS if figure in known]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n")
