"""WAL into a timeline: what each record changes, as keyed values, in WAL order.

::

    chunk -> WalDecoder (native, no GIL) -> one batch -> timeline.put_batch
                 |  stops for
                 +-- a size it does not know  -> timeline.get_value
                 +-- a special record         -> special_records
                 +-- a long record's end      -> what it changed is put at once

Every record type of PostgreSQL 14 to 18 is handled; one that nobody has heard of stops ingest with an error,
because passing over it would make wrong pages (S1). Only WAL at or below the commit LSN comes here (C3).

What is not kept, on purpose: contents of the free space map (it is not in WAL; after a truncation
the map counts as empty), and tablespaces' paths: relations in user tablespaces are stored like all others,
but computes do not serve them.

Not here: receiving WAL (`wal_receiver`), what the rare records do (`special_records`), storing (`storage`).
"""

from collections.abc import Callable
from typing import Protocol

from excimer._native.wal_decoder import DONE, LONG_RECORD, LONG_XACT_SIZE_BYTES, SPECIAL, WalDecoder
from excimer.base.errors import CorruptionError, RefusedError
from excimer.base.keys import KeyKind, kind_range, make_key, origin_key, parse_key
from excimer.base.lsn import Lsn, format_lsn
from excimer.pageserver.special_records import apply_special_record
from excimer.pgformat.checkpoint_state import CheckpointState
from excimer.pgformat.wal_record import decode_record
from excimer.storage.format.relation_size import (
    FIRST_BIRTH_LSN,
    RelationSize,
    pack_relation_size,
    truncation_notes,
    unpack_relation_size,
)
from excimer.storage.format.values import PackedBatch, ValueKind

_CHECKPOINT_KEY = make_key(KeyKind.CHECKPOINT)
_COMMIT_TIME_KEY = make_key(KeyKind.COMMIT_TIME)
ORIGINS_WITHOUT_PROGRESS = (0, 0xFFFF)
"""InvalidRepOriginId and DoNotReplicateId: `replorigin_advance` leaves both alone."""

PutBatch = Callable[[PackedBatch, Lsn, Lsn], None]
ReadPages = Callable[[bytes, int, Lsn], bytes]
"""Blocking `Timeline.get_pages`: key, count of adjacent blocks, LSN."""


class IngestedTimeline(Protocol):
    """What ingest needs of `storage.engine.timeline.Timeline`."""

    @property
    def pg_version(self) -> int: ...
    @property
    def wal_segment_size_bytes(self) -> int: ...
    @property
    def last_record_lsn(self) -> Lsn: ...
    @property
    def prev_record_lsn(self) -> Lsn: ...
    def put_batch(self, batch: PackedBatch, end_lsn: Lsn, prev_record_lsn: Lsn) -> None: ...
    def get_value(self, key: bytes, lsn: Lsn) -> bytes | None: ...
    def scan(self, start: bytes, end: bytes, lsn: Lsn) -> list[tuple[bytes, bytes]]: ...


class WalGapError(RefusedError):
    """The chunk does not begin where the last one ended."""


class CheckpointMissingError(CorruptionError):
    """The timeline has no checkpoint state: it was not imported from a cluster."""


class WalIngest:
    """Ingest of one timeline, from its last record on; used by one thread at a time.

    Its state is a cache of the timeline's: after any exception throw it away and make a new one, then
    send WAL again from `timeline.last_record_lsn`.
    """

    def __init__(
        self,
        timeline: IngestedTimeline,
        *,
        read_pages: ReadPages,
        put_batch: PutBatch | None = None,
        long_xact_size_bytes: int = LONG_XACT_SIZE_BYTES,
    ) -> None:
        """`put_batch` stands in for the timeline's own, say to wait while memory is full; records of
        transactions that are as long as `long_xact_size_bytes` are never held whole.

        Raises `CheckpointMissingError`.
        """
        self.timeline = timeline
        self.read_pages = read_pages
        self._put_batch = put_batch or timeline.put_batch
        lsn = timeline.last_record_lsn
        state = timeline.get_value(_CHECKPOINT_KEY, lsn)
        if state is None:
            raise CheckpointMissingError(f"the timeline has no checkpoint state at {format_lsn(lsn)}")
        self._decoder = WalDecoder(
            lsn,
            timeline.pg_version,
            timeline.wal_segment_size_bytes,
            state,
            previous_lsn=timeline.prev_record_lsn,
            long_xact_size_bytes=long_xact_size_bytes,
        )
        self._changes = self._decoder.changes
        commit_time = timeline.get_value(_COMMIT_TIME_KEY, lsn)
        if commit_time is not None:
            self._changes.last_commit_time = int.from_bytes(commit_time, "little", signed=True)
        for key, remote_lsn in timeline.scan(*kind_range(KeyKind.ORIGIN), lsn):
            self._changes.origins.set(parse_key(key).rel, int.from_bytes(remote_lsn, "little"))

    @property
    def position(self) -> Lsn:
        """LSN of the next byte wanted."""
        return self._decoder.position

    @property
    def last_record_lsn(self) -> Lsn:
        """End of the last complete record put."""
        return self._decoder.applied_end

    @property
    def checkpoint_state(self) -> CheckpointState:
        """Exact at `last_record_lsn`; right after a restart next_xid may be up to 818 too high."""
        return CheckpointState.unpack(self._changes.get_checkpoint_state())

    def ingest(self, chunk: bytes, start_lsn: Lsn) -> Lsn:
        """Puts all records that `chunk` completes; returns the end of the last complete record so far.

        Raises `WalGapError`, `InvalidWalError` (records before the damage are put), and what the
        timeline raises.
        """
        if start_lsn != self._decoder.position:
            raise WalGapError(
                f"WAL continues at {format_lsn(self._decoder.position)}, not at {format_lsn(start_lsn)}"
            )
        self._decoder.feed(chunk)
        try:
            while (stop := self._decoder.run()) != DONE:
                if stop == SPECIAL:
                    self._apply_special()
                elif stop == LONG_RECORD:
                    self.put()
                else:
                    for key in self._decoder.unknown_keys:
                        self.size(key)
        except CorruptionError:
            self.put()
            raise
        self.put()
        return self._decoder.applied_end

    def _apply_special(self) -> None:
        record = self._decoder.special_record
        apply_special_record(self, record, decode_record(record.data, self.timeline.pg_version))
        self._decoder.finish_special()

    # What special records need

    def put(self) -> None:
        """Everything up to the last complete record becomes readable in the timeline."""
        end_lsn = self._decoder.applied_end
        if end_lsn > self.timeline.last_record_lsn:
            self._put_batch(self._changes.batch.take(), end_lsn, self._decoder.applied_start)

    def size(self, key: bytes) -> int | None:
        """Blocks of a RELATION_SIZE or SLRU_SIZE key as of the record at hand; None if it does not exist."""
        known = self._changes.sizes.get(key)
        if known is None:
            value = self.timeline.get_value(key, self.timeline.last_record_lsn)
            size = RelationSize(-1) if value is None else unpack_relation_size(value)
            self._changes.sizes.set(key, *size)
            known = size.blocks
        return None if known < 0 else known

    def put_size(self, key: bytes, lsn: Lsn, blocks: int | None) -> None:
        """None: it does not exist from here on. A fork that did not exist is born with this record."""
        if blocks is None:
            self._changes.sizes.set(key, -1)
            self.put_value(key, lsn, ValueKind.TOMBSTONE)
            return
        self.size(key)
        born_lsn, truncated_lsn = self._changes.sizes.get_lsns(key) or (lsn - 1, 0)
        self._put_size(key, lsn, RelationSize(blocks, born_lsn, truncated_lsn))

    def truncate_fork(self, key: bytes, lsn: Lsn, blocks: int) -> None:
        """Cuts the fork of a RELATION_SIZE key. Should blocks come back, what they had before is dead."""
        self.size(key)
        born_lsn, _ = self._changes.sizes.get_lsns(key) or (lsn - 1, 0)
        born_lsn = max(born_lsn, FIRST_BIRTH_LSN)
        if blocks == 0:
            self._put_size(key, lsn, RelationSize(0, lsn + 1))
            return
        for note_key, note in truncation_notes(key, blocks, lsn):
            self.put_value(note_key, lsn, ValueKind.IMAGE, note)
        self._put_size(key, lsn, RelationSize(blocks, born_lsn, lsn))

    def _put_size(self, key: bytes, lsn: Lsn, size: RelationSize) -> None:
        self._changes.sizes.set(key, *size)
        is_fork = key[0] == KeyKind.RELATION_SIZE
        payload = pack_relation_size(size) if is_fork else size.blocks.to_bytes(4, "little")
        self.put_value(key, lsn, ValueKind.IMAGE, payload)

    def put_value(self, key: bytes, lsn: Lsn, kind: ValueKind, payload: bytes = b"") -> None:
        starts_chain = kind is not ValueKind.NATIVE
        self._changes.batch.add(key, lsn, kind, starts_chain, payload)

    def advance_origin(self, origin: int, lsn: Lsn, remote_lsn: int) -> None:
        """Up to `remote_lsn` at its origin it has been applied; origins never go back by themselves."""
        known = self._changes.origins.get(origin)
        if origin not in ORIGINS_WITHOUT_PROGRESS and (known is None or known < remote_lsn):
            self.put_origin(origin, lsn, remote_lsn)

    def put_origin(self, origin: int, lsn: Lsn, remote_lsn: int | None) -> None:
        """None: nothing has been applied of it from here on."""
        if origin in ORIGINS_WITHOUT_PROGRESS:
            return
        self._changes.origins.set(origin, remote_lsn)
        if remote_lsn is None:
            self.put_value(origin_key(origin), lsn, ValueKind.TOMBSTONE)
        else:
            self.put_value(origin_key(origin), lsn, ValueKind.IMAGE, remote_lsn.to_bytes(8, "little"))

    def put_checkpoint_state(self, state: CheckpointState) -> None:
        self._changes.set_checkpoint_state(state.pack())

    def advance_next_xid(self, xid: int) -> None:
        self._changes.advance_next_xid(xid)

    def full_xid(self, xid: int) -> int:
        """With its epoch."""
        return self._changes.get_full_xid(xid)
