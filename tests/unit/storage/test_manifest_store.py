"""The writer of manifests and an object store that does not always answer: who is fenced, and who is not."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.io.object_store import MemoryObjectStore, ObjectExistsError, ObjectStoreError
from excimer.storage.engine.manifest_store import ManifestStore, OvertakenError
from excimer.storage.format.manifest import Manifest, unpack_manifest

TENANT, TIMELINE = "a" * 32, "b" * 32
GENERATION = 3


def manifest(lsn: int) -> Manifest:
    return Manifest(
        tenant_id=TENANT,
        timeline_id=TIMELINE,
        pg_version=18,
        system_id=1,
        wal_segment_size_bytes=1 << 24,
        oldest_lsn=8,
        disk_consistent_lsn=lsn,
        prev_record_lsn=0,
    )


class LateStore(MemoryObjectStore):
    """The answers of the next `lost` writes are lost; they come when `arrive` says so, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = 0
        self.under_way: list[tuple[str, bytes]] = []

    def put(self, name: str, data: bytes) -> None:
        if self.lost:
            self.lost -= 1
            self.under_way.append((name, bytes(data)))
            raise ObjectStoreError("timed out")
        super().put(name, data)

    def arrive(self, number: int) -> None:
        name, data = self.under_way.pop(number)
        try:
            super().put(name, data)
        except ObjectExistsError:
            return


def newest(store: MemoryObjectStore) -> int:
    """The LSN of the manifest of the greatest name."""
    name = max(store.objects)
    return unpack_manifest(store.objects[name], name).disk_consistent_lsn


def test_an_earlier_try_that_arrives_late_fences_nobody() -> None:
    """A times out, B differs and times out, A arrives: nobody has overtaken."""
    store = LateStore()
    writer = ManifestStore(store, TENANT, TIMELINE, GENERATION)
    store.lost = 2
    for lsn in (8, 16):
        with pytest.raises(ObjectStoreError):
            writer.write(manifest(lsn))
    store.arrive(0)
    assert writer.write(manifest(24)).sequence == 2
    assert newest(store) == 24
    assert writer.is_sure_of_newest


def test_a_try_that_arrives_between_the_look_and_the_write_fences_nobody() -> None:
    store = LateStore()
    writer = ManifestStore(store, TENANT, TIMELINE, GENERATION)
    store.lost = 1
    with pytest.raises(ObjectStoreError):
        writer.write(manifest(8))
    put = store.put

    def put_after_it(name: str, data: bytes) -> None:
        if store.under_way:
            store.arrive(0)
        put(name, data)

    store.put = put_after_it  # type: ignore[method-assign]
    assert writer.write(manifest(16)).sequence == 2
    assert newest(store) == 16


def test_another_writer_of_the_same_generation_fences() -> None:
    store = LateStore()
    writer, other = (ManifestStore(store, TENANT, TIMELINE, GENERATION) for _ in range(2))
    store.lost = 1
    with pytest.raises(ObjectStoreError):
        writer.write(manifest(8))
    other.write(manifest(16))
    store.arrive(0)
    with pytest.raises(OvertakenError):
        writer.write(manifest(24))
    assert newest(store) == 16
    assert not writer.is_sure_of_newest


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 3), max_size=3)), max_size=12))
def test_one_writer_is_never_fenced_and_its_last_answered_write_is_the_newest(
    steps: list[tuple[bool, list[int]]],
) -> None:
    """Whatever is lost, and whenever it arrives: as long as nobody else writes."""
    store = LateStore()
    writer = ManifestStore(store, TENANT, TIMELINE, GENERATION)
    for lsn, (is_lost, arriving) in zip(itertools.count(8, 8), steps, strict=False):
        store.lost = int(is_lost)
        try:
            writer.write(manifest(lsn))
        except ObjectStoreError:
            assert is_lost
        else:
            assert newest(store) == lsn
        for number in arriving:
            if number < len(store.under_way):
                store.arrive(number)
        if not is_lost:
            assert newest(store) == lsn
