"""Builds WAL byte by byte: records with right lengths, links and CRCs, laid out in pages."""

import struct

from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, Lsn, align_lsn
from excimer.pgformat.control_file import WAL_PAGE_MAGICS
from excimer.pgformat.wal_record import record_crc
from excimer.pgformat.wal_segment import CONTINUES_RECORD, LONG_HEADER, PageHeader, pack_page_header

SYSTEM_ID = 7_000_000_000_000_000_001
BLOCK_ID_DATA_LONG = 254
BLOCK_ID_DATA_SHORT = 255


def build_main_data(data: bytes) -> bytes:
    """The header of main data, to be followed by block data and then by the data itself."""
    if not data:
        return b""
    if len(data) < 256:
        return bytes([BLOCK_ID_DATA_SHORT, len(data)])
    return struct.pack("<BI", BLOCK_ID_DATA_LONG, len(data))


def build_block(
    block_id: int,
    relation: tuple[int, int, int] | None,
    block: int,
    *,
    fork: int = 0,
    flags: int = 0,
    data: bytes = b"",
    image: bytes = b"",
) -> tuple[bytes, bytes]:
    """A block reference: its header and its data. `image` is an uncompressed whole page."""
    flags |= fork | (0x20 if data else 0) | (0x10 if image else 0) | (0 if relation else 0x80)
    header = struct.pack("<BBH", block_id, flags, len(data))
    if image:
        header += struct.pack("<HHB", len(image), 0, 0x02)
    if relation:
        header += struct.pack("<III", *relation)
    return header + struct.pack("<I", block), image + data


class WalBuilder:
    """A WAL stream from `start_lsn` on; `stream` holds its bytes, page headers included."""

    def __init__(
        self,
        start_lsn: int,
        pg_version: int = 18,
        segment_size_bytes: int = 1 << 20,
        previous_lsn: int = 0,
    ) -> None:
        self.start_lsn = start_lsn
        self.pg_version = pg_version
        self.segment_size_bytes = segment_size_bytes
        self.previous_lsn = previous_lsn
        self.stream = bytearray()
        self.ends: list[Lsn] = []
        self.starts: list[Lsn] = []

    @property
    def lsn(self) -> int:
        return self.start_lsn + len(self.stream)

    def add(
        self,
        rmgr: int,
        info: int,
        main_data: bytes = b"",
        *,
        xid: int = 0,
        blocks: tuple[tuple[bytes, bytes], ...] = (),
        origin: int | None = None,
    ) -> Lsn:
        """Appends a record and returns its end."""
        body = b"".join(header for header, _ in blocks)
        if origin is not None:
            body += struct.pack("<BH", 253, origin)
        body += build_main_data(main_data)
        body += b"".join(data for _, data in blocks) + main_data
        total = 24 + len(body)
        head = struct.pack("<IIQBB2x", total, xid, self.previous_lsn, info, rmgr)
        crc = record_crc(head + bytes(4) + body)
        self._lay_out(head + struct.pack("<I", crc) + body)
        if rmgr == 0 and info & 0xF0 == 0x40:
            self.stream += bytes(-self.lsn % self.segment_size_bytes)
        self.ends.append(Lsn(self.lsn))
        return Lsn(self.lsn)

    def _lay_out(self, record: bytes) -> None:
        if self.lsn % WAL_PAGE_SIZE_BYTES == 0:
            self._page_header(0)
        self.previous_lsn = self.lsn
        self.starts.append(Lsn(self.lsn))
        rest = record
        while rest:
            if self.lsn % WAL_PAGE_SIZE_BYTES == 0:
                self._page_header(len(rest))
            room = WAL_PAGE_SIZE_BYTES - self.lsn % WAL_PAGE_SIZE_BYTES
            self.stream += rest[:room]
            rest = rest[room:]
        self.stream += bytes(align_lsn(self.lsn) - self.lsn)

    def _page_header(self, remaining_bytes: int) -> None:
        info = CONTINUES_RECORD if remaining_bytes else 0
        if self.lsn % self.segment_size_bytes == 0:
            info |= LONG_HEADER
        magic = WAL_PAGE_MAGICS[self.pg_version]
        self.stream += pack_page_header(
            PageHeader(magic, info, 1, self.lsn, remaining_bytes, SYSTEM_ID, self.segment_size_bytes)
        )
