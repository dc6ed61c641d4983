"""Restoring pages: collect the chains of adjacent blocks, then images, native records, redo.

A read is first tried where it was asked for, on the event loop, with what memory and the block cache have:
most reads are a handful of microseconds, and a way through another thread costs a multiple of that. The
try waits for nothing and gives up where it would have to, or where there is much to do; then everything is
done in a worker thread, which may wait for disk and object storage. Redo is awaited in either case.

Both ways find the same (`tests/property/test_fast_reads.py`); the slow one is the definition.
"""

import asyncio
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Final, Protocol

import lz4.block
import zstandard

from excimer._native.cached_walk import collect_cached
from excimer._native.memory_layer import MemoryLayer
from excimer._native.page_chains import MalformedValueError, PageChains
from excimer.base.errors import CorruptionError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import KeyKind, make_key, parse_key
from excimer.base.lsn import format_lsn
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.errors import NoSuchPageError, PageRebuildError
from excimer.storage.engine.layer_prefetch import prefetch
from excimer.storage.engine.value_reads import ValueSource, read_value, scan_values, try_read_value
from excimer.storage.engine.walk_memory import WalkMemory
from excimer.storage.format.layer_file import DamagedLayerError
from excimer.storage.format.relation_size import (
    RelationSize,
    dead_up_to,
    note_ranges,
    size_blocks,
    unpack_relation_size,
)
from excimer.storage.plan.read_path import Visit, plan_read

TRIED_BLOCKS_MAX: Final = 32
TRIED_VALUES_MAX: Final = 512
"""What may be done on the event loop at once: some tens of microseconds."""
COMPRESSION_LZ4 = 2
COMPRESSION_ZSTD = 3

_SIZE_KINDS: Final[dict[int, bytes]] = {
    KeyKind.RELATION_BLOCK: bytes([KeyKind.RELATION_SIZE]),
    KeyKind.SLRU_BLOCK: bytes([KeyKind.SLRU_SIZE]),
}
_NO_BLOCK: Final = bytes(4)


class PageSource(ValueSource, Protocol):
    """One timeline, as page reads see it."""

    @property
    def context(self) -> StorageContext: ...
    @property
    def pg_version(self) -> int: ...
    @property
    def walk_memory(self) -> WalkMemory: ...
    @property
    def tenant_id(self) -> TenantId: ...
    @property
    def timeline_id(self) -> TimelineId: ...


WalkWatcher = Callable[[PageSource, MemoryLayer | Visit, PageChains], None]
"""Is told of each layer that a walk has visited, on which timeline, and what it has collected by then."""


class PageRead:
    """One read of `count` adjacent blocks at one LSN."""

    def __init__(
        self, source: PageSource, key: bytes, count: int, lsn: int, watch: WalkWatcher | None = None
    ) -> None:
        self._source = source
        self._watch = watch
        self._key = key
        self._lsn = lsn
        self._count = count
        self._chains = PageChains(key, count, lsn)
        self._redo: tuple[list[int], list[bytes]] | None = None
        """What redo has to do next, once the chains are collected."""

    def try_pages(self) -> bytes | None:
        """The pages, if nothing has to be waited for; else None, and `run` goes on from here.

        On the event loop's thread, at most once, before `run`. Errors as `Timeline.get_pages`.
        """
        if self._count > TRIED_BLOCKS_MAX or not self._try_collect():
            return None
        self._redo = self._restore()
        return None if self._redo[1] else self._chains.take_pages()

    async def run(self) -> bytes:
        """The pages. Errors as `Timeline.get_pages`."""
        context = self._source.context
        if self._redo is None:
            loop = asyncio.get_running_loop()
            self._redo = await loop.run_in_executor(context.executor, self._collect_and_restore)
        slots, requests = self._redo
        while requests:
            pages = await context.redo.redo(requests, self._source.pg_version, self._source.tenant_id)
            slots, requests = self._place(slots, pages)
        return self._chains.take_pages()

    def _try_collect(self) -> bool:
        size = try_read_value(self._source, size_key_of(self._key), self._lsn)
        if size is None:
            return False
        check_within(self._key, self._count, self._lsn, size.value)
        try:
            if try_collect_chains(self._source, self._key, self._chains, self._lsn) and try_drop_dead(
                self._source, self._key, self._chains, size.value
            ):
                return True
        except MalformedValueError:
            pass  # the slow way meets it again, and says in which file
        self._chains = PageChains(self._key, self._count, self._lsn)
        return False

    def _collect_and_restore(self) -> tuple[list[int], list[bytes]]:
        size_value = read_value(self._source, size_key_of(self._key), self._lsn)
        check_within(self._key, self._count, self._lsn, size_value)
        collect_chains(self._source, self._key, self._chains, self._lsn, self._watch)
        drop_dead(self._source, self._key, self._chains, self._lsn, size_value)
        return self._restore()

    def _restore(self) -> tuple[list[int], list[bytes]]:
        try:
            for slot, compression, data, size in self._chains.restore_bases():
                self._chains.set_image_data(slot, decompress_image(compression, data, size))
        except (MalformedValueError, lz4.block.LZ4BlockError, zstandard.ZstdError) as error:
            raise PageRebuildError(self._key, self._lsn, str(error)) from error
        return self._next_redo()

    def _next_redo(self) -> tuple[list[int], list[bytes]]:
        try:
            self._apply_native_records()
            return self._chains.take_redo()
        except MalformedValueError as error:
            raise PageRebuildError(self._key, self._lsn, str(error)) from error

    def _apply_native_records(self) -> None:
        for slot, records in groupby(self._chains.take_native(), key=itemgetter(0)):
            page = bytearray(self._chains.page(slot))
            for _, lsn, payload in records:
                try:
                    self._source.context.apply_native(page, payload, lsn)
                except (CorruptionError, ValueError) as error:
                    key = block_key(self._key, slot)
                    raise PageRebuildError(key, self._lsn, f"{error} (made at {format_lsn(lsn)})") from error
            self._chains.set_page(slot, page)

    def _place(self, slots: list[int], pages: Sequence[bytes | Exception]) -> tuple[list[int], list[bytes]]:
        for slot, page in zip(slots, pages, strict=True):
            if isinstance(page, RetryableError):
                raise page
            if isinstance(page, Exception):
                raise PageRebuildError(block_key(self._key, slot), self._lsn, str(page)) from page
            try:
                self._chains.set_page(slot, page)
            except MalformedValueError as error:
                raise PageRebuildError(block_key(self._key, slot), self._lsn, str(error)) from error
        return self._next_redo()


def check_within(key: bytes, count: int, lsn: int, size_value: bytes | None) -> None:
    """Raises `NoSuchPageError` unless a relation of this size (its stored value) has the blocks."""
    block = int.from_bytes(key[14:], "big")
    size = None if size_value is None else size_blocks(size_value)
    if size is None or block + count > size:
        first_missing = block if size is None else max(size, block)
        raise NoSuchPageError(block_key(key, first_missing - block), lsn, size)


def read_size_blocks(source: ValueSource, key: bytes, lsn: int) -> int | None:
    """Size of the relation fork, or SLRU segment, that a block key belongs to; None if it does not exist."""
    size = read_value(source, size_key_of(key), lsn)
    return None if size is None else size_blocks(size)


def size_key_of(key: bytes) -> bytes:
    """Of a block key's relation fork, or SLRU segment."""
    try:
        return _SIZE_KINDS[key[0]] + key[1:14] + _NO_BLOCK
    except KeyError:
        raise ValueError(f"key kind {key[0]:#x} has no blocks") from None


def try_collect_chains(source: PageSource, key: bytes, chains: PageChains, lsn: int) -> bool:
    """`collect_chains` from memory and the block cache only; False if they are not enough.

    The chains are then of no further use. Raises `MalformedValueError`.
    """
    last_key = key if chains.count == 1 else block_key(key, chains.count - 1)
    cache = source.context.cache
    tick = source.context.local_disk.next_tick()
    at = source
    while True:
        stack = at.stack
        for memory in stack.memory_layers:
            if memory.start_lsn < lsn and not memory.try_collect(chains, lsn, TRIED_VALUES_MAX):
                return False
        if chains.open_count == 0:
            return True
        plan = at.walk_memory.plan(stack, key, last_key, lsn)
        if not collect_cached(chains, plan.steps, cache, TRIED_VALUES_MAX, tick):
            return False
        if chains.open_count == 0:
            return True
        if not plan.continues_in_ancestor or stack.ancestry is None:
            break
        lsn = min(lsn, stack.ancestry.lsn)
        at = stack.ancestry.timeline
    chains.close_all()
    return True


def collect_chains(
    source: PageSource, key: bytes, chains: PageChains, lsn: int, watch: WalkWatcher | None = None
) -> None:
    """Walks the timeline's layers and its ancestors', newest first, until every chain has its start."""
    visited = _walk(source, key, chains, lsn, watch)
    source.context.counters.read_visited(visited)


def _walk(source: PageSource, key: bytes, chains: PageChains, lsn: int, watch: WalkWatcher | None) -> int:
    """How many layer files it took."""
    visited = 0
    last_key = block_key(key, chains.count - 1)
    at = source
    while True:
        stack = at.stack
        for memory in stack.memory_layers:
            if memory.start_lsn < lsn:
                memory.collect(chains, lsn)
                if watch is not None:
                    watch(at, memory, chains)
        if chains.open_count == 0:
            return visited
        plan = plan_read(stack.disk, key, last_key, 0, lsn)
        prefetch(plan.visits, stack.files, key, last_key)
        for visit in plan.visits:
            visited += 1
            file = stack.files[visit.layer.description.name]
            for block in file.blocks(key, last_key, visit.low_lsn, visit.high_lsn):
                try:
                    chains.add_block(block, visit.low_lsn, visit.high_lsn)
                except MalformedValueError as error:
                    raise DamagedLayerError(str(file.local_path), str(error)) from error
            if watch is not None:
                watch(at, visit, chains)
            if chains.open_count == 0:
                return visited
        if not plan.continues_in_ancestor or stack.ancestry is None:
            break
        lsn = min(lsn, stack.ancestry.lsn)
        at = stack.ancestry.timeline
    chains.close_all()
    return visited


def try_drop_dead(source: PageSource, key: bytes, chains: PageChains, size_value: bytes | None) -> bool:
    """`drop_dead` if it needs nothing but what is known already; False if it does."""
    if key[0] != KeyKind.RELATION_BLOCK or size_value is None:
        return True
    size = unpack_relation_size(size_value)
    if size.born_lsn > chains.oldest_lsn():
        for slot in range(chains.count):
            chains.drop_below(slot, size.born_lsn)
    if chains.oldest_lsn() > size.truncated_lsn:
        return True
    known = source.value_cache.try_get_dead(_dead_key(key, chains.count, size))
    if known is None:
        return False
    for slot, lsn in enumerate(known):
        chains.drop_below(slot, lsn + 1)
    return True


def drop_dead(source: PageSource, key: bytes, chains: PageChains, lsn: int, size_value: bytes | None) -> None:
    """Drops values that blocks had before they were cut off: `storage.format.relation_size`."""
    if try_drop_dead(source, key, chains, size_value):
        return
    assert size_value is not None
    size = unpack_relation_size(size_value)
    first = int.from_bytes(key[14:], "big")
    last = first + chains.count - 1
    notes = [
        note
        for start, end in note_ranges(size_key_of(key), first, last)
        for note in scan_values(source, start, end, lsn)
    ]
    dead = dead_up_to(notes, first, last)
    source.value_cache.put_dead(_dead_key(key, chains.count, size), dead, lsn)
    for slot, dead_lsn in enumerate(dead):
        chains.drop_below(slot, dead_lsn + 1)


def _dead_key(key: bytes, count: int, size: RelationSize) -> tuple[bytes, int, int, int]:
    """What of it is dead is the same at all LSNs of a history at which the last truncation is the same."""
    return key, count, size.born_lsn, size.truncated_lsn


def decompress_image(compression: int, data: bytes, size_bytes: int) -> bytes:
    """An image's content, compressed by PostgreSQL with lz4 or zstd. Raises their errors, or ValueError."""
    if compression == COMPRESSION_LZ4:
        return bytes(lz4.block.decompress(data, uncompressed_size=size_bytes))
    if compression == COMPRESSION_ZSTD:
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size_bytes)
    raise MalformedValueError(f"page image with unknown compression {compression}")


def block_key(key: bytes, offset: int) -> bytes:
    """The key of the block `offset` blocks further."""
    fields = parse_key(key)
    return make_key(*fields[:5], block=fields.block + offset)
