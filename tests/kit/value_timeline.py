"""A timeline that only remembers what ingest put into it: for tests of ingest without storage."""

from excimer.base.keys import KeyKind, make_key
from excimer.base.lsn import Lsn
from excimer.pgformat.checkpoint import CheckPoint
from excimer.pgformat.checkpoint_state import CheckpointState, ClusterSettings
from excimer.storage.format.relation_size import size_blocks
from excimer.storage.format.values import PackedBatch, Value, ValueKind, unpack_batch


def make_state(**checkpoint_fields: int) -> CheckpointState:
    fields = dict.fromkeys(CheckPoint.__struct_fields__, 0)
    fields |= {"next_xid": 1000, "next_multi": 1, "oldest_multi": 1, "oldest_xid": 700, "timeline": 1}
    checkpoint = CheckPoint(**(fields | {"full_page_writes": True} | checkpoint_fields))  # type: ignore[arg-type]
    settings = ClusterSettings(
        max_connections=100,
        max_worker_processes=8,
        max_wal_senders=10,
        max_prepared_xacts=0,
        max_locks_per_xact=64,
        wal_level=1,
        wal_log_hints=False,
        track_commit_timestamp=False,
    )
    return CheckpointState(checkpoint, settings)


class ValueTimeline:
    """Checks of every batch what the real engine checks: LSNs in order and within the batch's range."""

    def __init__(
        self, start_lsn: int, state: CheckpointState, pg_version: int = 18, segment_size_bytes: int = 1 << 20
    ) -> None:
        self.pg_version = pg_version
        self.wal_segment_size_bytes = segment_size_bytes
        self.last_record_lsn = Lsn(start_lsn)
        self.prev_record_lsn = Lsn(0)
        self.values: list[Value] = []
        self.batches = 0
        self.lookups: list[bytes] = []
        self._newest: dict[bytes, list[Value]] = {}
        self._add(Value(make_key(KeyKind.CHECKPOINT), start_lsn, ValueKind.IMAGE, True, state.pack()))
        self.values.clear()

    def _add(self, value: Value) -> None:
        self.values.append(value)
        self._newest.setdefault(value.key, []).append(value)

    def put_batch(self, batch: PackedBatch, end_lsn: Lsn, prev_record_lsn: Lsn) -> None:
        before = self.last_record_lsn + 1
        for value in unpack_batch(batch):
            assert before <= value.lsn <= end_lsn, (before, value, end_lsn)
            before = Lsn(value.lsn)
            self._add(value)
        assert prev_record_lsn < end_lsn
        self.last_record_lsn, self.prev_record_lsn = end_lsn, prev_record_lsn
        self.batches += 1

    def get_value(self, key: bytes, lsn: Lsn) -> bytes | None:
        self.lookups.append(key)
        history = [value for value in self._newest.get(key, []) if value.lsn <= lsn]
        return history[-1].payload if history and history[-1].kind is not ValueKind.TOMBSTONE else None

    def scan(self, start: bytes, end: bytes, lsn: Lsn) -> list[tuple[bytes, bytes]]:
        found = [(key, self.get_value(key, lsn)) for key in sorted(self._newest) if start <= key < end]
        return [(key, value) for key, value in found if value is not None]

    def size(self, key: bytes) -> int | None:
        value = self.get_value(key, self.last_record_lsn)
        return None if value is None else size_blocks(value)

    def set_size(self, key: bytes, blocks: int) -> None:
        """As if it had been so from the beginning."""
        payload = blocks.to_bytes(4, "little")
        self._newest[key] = [Value(key, 1, ValueKind.IMAGE, True, payload)]
