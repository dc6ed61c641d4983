"""Whether an object store can be trusted: tried out at each start, because some only say so.

All safety of object storage here rests on create-if-absent: of several writers of one manifest exactly one
may succeed (G1). There are stores that speak S3 and ignore the condition; on them a deposed
pageserver would overwrite its successor's history. They are refused.

A probe makes a few objects of a few bytes below ``excimer-probe/`` and removes them again. The names are
random, so that any number of processes may probe at once.

Not here: speed, and durability, which nobody can try out.
"""

import secrets
import threading
from contextlib import suppress
from typing import Final

from excimer.base.errors import RefusedError
from excimer.io.object_store import ObjectExistsError, ObjectStore, ObjectStoreDeniedError, ObjectStoreError

PROBE_PREFIX: Final = "excimer-probe"
RACERS: Final = 4


class UnusableObjectStoreError(RefusedError):
    """The object store does not let us in, or does not do what the data's safety depends on."""


def check_object_store(store: ObjectStore, url: str) -> None:
    """Returns when the store has done all that is needed of it.

    Blocks. Raises `UnusableObjectStoreError` when it never will, `ObjectStoreError` when it is not reached.
    """
    prefix = f"{PROBE_PREFIX}/{secrets.token_hex(8)}"
    try:
        _create(store, f"{prefix}/one", url)  # if it fails nothing is removed: that would fail as slowly
        try:
            _check_creation(store, f"{prefix}/one", url)
            _check_race(store, f"{prefix}/race", url)
            _check_reading(store, prefix, url)
        finally:
            with suppress(ObjectStoreError):
                store.delete_many([f"{prefix}/one", f"{prefix}/race"])
    except ObjectStoreDeniedError as error:
        raise UnusableObjectStoreError(f"the object store does not let us work: {error}") from error


def _create(store: ObjectStore, name: str, url: str) -> None:
    try:
        store.put(name, b"first")
    except ObjectExistsError as error:  # a retry after a lost answer meets its own object
        if store.get(name) != b"first":
            raise UnusableObjectStoreError(f"{url} says that a new object exists") from error


def _check_creation(store: ObjectStore, name: str, url: str) -> None:
    try:
        store.put(name, b"second")
    except ObjectExistsError:
        if store.get(name) == b"first":
            return
    raise UnusableObjectStoreError(
        f"{url} does not honour create-if-absent: it overwrote an object that it was told to keep. Two "
        "pageservers could destroy each other's data there; use a store with conditional writes "
        "(If-None-Match: *)"
    )


def _check_race(store: ObjectStore, name: str, url: str) -> None:
    """Of several writers at once exactly one may succeed, and its bytes must be there."""
    won: list[bytes] = []
    failed: list[ObjectStoreError] = []

    def write(data: bytes) -> None:
        try:
            store.put(name, data)
        except ObjectExistsError:
            return
        except ObjectStoreError as error:
            failed.append(error)
            return
        won.append(data)

    racers = [threading.Thread(target=write, args=(b"%d" % number,)) for number in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    if failed:
        raise failed[0]
    if not won:  # the winner's answer was lost, and its own retry met its object
        raise ObjectStoreError(f"{url} answers too badly to be tried out: try again")
    if len(won) > 1 or store.get(name) != won[0]:
        raise UnusableObjectStoreError(
            f"{url} lets {len(won)} of {RACERS} simultaneous writers create the same object: it must be "
            "exactly one. Two pageservers could destroy each other's data there; on a versioned bucket, "
            "turn versioning off"
        )


def _check_reading(store: ObjectStore, prefix: str, url: str) -> None:
    name = f"{prefix}/one"
    if store.get_range(name, 1, 3) != b"ir":
        raise UnusableObjectStoreError(f"{url} answers requests for a range of bytes with other bytes")
    listed = [info.name for info in store.list(prefix)]
    if listed != [name, f"{prefix}/race"]:
        raise UnusableObjectStoreError(f"{url} does not list the objects that were just made")
    store.delete(name)
    if store.size_bytes(name) is not None:
        raise UnusableObjectStoreError(f"{url} does not delete objects")
