"""Carries out a `MergePlan`: layers in, streamed through `_native/layer_merge`, L1 layers out.

One call writes one file, so that whoever calls can let others go first in between. A file ends at
the first key after its size is reached: a key's values of one merge are never in two files.

Nothing of the merge counts before one manifest names all of its layers and none of its sources
(`compactor`). Left in the middle, it is planned again from the start; what was written is nobody's.

All calls block.
"""

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from excimer._native.layer_merge import LayerMerge
from excimer._native.page_chains import MalformedValueError
from excimer.base.errors import CorruptionError
from excimer.base.keys import MAX_KEY, MIN_KEY
from excimer.base.lsn import MAX_LSN
from excimer.storage.engine.disk_layer import DiskLayer
from excimer.storage.engine.layer_stack import LayerHome
from excimer.storage.engine.layer_writing import write_layer
from excimer.storage.format.layer_file import DamagedLayerError, LayerHeader, LayerKind, RawBlock
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.plan.compaction_plan import MergePlan
from excimer.storage.plan.layer_map import LayerRun

BLOCK_READY = -1
FINISHED = -2


class MergeJob:
    """One merge, from its plan to its local files. Used by one thread at a time."""

    def __init__(
        self,
        home: LayerHome,
        files: Mapping[str, DiskLayer],
        plan: MergePlan,
        generation: int,
        file_size_bytes: int,
    ) -> None:
        self._home = home
        self._plan = plan
        self._generation = generation
        self._file_size_bytes = file_size_bytes
        self._blocks = [_blocks_of(run, files) for run in plan.runs]
        self._merge = LayerMerge(
            [(run.start_lsn, run.end_lsn) for run in plan.runs], home.context.settings.block_size_bytes
        )
        self._key_count = 0
        self.damaged_run: LayerRun | None = None
        """After `DamagedLayerError`: whose it is."""

    def write_next(self) -> LayerDescription | None:
        """The next L1 layer as a local file, durable on return; None when all is merged.

        Raises `DamagedLayerError`, `ObjectStoreError`, OSError, and `CorruptionError` if not every value
        of the sources was met.
        """
        first = self._next_block(end_at_key=False)
        if first is None:
            self._check_complete()
            return None
        header = LayerHeader(
            LayerKind.DELTA,
            self._plan.start_lsn,
            self._plan.end_lsn,
            self._home.tenant_id,
            self._home.timeline_id,
        )
        layer = write_layer(self._home, header, self._share(first), self._generation)
        key_count = self._merge.key_count - self._key_count
        self._key_count = self._merge.key_count
        return msgspec.structs.replace(layer, level=1, key_count=key_count)

    def _share(self, first: RawBlock) -> Iterator[RawBlock]:
        """One file's blocks."""
        block: RawBlock | None = first
        size = 0
        while block is not None:
            size += len(block.data)
            yield block
            is_full = size >= self._file_size_bytes
            if is_full and self._merge.at_key_boundary:
                return
            block = self._next_block(end_at_key=is_full)

    def _next_block(self, *, end_at_key: bool) -> RawBlock | None:
        merge = self._merge
        while True:
            try:
                outcome = merge.step(end_at_key)
            except MalformedValueError as error:
                self.damaged_run = self._plan.runs[merge.failed_source]
                raise DamagedLayerError(_names(self.damaged_run.descriptions), str(error)) from error
            if outcome == BLOCK_READY:
                return RawBlock(*merge.take_block())
            if outcome == FINISHED:
                return None
            try:
                merge.feed(outcome, next(self._blocks[outcome], b""))
            except DamagedLayerError:
                self.damaged_run = self._plan.runs[outcome]
                raise

    def _check_complete(self) -> None:
        expected = sum(layer.value_count for layer in self._plan.descriptions)
        if self._merge.value_count != expected:
            raise CorruptionError(
                f"a merge of {_names(self._plan.descriptions)} met {self._merge.value_count} values"
                f" instead of {expected}"
            )


def _names(layers: Iterable[LayerDescription]) -> str:
    return ", ".join(layer.name for layer in layers)


def _blocks_of(run: LayerRun, files: Mapping[str, DiskLayer]) -> Iterator[bytes]:
    """A run's layers have no key in common, so that one after the other they are one sorted stream."""
    for layer in run.descriptions:
        yield from files[layer.name].blocks(MIN_KEY, MAX_KEY, 0, MAX_LSN, cached=False)
