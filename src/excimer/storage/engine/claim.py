"""How a new generation takes a timeline over, so that no older one can remove what it needs (G1, D3).

::

    older generation                          newer generation
      manifest 1-7: layers A, B                 reads 1-7
      manifest 1-8: layers B                    writes 2-1, a copy of 1-7       (the claim)
      is 2-1 there? no -> deletes A             is 1-7 still the newest of the older? no: 1-8
                                                writes 2-2, a copy of 1-8
      is 2-1 there? yes -> deletes nothing      is 1-8 still ...? yes -> serves

The older one makes its manifest durable before it looks for a claim, and the newer one its claim before it
looks for manifests: of two that cross, one sees the other. A claim says which manifest it repeats until the
next commit, so that a crash in the middle is noticed and the check is made again.

Only then are layers removed that no manifest names and that an older generation has written: what a
crash left behind, or a flush that is under way there and will have been for nothing. The claim is settled
before by a manifest that repeats nothing. For layers of our own generation see `leftovers`.
"""

import logging
from collections.abc import Iterable
from typing import Final

import msgspec

from excimer.io.object_store import ObjectInfo, ObjectStore, ObjectStoreError
from excimer.storage.engine.manifest_store import (
    FoundManifest,
    ManifestStore,
    find_newest_manifest,
    has_follower,
    list_timeline,
    read_manifest,
)
from excimer.storage.format.manifest import ManifestName, layer_generation

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
    is_own = found.name.generation == generation
    if is_own and not found.manifest.claimed_from:
        return found
    writer = ManifestStore(store, tenant_id, timeline_id, generation, found.name.sequence if is_own else 0)
    claimed_from = found.manifest.claimed_from
    if not is_own:
        if found.has_marker:
            return FoundManifest(found.name, msgspec.structs.replace(found.manifest, deleted=True))
        claimed_from = str(found.name)
        claim = msgspec.structs.replace(found.manifest, claimed_from=claimed_from)
        writer.write(claim)
        found = FoundManifest(ManifestName(generation, writer.last_sequence), claim)
    for _ in range(CLAIMS_MAX):
        objects = list_timeline(store, tenant_id, timeline_id, generation)
        if objects.has_marker:
            return FoundManifest(found.name, msgspec.structs.replace(found.manifest, deleted=True))
        older = [name for name in objects.manifests if name.generation < generation]
        newest = str(older[-1]) if older else claimed_from
        if older and has_follower(store, tenant_id, timeline_id, older[-1]):
            continue  # the listing lags behind
        if newest == claimed_from:
            return _settle(store, writer, found, objects.layers)
        followed = read_manifest(store, tenant_id, timeline_id, older[-1])
        if followed is not None:
            claim = msgspec.structs.replace(followed, claimed_from=newest)
            writer.write(claim)
            claimed_from = newest
            found = FoundManifest(ManifestName(generation, writer.last_sequence), claim)
            if followed.deleted:
                return found
    raise ObjectStoreError(f"the manifests of timeline {timeline_id} change faster than they can be claimed")


def _settle(
    store: ObjectStore, writer: ManifestStore, found: FoundManifest, layers: list[str]
) -> FoundManifest:
    """The claim is good. Before anything is removed a manifest says so: the older one may be about to name
    it, and a claim that is checked again would take that over.
    """
    name, manifest = found.name, msgspec.structs.replace(found.manifest, claimed_from="")
    named = {layer.name for layer in manifest.layers}
    strangers = {
        each
        for each in layers
        if (last_part := each.rsplit("/", 1)[-1]) not in named
        and layer_generation(last_part) < name.generation
    }
    if strangers:
        name = writer.write(manifest)
        try:
            store.delete_many(sorted(strangers))
        except ObjectStoreError as error:
            _log.warning("%d layers that no manifest names are removed later: %s", len(strangers), error)
            strangers.clear()
    return FoundManifest(name, manifest, layers=tuple(each for each in layers if each not in strangers))
