"""A layer of which only parts are here: which requests reading it makes, and what survives what."""

import random
import threading
from pathlib import Path

import pytest

from excimer.io.filesystem import FaultyFilesystem, LocalFilesystem
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore, ObjectStoreError
from excimer.storage.engine.local_disk import LocalDisk
from excimer.storage.engine.partial_copy import LayerMissingError, LayerObject, PartialCopy

NAME = "tenants/t/layers/one"
CHUNK = 100
CONTENT = random.Random(3).randbytes(1050)


class Store:
    """One object, and the ranges that were asked for."""

    def __init__(self) -> None:
        self.objects = MemoryObjectStore()
        self.objects.put(NAME, CONTENT)
        self.failing = False
        self.ranges: list[tuple[int, int]] = []
        self.faulty = FaultyObjectStore(self.objects, self._fault)
        self.disk = LocalDisk()

    def _fault(self, operation: str, name: str) -> None:
        if self.failing:
            raise ObjectStoreError("away")

    def get_range(self, name: str, start: int, end: int) -> bytes:
        data = self.faulty.get_range(name, start, end)
        self.ranges.append((start, end))
        return data

    def copy(self, path: Path, filesystem: LocalFilesystem | None = None) -> PartialCopy:
        layer = LayerObject(self, self.disk, NAME, len(CONTENT))  # type: ignore[arg-type]
        return PartialCopy(layer, filesystem or LocalFilesystem(), path, CHUNK)


def test_chunks_are_fetched_once_and_adjacent_ones_together(tmp_path: Path) -> None:
    store = Store()
    copy = store.copy(tmp_path / "layers" / "one")
    assert copy.read(250, 10) == CONTENT[250:260]
    assert store.ranges == [(200, 300)]
    assert copy.read(120, 300) == CONTENT[120:420]
    assert store.ranges[1:] == [(100, 200), (300, 500)], "from 300 on it is a sequential read: one ahead"
    assert copy.read(120, 370) == CONTENT[120:490]
    assert copy.read(1000, 50) == CONTENT[1000:]
    assert store.ranges[3:] == [(1000, 1050)]
    assert copy.local_size_bytes == 5 * CHUNK
    assert store.disk.fetched_bytes == 450


def test_a_sequential_reader_is_served_ahead_of_itself(tmp_path: Path) -> None:
    store = Store()
    copy = store.copy(tmp_path / "one")
    for at in range(0, len(CONTENT), 30):
        assert copy.read(at, 30) == CONTENT[at : at + 30]
    assert store.ranges == [(0, 100), (100, 300), (300, 700), (700, 1050)]


def test_the_rest_gets_the_final_name(tmp_path: Path) -> None:
    store = Store()
    path = tmp_path / "one"
    copy = store.copy(path)
    for at in (0, 200, 400, 600, 800):
        assert not copy.try_take_wish_for_rest()
        copy.read(at, 1)
    copy.read(1000, 1)
    assert copy.try_take_wish_for_rest()
    assert not copy.try_take_wish_for_rest()
    assert not path.exists()
    copy.fetch_rest()
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in tmp_path.iterdir()] == ["one"]
    assert copy.read(0, 1050) == CONTENT


def test_a_dropped_copy_serves_those_who_read_it_and_leaves_nothing(tmp_path: Path) -> None:
    store = Store()
    copy = store.copy(tmp_path / "one")
    copy.read(0, 1)
    copy.drop()
    copy.drop()
    assert copy.read(0, 300) == CONTENT[:300]
    copy.fetch_rest()
    assert list(tmp_path.iterdir()) == []
    unopened = store.copy(tmp_path / "two")
    unopened.drop()
    assert unopened.read(0, 300) == CONTENT[:300]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_the_cache_and_not_the_read(tmp_path: Path) -> None:
    def full(operation: str, path: Path) -> None:
        if operation == "write":
            raise OSError(28, "No space left on device")

    store = Store()
    copy = store.copy(tmp_path / "one", FaultyFilesystem(full))
    for _ in range(2):
        assert copy.read(50, 200) == CONTENT[50:250]
    assert copy.local_size_bytes == 0
    copy.fetch_rest()
    assert not (tmp_path / "one").exists()


def test_a_failed_request_can_be_made_again(tmp_path: Path) -> None:
    store = Store()
    copy = store.copy(tmp_path / "one")
    store.failing = True
    with pytest.raises(ObjectStoreError):
        copy.read(0, 10)
    store.failing = False
    assert copy.read(0, 10) == CONTENT[:10]
    assert (store.disk.fetches, store.disk.fetch_failures) == (2, 1)
    store.objects.delete(NAME)
    assert copy.read(20, 10) == CONTENT[20:30]
    with pytest.raises(LayerMissingError, match=NAME):
        copy.read(100, 1)


def test_many_readers_load_each_chunk_once(tmp_path: Path) -> None:
    store = Store()
    copy = store.copy(tmp_path / "one")
    wrong: list[int] = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(200):
            start = chance.randrange(len(CONTENT))
            size = chance.randrange(1, 400)
            if copy.read(start, size) != CONTENT[start : start + size]:
                wrong.append(start)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert wrong == []
    loaded = [chunk for start, end in store.ranges for chunk in range(start // CHUNK, -(-end // CHUNK))]
    assert sorted(loaded) == list(range(11))
