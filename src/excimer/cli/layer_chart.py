"""The layer map of a branch as a chart: where each layer lies, keys across and LSNs up. No drawing yet.

Keys and LSNs are huge and uneven, so both axes are ranked: each place where some layer begins or ends is
one step further, whatever lies between. That keeps every layer visible and no distance true.

The drawings are in `layer_text` (for a terminal) and `layer_svg`.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from excimer.base.lsn import format_lsn, parse_lsn

KEY_SIZE_BYTES = 18
KIB = 1 << 10
MIB = 1 << 20


class BoxKind(StrEnum):
    MEMORY = "memory"
    L0 = "L0"
    L1 = "L1"
    IMAGE = "images"


@dataclass(frozen=True, slots=True)
class Box:
    """One layer. An image has no height: `low_lsn` is `high_lsn`."""

    kind: BoxKind
    low_lsn: int
    high_lsn: int
    first_key: int
    end_key: int
    size_bytes: int
    covers_after_lsn: int | None
    text: str
    """All about it, for a tooltip."""


@dataclass(frozen=True, slots=True)
class Mark:
    """An LSN that something happens at: a branch leaves, the history begins."""

    lsn: int
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    boxes: tuple[Box, ...]
    marks: tuple[Mark, ...]
    keys: tuple[int, ...]
    """Where a layer begins or ends, ascending."""
    lsns: tuple[int, ...]
    first_key_text: str
    last_key_text: str

    def column(self, key: int) -> int:
        """The step at which a key of `keys` stands."""
        return bisect_left(self.keys, key)

    def row(self, lsn: int) -> int:
        return bisect_left(self.lsns, lsn)


def build_chart(answer: dict[str, Any]) -> Chart:
    """From the answer about a layer map that the pageserver gives."""
    layers = [_disk_box(layer) for layer in answer["layers"]]
    first_key = min((box.first_key for box in layers), default=0)
    end_key = max((box.end_key for box in layers), default=1)
    memory = [
        _memory_box(layer, first_key, end_key) for layer in answer["memory"] if layer["value_count"] > 0
    ]
    boxes = (*memory, *layers)
    marks = tuple(_marks(answer))
    lsns = {lsn for box in boxes for lsn in (box.low_lsn, box.high_lsn)} | {mark.lsn for mark in marks}
    keys = {key for box in boxes for key in (box.first_key, box.end_key)} | {first_key, end_key}
    named = sorted(answer["layers"], key=lambda layer: str(layer["first_key"]))
    last = max(answer["layers"], key=lambda layer: str(layer["last_key"]), default=None)
    return Chart(
        boxes,
        marks,
        tuple(sorted(keys)),
        tuple(sorted(lsns)),
        named[0]["first_key_text"] if named else "",
        last["last_key_text"] if last else "",
    )


def _disk_box(layer: dict[str, Any]) -> Box:
    low_lsn, high_lsn = parse_lsn(layer["start_lsn"]), parse_lsn(layer["end_lsn"])
    covers = None if layer["covers_after_lsn"] is None else int(parse_lsn(layer["covers_after_lsn"]))
    delta_kind = BoxKind.L1 if layer["level"] else BoxKind.L0
    kind = BoxKind.IMAGE if layer["kind"] == "image" else delta_kind
    lines = [
        layer["name"],
        f"{kind}, {format_lsn(low_lsn)} to {format_lsn(high_lsn)}"
        if kind is not BoxKind.IMAGE
        else f"images at {format_lsn(high_lsn)}, {describe_cover(covers)}",
        f"{layer['first_key_text']} to {layer['last_key_text']}",
        f"{layer['value_count']:,} values, {describe_size(layer['size_bytes'])}",
    ]
    first, last = int(layer["first_key"], 16), int(layer["last_key"], 16)
    text = "\n".join(lines)
    return Box(kind, low_lsn, high_lsn, first, last + 1, layer["size_bytes"], covers, text)


def _memory_box(layer: dict[str, Any], first_key: int, end_key: int) -> Box:
    low_lsn, high_lsn = parse_lsn(layer["start_lsn"]), parse_lsn(layer["end_lsn"])
    state = "open" if layer["is_open"] else "waits to become durable"
    text = f"memory, {state}\n{layer['value_count']:,} values, {describe_size(layer['size_bytes'])}"
    return Box(BoxKind.MEMORY, low_lsn, high_lsn, first_key, end_key, layer["size_bytes"], None, text)


def _marks(answer: dict[str, Any]) -> Iterable[Mark]:
    for branch in answer["branches"]:
        yield Mark(parse_lsn(branch["lsn"]), f"branch {branch.get('name') or branch['timeline_id']}")
    if answer["ancestor_lsn"] is not None:
        yield Mark(parse_lsn(answer["ancestor_lsn"]), "branch point: what is below is the ancestor's")
    yield Mark(parse_lsn(answer["oldest_lsn"]), "oldest: what is below cannot be read")
    yield Mark(parse_lsn(answer["last_record_lsn"]), "head")


def summarise(chart: Chart) -> list[str]:
    """``L0  3 files, 12.0 MiB`` for each kind that there is, and all together on disk."""
    lines = []
    for kind in BoxKind:
        boxes = [box for box in chart.boxes if box.kind is kind]
        if boxes:
            lines.append(f"{kind.value:<7}{describe_boxes(boxes)}")
    on_disk = [box for box in chart.boxes if box.kind is not BoxKind.MEMORY]
    return [*lines, f"{'total':<7}{describe_boxes(on_disk)} in object storage"]


def describe_boxes(boxes: Sequence[Box]) -> str:
    size = describe_size(sum(box.size_bytes for box in boxes))
    return f"{len(boxes)} layer{'' if len(boxes) == 1 else 's'}, {size}"


def describe_cover(covers_after_lsn: int | None) -> str:
    if covers_after_lsn is None:
        return "of some keys"
    if covers_after_lsn == 0:
        return "of every key"
    return f"of all that changed after {format_lsn(covers_after_lsn)}"


def describe_size(size_bytes: int) -> str:
    if size_bytes < KIB:
        return f"{size_bytes} B"
    if size_bytes < MIB:
        return f"{size_bytes / KIB:.1f} KiB"
    return f"{size_bytes / MIB:.1f} MiB"
