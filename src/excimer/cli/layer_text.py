"""A layer chart in characters, newest LSN at the top.

::

          0/5A3F000 │····················│ memory: 1 layer, 0.4 MiB  ◄ head
          0/5A00000 │░░░░░░░░░░░░░░░░░░░░│ L0: 1 layer, 3.1 MiB
          0/5000000 │━━━━━━━━━┳━━━━━━━━━━│ images: 2 layers, 8.0 MiB, of every key
                    │▓▓▓▓▓▓▓▓▓╎▓▓▓▓▓▓▓▓▓▓│ L1: 2 layers, 5.7 MiB
          0/1000000 │                    │ ◄ oldest
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from excimer.base.lsn import format_lsn
from excimer.cli.layer_chart import Box, BoxKind, Chart, Mark, describe_boxes, describe_cover, summarise

LSN_WIDTH: Final = 18
WIDTH_MIN: Final = 20
ROWS_MAX: Final = 120
"""More steps of LSN than that are drawn several to a row."""

_FILLS: Final = {BoxKind.MEMORY: "·", BoxKind.L0: "░", BoxKind.L1: "▓"}
_CUT: Final = "╎"
_LEGEND: Final = "· memory   ░ L0   ▓ L1   ━ images that cover all   ╌ images of some keys   ╎ ┳ next file"


def draw_text(chart: Chart, width: int) -> list[str]:
    """Lines of about `width` characters; descriptions at their ends may make them longer."""
    columns = max(WIDTH_MIN, width - LSN_WIDTH - 45)
    lsns = _thinned(chart.lsns)
    lines: list[str] = []
    for upper, lower in pairwise([*reversed(lsns), -1]):
        images = [box for box in chart.boxes if box.kind is BoxKind.IMAGE and lower < box.high_lsn <= upper]
        marks = [mark for mark in chart.marks if lower < mark.lsn <= upper]
        bands = [box for box in chart.boxes if box.low_lsn < upper and box.high_lsn > lower >= 0]
        bands = [box for box in bands if box.kind is not BoxKind.IMAGE]
        label = format_lsn(upper)
        if images:
            lines.append(_line(label, _image_row(chart, images, columns), _image_text(images), marks))
            label, marks = "", []
        if bands:
            begun = [box for box in bands if lower < box.high_lsn <= upper]
            lines.append(_line(label, _band_row(chart, bands, columns), _band_text(begun), marks))
        elif marks:
            lines.append(_line(label, " " * columns, "", marks))
    return [*lines, *_footer(chart, columns)]


def _thinned(lsns: Sequence[int]) -> list[int]:
    """At most ROWS_MAX of them, the first and the last included."""
    if len(lsns) <= ROWS_MAX:
        return list(lsns)
    step = (len(lsns) - 1) / (ROWS_MAX - 1)
    return [lsns[round(index * step)] for index in range(ROWS_MAX)]


def _span(chart: Chart, box: Box, columns: int) -> tuple[int, int]:
    """The columns of a box, at least one."""
    steps = max(len(chart.keys) - 1, 1)
    start = min(chart.column(box.first_key) * columns // steps, columns - 1)
    end = max(chart.column(box.end_key) * columns // steps, start + 1)
    return start, end


def _band_row(chart: Chart, boxes: Sequence[Box], columns: int) -> str:
    row = [" "] * columns
    for kind in (BoxKind.L1, BoxKind.L0, BoxKind.MEMORY):  # a merged row shows the youngest
        for box in sorted(boxes, key=lambda box: box.first_key):
            if box.kind is kind:
                start, end = _span(chart, box, columns)
                is_cut = start > 0 and row[start - 1] == _FILLS[kind]
                row[start:end] = (_CUT if is_cut else _FILLS[kind]) + _FILLS[kind] * (end - start - 1)
    return "".join(row)


def _image_row(chart: Chart, boxes: Sequence[Box], columns: int) -> str:
    row = [" "] * columns
    for box in sorted(boxes, key=lambda box: box.first_key):
        start, end = _span(chart, box, columns)
        fill = "╌" if box.covers_after_lsn is None else "━"
        is_cut = start > 0 and row[start - 1] != " "
        row[start:end] = ("┳" if is_cut else fill) + fill * (end - start - 1)
    return "".join(row)


def _image_text(boxes: Sequence[Box]) -> str:
    return f"images: {describe_boxes(boxes)}, {describe_cover(boxes[0].covers_after_lsn)}"


def _band_text(boxes: Sequence[Box]) -> str:
    kinds = [kind for kind in BoxKind if any(box.kind is kind for box in boxes)]
    return "; ".join(
        f"{kind.value}: {describe_boxes([box for box in boxes if box.kind is kind])}" for kind in kinds
    )


def _line(label: str, row: str, text: str, marks: Sequence[Mark]) -> str:
    pointed = "  ".join(f"◄ {mark.text}" for mark in marks)
    return f"{label:>{LSN_WIDTH}} │{row}│ {'  '.join(part for part in (text, pointed) if part)}".rstrip()


def _footer(chart: Chart, columns: int) -> list[str]:
    indent = " " * (LSN_WIDTH + 2)
    first, last = chart.first_key_text, chart.last_key_text
    keys = [indent + first + last.rjust(columns - len(first))] if len(first) + len(last) < columns else []
    if not keys and first:
        keys = [f"{indent}keys from {first}", f"{indent}       to {last}"]
    return [*keys, "", _LEGEND, *summarise(chart)]
