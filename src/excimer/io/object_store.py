"""Object storage as an interface: where everything durable ends up.

Only create-if-absent is relied upon, never overwriting and never If-Match: it is what every store
really offers (S3, GCS, Azure, a local directory). Names are paths with slashes. All calls may
block, and are made from worker threads.

Bodies: `ObstoreObjectStore` (by URL: ``file:///dir``, ``s3://bucket/prefix``, ``gs://…``, ``az://…``),
`MemoryObjectStore`, and `FaultyObjectStore`, which wraps another and fails chosen operations.

Not here: what is stored, and retries (`excimer.storage.engine`).
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url

from excimer.base.errors import RefusedError, RetryableError


class ObjectStoreError(RetryableError):
    """Object storage could not be reached or answered with an error."""


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
        """Creates the object; durable on return. Raises `ObjectExistsError`, `ObjectStoreError`."""

    def get(self, name: str) -> bytes:
        """The whole object. Raises `ObjectMissingError`, `ObjectStoreError`."""

    def get_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end). Raises `ObjectMissingError`, `ObjectStoreError`."""

    def list(self, prefix: str) -> list[ObjectInfo]:
        """Every object below the directory `prefix` (whole path parts), sorted by name."""

    def delete(self, name: str) -> None:
        """Removes the object; removing what is not there is fine."""


class ObstoreObjectStore:
    """Any store that obstore reaches by URL. A local directory is synced to disk after each put."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = url
        self._directory = Path(unquote(parts.path)) if parts.scheme == "file" else None
        try:
            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
            self._store = LocalStore(self._directory) if self._directory is not None else from_url(url)
        except (BaseError, OSError, ValueError) as error:
            raise RefusedError(f"the object store {url} cannot be opened: {error}") from error

    def put(self, name: str, data: bytes) -> None:
        try:
            obstore.put(self._store, name, data, mode="create", use_multipart=False)
            if self._directory is not None:
                _sync_file_and_parents(self._directory / name, self._directory)
        except AlreadyExistsError as error:
            raise ObjectExistsError(f"{name} exists already in {self.url}") from error
        except (BaseError, OSError) as error:
            raise ObjectStoreError(f"{name} could not be written to {self.url}: {error}") from error

    def get(self, name: str) -> bytes:
        try:
            return bytes(obstore.get(self._store, name).bytes())
        except FileNotFoundError as error:
            raise ObjectMissingError(f"{name} is not in {self.url}") from error
        except (BaseError, OSError) as error:
            raise ObjectStoreError(f"{name} could not be read from {self.url}: {error}") from error

    def get_range(self, name: str, start: int, end: int) -> bytes:
        try:
            return bytes(obstore.get_range(self._store, name, start=start, end=end))
        except FileNotFoundError as error:
            raise ObjectMissingError(f"{name} is not in {self.url}") from error
        except (BaseError, OSError) as error:
            raise ObjectStoreError(f"{name} could not be read from {self.url}: {error}") from error

    def list(self, prefix: str) -> list[ObjectInfo]:
        try:
            pages = obstore.list(self._store, prefix=prefix or None)
            found = [ObjectInfo(meta["path"], meta["size"]) for page in pages for meta in page]
        except FileNotFoundError:
            return []
        except (BaseError, OSError) as error:
            raise ObjectStoreError(f"{prefix} could not be listed in {self.url}: {error}") from error
        return sorted(found)

    def delete(self, name: str) -> None:
        try:
            obstore.delete(self._store, name)
        except FileNotFoundError:
            return
        except (BaseError, OSError) as error:
            raise ObjectStoreError(f"{name} could not be deleted from {self.url}: {error}") from error


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

    def get(self, name: str) -> bytes:
        try:
            return self.objects[name]
        except KeyError:
            raise ObjectMissingError(f"{name} is not there") from None

    def get_range(self, name: str, start: int, end: int) -> bytes:
        return self.get(name)[start:end]

    def list(self, prefix: str) -> list[ObjectInfo]:
        below = prefix.rstrip("/") + "/" if prefix else ""
        with self._lock:
            return sorted(
                ObjectInfo(name, len(data)) for name, data in self.objects.items() if name.startswith(below)
            )

    def delete(self, name: str) -> None:
        with self._lock:
            self.objects.pop(name, None)


class FaultyObjectStore:
    """Another store whose operations fail when `fault` says so.

    `fault` is asked before each operation with its name and the object's; it raises to fail it.
    With `lose_answer` the operation is carried out first and the error comes after, as when a
    connection breaks before the answer.
    """

    def __init__(
        self, inner: ObjectStore, fault: Callable[[str, str], None], *, lose_answer: bool = False
    ) -> None:
        self._inner = inner
        self._fault = fault
        self._lose_answer = lose_answer

    def put(self, name: str, data: bytes) -> None:
        if self._lose_answer:
            self._inner.put(name, data)
            self._fault("put", name)
            return
        self._fault("put", name)
        self._inner.put(name, data)

    def get(self, name: str) -> bytes:
        self._fault("get", name)
        return self._inner.get(name)

    def get_range(self, name: str, start: int, end: int) -> bytes:
        self._fault("get_range", name)
        return self._inner.get_range(name, start, end)

    def list(self, prefix: str) -> list[ObjectInfo]:
        self._fault("list", prefix)
        return self._inner.list(prefix)

    def delete(self, name: str) -> None:
        self._fault("delete", name)
        self._inner.delete(name)


def _sync_file_and_parents(path: Path, top: Path) -> None:
    """Makes the file and the directories that lead to it durable (obstore renames but does not sync)."""
    for place in (path, *path.parents):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if place == top:
            return
