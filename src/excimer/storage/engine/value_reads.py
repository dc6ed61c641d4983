"""Reading keys whose values are whole (sizes, relation maps, checkpoint fields…), with a cache.

History at or below a reached LSN never changes, so an answer "the newest value of K at or below
LSN C is V, made at LSN F" stays true for every LSN in [F, C], and a question at a later LSN needs
only what came after C. That keeps the size checks of page reads out of the layer files.

Calls may block on disk and, for a layer without a local copy, on object storage.
"""

import threading
from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol

from excimer._native.page_chains import MalformedValueError, scan_block
from excimer.base.errors import CorruptionError
from excimer.base.keys import KEY_SIZE_BYTES, describe_key
from excimer.storage.engine.layer_prefetch import prefetch
from excimer.storage.engine.layer_stack import LayerStack
from excimer.storage.format.layer_file import DamagedLayerError
from excimer.storage.format.values import ValueKind
from excimer.storage.plan.read_path import plan_read

DEAD_ENTRIES_MAX = 10_000

StoredValue = tuple[int, int, bytes]
"""LSN, kind, payload."""


class ValueSource(Protocol):
    """One timeline, as these reads see it."""

    @property
    def stack(self) -> LayerStack: ...
    @property
    def value_cache(self) -> "ValueCache": ...


class CachedValue(NamedTuple):
    found_lsn: int
    """From here on it was so: when the value was made, or 0 if there never was one. Later than that where
    history was not looked at any further.
    """
    checked_lsn: int
    """Nothing newer exists at or below this."""
    value: bytes | None


class ValueCache:
    """Bounded: it is emptied when full, since what is asked for comes back quickly.

    `may_keep` says whether an LSN is still retained: what was read while its history went is not kept.
    """

    def __init__(self, entries_max: int, may_keep: Callable[[int], bool]) -> None:
        self._entries_max = entries_max
        self._may_keep = may_keep
        self._entries: dict[bytes, CachedValue] = {}
        self._dead: dict[Hashable, list[int]] = {}
        self._lock = threading.Lock()

    def try_get(self, key: bytes) -> CachedValue | None:
        return self._entries.get(key)

    def try_get_dead(self, key: Hashable) -> list[int] | None:
        """For blocks that were cut off, the LSNs at or below which their values are dead; None: not known."""
        return self._dead.get(key)

    def put_dead(self, key: Hashable, lsns: list[int], read_lsn: int) -> None:
        with self._lock:
            if not self._may_keep(read_lsn):
                return
            if len(self._dead) >= min(self._entries_max, DEAD_ENTRIES_MAX):
                self._dead.clear()
            self._dead[key] = lsns

    def put(self, key: bytes, entry: CachedValue) -> None:
        with self._lock:
            known = self._entries.get(key)
            if known is not None and known.checked_lsn >= entry.checked_lsn:
                return
            if not self._may_keep(entry.checked_lsn):
                return
            if len(self._entries) >= self._entries_max:
                self._entries.clear()
            self._entries[key] = entry


def read_value(source: ValueSource, key: bytes, lsn: int) -> bytes | None:
    """The newest value at or below `lsn`; None if there is none or it is a tombstone."""
    return _read_cached(source, key, lsn).value


def read_value_and_lsn(source: ValueSource, key: bytes, lsn: int) -> tuple[int, bytes] | None:
    """Like `read_value`, with an LSN from which on up to `lsn` it is the value."""
    entry = _read_cached(source, key, lsn)
    return None if entry.value is None else (entry.found_lsn, entry.value)


def scan_values(source: ValueSource, start: bytes, end: bytes, lsn: int) -> list[tuple[bytes, bytes]]:
    """Keys in [start, end) alive at `lsn`, in order, with their values."""
    found: dict[bytes, StoredValue] = {}
    stack = source.stack
    while _scan_own(stack, start, end, (0, lsn), found) and stack.ancestry is not None:
        lsn = min(lsn, stack.ancestry.lsn)
        stack = stack.ancestry.timeline.stack
    live = [
        (key, payload)
        for key, (value_lsn, kind, payload) in found.items()
        if kind == ValueKind.IMAGE or _check_kind(key, value_lsn, kind) is not ValueKind.TOMBSTONE
    ]
    live.sort()
    return live


def _read_cached(source: ValueSource, key: bytes, lsn: int) -> CachedValue:
    stack = source.stack
    if stack.ancestry is not None and lsn <= stack.ancestry.lsn:
        # Not cached here: what follows would have to be looked for in the ancestor too.
        return _read_cached(stack.ancestry.timeline, key, lsn)
    known = source.value_cache.try_get(key)
    if known is not None and known.found_lsn <= lsn <= known.checked_lsn:
        return known
    newer_only = known is not None and lsn > known.checked_lsn
    low_lsn = known.checked_lsn if known is not None and newer_only else 0
    found, go_on = _find_own(stack, key, low_lsn, lsn)
    if found is not None:
        entry = _cache_entry(key, found, lsn)
    elif not go_on:  # images of every live key are without it: when it went is not known
        entry = CachedValue(lsn, lsn, None)
    elif known is not None and newer_only:
        entry = CachedValue(known.found_lsn, lsn, known.value)
    elif stack.ancestry is not None:
        older = _read_cached(stack.ancestry.timeline, key, stack.ancestry.lsn)
        entry = CachedValue(older.found_lsn, lsn, older.value)
    else:
        entry = CachedValue(0, lsn, None)
    source.value_cache.put(key, entry)
    return entry


def try_read_value(source: ValueSource, key: bytes, lsn: int) -> CachedValue | None:
    """What `read_value` finds, if the cache and memory are enough to know. Never blocks."""
    stack = source.stack
    while stack.ancestry is not None and lsn <= stack.ancestry.lsn:
        source = stack.ancestry.timeline
        stack = source.stack
    known = source.value_cache.try_get(key)
    if known is None or lsn < known.found_lsn:
        return None
    if lsn <= known.checked_lsn:
        return known
    if stack.disk_end_lsn > known.checked_lsn:
        return None
    for memory in stack.memory_layers:
        if memory.newest_lsn > known.checked_lsn and memory.start_lsn < lsn:
            answer = memory.try_find_value(key, known.checked_lsn, lsn)
            if answer is None:
                return None
            if answer[0] is not None:
                entry = _cache_entry(key, answer[0], lsn)
                break
    else:
        entry = CachedValue(known.found_lsn, lsn, known.value)
    source.value_cache.put(key, entry)
    return entry


def _cache_entry(key: bytes, found: StoredValue, lsn: int) -> CachedValue:
    value_lsn, kind, payload = found
    tombstone = _check_kind(key, value_lsn, kind) is ValueKind.TOMBSTONE
    return CachedValue(value_lsn, lsn, None if tombstone else payload)


def _find_own(stack: LayerStack, key: bytes, low_lsn: int, high_lsn: int) -> tuple[StoredValue | None, bool]:
    """The newest value in this timeline's own layers; whether the ancestor may have one otherwise."""
    for memory in stack.memory_layers:
        if memory.newest_lsn > low_lsn and memory.start_lsn < high_lsn:
            in_memory = memory.find_value(key, low_lsn, high_lsn)
            if in_memory is not None:
                return in_memory, False
    if low_lsn >= stack.disk_end_lsn:
        return None, True
    found: dict[bytes, StoredValue] = {}
    go_on = _scan_disk(stack, key, next_key(key), (low_lsn, high_lsn), found, only_first=True)
    return found.get(key), go_on


def _scan_own(
    stack: LayerStack, start: bytes, end: bytes, lsns: tuple[int, int], found: dict[bytes, StoredValue]
) -> bool:
    for memory in stack.memory_layers:
        memory.scan(start, end, *lsns, found)
    return _scan_disk(stack, start, end, lsns, found, only_first=False)


def _scan_disk(
    stack: LayerStack,
    start: bytes,
    end: bytes,
    lsns: tuple[int, int],
    found: dict[bytes, StoredValue],
    *,
    only_first: bool,
) -> bool:
    plan = plan_read(stack.disk, start, previous_key(end), *lsns)
    if only_first:
        prefetch(plan.visits, stack.files, start, previous_key(end))
    for visit in plan.visits:
        file = stack.files[visit.layer.description.name]
        for block in file.blocks(start, previous_key(end), visit.low_lsn, visit.high_lsn):
            try:
                scan_block(block, start, end, visit.low_lsn, visit.high_lsn, found)
            except MalformedValueError as error:
                raise DamagedLayerError(str(file.local_path), str(error)) from error
        if only_first and found:
            return False
    return plan.continues_in_ancestor


def _check_kind(key: bytes, lsn: int, kind: int) -> ValueKind:
    if kind not in (ValueKind.IMAGE, ValueKind.TOMBSTONE):
        raise CorruptionError(
            f"{describe_key(key)} has a value of kind {kind} at LSN {lsn:X}: not a whole value"
        )
    return ValueKind(kind)


def next_key(key: bytes) -> bytes:
    """The smallest key above; the greatest key is its own successor."""
    number = int.from_bytes(key, "big") + 1
    return key if number >> (8 * KEY_SIZE_BYTES) else number.to_bytes(KEY_SIZE_BYTES, "big")


def previous_key(key: bytes) -> bytes:
    number = int.from_bytes(key, "big")
    return key if number == 0 else (number - 1).to_bytes(KEY_SIZE_BYTES, "big")
