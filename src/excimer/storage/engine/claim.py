"""How a new generation takes a timeline over, so that no older one can remove what it needs (G1, D3).

::

    older generation                          newer generation
      manifest 1-7: layers A, B                 reads 1-7
      manifest 1-8: layers B                    writes 2-1, a copy of 1-7       (the claim)
      is 2-1 there? no -> deletes A             is 1-7 still the newest of the older? no: 1-8
                                                writes 2-2, a copy of 1-8
      is 2-1 there? yes -> deletes nothing      is 1-8 still ...? yes: writes 2-3, no claim any more,
                                                and serves

The older one makes its manifest durable before it looks for a claim, and the newer one its claim before it
looks for manifests: of two that cross, one sees the other.

A claim names the manifest that it repeats. It keeps older generations from deleting, and says nothing about
the timeline: who finds one that was never *settled*, its own or another's, goes by the newest manifest that
is no claim. What is settled is not looked at again: an older generation that writes on changes nothing.

Only then are layers removed that no manifest names and that an older generation has written: what a
crash left behind, or a flush that is under way there and will have been for nothing. A newer generation that
has come meanwhile may name them, and is looked for before. For layers of our own generation see `leftovers`.
"""

import logging
from collections.abc import Iterable
from typing import Final

import msgspec

from excimer.io.object_store import ObjectInfo, ObjectStore, ObjectStoreError
from excimer.storage.engine.manifest_store import (
    FoundManifest,
    ManifestStore,
    check_not_overtaken,
    find_newest_manifest,
    has_follower,
    list_timeline,
    read_manifest,
    timeline_prefix,
)
from excimer.storage.format.manifest import (
    DamagedManifestError,
    Manifest,
    ManifestName,
    layer_generation,
)

_log = logging.getLogger(__name__)

CLAIMS_MAX: Final = 10


def claim_newest(
    store: ObjectStore,
    tenant_id: str,
    timeline_id: str,
    generation: int,
    listed: Iterable[ObjectInfo] | None = None,
) -> FoundManifest | None:
    """The newest manifest, as one of our own generation; None when the timeline has none. `listed` is what a
    listing of its prefix has just answered.

    One that says *deleted* is answered as it is. Blocks. Raises `OvertakenError`, `DamagedManifestError`,
    `ObjectStoreError`.
    """
    found = find_newest_manifest(store, tenant_id, timeline_id, generation, listed)
    if found is None or found.manifest.deleted:
        return found
    is_own, is_claim = found.name.generation == generation, bool(found.manifest.claimed_from)
    if is_own and not is_claim:
        return found
    if found.has_marker:
        return _as_deleted(found)
    writer = ManifestStore(store, tenant_id, timeline_id, generation, found.name.sequence if is_own else 0)
    claim = found.manifest
    if not is_own:
        claim = _write_claim(writer, found)
    for _ in range(CLAIMS_MAX):
        objects = list_timeline(store, tenant_id, timeline_id, generation)
        if objects.has_marker:
            return _as_deleted(found)
        older = [name for name in objects.manifests if name.generation < generation]
        newest = _find_settled(store, claim, older)
        if newest is None:
            continue  # the listing lags behind
        if str(newest.name) == claim.claimed_from:
            return _settle(store, writer, claim, objects.layers)
        claim = _write_claim(writer, newest)
        if claim.deleted:
            return newest
    raise ObjectStoreError(f"the manifests of timeline {timeline_id} change faster than they can be claimed")


def _as_deleted(found: FoundManifest) -> FoundManifest:
    return FoundManifest(found.name, msgspec.structs.replace(found.manifest, deleted=True))


def _write_claim(writer: ManifestStore, found: FoundManifest) -> Manifest:
    """Repeats what was found. What is a claim itself is taken at its word until the next look."""
    claimed_from = found.manifest.claimed_from or str(found.name)
    claim = msgspec.structs.replace(found.manifest, claimed_from=claimed_from)
    writer.write(claim)
    return claim


def _find_settled(store: ObjectStore, claim: Manifest, older: list[ManifestName]) -> FoundManifest | None:
    """The newest of these that is no claim; not read again if it is what `claim` repeats. None: list again.

    Raises `DamagedManifestError` if there is none, nor what `claim` repeats.
    """
    tenant_id, timeline_id = claim.tenant_id, claim.timeline_id
    generation_seen = None
    for name in reversed(older):
        if name.generation != generation_seen and has_follower(store, tenant_id, timeline_id, name):
            return None
        generation_seen = name.generation
        if str(name) == claim.claimed_from:
            return FoundManifest(name, claim)
        manifest = read_manifest(store, tenant_id, timeline_id, name)
        if manifest is None:
            return None
        if not manifest.claimed_from:
            return FoundManifest(name, manifest)
    base_name = f"{timeline_prefix(tenant_id, timeline_id)}/{claim.claimed_from}"
    if store.size_bytes(base_name) is not None:
        return None
    raise DamagedManifestError(f"manifest {base_name} is missing, and only a claim repeats it")


def _settle(store: ObjectStore, writer: ManifestStore, claim: Manifest, layers: list[str]) -> FoundManifest:
    """The claim is good, which a manifest says before anybody goes by it and before anything is removed.

    Raises `OvertakenError`: a newer generation has come meanwhile.
    """
    manifest = msgspec.structs.replace(claim, claimed_from="")
    name = writer.write(manifest)
    named = {layer.name for layer in manifest.layers}
    strangers = {
        each
        for each in layers
        if (last_part := each.rsplit("/", 1)[-1]) not in named
        and layer_generation(last_part) < name.generation
    }
    if strangers:
        check_not_overtaken(store, claim.tenant_id, claim.timeline_id, name.generation)
        try:
            store.delete_many(sorted(strangers))
        except ObjectStoreError as error:
            _log.warning("%d layers that no manifest names are removed later: %s", len(strangers), error)
            strangers.clear()
    return FoundManifest(name, manifest, layers=tuple(each for each in layers if each not in strangers))
