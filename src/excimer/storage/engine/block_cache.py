"""Decompressed layer blocks that were used lately, shared by all timelines, bounded in bytes."""

import threading
from collections import OrderedDict

DEFAULT_SIZE_BYTES = 128 * 1024 * 1024

BlockId = tuple[str, int]
"""Layer's object name, block number. Layers are immutable, so an entry never goes stale."""


class BlockCache:
    """Least recently used goes first. Any thread."""

    def __init__(self, size_bytes_max: int = DEFAULT_SIZE_BYTES) -> None:
        self._size_bytes_max = size_bytes_max
        self._blocks: OrderedDict[BlockId, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self.size_bytes = 0
        self.hits = 0
        self.misses = 0

    def try_get(self, block_id: BlockId) -> bytes | None:
        with self._lock:
            block = self._blocks.get(block_id)
            if block is None:
                self.misses += 1
                return None
            self._blocks.move_to_end(block_id)
            self.hits += 1
            return block

    def add(self, block_id: BlockId, block: bytes) -> None:
        with self._lock:
            if block_id in self._blocks:
                return
            self._blocks[block_id] = block
            self.size_bytes += len(block)
            while self.size_bytes > self._size_bytes_max:
                _, oldest = self._blocks.popitem(last=False)
                self.size_bytes -= len(oldest)
