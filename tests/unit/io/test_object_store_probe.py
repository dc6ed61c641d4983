"""Which stores are refused at start, and that a good one keeps nothing of the probe."""

import threading

import pytest

from excimer.io.object_store import (
    FaultyObjectStore,
    MemoryObjectStore,
    ObjectInfo,
    ObjectStoreDeniedError,
    ObjectStoreError,
)
from excimer.io.object_store_probe import RACERS, UnusableObjectStoreError, check_object_store


class Overwriting(MemoryObjectStore):
    """Accepts a violated precondition, as radosgw over dbstore and rclone do."""

    def put(self, name: str, data: bytes) -> None:
        self.objects[name] = data


class Racing(MemoryObjectStore):
    """Looks first and then writes, as versioned buckets of some stores do."""

    def __init__(self) -> None:
        super().__init__()
        self._all_looked = threading.Barrier(RACERS)

    def put(self, name: str, data: bytes) -> None:
        if name.endswith("/race") and name not in self.objects:
            self._all_looked.wait(10)
            self.objects[name] = data
            return
        super().put(name, data)


class WholeRanges(MemoryObjectStore):
    def get_range(self, name: str, start: int, end: int) -> bytes:
        return self.get(name)


class Forgetful(MemoryObjectStore):
    def list(self, prefix: str) -> list[ObjectInfo]:
        return []


class Keeping(MemoryObjectStore):
    def delete(self, name: str) -> None:
        return


def test_a_good_store_keeps_nothing_of_it() -> None:
    store = MemoryObjectStore()
    check_object_store(store, "memory:///")
    assert store.objects == {}


@pytest.mark.parametrize(
    ("store", "complaint"),
    [
        (Overwriting(), "does not honour create-if-absent"),
        (Racing(), f"lets {RACERS} of {RACERS} simultaneous writers"),
        (WholeRanges(), "range of bytes"),
        (Forgetful(), "does not list"),
        (Keeping(), "does not delete"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_bad_store_is_refused_and_named(store: MemoryObjectStore, complaint: str) -> None:
    with pytest.raises(UnusableObjectStoreError, match=rf"s3://bad/.*{complaint}"):
        check_object_store(store, "s3://bad/")
    assert isinstance(store, Keeping) or store.objects == {}


@pytest.mark.parametrize("operation", ["put", "get", "get_range", "list", "delete", "size"])
def test_a_store_that_is_away_is_asked_again_and_one_that_denies_is_refused(operation: str) -> None:
    def failing(error: ObjectStoreError) -> FaultyObjectStore:
        def fault(asked: str, name: str) -> None:
            if asked == operation:
                raise error

        return FaultyObjectStore(MemoryObjectStore(), fault)

    with pytest.raises(ObjectStoreError, match="away"):
        check_object_store(failing(ObjectStoreError("away")), "s3://x")
    with pytest.raises(UnusableObjectStoreError, match="not allowed"):
        check_object_store(failing(ObjectStoreDeniedError("not allowed")), "s3://x")
