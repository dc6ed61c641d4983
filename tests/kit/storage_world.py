"""A small world for the storage engine: fakes that are deterministic, and an oracle beside it.

The fake redo folds a record into a page so that every missing, doubled or misplaced record changes
the outcome; the oracle keeps every value in a dict and computes the same pages the slow way.
"""

import asyncio
import functools
import hashlib
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import ParamSpec

from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.base.lsn import Lsn
from excimer.io.filesystem import Filesystem, LocalFilesystem
from excimer.io.object_store import MemoryObjectStore, ObjectStore
from excimer.storage.engine.context import StorageContext, StorageSettings
from excimer.storage.engine.local_disk import LocalDisk
from excimer.storage.engine.tenant import NewTimeline, TenantStorage
from excimer.storage.engine.timeline import Timeline
from excimer.storage.engine.upload_queue import UploadQueue
from excimer.storage.format.page_image import restore_page_image
from excimer.storage.format.values import PackedBatch, Value, ValueKind, pack_batch

TENANT = TenantId("0a" * 16)
MAIN = TimelineId("11" * 16)
START = Lsn(0x1000)

_Given = ParamSpec("_Given")
_RECORD_HEAD = struct.Struct("<QQII")


def in_event_loop(test: Callable[_Given, Coroutine[None, None, None]]) -> Callable[_Given, None]:
    """Runs a coroutine test to its end in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def fold(page: bytes, lsn: int, start_lsn: int, payload: bytes) -> bytes:
    """What our pretended PostgreSQL does with a record: a page that depends on all that came before."""
    seed = hashlib.blake2b(page + struct.pack("<QQ", lsn, start_lsn) + payload, digest_size=32).digest()
    return seed * (BLOCK_SIZE_BYTES // 32)


def apply_native(page: bytearray, payload: bytes, lsn: int) -> None:
    page[:] = fold(bytes(page), lsn, 0, payload)


class FakeRedo:
    """Reads the redo workers' request format and folds."""

    def __init__(self) -> None:
        self.requests = 0
        self.fail_next: Exception | None = None

    async def redo(
        self, requests: Sequence[bytes], pg_version: int, tenant: TenantId
    ) -> list[bytes | Exception]:
        self.requests += len(requests)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            return [error, *map(redo_one, requests[1:])]
        return [redo_one(request) for request in requests]


def redo_one(request: bytes) -> bytes:
    length, operation = struct.unpack_from("<II", request)
    assert (length, operation) == (len(request) - 8, ord("R"))
    *_, has_base, count, zero = struct.unpack_from("<8I", request, 8)
    assert zero == 0
    at = 40
    page = bytes(BLOCK_SIZE_BYTES)
    if has_base:
        page = request[at : at + BLOCK_SIZE_BYTES]
        at += BLOCK_SIZE_BYTES
    for _ in range(count):
        start_lsn, end_lsn, size, _ = _RECORD_HEAD.unpack_from(request, at)
        page = fold(page, end_lsn, start_lsn, request[at + 24 : at + 24 + size])
        at += 24 + (size + 7) // 8 * 8
    assert at == len(request)
    return page


def expected_page(values: Sequence[Value]) -> bytes:
    """The page that a chain, oldest first and complete, yields."""
    page = bytes(BLOCK_SIZE_BYTES)
    for value in values:
        if value.kind == ValueKind.IMAGE:
            page = value.payload
        elif value.kind in (ValueKind.TOMBSTONE, ValueKind.ZERO_PAGE):
            page = bytes(BLOCK_SIZE_BYTES)
        elif value.kind == ValueKind.PAGE_IMAGE:
            page = restore_page_image(value.payload, value.lsn)
        elif value.kind == ValueKind.NATIVE:
            page = fold(page, value.lsn, 0, value.payload)
        elif value.kind == ValueKind.WAL_RECORD:
            base = bytes(BLOCK_SIZE_BYTES) if value.starts_chain else page
            page = fold(base, value.lsn, struct.unpack_from("<Q", value.payload)[0], value.payload[8:])
        else:
            raise AssertionError(value.kind)
    return page


def record_value(key: bytes, lsn: int, text: bytes, *, will_init: bool = False) -> Value:
    return Value(key, lsn, ValueKind.WAL_RECORD, will_init, struct.pack("<Q", lsn - 8) + text)


def image_of(text: bytes) -> bytes:
    return fold(text, 0, 0, b"")


def size_value(key: bytes, lsn: int, blocks: int | None) -> Value:
    if blocks is None:
        return Value(key, lsn, ValueKind.TOMBSTONE, True, b"")
    return Value(key, lsn, ValueKind.IMAGE, True, struct.pack("<I", blocks))


def put(timeline: Timeline, values: list[Value]) -> PackedBatch:
    """One batch whose last value's record is the last one."""
    batch = pack_batch(values)
    end_lsn = Lsn(values[-1].lsn)
    timeline.put_batch(batch, end_lsn, Lsn(end_lsn - 8))
    return batch


def new_main(timeline_id: TimelineId = MAIN) -> NewTimeline:
    return NewTimeline(
        timeline_id=timeline_id,
        pg_version=18,
        system_id=7_000_000_000_000_000_001,
        wal_segment_size_bytes=16 * 1024 * 1024,
        last_record_lsn=START,
        prev_record_lsn=Lsn(START - 0x40),
    )


@asynccontextmanager
async def storage_context(
    local_dir: Path,
    *,
    store: ObjectStore | None = None,
    filesystem: Filesystem | None = None,
    settings: StorageSettings | None = None,
    redo: FakeRedo | None = None,
    local_disk: LocalDisk | None = None,
    executor: Executor | None = None,
) -> AsyncIterator[StorageContext]:
    disk = local_disk or LocalDisk()
    with executor or ThreadPoolExecutor(2, thread_name_prefix="storage") as executor, closing(disk):
        yield StorageContext(
            store=store if store is not None else MemoryObjectStore(),
            filesystem=filesystem or LocalFilesystem(),
            local_dir=local_dir,
            redo=redo or FakeRedo(),
            apply_native=apply_native,
            executor=executor,
            settings=settings or StorageSettings(),
            local_disk=disk,
            uploads=UploadQueue(pause_s_first=0.001),
        )


async def attach(context: StorageContext, generation: int = 1) -> TenantStorage:
    return await TenantStorage.attach(context, TENANT, generation)
