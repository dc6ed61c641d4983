"""Carries out one round of a `CompactionPlan`: reads pages as any reader does, writes them as images.

A page that cannot be rebuilt is left out and logged; the round is then written as covering nothing,
so that a read of that page still meets its damaged history and fails, rather than an older page.

Not here: deciding on a round (`excimer.storage.plan.compaction_plan`), committing it
(`Timeline.compact`).
"""

import heapq
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from excimer._native.page_chains import MalformedValueError, key_runs
from excimer.base.errors import CorruptionError
from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    MAX_KEY,
    MIN_KEY,
    KeyKind,
    make_key,
    parse_key,
)
from excimer.base.lsn import MAX_LSN, Lsn
from excimer.storage.engine.disk_layer import DiskLayer
from excimer.storage.engine.layer_stack import LayerHome
from excimer.storage.engine.layer_writing import image_value, write_images
from excimer.storage.engine.page_reads import PageRead, PageSource, block_key, read_size_blocks
from excimer.storage.engine.value_reads import read_value, scan_values
from excimer.storage.format.layer_file import DamagedLayerError
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.format.values import Value, ValueKind
from excimer.storage.plan.compaction_plan import CompactionPlan

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

RUN_BLOCKS_MAX = 128
"""Pages read at once."""

BLOCK_KINDS = (KeyKind.RELATION_BLOCK, KeyKind.SLRU_BLOCK)
SIZE_KINDS = {KeyKind.RELATION_SIZE: KeyKind.RELATION_BLOCK, KeyKind.SLRU_SIZE: KeyKind.SLRU_BLOCK}


class KeyRun(NamedTuple):
    """`blocks` adjacent blocks, or one key of another kind."""

    first_key: bytes
    blocks: int


class CompactionSource(PageSource, Protocol):
    home: LayerHome
    generation: int

    async def in_thread(self, function: Callable[[], _Result], /) -> _Result: ...


async def run_compaction(source: CompactionSource, plan: CompactionPlan) -> list[LayerDescription]:
    """The round's image layers as local files, not yet uploaded. Raises as reads and writes do."""
    runs = await source.in_thread(partial(_plan_runs, source, plan))
    written: list[LayerDescription] = []
    values: list[Value] = []
    size = 0
    covers_after_lsn: int | None = plan.covers_after_lsn
    limit = source.home.context.settings.image_layer_size_bytes
    for run in runs:
        try:
            taken = await _read_run(source, run, plan.lsn)
        except DamagedLayerError:
            raise
        except CorruptionError as error:
            _log.error("compaction of timeline %s leaves out a run: %s", source.home.timeline_id, error)
            covers_after_lsn = None
            continue
        values += taken
        size += sum(len(value.payload) for value in taken)
        if size >= limit:
            written += await source.in_thread(partial(_write, source, values, plan.lsn))
            values, size = [], 0
    if values:
        written += await source.in_thread(partial(_write, source, values, plan.lsn))
    return [msgspec.structs.replace(layer, covers_after_lsn=covers_after_lsn) for layer in written]


def _write(source: CompactionSource, values: list[Value], lsn: Lsn) -> list[LayerDescription]:
    return write_images(source.home, values, lsn, source.generation, covers_after_lsn=None)


async def _read_run(source: CompactionSource, run: KeyRun, lsn: Lsn) -> list[Value]:
    """Images of a run's keys; none of blocks that no longer exist."""
    fields = parse_key(run.first_key)
    if fields.kind not in BLOCK_KINDS:
        value = await source.in_thread(partial(read_value, source, run.first_key, lsn))
        if value is None:
            return [Value(run.first_key, lsn, ValueKind.TOMBSTONE, True, b"")]
        return [image_value(run.first_key, lsn, value)]
    size = await source.in_thread(partial(read_size_blocks, source, run.first_key, lsn))
    count = min(run.blocks, (size or 0) - fields.block)
    if count <= 0:
        return []
    pages = await PageRead(source, run.first_key, count, lsn).run()
    return [
        image_value(
            block_key(run.first_key, at), lsn, pages[at * BLOCK_SIZE_BYTES : (at + 1) * BLOCK_SIZE_BYTES]
        )
        for at in range(count)
    ]


def _plan_runs(source: CompactionSource, plan: CompactionPlan) -> list[KeyRun]:
    if plan.covers_after_lsn == 0:
        return list(split_runs(_live_runs(source, plan.lsn)))
    files = [source.stack.files[layer.name] for layer in plan.sources]
    return list(split_runs(merge_runs(heapq.merge(*(_changed_runs(file) for file in files)))))


def _changed_runs(file: DiskLayer) -> Iterator[KeyRun]:
    for block in file.blocks(MIN_KEY, MAX_KEY, 0, MAX_LSN, cached=False):
        try:
            yield from (KeyRun(*run) for run in key_runs(block))
        except MalformedValueError as error:
            raise DamagedLayerError(str(file.local_path), str(error)) from error


def _live_runs(source: CompactionSource, lsn: Lsn) -> Iterator[KeyRun]:
    """Every key alive at `lsn`, in order: blocks by their relations' sizes, and all other kinds."""
    runs = []
    for start, end in _METADATA_RANGES:
        for key, value in scan_values(source, start, end, lsn):
            runs.append(KeyRun(key, 1))
            fields = parse_key(key)
            block_kind = SIZE_KINDS.get(KeyKind(fields.kind))
            blocks = int.from_bytes(value, "little") if block_kind is not None else 0
            if block_kind is not None and blocks:
                runs.append(KeyRun(make_key(block_kind, *fields[1:5]), blocks))
    return iter(sorted(runs))


_METADATA_RANGES = (
    (make_key(KeyKind.RELATION_SIZE), make_key(KeyKind.SLRU_BLOCK)),
    (make_key(KeyKind.SLRU_SIZE), MAX_KEY),
)


def merge_runs(runs: Iterable[KeyRun]) -> Iterator[KeyRun]:
    """Sorted runs that may overlap or touch, as runs that do neither."""
    pending: KeyRun | None = None
    for run in runs:
        if pending is None:
            pending = run
            continue
        gap = _distance(pending.first_key, run.first_key)
        if gap is not None and gap <= pending.blocks:
            pending = KeyRun(pending.first_key, max(pending.blocks, gap + run.blocks))
        else:
            yield pending
            pending = run
    if pending is not None:
        yield pending


def split_runs(runs: Iterable[KeyRun]) -> Iterator[KeyRun]:
    """Runs of at most RUN_BLOCKS_MAX."""
    for run in runs:
        for start in range(0, run.blocks, RUN_BLOCKS_MAX):
            key = run.first_key if start == 0 else block_key(run.first_key, start)
            yield KeyRun(key, min(RUN_BLOCKS_MAX, run.blocks - start))


def _distance(key: bytes, other: bytes) -> int | None:
    """How many blocks further `other` is in the same relation; for other kinds 0 means the same key."""
    if key[:14] != other[:14]:
        return None
    return int.from_bytes(other[14:], "big") - int.from_bytes(key[14:], "big")
