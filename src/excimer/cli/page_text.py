"""The explanation of a page in lines: each layer visited, each value found, the page that came of it."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from excimer.cli.layer_chart import describe_size

NEWEST_SHOWN: Final = 20
OLDEST_SHOWN: Final = 5


def draw_explanation(answer: dict[str, Any]) -> Iterator[str]:
    """From the answer that the pageserver gives to `explain_page`."""
    yield f"{answer['page']} at {answer['lsn']}, PostgreSQL {answer['pg_version']}"
    for number, visit in enumerate(answer["visits"], 1):
        yield ""
        yield f"{number:>3}  {_place(visit)}"
        branch = visit["branch"] or visit["timeline_id"]
        yield f"     {visit['low_lsn']} < LSN <= {visit['high_lsn']}, branch {branch}"
        if not visit["values"]:
            yield "     nothing of this page"
        yield from _values(visit["values"])
    yield ""
    yield from _outcome(answer)


def _values(values: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The newest and the oldest; a page that changes all the time has thousands."""
    left_out = len(values) - NEWEST_SHOWN - OLDEST_SHOWN
    for index, value in enumerate(values):
        if left_out <= 1 or not NEWEST_SHOWN <= index < NEWEST_SHOWN + left_out:
            end = ", nothing older matters" if value["starts_chain"] else ""
            yield f"     {value['lsn']:>17}  {value['text']} ({describe_size(value['size_bytes'])}){end}"
        elif index == NEWEST_SHOWN:
            yield f"     {'…':>17}  {left_out:,} more; --json has them all"


def _place(visit: dict[str, Any]) -> str:
    if visit["layer"] is None:
        return "memory layer"
    level = f" L{visit['level']}" if visit["kind"] == "delta" else ""
    return f"{visit['kind']} layer{level} {visit['layer']}"


def _outcome(answer: dict[str, Any]) -> Iterator[str]:
    """The page's header, or why there is none."""
    count = sum(len(visit["values"]) for visit in answer["visits"])
    if answer["problem"] is not None:
        yield f"no page comes of it: {answer['problem']}"
        return
    if count == 0:
        yield "no value anywhere: a page of zeros"
    header = answer["header"]
    if header is None:
        yield f"the page is made of {count} value{'' if count == 1 else 's'}; pages of an SLRU have no header"
        return
    if header["is_new"]:
        yield "the page is new: it was never initialised"
        return
    flags = ", ".join(header["flags"]) or "none"
    stored = header["checksum"]
    checksum = (
        f"checksum {stored:#06x}"
        if stored
        else f"no checksum (it would be {header['computed_checksum']:#06x})"
    )
    if stored and stored != header["computed_checksum"]:
        checksum += f", WRONG: computed {header['computed_checksum']:#06x}"
    yield (
        f"the page: pd_lsn {header['lsn']}, lower {header['lower']}, upper {header['upper']}, "
        f"special {header['special']}, flags: {flags}"
    )
    yield f"          layout {header['layout_version']}, prune xid {header['prune_xid']}, {checksum}"
