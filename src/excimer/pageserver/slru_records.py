"""SLRU pages and files coming and going: the rare records of commit status, multixacts, commit times.

Page numbers in these records are 32 bits wide before PostgreSQL 17 and 64 from 17 on.

Not here: entries being written, which is native (`_native/wal_decoder.pyx`).
"""

import struct
from enum import IntEnum
from typing import TYPE_CHECKING

import msgspec

from excimer.base.keys import (
    SLRU_SEGMENT_BLOCKS,
    KeyKind,
    Slru,
    make_key,
    parse_key,
    slru_block_key,
    slru_size_key,
)
from excimer.base.lsn import Lsn
from excimer.pgformat.slru import (
    COMMIT_TIMES_PER_PAGE,
    FIRST_MULTIXACT,
    OFFSETS_PER_PAGE,
    is_segment_obsolete,
    member_segments,
    xid_precedes,
)
from excimer.pgformat.wal_record import DecodedRecord, WalRecord
from excimer.storage.format.values import ValueKind

if TYPE_CHECKING:
    from excimer.pageserver.ingest import WalIngest

INFO_MASK = 0xF0
MULTIXACT_INFO_MASK = 0x70


class PageInfo(IntEnum):
    """Records of commit status and of commit times."""

    ZERO = 0x00
    TRUNCATE = 0x10


class MultixactInfo(IntEnum):
    ZERO_OFFSETS = 0x00
    ZERO_MEMBERS = 0x10
    TRUNCATE = 0x30


_MULTIXACT_TRUNCATE = struct.Struct("<IIIII")
_IDS = 1 << 32


def apply_clog_record(ingest: "WalIngest", record: WalRecord, decoded: DecodedRecord) -> bool:
    """False: there is no such record."""
    page, _ = _page_number(ingest, decoded.main_data)
    match decoded.header.info & INFO_MASK:
        case PageInfo.ZERO:
            _zero_page(ingest, record.end_lsn, Slru.XACT, page)
        case PageInfo.TRUNCATE:
            _truncate(ingest, record.end_lsn, Slru.XACT, page)
        case _:
            return False
    return True


def apply_commit_ts_record(ingest: "WalIngest", record: WalRecord, decoded: DecodedRecord) -> bool:
    """False: there is no such record."""
    page, rest = _page_number(ingest, decoded.main_data)
    match decoded.header.info & INFO_MASK:
        case PageInfo.ZERO:
            _zero_page(ingest, record.end_lsn, Slru.COMMIT_TS, page)
        case PageInfo.TRUNCATE:
            _advance_oldest_commit_time(ingest, struct.unpack_from("<I", rest)[0])
            _truncate(ingest, record.end_lsn, Slru.COMMIT_TS, page)
        case _:
            return False
    return True


def apply_multixact_record(ingest: "WalIngest", record: WalRecord, decoded: DecodedRecord) -> bool:
    """False: there is no such record."""
    match decoded.header.info & MULTIXACT_INFO_MASK:
        case MultixactInfo.ZERO_OFFSETS:
            page, _ = _page_number(ingest, decoded.main_data)
            _zero_page(ingest, record.end_lsn, Slru.MULTIXACT_OFFSETS, page)
        case MultixactInfo.ZERO_MEMBERS:
            page, _ = _page_number(ingest, decoded.main_data)
            _zero_page(ingest, record.end_lsn, Slru.MULTIXACT_MEMBERS, page)
        case MultixactInfo.TRUNCATE:
            _truncate_multixacts(ingest, record.end_lsn, decoded.main_data)
        case _:
            return False
    return True


def start_commit_times(ingest: "WalIngest", lsn: Lsn) -> None:
    """ActivateCommitTs: the next xid's page exists from here on."""
    state = ingest.checkpoint_state
    next_xid = state.checkpoint.next_xid & (_IDS - 1)
    if not state.checkpoint.oldest_commit_ts_xid:
        checkpoint = msgspec.structs.replace(
            state.checkpoint, oldest_commit_ts_xid=next_xid, newest_commit_ts_xid=next_xid
        )
        ingest.put_checkpoint_state(msgspec.structs.replace(state, checkpoint=checkpoint))
    segment, block = divmod(next_xid // COMMIT_TIMES_PER_PAGE, SLRU_SEGMENT_BLOCKS)
    if (ingest.size(slru_size_key(Slru.COMMIT_TS, segment)) or 0) <= block:
        _zero_page(ingest, lsn, Slru.COMMIT_TS, next_xid // COMMIT_TIMES_PER_PAGE)


def stop_commit_times(ingest: "WalIngest", lsn: Lsn) -> None:
    """DeactivateCommitTs: all is forgotten."""
    state = ingest.checkpoint_state
    checkpoint = msgspec.structs.replace(state.checkpoint, oldest_commit_ts_xid=0, newest_commit_ts_xid=0)
    ingest.put_checkpoint_state(msgspec.structs.replace(state, checkpoint=checkpoint))
    for segment in _segments(ingest, Slru.COMMIT_TS):
        ingest.put_size(slru_size_key(Slru.COMMIT_TS, segment), lsn, None)


def _page_number(ingest: "WalIngest", data: bytes) -> tuple[int, bytes]:
    layout = "<I" if ingest.timeline.pg_version < 17 else "<Q"
    (page,) = struct.unpack_from(layout, data)
    return page, data[struct.calcsize(layout) :]


def _zero_page(ingest: "WalIngest", lsn: Lsn, slru: Slru, page: int) -> None:
    segment, block = divmod(page, SLRU_SEGMENT_BLOCKS)
    key = slru_size_key(slru, segment)
    size = ingest.size(key) or 0
    for zeroed in {*range(size, block), block}:
        ingest.put_value(slru_block_key(slru, segment, zeroed), lsn, ValueKind.ZERO_PAGE)
    if size <= block:
        ingest.put_size(key, lsn, block + 1)


def _segments(ingest: "WalIngest", slru: Slru) -> list[int]:
    """Those that exist before the record at hand."""
    ingest.put()
    start, end = make_key(KeyKind.SLRU_SIZE, slru), make_key(KeyKind.SLRU_SIZE, slru + 1)
    found = ingest.timeline.scan(start, end, ingest.timeline.last_record_lsn)
    return [parse_key(key).rel for key, _ in found]


def _truncate(ingest: "WalIngest", lsn: Lsn, slru: Slru, cutoff_page: int) -> None:
    for segment in _segments(ingest, slru):
        if is_segment_obsolete(slru, segment, cutoff_page):
            ingest.put_size(slru_size_key(slru, segment), lsn, None)


def _truncate_multixacts(ingest: "WalIngest", lsn: Lsn, data: bytes) -> None:
    oldest_db, _, oldest, start_member, end_member = _MULTIXACT_TRUNCATE.unpack_from(data)
    state = ingest.checkpoint_state
    checkpoint = msgspec.structs.replace(state.checkpoint, oldest_multi=oldest, oldest_multi_db=oldest_db)
    ingest.put_checkpoint_state(msgspec.structs.replace(state, checkpoint=checkpoint))
    for segment in member_segments(start_member, end_member):
        key = slru_size_key(Slru.MULTIXACT_MEMBERS, segment)
        if ingest.size(key) is not None:
            ingest.put_size(key, lsn, None)
    last_removed = oldest - 1 if oldest > FIRST_MULTIXACT else _IDS - 1
    _truncate(ingest, lsn, Slru.MULTIXACT_OFFSETS, last_removed // OFFSETS_PER_PAGE)


def _advance_oldest_commit_time(ingest: "WalIngest", xid: int) -> None:
    state = ingest.checkpoint_state
    oldest = state.checkpoint.oldest_commit_ts_xid
    if oldest and xid_precedes(oldest, xid):
        checkpoint = msgspec.structs.replace(state.checkpoint, oldest_commit_ts_xid=xid)
        ingest.put_checkpoint_state(msgspec.structs.replace(state, checkpoint=checkpoint))
