"""Records out of a stream of WAL bytes: the readable definition.

Bytes arrive in chunks cut anywhere. A record is given when it is complete, padding to 8 included,
and only if its page headers, `xl_prev` and CRC are right. A segment switch is complete at its
segment's end; what lies between is not looked at, as PostgreSQL does not.

Not here: speed. `_native/wal_scanner.pyx` does the same thing (a property test holds the two
together) and is what services use.
"""

from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, Lsn, align_lsn, format_lsn
from excimer.pgformat.wal_record import (
    RECORD_HEADER_SIZE_BYTES,
    RECORD_SIZE_BYTES_MAX,
    Rmgr,
    WalRecord,
    record_crc,
    unpack_record_header,
)
from excimer.pgformat.wal_segment import (
    CONTINUES_RECORD,
    DEFAULT_SEGMENT_SIZE_BYTES,
    OVERWRITES_RECORD,
    InvalidWalError,
    page_header_size,
    unpack_page_header,
)

XLOG_SWITCH = 0x40
_LENGTH_BYTES = 4


class WalReader:
    """Reads records from `start_lsn`, which is the end of one (or the very beginning).

    `previous_lsn` is the start of the record that ends there, 0 when unknown: then the first
    record's `xl_prev` need only lie before it.
    """

    def __init__(
        self,
        start_lsn: int,
        pg_version: int,
        segment_size_bytes: int = DEFAULT_SEGMENT_SIZE_BYTES,
        previous_lsn: int = 0,
    ) -> None:
        self.position = Lsn(start_lsn)
        """LSN of the next byte to feed."""
        self.last_record_start = Lsn(previous_lsn)
        self.last_record_end = Lsn(start_lsn)
        self._pg_version = pg_version
        self._segment_size_bytes = segment_size_bytes
        self._pending = b""
        self._taken = 0
        """Of `_pending`; cut off once a chunk, for cutting copies all that is left."""
        self._lsn = start_lsn  # of the first byte that is left
        self._record_start = start_lsn
        self._record = bytearray()
        self._skip_to = 0
        self._error: InvalidWalError | None = None

    def feed(self, chunk: bytes) -> list[WalRecord]:
        """Records that `chunk` completes. Raises `InvalidWalError`, again at every later call.

        Records completed by the same chunk before the invalid place are counted in
        `last_record_end` but not given.
        """
        if self._error is not None:
            raise self._error
        self._pending = self._pending[self._taken :] + chunk
        self._taken = 0
        self.position = Lsn(self.position + len(chunk))
        records: list[WalRecord] = []
        try:
            while self._step(records):
                pass
        except InvalidWalError as error:
            self._error = error
            raise
        return records

    def _step(self, records: list[WalRecord]) -> bool:
        """Consumes one page header or one page's part of a record; False when bytes are missing."""
        if self._skip_to > self._lsn:
            if not self._consume(self._skip_to - self._lsn):
                return False
            if self._skip_to == self._lsn:
                self._complete(records)
            return True
        if self._lsn % WAL_PAGE_SIZE_BYTES == 0:
            return self._page_header()
        if not self._record:
            self._record_start = self._lsn
        room = WAL_PAGE_SIZE_BYTES - self._lsn % WAL_PAGE_SIZE_BYTES
        wanted = self._wanted_bytes()
        part = self._consume(min(wanted, room))
        self._record += part
        if part and self._wanted_bytes() == 0:
            self._check_record(records)
        return bool(part)

    def _consume(self, size: int) -> bytes:
        """So many bytes, or all that are left."""
        taken = self._pending[self._taken : self._taken + size]
        self._taken += len(taken)
        self._lsn += len(taken)
        return taken

    def _wanted_bytes(self) -> int:
        """Bytes still missing from the record: first those of its length, then all of it, padded."""
        if len(self._record) < _LENGTH_BYTES:
            return _LENGTH_BYTES - len(self._record)
        total = int.from_bytes(self._record[:_LENGTH_BYTES], "little")
        if not RECORD_HEADER_SIZE_BYTES <= total <= RECORD_SIZE_BYTES_MAX:
            raise InvalidWalError(self._record_start, f"record length {total} is not possible")
        return align_lsn(total) - len(self._record)

    def _page_header(self) -> bool:
        size = page_header_size(self._lsn, self._segment_size_bytes)
        content = self._pending[self._taken : self._taken + size]
        if len(content) < size:
            return False
        header = unpack_page_header(content, self._lsn, self._pg_version, self._segment_size_bytes)
        if self._record and header.info & OVERWRITES_RECORD:
            self._record.clear()
        expected = 0
        if self._record:
            expected = int.from_bytes(self._record[:_LENGTH_BYTES], "little") - len(self._record)
        continues = bool(header.info & CONTINUES_RECORD)
        if continues != (expected > 0) or header.remaining_bytes != expected:
            raise InvalidWalError(
                self._lsn, f"page continues a record by {header.remaining_bytes} bytes, not {expected}"
            )
        self._consume(size)
        return True

    def _check_record(self, records: list[WalRecord]) -> None:
        header = unpack_record_header(bytes(self._record[:RECORD_HEADER_SIZE_BYTES]))
        start = self._record_start
        previous = self.last_record_start
        if header.previous_lsn != previous if previous else header.previous_lsn >= start:
            raise InvalidWalError(
                start, f"record follows {format_lsn(header.previous_lsn)}, not {format_lsn(previous)}"
            )
        if record_crc(bytes(self._record[: header.total_bytes])) != header.crc:
            raise InvalidWalError(start, "record's checksum is wrong")
        is_switch = header.rmgr == Rmgr.XLOG and header.info & 0xF0 == XLOG_SWITCH
        if is_switch and self._lsn % self._segment_size_bytes:
            self._skip_to = self._lsn + -self._lsn % self._segment_size_bytes
        else:
            self._complete(records)

    def _complete(self, records: list[WalRecord]) -> None:
        total = int.from_bytes(self._record[:_LENGTH_BYTES], "little")
        records.append(WalRecord(Lsn(self._record_start), Lsn(self._lsn), bytes(self._record[:total])))
        self.last_record_start = Lsn(self._record_start)
        self.last_record_end = Lsn(self._lsn)
        self._record.clear()
        self._skip_to = 0
