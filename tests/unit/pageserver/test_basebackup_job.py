"""What a basebackup costs the store: reads of adjacent pages, a few at a time."""

import asyncio

import zstandard

from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES, origin_key
from excimer.base.lsn import Lsn
from excimer.pageserver.basebackup_job import CONCURRENT_RUNS_MAX, BasebackupPoint, build_basebackup
from excimer.pageserver.bootstrap import initdb_template
from excimer.pageserver.initdb_import import import_initdb
from excimer.pgformat.basebackup import decode_basebackup
from excimer.pgformat.replication_origins import ORIGINS_PATH, parse_origins
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.memory_timeline import MemoryTimeline

SCANS = 6
"""Sizes of relations and of SLRU segments, relation maps, databases, prepared transactions, origins."""
PAGES_PER_READ_MIN = 3


class CountedTimeline(MemoryTimeline):
    scans = 0

    def scan(self, start: bytes, end: bytes, lsn: Lsn) -> list[tuple[bytes, bytes]]:
        self.scans += 1
        return super().scan(start, end, lsn)


def test_pages_are_read_in_runs_and_all_else_in_a_few_scans() -> None:
    build = build_of(NEWEST_VERSION)
    cluster = import_initdb(initdb_template(build), build.version)
    timeline = CountedTimeline(TenantId("aa" * 16), TimelineId("bb" * 16), build.version)
    for key, value in cluster.images:
        timeline.put(key, cluster.end_lsn, value)
    timeline.put(origin_key(3), cluster.end_lsn, (0xA_0000_9000).to_bytes(8, "little"))
    point = BasebackupPoint(
        cluster.end_lsn,
        cluster.prev_record_lsn,
        cluster.control_file.pack(),
        cluster.control_file.checkpoint,
    )
    compressed = asyncio.run(build_basebackup(timeline, point))
    backup = decode_basebackup(zstandard.ZstdDecompressor().decompress(compressed, 1 << 30))
    assert all(len(page.page) == BLOCK_SIZE_BYTES for page in backup.pages)
    assert sum(count for _, count, _ in timeline.reads) == len(backup.pages) > 100
    assert len(timeline.reads) * PAGES_PER_READ_MIN < len(backup.pages)
    assert timeline.reading_most <= CONCURRENT_RUNS_MAX
    assert timeline.scans == SCANS
    assert backup.origin_count == 1
    assert parse_origins(dict(backup.files)[ORIGINS_PATH]) == [(3, 0xA_0000_9000)]
