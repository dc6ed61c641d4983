"""What a basebackup contains: decided from sizes, maps and a checkpoint, without reading a page.

A compute starts without its pages and fetches them when it first reads them. Three groups travel
inline all the same:

* what a **commit may write**: a page that is missing inside a critical section is a PANIC, so the
  transaction status pages of the next xid and of every prepared transaction must be there;
* every **init fork**, because start-up copies them all;
* the **start-up working set** of catalogs, to save some thirty round trips (experiment "whole").

Not here: reading anything (`basebackup_job`), the bytes (`pgformat.basebackup`).
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from excimer.base.keys import (
    DEFAULT_TABLESPACE,
    GLOBAL_TABLESPACE,
    SLRU_SEGMENT_BLOCKS,
    Fork,
    Relation,
    Slru,
    parse_key,
    relation_block_key,
)
from excimer.pgformat.basebackup import RelationFork, SlruSegment
from excimer.pgformat.checkpoint import CheckPoint
from excimer.pgformat.slru import ENTRIES_PER_PAGE, MEMBERS_PER_PAGE, OFFSETS_PER_PAGE, page_key
from excimer.pgformat.two_phase import PreparedTransaction
from excimer.storage.format.relation_size import size_blocks

BUILT_IN_TABLESPACES = frozenset((DEFAULT_TABLESPACE, GLOBAL_TABLESPACE))

RUN_BLOCKS_MAX = 64
"""Most blocks read in one call while a basebackup is built."""

INIT_FORK_BLOCKS_MAX = 64
"""Of an init fork, which has one or two; what more a hostile one claims is fetched when it is read."""

WARM_DATABASES_MAX = 8
"""Databases whose catalogs travel inline; the start-up working set of one is about 1 MiB."""

TEMPLATE_DATABASES = frozenset((1, 4))
"""template1 and (from 15 on) template0: nobody connects there at start."""

_XID_MASK = 0xFFFFFFFF

GLOBAL_CATALOG_BLOCKS: Mapping[int, int] = {
    1260: 4,  # pg_authid
    1262: 4,  # pg_database
    2672: 4,  # pg_database_oid_index
    2676: 4,  # pg_authid_rolname_index
    2677: 4,  # pg_authid_oid_index
    2965: 4,  # pg_db_role_setting_databaseid_rol_index
    2671: 4,  # pg_database_datname_index
}
DATABASE_CATALOG_BLOCKS: Mapping[int, int] = {
    1259: 12,  # pg_class
    1249: 60,  # pg_attribute
    1247: 4,  # pg_type
    2610: 8,  # pg_index
    2601: 1,  # pg_am
    2616: 4,  # pg_opclass
    2603: 8,  # pg_amproc
    2655: 6,  # pg_amproc_fam_proc_index
    2659: 16,  # pg_attribute_relid_attnum_index
    2662: 6,  # pg_class_oid_index
    2663: 6,  # pg_class_relname_nsp_index
    2679: 4,  # pg_index_indexrelid_index
    2687: 4,  # pg_opclass_oid_index
    2703: 4,  # pg_type_oid_index
}


class PageRun(NamedTuple):
    """Adjacent blocks from `key` on."""

    key: bytes
    blocks: int


class Manifest(NamedTuple):
    """Every file of a timeline at an LSN, in key order."""

    relation_forks: list[RelationFork]
    slru_segments: list[SlruSegment]


def plan_manifest(
    relation_sizes: Iterable[tuple[bytes, bytes]], slru_sizes: Iterable[tuple[bytes, bytes]]
) -> Manifest:
    """The manifest from live RELATION_SIZE and SLRU_SIZE keys and their values.

    Forks of unlogged relations other than their init fork are left out: start-up resets them. So is
    what lies in user tablespaces, which computes do not have.
    """
    forks = [
        RelationFork(spc, db, rel, fork, size_blocks(value))
        for (_, spc, db, rel, fork, _), value in ((parse_key(key), value) for key, value in relation_sizes)
        if spc in BUILT_IN_TABLESPACES
    ]
    unlogged = {fork[:3] for fork in forks if fork.fork == Fork.INIT}
    if unlogged:
        forks = [fork for fork in forks if fork.fork == Fork.INIT or fork[:3] not in unlogged]
    segments = [
        SlruSegment(fields.spc, fields.rel, size_blocks(value))
        for fields, value in ((parse_key(key), value) for key, value in slru_sizes)
    ]
    return Manifest(forks, segments)


def plan_pages(
    manifest: Manifest,
    maps: Mapping[tuple[int, int], Mapping[int, int]],
    checkpoint: CheckPoint,
    prepared: Sequence[PreparedTransaction],
) -> list[PageRun]:
    """The runs to send inline; each lies within an existing file.

    `maps` holds each database's parsed pg_filenode.map by (spc, db).
    """
    sizes = {fork[:4]: fork.blocks for fork in manifest.relation_forks}
    runs = list(_slru_runs(manifest.slru_segments, commit_pages(checkpoint, prepared)))
    wanted = {
        fork[:4]: min(fork.blocks, INIT_FORK_BLOCKS_MAX)
        for fork in manifest.relation_forks
        if fork.fork == Fork.INIT
    }
    for spc, db, catalogs in _warm_databases(maps):
        mapping = maps[spc, db]
        for oid, blocks in catalogs.items():
            file = (spc, db, mapping.get(oid, oid), Fork.MAIN)
            if file in sizes:
                wanted[file] = min(blocks, sizes[file])
    for (spc, db, rel, fork), blocks in sorted(wanted.items()):
        runs += [
            PageRun(
                relation_block_key(Relation(spc, db, rel), fork, start), min(RUN_BLOCKS_MAX, blocks - start)
            )
            for start in range(0, blocks, RUN_BLOCKS_MAX)
        ]
    return runs


def _warm_databases(
    maps: Mapping[tuple[int, int], object],
) -> Iterable[tuple[int, int, Mapping[int, int]]]:
    if (GLOBAL_TABLESPACE, 0) in maps:
        yield GLOBAL_TABLESPACE, 0, GLOBAL_CATALOG_BLOCKS
    databases = sorted(db for spc, db in maps if spc == DEFAULT_TABLESPACE and db not in TEMPLATE_DATABASES)
    for db in databases[:WARM_DATABASES_MAX]:
        yield DEFAULT_TABLESPACE, db, DATABASE_CATALOG_BLOCKS


def commit_pages(checkpoint: CheckPoint, prepared: Sequence[PreparedTransaction]) -> set[tuple[Slru, int]]:
    """SLRU pages (by number over all segments) that the first commits of a compute may write."""
    next_xid = checkpoint.next_xid & _XID_MASK
    xids = {next_xid, (next_xid - 1) & _XID_MASK}
    for transaction in prepared:
        xids.update((transaction.xid, *transaction.subxids))
    pages = {(slru, xid // ENTRIES_PER_PAGE[slru]) for slru in (Slru.XACT, Slru.COMMIT_TS) for xid in xids}
    for multi in (checkpoint.next_multi - 1, checkpoint.next_multi, checkpoint.next_multi + 1):
        pages.add((Slru.MULTIXACT_OFFSETS, (multi & _XID_MASK) // OFFSETS_PER_PAGE))
    for member in (checkpoint.next_multi_offset - 1, checkpoint.next_multi_offset):
        pages.add((Slru.MULTIXACT_MEMBERS, (member & _XID_MASK) // MEMBERS_PER_PAGE))
    return pages


def _slru_runs(segments: Iterable[SlruSegment], pages: set[tuple[Slru, int]]) -> Iterable[PageRun]:
    """Runs of the pages that exist; one that does not is made by the compute itself."""
    sizes = {(segment.slru, segment.segment): segment.blocks for segment in segments}
    existing = sorted(
        (slru, page)
        for slru, page in pages
        if page % SLRU_SEGMENT_BLOCKS < sizes.get((slru, page // SLRU_SEGMENT_BLOCKS), 0)
    )
    for _, group in groupby(
        enumerate(existing),
        key=lambda item: (item[1][0], item[1][1] - item[0], item[1][1] // SLRU_SEGMENT_BLOCKS),
    ):
        run = [page for _, page in group]
        slru, first = run[0]
        yield PageRun(page_key(slru, first), len(run))
