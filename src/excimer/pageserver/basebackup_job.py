"""Builds a basebackup: reads what `basebackup_plan` decided from the store, at one LSN.

Metadata is read in a thread, in six range scans; pages in batches of adjacent blocks, several at a
time. The result is a MessagePack value in a zstd frame, made in a thread too: nothing here holds the
event loop for more than a few hundred microseconds.

Not here: waiting for the LSN, and which checkpoint fields hold there (`tenants`).
"""

import asyncio
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import zstandard

from excimer.base.errors import CorruptionError
from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    GLOBAL_TABLESPACE,
    KeyKind,
    kind_range,
    make_key,
    parse_key,
)
from excimer.base.lsn import Lsn, format_lsn
from excimer.pageserver.basebackup_plan import (
    BUILT_IN_TABLESPACES,
    Manifest,
    PageRun,
    plan_manifest,
    plan_pages,
)
from excimer.pgformat.basebackup import (
    Basebackup,
    InlinePage,
    encode_basebackup,
    pack_relation_forks,
    pack_slru_segments,
)
from excimer.pgformat.checkpoint import CheckPoint
from excimer.pgformat.relation_map import parse_relation_map
from excimer.pgformat.replication_origins import ORIGINS_PATH, OriginProgress, pack_origins
from excimer.pgformat.two_phase import PreparedTransaction, parse_two_phase, two_phase_path

COMPRESSION_LEVEL = 1
CONCURRENT_RUNS_MAX = 16


class BasebackupError(CorruptionError):
    """The store lacks something without which no compute can start."""


class BasebackupSource(Protocol):
    """The part of `excimer.storage.engine.timeline.Timeline` that a basebackup reads."""

    @property
    def pg_version(self) -> int: ...
    def get_value(self, key: bytes, lsn: Lsn, /) -> bytes | None: ...
    def scan(self, start: bytes, end: bytes, lsn: Lsn, /) -> Sequence[tuple[bytes, bytes]]: ...
    async def get_pages(self, key: bytes, count: int, lsn: Lsn, /) -> bytes: ...


class BasebackupPoint(NamedTuple):
    """Where in the WAL a basebackup is, and what a checkpoint there would say."""

    lsn: Lsn
    prev_lsn: Lsn
    """Start of the record that ends at `lsn`; 0 when unknown."""
    control_file: bytes
    checkpoint: CheckPoint


class _Metadata(NamedTuple):
    manifest: Manifest
    files: list[tuple[str, bytes]]
    runs: list[PageRun]


async def build_basebackup(source: BasebackupSource, point: BasebackupPoint) -> bytes:
    """The compressed basebackup. Raises what the store raises, and `BasebackupError`."""
    metadata = await asyncio.to_thread(_read_metadata, source, point)
    pages = await _read_pages(source, metadata.runs, point.lsn)
    return await asyncio.to_thread(_encode, source.pg_version, point, metadata, pages)


def _read_metadata(source: BasebackupSource, point: BasebackupPoint) -> _Metadata:
    lsn = point.lsn
    manifest = plan_manifest(
        source.scan(*kind_range(KeyKind.RELATION_SIZE), lsn), source.scan(*kind_range(KeyKind.SLRU_SIZE), lsn)
    )
    prepared: list[PreparedTransaction] = []
    files: list[tuple[str, bytes]] = []
    maps: dict[tuple[int, int], dict[int, int]] = {}
    for key, value in source.scan(*kind_range(KeyKind.RELATION_MAP), lsn):
        _, spc, db, *_ = parse_key(key)
        if spc in BUILT_IN_TABLESPACES:
            maps[spc, db] = parse_relation_map(value)
            files.append((f"{_directory(spc, db)}/pg_filenode.map", value))
    if (GLOBAL_TABLESPACE, 0) not in maps:
        raise BasebackupError(f"no global/pg_filenode.map is known at {format_lsn(lsn)}")
    for key, value in source.scan(*kind_range(KeyKind.DATABASE), lsn):
        _, spc, db, *_ = parse_key(key)
        if spc in BUILT_IN_TABLESPACES:
            files.append((f"{_directory(spc, db)}/PG_VERSION", value))
    for key, value in source.scan(*kind_range(KeyKind.TWO_PHASE), lsn):
        fields = parse_key(key)
        files.append((two_phase_path(fields.db << 32 | fields.rel, source.pg_version), value))
        prepared.append(parse_two_phase(value, source.pg_version))
    origins = source.scan(*kind_range(KeyKind.ORIGIN), lsn)
    progress = (
        OriginProgress(parse_key(key).rel, Lsn(int.from_bytes(value, "little"))) for key, value in origins
    )
    files.append((ORIGINS_PATH, pack_origins(progress)))
    return _Metadata(manifest, files, plan_pages(manifest, maps, point.checkpoint, prepared))


def _directory(spc: int, db: int) -> str:
    return "global" if spc == GLOBAL_TABLESPACE else f"base/{db}"


async def _read_pages(source: BasebackupSource, runs: list[PageRun], lsn: Lsn) -> list[InlinePage]:
    pages: list[InlinePage] = []
    remaining = iter(runs)
    while batch := list(islice(remaining, CONCURRENT_RUNS_MAX)):
        for run, data in zip(
            batch, await asyncio.gather(*(source.get_pages(*run, lsn) for run in batch)), strict=True
        ):
            pages.extend(_inline_pages(run, data))
    return pages


def _inline_pages(run: PageRun, data: bytes) -> Iterator[InlinePage]:
    kind, spc, db, rel, fork, first = parse_key(run.key)
    for index in range(run.blocks):
        start = index * BLOCK_SIZE_BYTES
        key = make_key(kind, spc, db, rel, fork, first + index)
        yield InlinePage(key, data[start : start + BLOCK_SIZE_BYTES])


def _encode(pg_version: int, point: BasebackupPoint, metadata: _Metadata, pages: list[InlinePage]) -> bytes:
    backup = Basebackup(
        pg_version=pg_version,
        lsn=point.lsn,
        prev_lsn=point.prev_lsn,
        control_file=point.control_file,
        checkpoint=point.checkpoint.pack(),
        files=metadata.files,
        relation_forks=pack_relation_forks(metadata.manifest.relation_forks),
        slru_segments=pack_slru_segments(metadata.manifest.slru_segments),
        pages=pages,
    )
    return zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress(encode_basebackup(backup))
