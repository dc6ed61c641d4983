"""Object storage as an interface: where everything durable ends up.

Only create-if-absent is relied upon, never overwriting and never If-Match: it is what every store
really offers (S3, GCS, Azure, a local directory). Names are paths with slashes. All calls may
block, and are made from worker threads. They end in bounded time, with `ObjectStoreError` at the latest.

Two kinds of objects, by who names them. Those whose name somebody else could choose too (manifests,
settings, markers) are made by `put`, and exactly one of several writers succeeds. Those whose name holds
a checksum of the content (layers) are made by `put_file` and `copy`, which stream, and may write the
same bytes once more.

Bodies: `excimer.io.obstore_object_store` for real stores by URL, `MemoryObjectStore`, and
`FaultyObjectStore`, which wraps another and fails chosen operations.

Not here: what is stored, and retries beyond a single call's (`excimer.storage.engine`).
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from excimer.base.errors import RefusedError, RetryableError


class ObjectStoreError(RetryableError):
    """Object storage could not be reached or answered with an error."""


class ObjectStoreDeniedError(ObjectStoreError):
    """The store answers that we may not: credentials, permissions, or no such bucket."""


class ObjectExistsError(RefusedError):
    """The name is taken. Objects are never overwritten."""


class ObjectMissingError(RefusedError):
    """There is no object of that name."""


class ObjectInfo(NamedTuple):
    name: str
    size_bytes: int


class ObjectStore(Protocol):
    """A flat space of immutable objects."""

    def put(self, name: str, data: bytes) -> None:
        """Creates the object; durable on return. Raises `ObjectExistsError`, `ObjectStoreError`; after the
        latter it may exist, and a retry may meet its own object.
        """

    def put_file(self, name: str, path: Path) -> None:
        """Creates the object from a local file, with bounded memory; durable on return. The name must be of
        this content alone: an object of that name is left, or replaced by the same bytes.

        Raises `ObjectStoreError`, OSError when the file cannot be read.
        """

    def copy(self, source: str, target: str) -> None:
        """Makes `target` of the same content, inside the store; durable on return. As to an object of that
        name, see `put_file`. Raises `ObjectMissingError`, `ObjectStoreError`.
        """

    def get(self, name: str) -> bytes:
        """The whole object. Raises `ObjectMissingError`, `ObjectStoreError`."""

    def get_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end), all of which must exist; of an empty range nothing is asked. Raises
        `ObjectMissingError`, `ObjectStoreError`.
        """

    def size_bytes(self, name: str) -> int | None:
        """The object's size, None if there is none. Raises `ObjectStoreError`."""

    def list(self, prefix: str) -> list[ObjectInfo]:
        """Every object below the directory `prefix` (whole path parts), sorted by name."""

    def delete(self, name: str) -> None:
        """Removes the object; removing what is not there is fine. Raises `ObjectStoreError`."""

    def delete_many(self, names: Sequence[str]) -> None:
        """As `delete`, with few requests. After `ObjectStoreError` any of them may still be there."""


class MemoryObjectStore:
    """Objects in a dict, for tests and simulations."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, name: str, data: bytes) -> None:
        with self._lock:
            if name in self.objects:
                raise ObjectExistsError(f"{name} exists already")
            self.objects[name] = bytes(data)

    def put_file(self, name: str, path: Path) -> None:
        self.objects[name] = path.read_bytes()

    def copy(self, source: str, target: str) -> None:
        self.objects[target] = self.get(source)

    def get(self, name: str) -> bytes:
        try:
            return self.objects[name]
        except KeyError:
            raise ObjectMissingError(f"{name} is not there") from None

    def get_range(self, name: str, start: int, end: int) -> bytes:
        data = self.get(name)[start:end]
        if len(data) != end - start:
            raise ObjectStoreError(f"{name} ends before byte {end}")
        return data

    def size_bytes(self, name: str) -> int | None:
        data = self.objects.get(name)
        return None if data is None else len(data)

    def list(self, prefix: str) -> list[ObjectInfo]:
        below = prefix.rstrip("/") + "/" if prefix else ""
        with self._lock:
            return sorted(
                ObjectInfo(name, len(data)) for name, data in self.objects.items() if name.startswith(below)
            )

    def delete(self, name: str) -> None:
        with self._lock:
            self.objects.pop(name, None)

    def delete_many(self, names: Sequence[str]) -> None:
        for name in names:
            self.delete(name)


class FaultyObjectStore:
    """Another store whose operations fail when `fault` says so.

    `fault` is asked before each operation with its name and the object's; it raises to fail it.
    With `lose_answer` the operation is carried out first and the error comes after, as when a
    connection breaks before the answer. While `stale_listings` is set, `list` answers what was there
    when it was set, as stores do whose listings lag behind.
    """

    def __init__(
        self, inner: ObjectStore, fault: Callable[[str, str], None], *, lose_answer: bool = False
    ) -> None:
        self._inner = inner
        self._fault = fault
        self._lose_answer = lose_answer
        self._frozen_listing: list[ObjectInfo] | None = None

    @property
    def stale_listings(self) -> bool:
        return self._frozen_listing is not None

    @stale_listings.setter
    def stale_listings(self, stale: bool) -> None:
        self._frozen_listing = self._inner.list("") if stale else None

    def put(self, name: str, data: bytes) -> None:
        self._change("put", name, lambda: self._inner.put(name, data))

    def put_file(self, name: str, path: Path) -> None:
        self._change("put_file", name, lambda: self._inner.put_file(name, path))

    def copy(self, source: str, target: str) -> None:
        self._change("copy", target, lambda: self._inner.copy(source, target))

    def get(self, name: str) -> bytes:
        self._fault("get", name)
        return self._inner.get(name)

    def get_range(self, name: str, start: int, end: int) -> bytes:
        self._fault("get_range", name)
        return self._inner.get_range(name, start, end)

    def size_bytes(self, name: str) -> int | None:
        self._fault("size", name)
        return self._inner.size_bytes(name)

    def list(self, prefix: str) -> list[ObjectInfo]:
        self._fault("list", prefix)
        if self._frozen_listing is None:
            return self._inner.list(prefix)
        below = prefix.rstrip("/") + "/" if prefix else ""
        return [info for info in self._frozen_listing if info.name.startswith(below)]

    def delete(self, name: str) -> None:
        self._change("delete", name, lambda: self._inner.delete(name))

    def delete_many(self, names: Sequence[str]) -> None:
        """One operation per name, so that a fault can fall between any two."""
        for name in names:
            self.delete(name)

    def _change(self, operation: str, name: str, act: Callable[[], None]) -> None:
        if self._lose_answer:
            act()
            self._fault(operation, name)
            return
        self._fault(operation, name)
        act()
