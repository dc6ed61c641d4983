"""A layer chart as SVG: one rectangle for each layer, all about it when the pointer rests on it."""

from collections.abc import Iterator
from typing import Final
from xml.sax.saxutils import escape

from excimer.base.lsn import format_lsn
from excimer.cli.layer_chart import Box, BoxKind, Chart, describe_cover, summarise

WIDTH: Final = 1200
LEFT: Final = 130
RIGHT: Final = 250
TOP: Final = 60
STEP_MIN: Final = 7
STEP_MAX: Final = 26
HEIGHT_WANTED: Final = 800
TEXT_GAP: Final = 12
IMAGE_HEIGHT: Final = 4

_FILLS: Final = {
    BoxKind.MEMORY: "#b8b8b8",
    BoxKind.L0: "#f0a35e",
    BoxKind.L1: "#6c9bd1",
    BoxKind.IMAGE: "#3d8f5f",
}
_PARTIAL_IMAGE: Final = "#a8cfa0"
_STYLE: Final = (
    "text{font:11px sans-serif;fill:#222}.title{font:bold 15px sans-serif}rect{stroke:#fff;stroke-width:.6}"
    "rect:hover{stroke:#000}.mark{stroke:#b03030;stroke-dasharray:4 3}.name{fill:#b03030}"
)


def draw_svg(chart: Chart, title: str) -> str:
    """A whole document."""
    steps = max(len(chart.lsns) - 1, 1)
    step = min(max(HEIGHT_WANTED / steps, STEP_MIN), STEP_MAX)
    bottom = TOP + steps * step
    summary = summarise(chart)
    height = bottom + 50 + TEXT_GAP * 1.3 * len(summary)
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}">',
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
        f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>',
        *_legend(),
        *(_rectangle(chart, box, step, bottom) for box in sorted(chart.boxes, key=_image_last)),
        *_lsn_labels(chart, step, bottom),
        *_mark_lines(chart, step, bottom),
        f'<text x="{LEFT}" y="{bottom + 18:.1f}">{escape(chart.first_key_text)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{bottom + 18:.1f}" text-anchor="end">'
        f"{escape(chart.last_key_text)}</text>",
        *(
            f'<text x="{LEFT}" y="{bottom + 44 + TEXT_GAP * 1.3 * index:.1f}">{escape(line)}</text>'
            for index, line in enumerate(summary)
        ),
        "</svg>",
    ]
    return "\n".join(body) + "\n"


def _image_last(box: Box) -> bool:
    return box.kind is BoxKind.IMAGE


def _rectangle(chart: Chart, box: Box, step: float, bottom: float) -> str:
    scale = (WIDTH - LEFT - RIGHT) / max(len(chart.keys) - 1, 1)
    left = LEFT + chart.column(box.first_key) * scale
    width = max((chart.column(box.end_key) - chart.column(box.first_key)) * scale, 1)
    top = bottom - chart.row(box.high_lsn) * step
    height = (chart.row(box.high_lsn) - chart.row(box.low_lsn)) * step
    fill = _FILLS[box.kind]
    if box.kind is BoxKind.IMAGE:
        top, height = top - IMAGE_HEIGHT / 2, IMAGE_HEIGHT
        fill = _PARTIAL_IMAGE if box.covers_after_lsn is None else fill
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}">'
        f"<title>{escape(box.text)}</title></rect>"
    )


def _legend() -> Iterator[str]:
    entries = [(fill, kind.value) for kind, fill in _FILLS.items()]
    entries.append((_PARTIAL_IMAGE, f"images {describe_cover(None)}"))
    for index, (fill, name) in enumerate(entries):
        left = LEFT + 110 * index
        yield f'<rect x="{left}" y="36" width="12" height="10" fill="{fill}"/>'
        yield f'<text x="{left + 17}" y="45">{escape(name)}</text>'


def _lsn_labels(chart: Chart, step: float, bottom: float) -> Iterator[str]:
    """Those that do not overlap the one below."""
    last = bottom + 2 * TEXT_GAP
    for index, lsn in enumerate(chart.lsns):
        at = bottom - index * step
        if last - at >= TEXT_GAP:
            last = at
            yield f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{format_lsn(lsn)}</text>'


def _mark_lines(chart: Chart, step: float, bottom: float) -> Iterator[str]:
    last = bottom + 2 * TEXT_GAP
    for mark in sorted(chart.marks, key=lambda mark: mark.lsn):
        at = bottom - chart.row(mark.lsn) * step
        text_at = min(at, last - TEXT_GAP)
        last = text_at
        right = WIDTH - RIGHT
        yield f'<line class="mark" x1="{LEFT}" x2="{right + 6}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text class="name" x="{right + 10}" y="{text_at + 4:.1f}">{escape(mark.text)}</text>'
