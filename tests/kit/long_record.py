"""WAL with one record of hundreds of megabytes that is never in memory, and what ingest needs for it.

Run as a program: ``python -m tests.kit.long_record commit|prepare MEGABYTES [MORE]`` ingests such a record
and prints, as JSON, the bytes of the record and of its values and the growth of the peak of memory. The
process may have so many megabytes more than it has before.
"""

import json
import resource
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c

from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, Lsn, align_lsn
from excimer.pageserver.ingest import WalIngest
from excimer.pgformat import transaction_records as xact
from excimer.pgformat.control_file import WAL_PAGE_MAGICS
from excimer.pgformat.wal_record import Rmgr
from excimer.pgformat.wal_segment import CONTINUES_RECORD, LONG_HEADER, PageHeader, pack_page_header
from excimer.storage.format.values import PackedBatch
from tests.kit.value_timeline import ValueTimeline, make_state

PG_VERSION = 18
SEGMENT_BYTES = 16 << 20
START = Lsn(SEGMENT_BYTES + 40)
CHUNK_BYTES = 1 << 20
FIRST_XID = 5_000
XIDS_AT_ONCE = 1 << 18
INVALIDATION = struct.pack("<bxxxIII", 10, 5, 1259, 0)


def commit_data(size_bytes: int) -> tuple[int, Callable[[], Iterator[bytes]]]:
    """Exact length and parts of a commit: a third are subtransactions, the rest invalidations."""
    xid_count = size_bytes // 12 // XIDS_AT_ONCE * XIDS_AT_ONCE
    inval_count = (size_bytes - 4 * xid_count) // 16 // 4096 * 4096

    def parts() -> Iterator[bytes]:
        yield struct.pack("<qII", 7, xact.HAS_SUBXACTS | xact.HAS_INVALS, xid_count)
        for start in range(FIRST_XID, FIRST_XID + xid_count, XIDS_AT_ONCE):
            yield array("I", range(start, start + XIDS_AT_ONCE)).tobytes()
        yield struct.pack("<I", inval_count)
        for _ in range(inval_count // 4096):
            yield INVALIDATION * 4096

    return 20 + 4 * xid_count + 16 * inval_count, parts


def prepare_data(size_bytes: int) -> tuple[int, Callable[[], Iterator[bytes]]]:
    """Exact length and parts of a PREPARE: half are subtransactions, the rest what comes behind them."""
    xid_count = size_bytes // 8 // XIDS_AT_ONCE * XIDS_AT_ONCE
    rest = bytes(1 << 20)
    rest_count = size_bytes // 2 >> 20

    def parts() -> Iterator[bytes]:
        head = bytearray(72)
        struct.pack_into("<IIIIqIi", head, 0, 0x57F94534, 0, FIRST_XID - 1, 5, 77, 10, xid_count)
        struct.pack_into("<H", head, 54, 8)
        yield bytes(head) + b"longest\0"
        for start in range(FIRST_XID, FIRST_XID + xid_count, XIDS_AT_ONCE):
            yield array("I", range(start, start + XIDS_AT_ONCE)).tobytes()
        for _ in range(rest_count):
            yield rest

    return 80 + 4 * xid_count + (rest_count << 20), parts


def record_chunks(info: int, data: tuple[int, Callable[[], Iterator[bytes]]]) -> Iterator[bytes]:
    """WAL from `START` on with this one record of the transaction manager, in chunks of about a megabyte."""
    size_bytes, parts = data
    total = 24 + 5 + size_bytes
    part_header = struct.pack("<BI", 254, size_bytes)
    head = struct.pack("<IIQBB2x", total, FIRST_XID - 1, 0, info, Rmgr.XACT)
    crc = google_crc32c.value(part_header)
    for part in parts():
        crc = google_crc32c.extend(crc, part)
    crc = google_crc32c.extend(crc, head)
    pending = bytearray(head + struct.pack("<I", crc) + part_header)
    lsn, left = int(START), total
    page = bytearray()
    for part in parts():
        pending += part
        at = 0
        while left > len(pending) - at >= WAL_PAGE_SIZE_BYTES or left == len(pending) - at > 0:
            if lsn % WAL_PAGE_SIZE_BYTES == 0:
                header = _page_header(lsn, left)
                page += header
                lsn += len(header)
            room = min(WAL_PAGE_SIZE_BYTES - lsn % WAL_PAGE_SIZE_BYTES, len(pending) - at)
            page += pending[at : at + room]
            at, lsn, left = at + room, lsn + room, left - room
        del pending[:at]
        if len(page) >= CHUNK_BYTES:
            yield bytes(page)
            page.clear()
    assert not left
    assert not pending
    yield bytes(page) + bytes(align_lsn(lsn) - lsn)


def _page_header(lsn: int, remaining_bytes: int) -> bytes:
    flags = CONTINUES_RECORD | (LONG_HEADER if lsn % SEGMENT_BYTES == 0 else 0)
    magic = WAL_PAGE_MAGICS[PG_VERSION]
    return pack_page_header(PageHeader(magic, flags, 1, lsn, remaining_bytes, 7, SEGMENT_BYTES))


class CountingTimeline(ValueTimeline):
    """Counts what is put instead of keeping it."""

    kept_size_bytes = 0

    def put_batch(self, batch: PackedBatch, end_lsn: Lsn, prev_record_lsn: Lsn) -> None:
        self.kept_size_bytes += len(batch.entries) + len(batch.data)
        self.last_record_lsn, self.prev_record_lsn = end_lsn, prev_record_lsn


def peak_size_bytes() -> int:
    """The most memory that this process has had resident."""
    return _memory_of_process("VmHWM")


def _memory_of_process(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def main(kind: str, megabytes: str, more: str = "") -> None:
    if more:
        limit = _memory_of_process("VmSize") + (int(more) << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    size_bytes = int(megabytes) << 20
    if kind == "commit":
        info, data = xact.XACT_COMMIT | xact.XACT_HAS_INFO, commit_data(size_bytes)
    else:
        info, data = xact.XACT_PREPARE, prepare_data(size_bytes)
    timeline = CountingTimeline(START, make_state(), PG_VERSION, SEGMENT_BYTES)
    ingest = WalIngest(timeline, read_pages=lambda *_: b"")
    lsn, before = START, 0
    for chunk in record_chunks(info, data):
        before = before or peak_size_bytes()
        ingest.ingest(chunk, lsn)
        lsn = Lsn(lsn + len(chunk))
    assert timeline.last_record_lsn == lsn
    sizes = {
        "record": data[0],
        "kept": timeline.kept_size_bytes,
        "grown": peak_size_bytes() - before,
        "next_xid": ingest.checkpoint_state.checkpoint.next_xid,
    }
    print(json.dumps(sizes))


if __name__ == "__main__":
    main(*sys.argv[1:])
