"""What every object store must do, in one go: tried on each server that the tests can start."""

import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from excimer.io.object_store import (
    ObjectExistsError,
    ObjectInfo,
    ObjectMissingError,
    ObjectStoreError,
)
from excimer.io.object_store_probe import check_object_store
from excimer.io.obstore_object_store import PART_SIZE_BYTES, ObstoreObjectStore

PREFIX = "of/excimer"
MANY = 300
"""More than Azure deletes with one request (256)."""


def check_contract(open_store: Callable[[str], ObstoreObjectStore], bucket_url: str, scratch: Path) -> None:
    """`open_store` opens a URL; there is nothing below `bucket_url` yet, and nothing is left there."""
    store = open_store(f"{bucket_url}/{PREFIX}")
    check_object_store(store, store.url)
    assert store.list("") == []
    _check_small_objects(store)
    assert open_store(f"{bucket_url}/of").size_bytes("excimer/a/one") == 10
    _check_layers(store, scratch)
    _check_many(store)
    store.delete("a/one")
    store.delete("a/one")
    assert open_store(bucket_url).list("") == []


def _check_small_objects(store: ObstoreObjectStore) -> None:
    store.put("a/one", b"0123456789")
    with pytest.raises(ObjectExistsError):
        store.put("a/one", b"other")
    assert store.get("a/one") == b"0123456789"
    assert store.get_range("a/one", 2, 5) == b"234"
    with pytest.raises(ObjectStoreError):
        store.get_range("a/one", 5, 11)
    assert store.size_bytes("a/none") is None
    for missing in (
        lambda: store.get("a/none"),
        lambda: store.get_range("a/none", 0, 1),
        lambda: store.copy("a/none", "c"),
    ):
        with pytest.raises(ObjectMissingError):
            missing()
    won: list[bytes] = []

    def write(data: bytes) -> None:
        try:
            store.put("contested", data)
        except ObjectExistsError:
            return
        won.append(data)

    writers = [threading.Thread(target=write, args=(b"%d" % number,)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert won == [store.get("contested")]
    store.delete("contested")


def _check_layers(store: ObstoreObjectStore, scratch: Path) -> None:
    """Files of no part, one part and several."""
    for size_bytes in (0, 1000, 2 * PART_SIZE_BYTES + 17):
        content = random.Random(1).randbytes(size_bytes)
        (scratch / "layer").write_bytes(content)
        for _ in range(2):  # a retry puts the same bytes
            store.put_file("a/layer", scratch / "layer")
            store.copy("a/layer", "b/copy")
        assert store.get("b/copy") == content
        assert store.list("a") == [ObjectInfo("a/layer", size_bytes), ObjectInfo("a/one", 10)]
        if size_bytes > PART_SIZE_BYTES:
            start = PART_SIZE_BYTES - 3
            assert store.get_range("a/layer", start, start + 6) == content[start : start + 6]
    store.delete_many(["a/layer", "a/none", "b/copy"])
    assert store.size_bytes("a/layer") is None
    assert store.size_bytes("b/copy") is None


def _check_many(store: ObstoreObjectStore) -> None:
    names = [f"many/{number:03}" for number in range(MANY)]
    for name in names:
        store.put(name, b"")
    assert [info.name for info in store.list("many")] == names
    store.delete_many(names)
    assert store.list("many") == []


@contextmanager
def silent_server() -> Iterator[str]:
    """The endpoint of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
