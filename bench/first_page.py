"""[attach_first_page_ms] The first page after a pageserver with an empty disk attaches a 10 GB timeline.

The timeline is synthetic (`synthetic_store`): 10 GB of images under five flushes of 64 MiB that lie in every
read's way. The store is in this process and answers each request after 15 ms and 100 MB/s for its bytes,
about what S3 does in its own region. The time is from the start of the attachment, in the engine, to the
page of a random block: whatever the attachment asks for, the table's size and the page, over all layers.
Redo and the page service's own way are not in it (`getpage_*` have them). Each round has its own empty
directory.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.model import Bench, Samples
from bench.synthetic_store import (
    BLOCKS_PER_LAYER,
    PAGE,
    PAGES_PER_BLOCK,
    TABLE,
    TENANT,
    TIMELINE,
    SyntheticLayer,
    SyntheticStore,
    make_layers,
    make_size_layer,
)
from excimer._native.native_apply import apply_native
from excimer.base.ids import TenantId
from excimer.base.keys import relation_block_key
from excimer.io.filesystem import LocalFilesystem
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.tenant import TenantStorage

IMAGE_LAYERS = 160
ROUND_TRIP_S = 0.015
BYTES_PER_S = 100e6


def measure(bench: Bench) -> Samples:
    layers = make_layers(IMAGE_LAYERS)
    size_bytes = sum(layer.description.size_bytes for layer in layers)
    chance = random.Random(1)
    samples = []
    for _ in range(bench.effort.rounds):
        with tempfile.TemporaryDirectory(prefix="excimer-bench-") as directory:
            total_ms, attach_ms, requests = asyncio.run(_first_page(layers, Path(directory), chance))
        samples.append(total_ms)
        bench.note(f"first page of {size_bytes / 1e9:.1f} GB: {total_ms:.0f} ms, of which attaching "
                   f"{attach_ms:.0f} ms; {requests} requests")  # fmt: skip
    return {"attach_first_page_ms": samples}


class _NoRedo:
    async def redo(
        self, requests: Sequence[bytes], pg_version: int, tenant: TenantId
    ) -> Sequence[bytes | Exception]:
        raise AssertionError("all values are images")


async def _first_page(
    layers: Sequence[SyntheticLayer], directory: Path, chance: random.Random
) -> tuple[float, float, int]:
    """Milliseconds in all, those of attaching, and how many requests it took."""
    pages = IMAGE_LAYERS * BLOCKS_PER_LAYER * PAGES_PER_BLOCK
    store = SyntheticStore(layers, make_size_layer(pages))
    store.round_trip_s, store.bytes_per_s = ROUND_TRIP_S, BYTES_PER_S
    with ThreadPoolExecutor(16) as executor:
        context = StorageContext(
            store=store,
            filesystem=LocalFilesystem(),
            local_dir=directory,
            redo=_NoRedo(),
            apply_native=apply_native,
            executor=executor,
        )
        begun = time.monotonic()
        tenant = await TenantStorage.attach(context, TENANT, 2)
        attached = time.monotonic()
        timeline = tenant.timeline(TIMELINE)
        key = relation_block_key(TABLE, 0, chance.randrange(pages))
        page = await timeline.get_pages(key, 1, timeline.last_record_lsn)
        ended = time.monotonic()
        assert page == PAGE
        requests = len(store.requests)
        await tenant.close()
        context.local_disk.close()
    return (ended - begun) * 1000, (attached - begun) * 1000, requests
