from typing import Protocol, TypeVar

from excimer._native.block_cache import BlockCache
from excimer._native.block_index import BlockIndex
from excimer._native.page_chains import PageChains

class _Layer(Protocol):
    @property
    def number(self) -> int: ...
    @property
    def index(self) -> BlockIndex | None: ...
    last_used: int

_AnyLayer = TypeVar("_AnyLayer", bound=_Layer)

def collect_cached(
    chains: PageChains, steps: list[tuple[_AnyLayer, int, int]], cache: BlockCache, values_max: int, tick: int
) -> bool: ...
