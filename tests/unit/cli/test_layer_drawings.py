"""The layer map in characters and as SVG: every layer is there, where it belongs, whatever their number."""

import xml.etree.ElementTree as ElementTree
from typing import Any

from excimer.base.lsn import format_lsn
from excimer.cli.layer_chart import build_chart
from excimer.cli.layer_svg import draw_svg
from excimer.cli.layer_text import ROWS_MAX, draw_text

SVG = "{http://www.w3.org/2000/svg}"
MIB = 1 << 20


def _layer(
    kind: str, lsns: tuple[int, int], keys: tuple[int, int], *, level: int = 0, covers: int | None = None
) -> dict[str, Any]:
    return {
        "name": f"{kind}-{lsns[0]:x}-{lsns[1]:x}-{keys[0]:x}",
        "kind": kind,
        "level": level,
        "start_lsn": format_lsn(lsns[0]),
        "end_lsn": format_lsn(lsns[1]),
        "first_key": f"{keys[0]:036x}",
        "last_key": f"{keys[1]:036x}",
        "first_key_text": f"block {keys[0]}",
        "last_key_text": f"block {keys[1]}",
        "covers_after_lsn": None if covers is None else format_lsn(covers),
        "size_bytes": 3 * MIB,
        "value_count": 1234,
    }


def _answer(layers: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "ancestor_lsn": None,
        "oldest_lsn": "0/100",
        "last_record_lsn": "0/600",
        "memory": [
            {
                "start_lsn": "0/5F0",
                "end_lsn": "0/600",
                "is_open": True,
                "value_count": 3,
                "size_bytes": 4096,
            }
        ],
        "branches": [{"timeline_id": "cd", "name": "dev<1>", "lsn": "0/300"}],
        "layers": layers,
        **changes,
    }


LAYERS = [
    _layer("delta", (0x5A0, 0x5F0), (5, 99)),
    _layer("image", (0x500, 0x500), (0, 50), covers=0x200),
    _layer("image", (0x500, 0x500), (51, 99), covers=0x200),
    _layer("delta", (0x200, 0x500), (0, 50), level=1),
    _layer("delta", (0x200, 0x500), (51, 99), level=1),
    _layer("image", (0x300, 0x300), (0, 50)),
    _layer("image", (0x100, 0x100), (0, 99), covers=0),
]

DRAWN = """\
             0/600 │····················│ memory: 1 layer, 4.0 KiB  ◄ head
             0/5F0 │      ░░░░░░░░░░░░░░│ L0: 1 layer, 3.0 MiB
             0/500 │━━━━━━━━━━━━━┳━━━━━━│ images: 2 layers, 6.0 MiB, of all that changed after 0/200
                   │▓▓▓▓▓▓▓▓▓▓▓▓▓╎▓▓▓▓▓▓│ L1: 2 layers, 6.0 MiB
             0/300 │╌╌╌╌╌╌╌╌╌╌╌╌╌       │ images: 1 layer, 3.0 MiB, of some keys  ◄ branch dev<1>
                   │▓▓▓▓▓▓▓▓▓▓▓▓▓╎▓▓▓▓▓▓│
             0/100 │━━━━━━━━━━━━━━━━━━━━│ images: 1 layer, 3.0 MiB, of every key  ◄ oldest: what is below cannot be read
                    block 0     block 99

· memory   ░ L0   ▓ L1   ━ images that cover all   ╌ images of some keys   ╎ ┳ next file
memory 1 layer, 4.0 KiB
L0     1 layer, 3.0 MiB
L1     2 layers, 6.0 MiB
images 4 layers, 12.0 MiB
total  7 layers, 21.0 MiB in object storage"""  # noqa: E501 - a drawing


def test_the_picture_in_characters() -> None:
    assert "\n".join(draw_text(build_chart(_answer(LAYERS)), 60)) == DRAWN


def test_a_branch_without_layers_of_its_own_has_a_picture() -> None:
    answer = _answer([], memory=[], branches=[], ancestor_lsn="0/500", oldest_lsn="0/500")
    text = "\n".join(draw_text(build_chart(answer), 80))
    assert "branch point" in text
    assert "total  0 layers" in text
    ElementTree.fromstring(draw_svg(build_chart(answer), "nothing"))


def test_thousands_of_layers_fit_a_bounded_number_of_rows() -> None:
    layers = [
        _layer("delta", (0x1000 * lsn, 0x1000 * (lsn + 1)), (0x100 * key, 0x100 * key + 0xFF), level=1)
        for lsn in range(300)
        for key in range(20)
    ]
    chart = build_chart(_answer(layers, last_record_lsn=format_lsn(0x1000 * 300), memory=[]))
    lines = draw_text(chart, 100)
    assert len(lines) <= 2 * ROWS_MAX + 10
    assert lines[0].lstrip().startswith(format_lsn(0x1000 * 300))
    described = sum(int(part.split()[0]) for line in lines for part in line.split("L1: ")[1:])
    assert described == len(layers), "each layer is counted in one row"


def test_the_svg_has_a_rectangle_with_a_tooltip_for_each_layer() -> None:
    root = ElementTree.fromstring(draw_svg(build_chart(_answer(LAYERS)), "branch <main> & co"))
    titles = [element.text or "" for element in root.iter(f"{SVG}title")]
    assert len(titles) == len(LAYERS) + 1
    assert all(any(layer["name"] in title for title in titles) for layer in LAYERS)
    texts = {element.text for element in root.iter(f"{SVG}text")}
    assert {"branch <main> & co", "branch dev<1>", "head", "0/500"} <= texts


def test_rectangles_lie_where_their_lsns_and_keys_are() -> None:
    root = ElementTree.fromstring(draw_svg(build_chart(_answer(LAYERS)), "x"))
    places = {}
    for rect in root.iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None:
            x, y, width, height = (float(rect.get(name, "")) for name in ("x", "y", "width", "height"))
            places[(title.text or "").splitlines()[0]] = (x, y, x + width, y + height)
    lower, upper = places["delta-200-500-0"], places["delta-5a0-5f0-5"]
    assert upper[3] <= lower[1], "newer is above"
    assert abs(places["delta-200-500-33"][0] - lower[2]) < 0.2, "neighbours touch"
    assert upper[0] > lower[0], "it begins at a later key"
    image = places["image-300-300-0"]
    assert lower[1] < image[1] < image[3] < lower[3], "the image lies inside the delta's LSNs"
