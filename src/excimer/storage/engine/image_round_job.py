"""Carries out a piece of a `RoundPlan`: reads pages as any reader does, writes them as images.

Keys come from the sources' blocks as runs of adjacent blocks, are read BATCH_BLOCKS_MAX at a time, many
runs at once, and end up in one image layer of a bounded size per piece. Of the sources only as much is
read as the piece needs.

A page that cannot be rebuilt is left out and logged; the round then covers nothing, so that a read of
that page still meets its damaged history and fails, rather than an older page.

Not here: deciding on a round (`excimer.storage.plan.compaction_plan`), committing it (`compactor`).
"""

import asyncio
import heapq
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from excimer._native.page_chains import MalformedValueError, key_runs
from excimer.base.errors import CorruptionError
from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    MAX_KEY,
    MIN_KEY,
    KeyKind,
    kind_range,
    make_key,
    parse_key,
)
from excimer.base.lsn import Lsn
from excimer.storage.engine.disk_layer import DiskLayer
from excimer.storage.engine.layer_stack import LayerHome, LayerStack
from excimer.storage.engine.layer_writing import image_value, write_images
from excimer.storage.engine.page_reads import PageRead, PageSource, block_key, read_size_blocks
from excimer.storage.engine.value_reads import previous_key, read_value, scan_values
from excimer.storage.format.layer_block import VALUE_HEAD_SIZE_BYTES
from excimer.storage.format.layer_file import DamagedLayerError
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.format.relation_size import size_blocks
from excimer.storage.format.values import Value, ValueKind
from excimer.storage.plan.compaction_plan import RoundPlan
from excimer.storage.plan.read_path import Visit, plan_read

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

RUN_BLOCKS_MAX = 32
"""Adjacent pages read at once."""

BATCH_BLOCKS_MAX = 32
"""Pages wanted at the same time. Readers wait for threads and redo workers behind them: with 64 their p99 was
half as much again, with 16 no better, and images came as fast with 64 (`docs/performance.md`)."""

BATCH_RUNS_MAX = 4

BLOCK_KINDS = (KeyKind.RELATION_BLOCK, KeyKind.SLRU_BLOCK)


class KeyRun(NamedTuple):
    """Keys that differ in their block numbers, which follow each other."""

    first_key: bytes
    blocks: int


class TakenRun(NamedTuple):
    """A run's images."""

    values: list[Value]
    is_whole: bool
    """Nothing had to be left out."""


class RoundPiece(NamedTuple):
    layers: list[LayerDescription]
    is_whole: bool
    """Nothing had to be left out."""
    is_last: bool


class RoundSource(PageSource, Protocol):
    home: LayerHome
    generation: int

    def check_runs(self) -> None: ...
    async def in_thread(self, function: Callable[[], _Result], /) -> _Result: ...
    async def whole_in_thread(self, function: Callable[[], _Result], /) -> _Result: ...


async def write_round_piece(source: RoundSource, plan: RoundPlan) -> RoundPiece:
    """The next image layers of a round as local files, not yet uploaded. Raises as reads and writes do."""
    runs = _runs_from(source, plan)
    limit = source.home.context.settings.image_layer_size_bytes
    values: list[Value] = []
    size, is_whole, is_last = 0, True, False
    while size < limit and not is_last:
        batch = await source.in_thread(partial(_take_batch, runs))
        is_last = not batch
        for taken in await _read_batch(source, batch, plan.lsn):
            is_whole = is_whole and taken.is_whole
            values += taken.values
            size += sum(VALUE_HEAD_SIZE_BYTES + len(value.payload) for value in taken.values)
    layers: list[LayerDescription] = []
    if values:
        layers = await source.whole_in_thread(partial(_write, source, values, plan.lsn))
    return RoundPiece(layers, is_whole, is_last)


def _write(source: RoundSource, values: list[Value], lsn: Lsn) -> list[LayerDescription]:
    return write_images(source.home, values, lsn, source.generation, covers_after_lsn=None)


def _take_batch(runs: Iterator[KeyRun]) -> list[KeyRun]:
    """Empty at the end."""
    batch: list[KeyRun] = []
    blocks = 0
    for run in runs:
        batch.append(run)
        blocks += run.blocks
        if blocks >= BATCH_BLOCKS_MAX or len(batch) >= BATCH_RUNS_MAX:
            break
    return batch


async def _read_batch(source: RoundSource, runs: list[KeyRun], lsn: Lsn) -> list[TakenRun]:
    """All at the same time."""
    outcomes = await asyncio.gather(
        *(_try_read_run(source, run, lsn) for run in runs), return_exceptions=True
    )
    taken: list[TakenRun] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        taken.append(outcome)
    return taken


async def _try_read_run(source: RoundSource, run: KeyRun, lsn: Lsn) -> TakenRun:
    """If it cannot be read together, one by one, without those that cannot be read at all."""
    try:
        return TakenRun(await _read_run(source, run, lsn), True)
    except DamagedLayerError:
        raise
    except CorruptionError as error:
        source.check_runs()  # what is being deleted goes missing while it is read
        if run.blocks == 1:
            _log.error("compaction of timeline %s leaves out a page: %s", source.home.timeline_id, error)
            return TakenRun([], False)
    singles = [KeyRun(block_key(run.first_key, at), 1) for at in range(run.blocks)]
    parts = [await _try_read_run(source, single, lsn) for single in singles]
    return TakenRun([value for part in parts for value in part.values], all(part.is_whole for part in parts))


async def _read_run(source: RoundSource, run: KeyRun, lsn: Lsn) -> list[Value]:
    """Images of a run's keys; none of blocks that no longer exist."""
    fields = parse_key(run.first_key)
    if fields.kind not in BLOCK_KINDS:
        keys = [block_key(run.first_key, at) for at in range(run.blocks)]
        return await source.in_thread(partial(_whole_values, source, keys, lsn))
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


def _whole_values(source: RoundSource, keys: list[bytes], lsn: Lsn) -> list[Value]:
    values = []
    for key in keys:
        value = read_value(source, key, lsn)
        gone = Value(key, lsn, ValueKind.TOMBSTONE, True, b"")
        values.append(gone if value is None else image_value(key, lsn, value))
    return values


def _runs_from(source: RoundSource, plan: RoundPlan) -> Iterator[KeyRun]:
    """What is still to be written of the round, in order. Reads as it goes."""
    if plan.covers_after_lsn == 0:
        runs = live_runs(source, plan.lsn, plan.start_key)
    else:
        files = [source.stack.files[layer.name] for run in plan.sources for layer in run.descriptions]
        runs = merge_runs(heapq.merge(*(_changed_runs(file, plan) for file in files)))
    return split_runs(runs_from(runs, plan.start_key))


def _changed_runs(file: DiskLayer, plan: RoundPlan) -> Iterator[KeyRun]:
    for block in file.blocks(plan.start_key, MAX_KEY, plan.low_lsn, plan.lsn, cached=False):
        try:
            yield from (KeyRun(*run) for run in key_runs(block))
        except MalformedValueError as error:
            raise DamagedLayerError(str(file.local_path), str(error)) from error


def live_runs(source: PageSource, lsn: int, start_key: bytes = MIN_KEY) -> Iterator[KeyRun]:
    """Every key with a value at `lsn`, in order, from `start_key` on as far as that is cheap to know.

    Blocks of relations by the values there are, not by sizes: a far block makes a relation large and leaves
    the blocks before it without values, which are zeros in any case. Some may be gone by then, or too new.
    """
    relation_blocks = kind_range(KeyKind.RELATION_BLOCK)
    if start_key < relation_blocks[1]:
        yield from merge_runs(heapq.merge(*_stored_runs(source, lsn, max(start_key, relation_blocks[0]))))
    runs: list[KeyRun] = []
    for start, end in _METADATA_RANGES:
        for key, value in scan_values(source, start, end, lsn):
            runs.append(KeyRun(key, 1))
            fields = parse_key(key)
            if fields.kind == KeyKind.SLRU_SIZE and (blocks := size_blocks(value)):
                runs.append(KeyRun(make_key(KeyKind.SLRU_BLOCK, *fields[1:5]), blocks))
    yield from sorted(runs)


def estimate_live_keys(source: PageSource, lsn: int) -> int:
    """How many keys are alive at `lsn`, from sizes, without reading blocks.

    At most the values there are: a far block makes a relation large, and gives those before it no values.
    """
    by_sizes = 0
    for start, end in _METADATA_RANGES:
        for key, value in scan_values(source, start, end, lsn):
            by_sizes += 1
            if key[0] in (KeyKind.RELATION_SIZE, KeyKind.SLRU_SIZE):
                by_sizes += size_blocks(value)
    stored = 0
    stack: LayerStack | None = source.stack
    while stack is not None:
        stored += sum(layer.value_count for layer in stack.disk.descriptions)
        stack = None if stack.ancestry is None else stack.ancestry.timeline.stack
    return min(by_sizes, stored)


def _stored_runs(source: PageSource, lsn: int, start_key: bytes) -> Iterator[Iterator[KeyRun]]:
    """Runs of relations' blocks from each layer that a read would visit, its ancestors' too."""
    end_key = kind_range(KeyKind.RELATION_BLOCK)[1]
    stack = source.stack
    while True:
        for memory in stack.memory_layers:
            yield (KeyRun(key, 1) for key in memory.keys(start_key, end_key, lsn))
        plan = plan_read(stack.disk, start_key, previous_key(end_key), 0, lsn)
        for visit in plan.visits:
            yield _layer_runs(stack.files[visit.layer.description.name], (start_key, end_key), visit)
        if not plan.continues_in_ancestor or stack.ancestry is None:
            return
        lsn = min(lsn, stack.ancestry.lsn)
        stack = stack.ancestry.timeline.stack


def _layer_runs(file: DiskLayer, keys: tuple[bytes, bytes], visit: Visit) -> Iterator[KeyRun]:
    start, end = keys
    for block in file.blocks(start, previous_key(end), visit.low_lsn, visit.high_lsn, cached=False):
        try:
            for key, count in key_runs(block):
                if key < end:  # a run that begins before the start is cut by whoever asked
                    yield KeyRun(key, count)
        except MalformedValueError as error:
            raise DamagedLayerError(str(file.local_path), str(error)) from error


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


def runs_from(runs: Iterable[KeyRun], start_key: bytes) -> Iterator[KeyRun]:
    """Of sorted runs what lies at or after a key."""
    for run in runs:
        skipped = _distance(run.first_key, start_key) if run.first_key < start_key else 0
        if skipped is None or skipped >= run.blocks:
            continue
        yield KeyRun(block_key(run.first_key, skipped), run.blocks - skipped) if skipped else run


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
