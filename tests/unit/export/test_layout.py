"""What an exported directory holds, planned from a basebackup."""

import msgspec
import pytest

from excimer.base.lsn import Lsn
from excimer.export.cluster_settings import postgresql_conf
from excimer.export.layout import plan_export
from excimer.pgformat.basebackup import (
    Basebackup,
    RelationFork,
    SlruSegment,
    pack_relation_forks,
    pack_slru_segments,
)
from excimer.pgformat.wal_prefix import build_wal_prefix, wal_segment_file_name
from tests.kit.control_files import CHECKPOINT, CONTROL, SEGMENT

PAGE = 8192


def _backup(lsn: int, *, pg_version: int = 18, forks: list[RelationFork] | None = None) -> Basebackup:
    return Basebackup(
        pg_version=pg_version,
        lsn=lsn,
        prev_lsn=0,
        control_file=CONTROL.pack(),
        checkpoint=CHECKPOINT.pack(),
        files=[("base/5/PG_VERSION", b"18\n"), ("pg_twophase/0000000000000001", b"state")],
        relation_forks=pack_relation_forks(forks or []),
        slru_segments=pack_slru_segments([SlruSegment(1, 0x1A, 3)]),
        pages=[],
    )


@pytest.mark.parametrize(
    "end_lsn", [3 * SEGMENT + n for n in (0, 64, 80, 120, 160, 200, PAGE, PAGE + 64, 5000)]
)
def test_wal_is_the_prefix_whatever_boundary_it_crosses(end_lsn: int) -> None:
    layout = plan_export(_backup(end_lsn), now_s=5)
    prefix = build_wal_prefix(
        pg_version=18, template=CONTROL, checkpoint=CHECKPOINT, end_lsn=Lsn(end_lsn), prev_lsn=Lsn(0), now_s=5
    )
    wanted: dict[str, bytearray] = {}
    for lsn, data in prefix.chunks:  # a later one overwrites what an earlier one wrote
        content = wanted.setdefault(f"pg_wal/{wal_segment_file_name(lsn, SEGMENT)}", bytearray(SEGMENT))
        content[lsn % SEGMENT : lsn % SEGMENT + len(data)] = data
    found: dict[str, bytearray] = {}
    for segment in layout.wal:
        content = found[segment.path] = bytearray()
        for offset, data in segment.chunks:
            assert offset >= len(content), "chunks are in order and apart"
            content += bytes(offset - len(content)) + data
        content += bytes(segment.size_bytes - len(content))
    assert found == wanted


def test_files_folders_and_pages() -> None:
    big = 131_072 + 10
    forks = [
        RelationFork(1663, 5, 100, 0, big),
        RelationFork(1663, 5, 100, 1, 0),
        RelationFork(1664, 0, 7, 3, 1),
    ]
    layout = plan_export(_backup(3 * SEGMENT + 800, forks=forks), now_s=5)
    sizes = {file.path: file.blocks for file in layout.page_files}
    assert sizes == {
        "base/5/100": 131_072,
        "base/5/100.1": 10,
        "base/5/100_fsm": 0,
        "global/7_init": 1,
        "pg_multixact/offsets/001A": 3,
    }
    assert layout.page_count == big + 1 + 3
    names = [name for name, _ in layout.files]
    assert {"PG_VERSION", "postgresql.conf", "pg_hba.conf", "base/5/PG_VERSION"} <= set(names)
    assert "global/pg_control" not in names, "it comes last, apart"
    assert layout.directories.index("base") < layout.directories.index("base/5")
    assert "pg_wal/summaries" in layout.directories


def test_settings_that_the_history_needs_travel() -> None:

    control = msgspec.structs.replace(CONTROL, max_prepared_xacts=7, track_commit_timestamp=True, wal_level=2)
    backup = msgspec.structs.replace(_backup(3 * SEGMENT + 800), control_file=control.pack())
    text = dict(plan_export(backup, now_s=5).files)["postgresql.conf"].decode()
    assert "max_prepared_transactions = 7\n" in text
    assert "track_commit_timestamp = on\n" in text
    assert "wal_level = logical\n" in text
    plain = dict(plan_export(_backup(3 * SEGMENT + 800), now_s=5).files)["postgresql.conf"].decode()
    assert "prepared" not in plain
    assert "\nmax_logical_replication_workers = 0\n" in plain, "the branch goes on with its subscriptions"


@pytest.mark.parametrize(
    ("pg_version", "name"), [(17, "max_replication_slots"), (18, "max_active_replication_origins")]
)
def test_there_is_room_for_every_replication_origin(pg_version: int, name: str) -> None:
    text = postgresql_conf(CONTROL, Lsn(5), pg_version=pg_version, origin_count=12)
    assert f"\n{name} = 12\n" in text
    assert name not in postgresql_conf(CONTROL, Lsn(5), pg_version=pg_version, origin_count=10)
