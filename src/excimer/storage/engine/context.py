"""What timelines need from the world, and the engine's sizes. The host makes one and passes it in."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from excimer._native.block_cache import BlockCache
from excimer.base.ids import TenantId
from excimer.io.filesystem import Filesystem
from excimer.io.object_store import ObjectStore
from excimer.storage.engine.engine_counters import EngineCounters
from excimer.storage.engine.local_disk import LocalDisk
from excimer.storage.engine.upload_queue import UploadQueue
from excimer.storage.format.layer_block import BLOCK_TARGET_SIZE_BYTES
from excimer.storage.format.tenant_settings import TenantSettings

MIB = 1024 * 1024

BLOCK_CACHE_SIZE_BYTES = 128 * MIB
"""Of decompressed blocks, over all tenants."""


class RedoExecutor(Protocol):
    """Turns redo requests into pages; the host's `redo_pool.RedoPool`s, one per version, are the real one."""

    async def redo(
        self, requests: Sequence[bytes], pg_version: int, tenant: TenantId, /
    ) -> Sequence[bytes | Exception]:
        """One page, or the error that says why not, per request, in the same order. `tenant` is whose WAL
        the requests hold: no process redoes two tenants' WAL.
        """


NativeApplier = Callable[[bytearray, bytes, int], None]
"""Applies one native record, made at the given LSN, to a page in place."""


@dataclass(frozen=True)
class StorageSettings:
    """Sizes and times with a meaning to operators; defaults fit a laptop."""

    flush_size_bytes: int = 64 * MIB
    """Memory of the open layer at which it is frozen and flushed."""
    flush_interval_s: float = 60.0
    """An open layer with anything in it is flushed at the latest after this."""
    frozen_layers_max: int = 3
    """More frozen layers than this and ingest pauses."""
    put_wait_s: float = 60.0
    """How long ingest's thread is held up then before it is told to try again."""
    block_size_bytes: int = BLOCK_TARGET_SIZE_BYTES
    image_layer_size_bytes: int = 64 * MIB
    """Raw size at which an image layer ends and the next begins."""
    compaction_threshold: int = 4
    """So many L0 layers are merged into L1."""
    compaction_target_size_bytes: int = 128 * MIB
    """Raw size at which an L1 layer ends and the next begins."""
    image_creation_threshold: int = 2
    """So many L1 runs above the newest images lead to a round of new images."""
    pitr_interval_s: float = 7.0 * 86_400
    gc_horizon_bytes: int = 64 * MIB
    gc_period_s: float = 3600.0
    lsn_lease_length_s: float = 600.0
    throttle_from_layers: int = 8
    """With more L0 layers than this ingest is slowed, ..."""
    throttle_full_layers: int = 24
    """... and from so many on each batch waits for `throttle_delay_s_max`."""
    throttle_delay_s_max: float = 1.0
    metadata_cache_entries: int = 100_000
    retry_delay_ms_first: int = 100
    retry_delay_ms_max: int = 10_000

    def tenant_defaults(self) -> TenantSettings:
        """What a tenant has that sets nothing itself; the fields of the same names, explained there."""
        return TenantSettings(**{name: getattr(self, name) for name in TenantSettings.__struct_fields__})


@dataclass(frozen=True)
class StorageContext:
    """The world as the engine sees it. `executor` runs blocking work: give it several threads."""

    store: ObjectStore
    filesystem: Filesystem
    local_dir: Path
    redo: RedoExecutor
    apply_native: NativeApplier
    executor: Executor
    counters: EngineCounters = field(default_factory=EngineCounters)
    compaction_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    """So many timelines compact at the same time."""
    cache: BlockCache = field(default_factory=lambda: BlockCache(BLOCK_CACHE_SIZE_BYTES))
    settings: StorageSettings = field(default_factory=StorageSettings)
    local_disk: LocalDisk = field(default_factory=LocalDisk)
    uploads: UploadQueue = field(default_factory=UploadQueue)
    upload_executor: Executor | None = None
    """Runs what writes to object storage, which may hang for long; None: `executor` does it."""
