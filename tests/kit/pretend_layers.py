"""A timeline's layers as sets of keys: flushes and compactions as planned, without values: fast."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from excimer.base.keys import Fork, Relation, relation_block_key
from excimer.storage.format.layer_file import LayerKind
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.plan.compaction_plan import (
    CompactionLimits,
    MergePlan,
    RoundPlan,
    plan_merge,
    plan_round,
)
from excimer.storage.plan.layer_map import LayerMap
from excimer.storage.plan.read_path import plan_read

TABLE = Relation(1663, 5, 16384)
STEP = 100
"""LSNs from flush to flush."""


def block(number: int) -> bytes:
    return relation_block_key(TABLE, Fork.MAIN, number)


@dataclass
class PretendLayers:
    """`blocks` pages in a complete round; what is below the newest complete round is dropped as GC would."""

    blocks: int
    limits: CompactionLimits
    file_keys: int
    """Keys in an L1 layer, and in a piece of a round."""
    map: LayerMap = field(default_factory=LayerMap)
    keys: dict[str, frozenset[int]] = field(default_factory=dict)
    lsn: int = STEP
    flushed_keys: int = 0
    image_keys: int = 0
    serial: int = 0

    def __post_init__(self) -> None:
        first = self._describe(LayerKind.IMAGE, (STEP, STEP), range(self.blocks), covers_after_lsn=0)
        self.map = self.map.changed(added=[first])

    def flush(self, numbers: Iterable[int]) -> None:
        lsns = (self.lsn, self.lsn + STEP)
        layer = self._describe(LayerKind.DELTA, lsns, numbers)
        self.lsn += STEP
        self.flushed_keys += layer.key_count
        self.map = self.map.changed(added=[layer])

    def compact(self) -> bool:
        merge = plan_merge(self.map, self.limits)
        if merge is not None:
            self._merge(merge)
            return True
        plan = plan_round(self.map, self.limits, start_lsn=0, oldest_lsn=0, inherited_size_bytes=0)
        if plan is not None:
            self._write_piece(plan)
        return plan is not None

    def visits(self, number: int) -> int:
        """Layers that a read of one page visits now: it ends at the page's image."""
        plan = plan_read(self.map, block(number), block(number), 0, self.lsn)
        for count, visit in enumerate(plan.visits, 1):
            if visit.layer.is_image and number in self.keys[visit.layer.description.name]:
                return count
        raise AssertionError(f"block {number} has no image")

    def _merge(self, plan: MergePlan) -> None:
        everything = sorted(frozenset[int]().union(*(self.keys[each.name] for each in plan.descriptions)))
        added = [
            self._describe(LayerKind.DELTA, (plan.start_lsn, plan.end_lsn), share, level=1)
            for share in self._cut(everything)
        ]
        self.map = self.map.changed(added=added, removed=plan.descriptions)

    def _write_piece(self, plan: RoundPlan) -> None:
        names = [layer.name for run in plan.sources for layer in run.descriptions]
        changed: Iterable[int] = range(self.blocks)
        if plan.covers_after_lsn:
            changed = sorted(frozenset[int]().union(*(self.keys[name] for name in names)))
        left = [number for number in changed if block(number) >= plan.start_key]
        share, is_last = left[: self.file_keys], len(left) <= self.file_keys
        self.image_keys += len(share)
        added = list(plan.pieces)
        if share:
            added.append(self._describe(LayerKind.IMAGE, (plan.lsn, plan.lsn), share))
        covers = plan.covers_after_lsn if is_last else None
        after = None if is_last else plan.covers_after_lsn
        described = [replace(each, covers_after_lsn=covers, round_after_lsn=after) for each in added]
        self.map = self.map.changed(added=described, removed=plan.pieces)
        if covers == 0:
            self._collect_garbage(plan.lsn)

    def _collect_garbage(self, lsn: int) -> None:
        gone = [each for each in self.map.descriptions if each.end_lsn <= lsn and each.covers_after_lsn != 0]
        gone += [each for each in self.map.descriptions if each.end_lsn < lsn and each.covers_after_lsn == 0]
        self.map = self.map.changed(removed=gone)

    def _cut(self, ordered: list[int]) -> Iterable[list[int]]:
        return (ordered[at : at + self.file_keys] for at in range(0, len(ordered), self.file_keys))

    def _describe(
        self,
        kind: LayerKind,
        lsns: tuple[int, int],
        numbers: Iterable[int],
        *,
        level: int = 0,
        covers_after_lsn: int | None = None,
    ) -> LayerDescription:
        held = frozenset(numbers)
        self.serial += 1
        layer = LayerDescription(
            kind=kind,
            start_lsn=lsns[0],
            end_lsn=lsns[1],
            first_key=block(min(held)).hex(),
            last_key=block(max(held)).hex(),
            generation=1,
            fingerprint=self.serial,
            size_bytes=100 * len(held),
            index_offset=0,
            value_count=len(held),
            key_count=len(held),
            covers_after_lsn=covers_after_lsn,
            level=level,
        )
        self.keys[layer.name] = held
        return layer
