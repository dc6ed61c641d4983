"""Chains of records per page, taken from a stock server's WAL, and the server's own pages to compare with."""

import struct
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from excimer.base.keys import BLOCK_SIZE_BYTES, Fork, Relation, relation_path
from excimer.base.lsn import Lsn
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.wal_reader import WalReader
from excimer.pgformat.wal_record import BlockReference, Rmgr, WalRecord, decode_record

SEGMENT_SIZE_BYTES = 1 << 20
"""Small segments, so that a test's WAL directory is small."""

_SMGR_CREATE = 0x10
_SMGR_TRUNCATE = 0x20


class PageId(NamedTuple):
    relation: Relation
    fork: int
    block: int


class Chain(NamedTuple):
    """All records of one page since the base copy was made, or since its relation was."""

    records: list[WalRecord]
    is_new: bool


def read_wal(data_dir: Path, start_lsn: int, version: int) -> list[WalRecord]:
    """All records from `start_lsn` to the end of a stopped server's WAL."""
    reader = WalReader(start_lsn, version, SEGMENT_SIZE_BYTES)
    records: list[WalRecord] = []
    number, offset = divmod(start_lsn, SEGMENT_SIZE_BYTES)
    end = ControlFile.unpack((data_dir / "global/pg_control").read_bytes(), version).checkpoint_lsn
    per_id = 0x1_0000_0000 // SEGMENT_SIZE_BYTES
    while number * SEGMENT_SIZE_BYTES + offset < end:
        name = f"00000001{number // per_id:08X}{number % per_id:08X}"
        segment = (data_dir / "pg_wal" / name).read_bytes()
        # The server stops with its checkpoint record: what follows in the file is left over from before.
        stop = min(SEGMENT_SIZE_BYTES, end - number * SEGMENT_SIZE_BYTES)
        for place in range(offset, stop, 1 << 14):
            records += reader.feed(segment[place : min(place + (1 << 14), stop)])
        number, offset = number + 1, 0
    return records


def collect_chains(records: list[WalRecord], version: int) -> dict[PageId, Chain]:
    """Chains of all pages except those that a truncation cut."""
    chains: dict[PageId, list[WalRecord]] = defaultdict(list)
    created: set[Relation] = set()
    truncated: dict[Relation, Lsn] = {}
    for record in records:
        decoded = decode_record(record.data, version)
        if decoded.header.rmgr == Rmgr.SMGR:
            operation = decoded.header.info & 0xF0
            if operation == _SMGR_CREATE:
                created.add(Relation(*struct.unpack_from("<III", decoded.main_data)))
            elif operation == _SMGR_TRUNCATE:
                truncated[Relation(*struct.unpack_from("<III", decoded.main_data, 4))] = record.start_lsn
            continue
        for block in decoded.blocks:
            chains[PageId(block.relation, block.fork, block.block)].append(record)
        if decoded.header.rmgr in (Rmgr.HEAP, Rmgr.HEAP2):
            _add_map_pages(chains, decoded.blocks, record)
    return {
        page: Chain(chain, page.relation in created)
        for page, chain in chains.items()
        if page.relation not in truncated
    }


HEAP_BLOCKS_PER_MAP_PAGE = (BLOCK_SIZE_BYTES - 24) * 4


def _add_map_pages(
    chains: dict[PageId, list[WalRecord]], blocks: tuple[BlockReference, ...], record: WalRecord
) -> None:
    """Heap records clear bits of the visibility map without naming its page."""
    for block in blocks:
        if block.fork == Fork.MAIN:
            page = PageId(block.relation, Fork.VM, block.block // HEAP_BLOCKS_PER_MAP_PAGE)
            if not chains[page] or chains[page][-1] is not record:
                chains[page].append(record)


class PageFiles:
    """Pages of a data directory whose server is not running."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._files: dict[tuple[Relation, int], bytes | None] = {}

    def page(self, page: PageId) -> bytes | None:
        """None when the file is not there or shorter."""
        key = (page.relation, page.fork)
        if key not in self._files:
            path = self._data_dir / relation_path(page.relation, page.fork)
            self._files[key] = path.read_bytes() if path.exists() else None
        content = self._files[key]
        start = page.block * BLOCK_SIZE_BYTES
        if content is None or len(content) < start + BLOCK_SIZE_BYTES:
            return None
        return content[start : start + BLOCK_SIZE_BYTES]
