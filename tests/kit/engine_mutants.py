"""Engines with one rule broken each. The model must notice every one of them, or it proves nothing.

Each patches the engine through a `MonkeyPatch`, as small as the mistake that it stands for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import msgspec
import pytest

from excimer.base.lsn import Lsn
from excimer.storage.engine import (
    compactor,
    image_round_job,
    layer_writing,
    merge_job,
    timeline_commits,
    value_reads,
)
from excimer.storage.engine.disk_layer import DiskLayer
from excimer.storage.engine.image_round_job import KeyRun, RoundSource
from excimer.storage.engine.layer_stack import LayerHome, LayerStack
from excimer.storage.engine.manifest_store import ManifestStore
from excimer.storage.engine.merge_job import MergeJob
from excimer.storage.engine.tenant_timelines import TenantTimelines
from excimer.storage.engine.timeline import Timeline
from excimer.storage.engine.timeline_commits import TimelineCommits
from excimer.storage.format.layer_block import pack_value, unpack_block
from excimer.storage.format.manifest import LayerDescription, Manifest, ManifestName
from excimer.storage.format.values import Value, ValueKind
from excimer.storage.plan.layer_map import LayerRun
from excimer.storage.plan.retention import RetainedLsns, Retention
from tests.kit.storage_world import START

Mutant = Callable[[pytest.MonkeyPatch], None]


def reads_ignore_frozen_layers(patch: pytest.MonkeyPatch) -> None:
    """What has been frozen is not seen until it is flushed."""
    patch.setattr(LayerStack, "memory_layers", property(lambda stack: [stack.open]))


def branch_reads_above_its_branch_point(patch: pytest.MonkeyPatch) -> None:
    """S2 broken: what the ancestor did shortly after the branch point is seen by the branch."""
    init = Timeline.__init__
    patch.setattr(Timeline, "_check_arrived", lambda self, lsn: None)

    def too_far(self: Timeline, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]
        if self.stack.ancestry is not None:
            ancestry = replace(self.stack.ancestry, lsn=Lsn(self.stack.ancestry.lsn + 256))
            self.stack = replace(self.stack, ancestry=ancestry)

    patch.setattr(Timeline, "__init__", too_far)


def rounds_lose_tombstones(patch: pytest.MonkeyPatch) -> None:
    """A round leaves out keys that no longer exist, although it only covers what changed."""
    read_run = image_round_job._read_run

    async def without_tombstones(source: RoundSource, run: KeyRun, lsn: Lsn) -> list[Value]:
        return [value for value in await read_run(source, run, lsn) if value.kind is not ValueKind.TOMBSTONE]

    patch.setattr(image_round_job, "_read_run", without_tombstones)


def merges_lose_tombstones(patch: pytest.MonkeyPatch) -> None:
    """An L1 layer is without the tombstones of its sources, and nobody counts."""
    patch.setattr(MergeJob, "_check_complete", lambda self: None)
    blocks_of = merge_job._blocks_of

    def without_tombstones(run: LayerRun, files: Mapping[str, DiskLayer]) -> Iterator[bytes]:
        for block in blocks_of(run, files):
            kept = [value for value in unpack_block(block) if value.kind is not ValueKind.TOMBSTONE]
            if kept:
                yield b"".join(map(pack_value, kept))

    patch.setattr(merge_job, "_blocks_of", without_tombstones)


def merges_keep_the_newest_only(patch: pytest.MonkeyPatch) -> None:
    """An L1 layer holds of each whole value only the last one: history is lost."""
    patch.setattr(MergeJob, "_check_complete", lambda self: None)
    blocks_of = merge_job._blocks_of

    def newest(run: LayerRun, files: Mapping[str, DiskLayer]) -> Iterator[bytes]:
        for block in blocks_of(run, files):
            kept: list[Value] = []
            for value in unpack_block(block):
                if not kept or kept[-1].key != value.key or not kept[-1].starts_chain:
                    kept.append(value)
            yield b"".join(map(pack_value, kept))

    patch.setattr(merge_job, "_blocks_of", newest)


def manifest_before_its_layers(patch: pytest.MonkeyPatch) -> None:
    """A manifest names layers that are uploaded right after it."""
    upload = layer_writing.upload_layer
    write = ManifestStore.write
    waiting: list[tuple[LayerHome, LayerDescription]] = []

    def upload_later(home: LayerHome, description: LayerDescription) -> None:
        waiting.append((home, description))

    def write_and_upload(self: ManifestStore, manifest: Manifest) -> ManifestName:
        name = write(self, manifest)
        uploads = [each for each in waiting if each[0].context.store is self._store]
        waiting.clear()
        for home, description in uploads:
            upload(home, description)
        return name

    for module in (timeline_commits, compactor):
        patch.setattr(module, "upload_layer", upload_later)
    patch.setattr(ManifestStore, "write", write_and_upload)


def flush_forgets_its_manifest(patch: pytest.MonkeyPatch) -> None:
    """A flush says that it is durable without having written its manifest."""
    commit = TimelineCommits.commit_layers

    def without_manifest(self: TimelineCommits, manifest: Manifest, *args: object, **kwargs: object) -> None:
        with pytest.MonkeyPatch.context() as inner:
            if kwargs.get("flushed") is not None:
                inner.setattr(ManifestStore, "write", lambda self, manifest: None)
            commit(self, manifest, *args, **kwargs)  # type: ignore[arg-type]

    patch.setattr(TimelineCommits, "commit_layers", without_manifest)


def values_stay_cached_over_a_branch_point(patch: pytest.MonkeyPatch) -> None:
    """Whatever the cache knows of a key holds for every earlier LSN too."""
    put = value_reads.ValueCache.put

    def backdated(self: value_reads.ValueCache, key: bytes, entry: value_reads.CachedValue) -> None:
        put(self, key, entry._replace(found_lsn=max(0, entry.found_lsn - 64)))

    patch.setattr(value_reads.ValueCache, "put", backdated)


def rounds_cover_more_than_they_hold(patch: pytest.MonkeyPatch) -> None:
    """Every round claims to hold all live keys."""
    as_round = compactor._as_round

    def claimed(
        layers: Sequence[LayerDescription], covers_after_lsn: int | None, round_after_lsn: int | None
    ) -> list[LayerDescription]:
        return as_round(layers, None if covers_after_lsn is None else 0, round_after_lsn)

    patch.setattr(compactor, "_as_round", claimed)


def collection_ignores_branch_points(patch: pytest.MonkeyPatch) -> None:
    """S3 broken: below the cutoff only leases are retained."""
    retained = Retention.retained

    def without_branches(self: Retention, now_s: float) -> RetainedLsns:
        found = retained(self, now_s)
        branches = set(self.branch_points().values()) - set(self._leases)
        return found._replace(points=tuple(lsn for lsn in found.points if lsn not in branches))

    patch.setattr(Retention, "retained", without_branches)


def collection_ignores_leases(patch: pytest.MonkeyPatch) -> None:
    """S3 broken: below the cutoff only branch points are retained."""
    retained = Retention.retained

    def without_leases(self: Retention, now_s: float) -> RetainedLsns:
        found = retained(self, now_s)
        branches = set(self.branch_points().values())
        return found._replace(points=tuple(lsn for lsn in found.points if lsn in branches))

    patch.setattr(Retention, "retained", without_leases)


def collection_goes_on_beside_damage(patch: pytest.MonkeyPatch) -> None:
    """S3 broken: nobody holds the branch point of a timeline whose manifest cannot be read.

    Not among `MUTANTS`: `test_engine_damage` has a model of its own, in which there is damage.
    """
    patch.setattr(TenantTimelines, "find_standstill", lambda self: None)


def restart_forgets_leases(patch: pytest.MonkeyPatch) -> None:
    """S3 broken: who held an LSN below the cutoff cannot renew after a restart."""
    patch.setattr(Retention, "leases_below_cutoff", lambda self, now_s: ())


def cutoff_is_not_durable(patch: pytest.MonkeyPatch) -> None:
    """History goes before a manifest says that it has."""

    async def forgotten(self: TimelineCommits, lsn: Lsn) -> None:
        timeline = self._timeline
        timeline.manifest = msgspec.structs.replace(timeline.manifest, oldest_lsn=lsn)

    patch.setattr(TimelineCommits, "advance_oldest_lsn", forgotten)
    commit = TimelineCommits.commit_layers

    def with_older_cutoff(self: TimelineCommits, manifest: Manifest, *args: object, **kwargs: object) -> None:
        timeline = self._timeline
        announced_lsn, durable_lsn = manifest.oldest_lsn, timeline.manifest.oldest_lsn
        commit(
            self,
            msgspec.structs.replace(manifest, oldest_lsn=max(START, manifest.ancestor_lsn)),
            *args,  # type: ignore[arg-type]
            **kwargs,  # type: ignore[arg-type]
        )
        oldest_lsn = max(announced_lsn, durable_lsn)
        timeline.manifest = msgspec.structs.replace(timeline.manifest, oldest_lsn=oldest_lsn)

    patch.setattr(TimelineCommits, "commit_layers", with_older_cutoff)


def layers_are_deleted_before_the_manifest_says_so(patch: pytest.MonkeyPatch) -> None:
    """D3 broken: a crash in between leaves a manifest that names what is gone."""
    write = ManifestStore.write

    def deletes_first(self: ManifestStore, manifest: Manifest) -> ManifestName:
        named = {layer.name for layer in manifest.layers}
        prefix = f"{self._prefix}/layers"
        for info in self._store.list(prefix):
            if info.name.rsplit("/", 1)[-1] not in named:
                self._store.delete(info.name)
        return write(self, manifest)

    patch.setattr(ManifestStore, "write", deletes_first)


MUTANTS: tuple[Mutant, ...] = (
    reads_ignore_frozen_layers,
    branch_reads_above_its_branch_point,
    rounds_lose_tombstones,
    merges_lose_tombstones,
    merges_keep_the_newest_only,
    manifest_before_its_layers,
    flush_forgets_its_manifest,
    values_stay_cached_over_a_branch_point,
    rounds_cover_more_than_they_hold,
    collection_ignores_branch_points,
    collection_ignores_leases,
    restart_forgets_leases,
    cutoff_is_not_durable,
    layers_are_deleted_before_the_manifest_says_so,
)
