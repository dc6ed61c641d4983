"""The local WAL prefix with which stock PostgreSQL starts at an arbitrary LSN.

A compute has no WAL before the end E of the last record. PostgreSQL wants a checkpoint to recover
from, so the compute lays a *local-only* prefix that ends exactly at E::

    C                               P                     E = end of the last record
    | fake shutdown checkpoint      | NOOP covering P..E  | (zeros: end of WAL)
    +-------------------------------+---------------------+-----------------------

pg_control points at C and says "in production". PostgreSQL then "recovers" the one NOOP and writes
its own end-of-recovery checkpoint behind E with ``xl_prev = P``. P is the start of the real last
record, so that the WAL history stays linked; nothing of the prefix ever enters that history.

When P is unknown (a start in the past), any P' will do, because such a timeline begins at E.

Only the pages that the prefix touches are produced; the segment files are otherwise sparse.
Source: xlogreader.c, xlogrecord.h, xlog_internal.h; experiment "start", variant B.

Not here: which LSN to start at (the proposer's election), and any file.
"""

import struct
from typing import NamedTuple

import google_crc32c
import msgspec

from excimer.base.lsn import (
    WAL_PAGE_HEADER_SHORT_BYTES,
    WAL_PAGE_SIZE_BYTES,
    Lsn,
    align_lsn,
    record_start,
)
from excimer.pgformat.checkpoint import CheckPoint
from excimer.pgformat.control_file import WAL_PAGE_MAGICS, ClusterState, ControlFile

_RECORD_HEADER = struct.Struct("<IIQBBxx")
_RECORD_HEADER_BYTES = 24
_PAGE_HEADER = struct.Struct("<HHIQI4x")
_PAGE_HEADER_LONG = struct.Struct("<QII")

_RMGR_XLOG = 0
_INFO_CHECKPOINT_SHUTDOWN = 0x00
_INFO_CHECKPOINT_ONLINE = 0x10
_INFO_NOOP = 0x20
_INFO_SWITCH = 0x40

_BLOCK_ID_DATA_SHORT = 255
_BLOCK_ID_DATA_LONG = 254
_PAGE_FIRST_IS_CONTINUATION = 0x0001
_PAGE_LONG_HEADER = 0x0002

_TIMELINE = 1


class WalPrefix(NamedTuple):
    """Bytes to write, and the pg_control that goes with them."""

    chunks: list[tuple[Lsn, bytes]]
    """(position, bytes); positions map to segment files, everything else stays a hole."""
    checkpoint_lsn: Lsn
    control_file: bytes


class StandbyPoint(NamedTuple):
    """How PostgreSQL begins that only reads."""

    consistent_lsn: Lsn
    """It opens when it has replayed so far."""
    oldest_active_xid: int | None = None
    """Transactions from this one on may run, and the WAL that follows says which. None: none runs, and
    PostgreSQL opens by itself.
    """


class _Writer(NamedTuple):
    """Lays records over pages of one cluster's WAL."""

    pg_version: int
    system_id: int
    segment_size: int

    def page_header(self, address: int, remaining: int = 0) -> bytes:
        """`remaining`: bytes of a record continued from the page before."""
        is_long = address % self.segment_size == 0
        info = (_PAGE_FIRST_IS_CONTINUATION if remaining else 0) | (_PAGE_LONG_HEADER if is_long else 0)
        header = _PAGE_HEADER.pack(WAL_PAGE_MAGICS[self.pg_version], info, _TIMELINE, address, remaining)
        if is_long:
            header += _PAGE_HEADER_LONG.pack(self.system_id, self.segment_size, WAL_PAGE_SIZE_BYTES)
        return header

    def lay(self, start: int, record: bytes) -> tuple[list[tuple[Lsn, bytes]], Lsn]:
        """Cuts an 8-aligned copy of `record` at page boundaries; returns the chunks and its end."""
        padded = record + bytes(-len(record) % 8)
        chunks: list[tuple[Lsn, bytes]] = []
        position, offset = start, 0
        while offset < len(padded):
            if position % WAL_PAGE_SIZE_BYTES == 0:
                header = self.page_header(position, remaining=len(record) - offset)
                chunks.append((Lsn(position), header))
                position += len(header)
            size = min(len(padded) - offset, WAL_PAGE_SIZE_BYTES - position % WAL_PAGE_SIZE_BYTES)
            chunks.append((Lsn(position), padded[offset : offset + size]))
            position += size
            offset += size
        return chunks, Lsn(position)

    def space(self, start: int, end: int) -> int:
        """Bytes for records between two positions: their distance less the page headers between."""
        headers, boundary = 0, start - start % WAL_PAGE_SIZE_BYTES + WAL_PAGE_SIZE_BYTES
        while boundary < end:
            headers += record_start(boundary, self.segment_size) - boundary
            boundary += WAL_PAGE_SIZE_BYTES
        return end - start - headers


def build_wal_prefix(
    *,
    pg_version: int,
    template: ControlFile,
    checkpoint: CheckPoint,
    end_lsn: Lsn,
    prev_lsn: Lsn,
    now_s: int,
    standby: StandbyPoint | None = None,
) -> WalPrefix:
    """The prefix that ends at `end_lsn`, and its control file.

    `checkpoint` holds the fields a checkpoint at `end_lsn` would have; `prev_lsn` is the start of
    the last record, or 0 when unknown. With `standby` PostgreSQL opens read-only: at `end_lsn`, where it
    stays if nothing follows (a static endpoint), or once it has followed a primary (a replica). The
    checkpoint of a replica is an online one: after a shutdown checkpoint it would take open transactions for
    aborted. Raises ValueError when `end_lsn` cannot be a record's end.
    """
    writer = _Writer(pg_version, template.system_id, template.wal_segment_size)
    if end_lsn % 8 or 0 < end_lsn % WAL_PAGE_SIZE_BYTES <= WAL_PAGE_HEADER_SHORT_BYTES:
        raise ValueError(f"{end_lsn:#x} cannot be the end of a WAL record")
    last_lsn = prev_lsn or _invent_last_record(writer, end_lsn)
    checkpoint_lsn = _place_checkpoint(writer, last_lsn)
    oldest_active_xid = 0 if standby is None else standby.oldest_active_xid
    fake = msgspec.structs.replace(
        checkpoint, redo=checkpoint_lsn, time=now_s, oldest_active_xid=oldest_active_xid or 0
    )
    info = _INFO_CHECKPOINT_ONLINE if oldest_active_xid else _INFO_CHECKPOINT_SHUTDOWN
    chunks, checkpoint_end = writer.lay(checkpoint_lsn, _record(fake.pack(), prev=0, info=info))
    if record_start(checkpoint_end, writer.segment_size) != last_lsn:
        raise ValueError(f"{last_lsn:#x} cannot be the start of a WAL record")
    last_chunks, last_end = writer.lay(last_lsn, _last_record(writer, last_lsn, end_lsn, checkpoint_lsn))
    if _is_switch(writer, last_lsn, end_lsn):
        last_end = end_lsn
    if last_end != end_lsn:
        raise ValueError(f"a record from {last_lsn:#x} cannot end at {end_lsn:#x}")
    headers = _page_headers(writer, checkpoint_lsn, last_lsn)
    control = msgspec.structs.replace(
        template,
        state=ClusterState.IN_PRODUCTION if standby is None else ClusterState.IN_ARCHIVE_RECOVERY,
        time=now_s,
        checkpoint_lsn=checkpoint_lsn,
        checkpoint=fake,
        min_recovery_point=0 if standby is None else standby.consistent_lsn,
        min_recovery_point_timeline=0 if standby is None else _TIMELINE,
        backup_start=0,
        backup_end=0,
        backup_end_required=False,
    )
    return WalPrefix(headers + chunks + last_chunks, checkpoint_lsn, control.pack())


def wal_segment_file_name(lsn: int, segment_size: int) -> str:
    """Name of the segment that holds `lsn`, on PostgreSQL's timeline 1: 24 hex digits."""
    number = lsn // segment_size
    per_id = 0x1_0000_0000 // segment_size
    return f"{_TIMELINE:08X}{number // per_id:08X}{number % per_id:08X}"


def _record(payload: bytes, *, prev: int, info: int) -> bytes:
    """One record of the XLOG resource manager whose main data is `payload`."""
    if not payload:
        body = b""
    elif len(payload) <= 255:
        body = bytes([_BLOCK_ID_DATA_SHORT, len(payload)]) + payload
    else:
        body = bytes([_BLOCK_ID_DATA_LONG]) + struct.pack("<I", len(payload)) + payload
    return _finish(_RECORD_HEADER.pack(_RECORD_HEADER_BYTES + len(body), 0, prev, info, _RMGR_XLOG), body)


def _finish(header: bytes, body: bytes) -> bytes:
    crc = google_crc32c.extend(google_crc32c.value(body), header)
    return header + struct.pack("<I", crc) + body


def _noop(size: int, prev: int) -> bytes:
    """A NOOP of exactly `size` bytes, a multiple of 8 and at least 24."""
    room = size - _RECORD_HEADER_BYTES
    if room == 0:
        return _record(b"", prev=prev, info=_INFO_NOOP)
    payload_size = room - 2 if room - 2 <= 255 else room - 5
    return _record(bytes(payload_size), prev=prev, info=_INFO_NOOP)


def _is_switch(writer: _Writer, last_lsn: int, end_lsn: int) -> bool:
    """Whether the last record is taken to be XLOG_SWITCH, which reaches to its segment's end.

    A NOOP could cover the same stretch, but would have to fill up to a whole segment.
    """
    return end_lsn % writer.segment_size == 0 and end_lsn - last_lsn > WAL_PAGE_SIZE_BYTES


def _last_record(writer: _Writer, last_lsn: int, end_lsn: int, prev: int) -> bytes:
    if _is_switch(writer, last_lsn, end_lsn):
        return _record(b"", prev=prev, info=_INFO_SWITCH)
    size = writer.space(last_lsn, end_lsn)
    if size < _RECORD_HEADER_BYTES:
        raise ValueError(f"no record fits between {last_lsn:#x} and {end_lsn:#x}")
    return _noop(size, prev)


def _starts(writer: _Writer, before: int) -> range:
    """Candidate record starts below `before`, nearest first, page headers not yet excluded."""
    return range(before - _RECORD_HEADER_BYTES, max(before - 2 * WAL_PAGE_SIZE_BYTES, 0), -8)


def _is_record_start(writer: _Writer, lsn: int) -> bool:
    page = lsn - lsn % WAL_PAGE_SIZE_BYTES
    return lsn >= record_start(page, writer.segment_size)


def _invent_last_record(writer: _Writer, end_lsn: int) -> Lsn:
    for lsn in _starts(writer, end_lsn):
        if _is_record_start(writer, lsn) and writer.space(lsn, end_lsn) >= _RECORD_HEADER_BYTES:
            return Lsn(lsn)
    raise ValueError(f"no record can end at {end_lsn:#x}")


def _place_checkpoint(writer: _Writer, last_lsn: int) -> Lsn:
    """Where a checkpoint record must start for the next record to start at `last_lsn`."""
    size = align_lsn(_RECORD_HEADER_BYTES + 2 + 88)
    for lsn in _starts(writer, last_lsn):
        if not _is_record_start(writer, lsn):
            continue
        _, end = writer.lay(lsn, bytes(size))
        if record_start(end, writer.segment_size) == last_lsn:
            return Lsn(lsn)
    raise ValueError(f"no checkpoint can end before {last_lsn:#x}")


def _page_headers(writer: _Writer, *starts: int) -> list[tuple[Lsn, bytes]]:
    """Headers of the pages and segments in which records start; `lay` makes those it crosses."""
    addresses = {lsn - lsn % WAL_PAGE_SIZE_BYTES for lsn in starts}
    addresses |= {lsn - lsn % writer.segment_size for lsn in starts}
    return [(Lsn(address), writer.page_header(address)) for address in sorted(addresses)]
