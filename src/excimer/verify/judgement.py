"""Whether two copies of a block tell of one history. Pure: bytes in, a disagreement or None out."""

import struct
from typing import Final, NamedTuple

from excimer.base.keys import BLOCK_SIZE_BYTES, Fork, KeyKind, Slru, parse_key
from excimer.base.lsn import Lsn, format_lsn
from excimer.pgformat.page_header import PageHeader
from excimer.pgformat.page_kinds import PageKind, page_kind
from excimer.pgformat.page_masks import map_bits, masked_page, sequence_agrees

SHOWN_BYTES: Final = 16
FIRST_USER_OID: Final = 16384
FAKE_LSN_MAX: Final = 1
"""Below any record: pages of a GiST index carry it from their building."""

_COMMIT_TIME: Final = struct.Struct("<qH")


class Disagreement(NamedTuple):
    """Two copies that are not of one history."""

    reason: str
    offset: int | None = None
    """Of the first byte that may not differ; None where no byte is at fault."""
    here: bytes = b""
    """From `offset` on, a few bytes."""
    served: bytes = b""


def stamps_lsn(key: bytes) -> bool:
    """Whether every change of such a page leaves its LSN in the page: not of SLRUs, whose pages have no
    header, nor of visibility maps, where clearing a bit leaves none.
    """
    fields = parse_key(key)
    return fields.kind == KeyKind.RELATION_BLOCK and fields.fork != Fork.VM


def page_lsn(page: bytes) -> Lsn:
    return PageHeader.unpack(page).lsn


def judge_block(key: bytes, here: bytes, served: bytes, *, hints_are_logged: bool) -> Disagreement | None:
    """`here` is the endpoint's copy, `served` the pageserver's of a moment between whose LSN and that of
    `here` the block was not changed. `hints_are_logged`: the cluster has checksums.
    """
    if here == served:
        return None
    fields = parse_key(key)
    if fields.kind == KeyKind.SLRU_BLOCK:
        ours = _as_logged(here, served) if fields.spc == Slru.COMMIT_TS else here
        return None if ours == served else _first_difference(ours, served)
    kind, served_kind = (page_kind(page, fields.fork, fields.block) for page in (here, served))
    if kind is not served_kind:
        return _first_difference(here, served)._replace(
            reason=f"the page here is of a {kind.value}, the pageserver's of a {served_kind.value}"
        )
    masked, served_masked = (masked_page(page, kind, fields.block) for page in (here, served))
    if masked != served_masked:
        is_known = kind is PageKind.VISIBILITY_MAP and _is_copied_map(key, masked, served_masked)
        return None if is_known else _first_difference(masked, served_masked)
    if kind is PageKind.SEQUENCE and not sequence_agrees(here, served):
        return Disagreement("the value of the sequence here does not lead to the one that is logged")
    if kind in (PageKind.NEW, PageKind.VISIBILITY_MAP):
        return None
    return _judge_lsns(kind, fields.block, page_lsn(here), page_lsn(served), hints_are_logged)


def is_between(here: bytes, earlier: bytes, later: bytes) -> bool:
    """Whether each bit is as it was served at one of two moments between which `here` was read: then it may
    have been changed in that time, and says nothing else.
    """
    own, first, second = (int.from_bytes(page, "little") for page in (here, earlier, later))
    return (own ^ first) & (own ^ second) == 0


def comparable_bits(key: bytes, page: bytes) -> bytes:
    """What of a page without LSN tells of its history."""
    return map_bits(page) if parse_key(key).kind == KeyKind.RELATION_BLOCK else page


def _as_logged(here: bytes, served: bytes) -> bytes:
    """Commit times as WAL has them: of a transaction of a replication origin that gave no time of its own,
    PostgreSQL logs 0 for it and keeps the time of day.
    """
    logged = bytearray(here)
    for start in range(0, BLOCK_SIZE_BYTES - _COMMIT_TIME.size + 1, _COMMIT_TIME.size):
        time, origin = _COMMIT_TIME.unpack_from(served, start)
        if time == 0 != origin and origin == _COMMIT_TIME.unpack_from(here, start)[1]:
            _COMMIT_TIME.pack_into(logged, start, 0, origin)
    return bytes(logged)


def _is_copied_map(key: bytes, here: bytes, served: bytes) -> bool:
    """Whether a map lacks bits at the pageserver because PostgreSQL (15 to 18) did not log them.

    CREATE DATABASE by the strategy wal_log logs each page of a map with a hole where all its bits are:
    replayed it has none, on a standby as here, and the table's pages count as not all-visible, which is safe.
    Such a relation has the file number that it had in the template, which is older than its database.
    """
    fields = parse_key(key)
    lacking, extra = (
        int.from_bytes(one, "little") & ~int.from_bytes(other, "little")
        for one, other in ((here, served), (served, here))
    )
    return fields.db >= FIRST_USER_OID and fields.rel < fields.db and lacking != 0 == extra


def _judge_lsns(
    kind: PageKind, block: int, here: Lsn, served: Lsn, hints_are_logged: bool
) -> Disagreement | None:
    """Contents agree. SP-GiST's metapage is changed without a record, and a GiST index is built without LSNs;
    a hint may be logged by a record that carries nothing.
    """
    is_stamped = not (kind is PageKind.SPGIST and block == 0) and here > FAKE_LSN_MAX
    if here == served or not is_stamped or (hints_are_logged and served < here):
        return None
    return Disagreement(f"pd_lsn is {format_lsn(here)} here and {format_lsn(served)} at the pageserver", 0)


def _first_difference(here: bytes, served: bytes) -> Disagreement:
    places = (at for at in range(BLOCK_SIZE_BYTES) if here[at] != served[at])
    offset = next(places, 0)
    count = 1 + sum(1 for _ in places)
    end = offset + SHOWN_BYTES
    what = f"{count} byte{' differs' if count == 1 else 's differ'} from byte {offset} on"
    return Disagreement(what, offset, here[offset:end], served[offset:end])
