"""Where a timeline's objects lie, and its manifests: writing the next, finding the newest.

    tenants/TENANT/timelines/TIMELINE/index-GENERATION-SEQUENCE
    tenants/TENANT/timelines/TIMELINE/layers/LAYER
    tenants/TENANT/timelines/TIMELINE/deleted             there is no such timeline any more

A manifest is only ever created (G1): a writer whose name is taken by other content has been
overtaken by another process of the same generation and stops; unless it is the writer's own content, put
before without an answer, however long ago. A reader takes the greatest name, so
what an older generation still writes is never looked at.

A listing may lag behind on some stores, while asking for an object by name never does. So whoever takes the
greatest listed name asks for those that would follow it: the next of the same generation, and the first of
the next generations, which for that reason are kept.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, NamedTuple

from excimer.base.errors import FencedError
from excimer.io.object_store import (
    ObjectExistsError,
    ObjectInfo,
    ObjectMissingError,
    ObjectStore,
    ObjectStoreError,
)
from excimer.storage.format.manifest import (
    DamagedManifestError,
    Manifest,
    ManifestName,
    pack_manifest,
    parse_manifest_name,
    unpack_manifest,
)

MANIFESTS_KEPT = 3
"""Older ones of the same generation are deleted; a few stay for people who look for a cause."""

GENERATIONS_LOOKED_AHEAD = 3
"""Of those that a listing does not have."""


DELETED_MARKER: Final = "deleted"


class OvertakenError(FencedError):
    """Another process writes this timeline's manifests with the same or a newer generation."""


def tenant_prefix(tenant_id: str) -> str:
    return f"tenants/{tenant_id}"


def timeline_prefix(tenant_id: str, timeline_id: str) -> str:
    return f"tenants/{tenant_id}/timelines/{timeline_id}"


class FoundManifest(NamedTuple):
    name: ManifestName
    manifest: Manifest
    has_marker: bool = False
    """As of `TimelineObjects`, where it was found by a listing."""
    layers: tuple[str, ...] = ()
    """What that listing had, whole names."""


class TimelineObjects(NamedTuple):
    manifests: list[ManifestName]
    """Ascending."""
    layers: list[str]
    """Their whole names."""
    has_marker: bool
    """It was deleted, whatever else is there (`timeline_removal`)."""


class ManifestStore:
    """The manifests of one timeline, written by one thread at a time. Calls block."""

    def __init__(
        self, store: ObjectStore, tenant_id: str, timeline_id: str, generation: int, last_sequence: int = 0
    ) -> None:
        self._store = store
        self._prefix = timeline_prefix(tenant_id, timeline_id)
        self._generation = generation
        self._sequence = last_sequence
        self._unanswered: set[bytes] = set()
        """Digests of all that was put as the next sequence without an answer: each may still arrive."""
        self._has_written = False

    def write(self, manifest: Manifest) -> ManifestName:
        """Makes the manifest the newest; durable on return.

        Raises `OvertakenError`; `ObjectStoreError` after which it may or may not be there, and which
        the next write copes with.
        """
        data = pack_manifest(manifest)
        if self._unanswered:
            self._take_arrived(self._read_next())
        while True:
            name = ManifestName(self._generation, self._sequence + 1)
            self._unanswered.add(_digest(data))
            try:
                self._store.put(f"{self._prefix}/{name}", data)
                break
            except ObjectExistsError as error:
                found = self._read_next()
                if found == data:  # this very one, its answer lost
                    break
                if not self._take_arrived(found):
                    raise OvertakenError(
                        f"another process has written {self._prefix}/{name}: this one must stop"
                    ) from error
        self._unanswered.clear()
        self._has_written = True
        self._sequence += 1
        if self._sequence > MANIFESTS_KEPT + 1:  # the first of each generation stays
            old = ManifestName(self._generation, self._sequence - MANIFESTS_KEPT)
            with suppress(ObjectStoreError):  # an old manifest too many does no harm
                self._store.delete(f"{self._prefix}/{old}")
        return name

    @property
    def is_sure_of_newest(self) -> bool:
        """Whether the newest of this generation is one that we have written, and that was confirmed. No
        other process of our generation can write one from here on.
        """
        return self._has_written and not self._unanswered

    @property
    def last_sequence(self) -> int:
        """Of the last manifest known to be there."""
        return self._sequence

    def _read_next(self) -> bytes | None:
        """The manifest of the next sequence; None if there is none."""
        try:
            return self._store.get(f"{self._prefix}/{ManifestName(self._generation, self._sequence + 1)}")
        except ObjectMissingError:
            return None

    def _take_arrived(self, found: bytes | None) -> bool:
        """Whether the next sequence is one of ours whose answer was lost, perhaps an earlier try of several.

        Then it is the newest, and what else was tried under its name can no longer arrive.
        """
        if found is None or _digest(found) not in self._unanswered:
            return False
        self._sequence += 1
        self._unanswered.clear()
        return True


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def check_not_overtaken(
    store: ObjectStore, tenant_id: str, timeline_id: str, generation: int
) -> TimelineObjects:
    """Raises `OvertakenError` if a newer generation has a manifest of the timeline. Answers what a listing
    has. Blocks.
    """
    objects = list_timeline(store, tenant_id, timeline_id, generation)
    if _has_first(store, tenant_id, timeline_id, generation + 1):
        raise OvertakenError(
            f"timeline {timeline_id} is owned by generation {generation + 1}: "
            f"this one, {generation}, must stop"
        )
    return objects


def list_timeline(store: ObjectStore, tenant_id: str, timeline_id: str, generation: int) -> TimelineObjects:
    """Raises `OvertakenError` if a manifest is of a newer generation. Blocks."""
    listed = store.list(timeline_prefix(tenant_id, timeline_id))
    return sort_listing(listed, tenant_id, timeline_id, generation)


def sort_listing(
    listed: Iterable[ObjectInfo], tenant_id: str, timeline_id: str, generation: int
) -> TimelineObjects:
    """What a listing of a timeline's prefix has. Raises as `list_timeline`."""
    prefix = f"{timeline_prefix(tenant_id, timeline_id)}/"
    manifests, layers, has_marker = [], [], False
    for info in listed:
        name = parse_manifest_name(info.name.removeprefix(prefix))
        if name is not None:
            manifests.append(name)
        elif info.name.startswith(f"{prefix}layers/"):
            layers.append(info.name)
        elif info.name == f"{prefix}{DELETED_MARKER}":
            has_marker = True
    manifests.sort()
    if manifests and manifests[-1].generation > generation:
        raise OvertakenError(
            f"timeline {timeline_id} is owned by generation {manifests[-1].generation}: "
            f"this one, {generation}, must stop"
        )
    return TimelineObjects(manifests, layers, has_marker)


def find_newest_manifest(
    store: ObjectStore,
    tenant_id: str,
    timeline_id: str,
    generation: int,
    listed: Iterable[ObjectInfo] | None = None,
) -> FoundManifest | None:
    """None when the timeline has none. `listed` is what a listing of its prefix has just answered.

    Raises `OvertakenError` if one is of a newer generation than ours.
    """
    for _ in range(MANIFESTS_KEPT):
        if listed is None:
            listed = store.list(timeline_prefix(tenant_id, timeline_id))
        objects = sort_listing(listed, tenant_id, timeline_id, generation)
        listed = None
        if not objects.manifests:
            return None
        newest = objects.manifests[-1]
        manifest = _read_newest(store, tenant_id, timeline_id, newest, generation)
        if manifest is not None:  # else its still running owner has written newer ones meanwhile
            return FoundManifest(newest, manifest, objects.has_marker, tuple(objects.layers))
    raise ObjectStoreError(f"the manifests of timeline {timeline_id} change faster than they can be read")


def read_manifest(
    store: ObjectStore, tenant_id: str, timeline_id: str, name: ManifestName
) -> Manifest | None:
    """None if it is gone. Blocks. Raises `DamagedManifestError`, `ObjectStoreError`."""
    object_name = f"{timeline_prefix(tenant_id, timeline_id)}/{name}"
    try:
        manifest = _unpack_twice(store, object_name)
    except ObjectMissingError:
        return None
    if (manifest.tenant_id, manifest.timeline_id) != (tenant_id, timeline_id):
        raise DamagedManifestError(
            f"manifest {object_name} is another timeline's: it says {manifest.timeline_id} of tenant "
            f"{manifest.tenant_id}"
        )
    return manifest


def _unpack_twice(store: ObjectStore, object_name: str) -> Manifest:
    """What was only damaged on its way here is whole at the second try."""
    try:
        return unpack_manifest(store.get(object_name), object_name)
    except DamagedManifestError:
        return unpack_manifest(store.get(object_name), object_name)


def may_be_hidden(store: ObjectStore, tenant_id: str, timeline_id: str, generation: int) -> bool:
    """Whether a timeline that no listing has is there all the same, as far as its newest generations go."""
    oldest = max(1, generation - GENERATIONS_LOOKED_AHEAD + 1)
    return any(_has_first(store, tenant_id, timeline_id, each) for each in range(oldest, generation + 1))


def _read_newest(
    store: ObjectStore, tenant_id: str, timeline_id: str, newest: ManifestName, generation: int
) -> Manifest | None:
    """As `read_manifest`. Raises `ObjectStoreError` too if one exists that is newer than this newest listed.

    All is asked at the same time: an attachment is as slow as the answers it waits for in turn.
    """
    last = min(generation, newest.generation + GENERATIONS_LOOKED_AHEAD)
    with ThreadPoolExecutor(1 + GENERATIONS_LOOKED_AHEAD, thread_name_prefix="newest manifest") as beside:
        questions = [beside.submit(has_follower, store, tenant_id, timeline_id, newest)]
        questions += [
            beside.submit(_has_first, store, tenant_id, timeline_id, newer)
            for newer in range(newest.generation + 1, last + 1)
        ]
        manifest = read_manifest(store, tenant_id, timeline_id, newest)
    if any(question.result() for question in questions):
        raise ObjectStoreError(
            f"the object store's listing of timeline {timeline_id} lags behind what was written: try again"
        )
    return manifest


def has_follower(store: ObjectStore, tenant_id: str, timeline_id: str, name: ManifestName) -> bool:
    """Whether the next manifest of the same generation exists, whatever a listing says. Blocks."""
    following = ManifestName(name.generation, name.sequence + 1)
    return store.size_bytes(f"{timeline_prefix(tenant_id, timeline_id)}/{following}") is not None


def _has_first(store: ObjectStore, tenant_id: str, timeline_id: str, generation: int) -> bool:
    name = f"{timeline_prefix(tenant_id, timeline_id)}/{ManifestName(generation, 1)}"
    return store.size_bytes(name) is not None
