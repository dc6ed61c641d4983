"""The rare WAL records, in readable Python: what each changes, as PostgreSQL's redo does it.

One function per resource manager, found through `_HANDLERS`. Each gets the ingest (through which it
reads sizes and puts values), the record's place, and the record taken apart.
Sources: xlog_redo, smgr_redo, clog_redo, dbase_redo, multixact_redo, relmap_redo, commit_ts_redo,
replorigin_redo, PrepareRedoAdd.

Not here: records that come by the thousand (`_native/wal_decoder.pyx`), databases
(`database_records`), SLRU files coming and going (`slru_records`).
"""

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING

import msgspec

from excimer.base.errors import CorruptionError
from excimer.base.keys import (
    Fork,
    KeyKind,
    Relation,
    make_key,
    relation_block_key,
    relation_size_key,
    two_phase_key,
)
from excimer.base.lsn import format_lsn
from excimer.pageserver.database_records import apply_database_record
from excimer.pageserver.slru_records import (
    apply_clog_record,
    apply_commit_ts_record,
    apply_multixact_record,
    start_commit_times,
    stop_commit_times,
)
from excimer.pgformat.checkpoint import CheckPoint
from excimer.pgformat.checkpoint_state import CheckpointState, ClusterSettings
from excimer.pgformat.native_records import HEAP_BLOCKS_PER_VM_PAGE, encode_vm_truncate
from excimer.pgformat.replication_origins import (
    REPLORIGIN_DROP,
    REPLORIGIN_SET,
    decode_origin_drop,
    decode_origin_set,
)
from excimer.pgformat.slru import id_precedes, xid_precedes
from excimer.pgformat.transaction_records import XACT_OPMASK, XACT_PREPARE, decode_prepare
from excimer.pgformat.wal_record import DecodedRecord, MalformedRecordError, Rmgr, WalRecord
from excimer.pgformat.wal_segment import InvalidWalError
from excimer.storage.format.values import ValueKind
from excimer.wire.replication import POSTGRES_TIMELINE

if TYPE_CHECKING:
    from excimer.pageserver.ingest import WalIngest

INFO_MASK = 0xF0

SMGR_TRUNCATE = 0x20
RELMAP_UPDATE = 0x00
TBLSPC_CREATE = 0x00
TBLSPC_DROP = 0x10

TRUNCATE_MAIN = 0x1
TRUNCATE_VM = 0x2
TRUNCATE_FSM = 0x4

_TRUNCATE = struct.Struct("<IIIII")
_RELMAP = struct.Struct("<IIi")


class XlogInfo(IntEnum):
    CHECKPOINT_SHUTDOWN = 0x00
    CHECKPOINT_ONLINE = 0x10
    NEXTOID = 0x30
    PARAMETER_CHANGE = 0x60
    FPW_CHANGE = 0x80
    END_OF_RECOVERY = 0x90


class UnsupportedRecordError(CorruptionError):
    """A record that no PostgreSQL of the timeline's version writes: ingest cannot go on."""


def apply_special_record(ingest: "WalIngest", record: WalRecord, decoded: DecodedRecord) -> None:
    """Raises `UnsupportedRecordError`, `InvalidWalError` for one shorter than it must be."""
    handler = _HANDLERS.get(decoded.header.rmgr)
    try:
        if handler is not None and handler(ingest, record, decoded):
            return
    except (struct.error, MalformedRecordError) as error:
        raise InvalidWalError(record.start_lsn, f"malformed record: {error}") from error
    raise UnsupportedRecordError(
        f"record at {format_lsn(record.start_lsn)} of resource manager {decoded.header.rmgr} with info "
        f"{decoded.header.info:#x} is not known in PostgreSQL {ingest.timeline.pg_version}"
    )


def _apply_xlog(ingest: "WalIngest", record: WalRecord, decoded: DecodedRecord) -> bool:
    state = ingest.checkpoint_state
    checkpoint = state.checkpoint
    data = decoded.main_data
    match decoded.header.info & INFO_MASK:
        case XlogInfo.CHECKPOINT_SHUTDOWN:
            checkpoint = CheckPoint.unpack(data)
        case XlogInfo.CHECKPOINT_ONLINE:
            checkpoint = _after_online_checkpoint(checkpoint, CheckPoint.unpack(data))
        case XlogInfo.NEXTOID:
            checkpoint = msgspec.structs.replace(checkpoint, next_oid=struct.unpack_from("<I", data)[0])
        case XlogInfo.PARAMETER_CHANGE:
            _change_parameters(ingest, record, state, ClusterSettings.unpack(data))
            return True
        case XlogInfo.FPW_CHANGE:
            checkpoint = msgspec.structs.replace(
                checkpoint, full_page_writes=struct.unpack_from("<?", data)[0]
            )
        case XlogInfo.END_OF_RECOVERY:
            pass  # a new timeline of PostgreSQL's, perhaps
        case _:
            return False
    # Imported WAL may be of another one; whatever starts from what we keep is on this one.
    checkpoint = msgspec.structs.replace(
        checkpoint, timeline=POSTGRES_TIMELINE, prev_timeline=POSTGRES_TIMELINE
    )
    ingest.put_checkpoint_state(CheckpointState(checkpoint, state.settings))
    return True


def _after_online_checkpoint(known: CheckPoint, said: CheckPoint) -> CheckPoint:
    """An online checkpoint's counters are as of its start: they only ever move ours forward."""
    changes: dict[str, int] = {}
    if id_precedes(known.next_multi, said.next_multi):
        changes["next_multi"] = said.next_multi
    if id_precedes(known.next_multi_offset, said.next_multi_offset):
        changes["next_multi_offset"] = said.next_multi_offset
    if id_precedes(known.oldest_multi, said.oldest_multi):
        changes |= {"oldest_multi": said.oldest_multi, "oldest_multi_db": said.oldest_multi_db}
    if xid_precedes(known.oldest_xid, said.oldest_xid):
        changes |= {"oldest_xid": said.oldest_xid, "oldest_xid_db": said.oldest_xid_db}
    return msgspec.structs.replace(
        known,
        redo=said.redo,
        timeline=said.timeline,
        prev_timeline=said.prev_timeline,
        full_page_writes=said.full_page_writes,
        wal_level=said.wal_level,
        next_xid=max(known.next_xid, said.next_xid),
        time=said.time,
        oldest_active_xid=said.oldest_active_xid,
        **changes,
    )


def _change_parameters(
    ingest: "WalIngest", record: WalRecord, state: CheckpointState, settings: ClusterSettings
) -> None:
    ingest.put_checkpoint_state(msgspec.structs.replace(state, settings=settings))
    if settings.track_commit_timestamp and not state.settings.track_commit_timestamp:
        start_commit_times(ingest, record.end_lsn)
    elif state.settings.track_commit_timestamp and not settings.track_commit_timestamp:
        stop_commit_times(ingest, record.end_lsn)


def _apply_prepare(ingest: "WalIngest", record: WalRecord, decoded: DecodedRecord) -> bool:
    """The state file appears; its subtransactions' xids count as used; its origin has moved on."""
    if decoded.header.info & XACT_OPMASK != XACT_PREPARE:
        return False
    prepared = decode_prepare(decoded.main_data, ingest.timeline.pg_version)
    for xid in (prepared.xid, *prepared.subxacts):
        ingest.advance_next_xid(xid)
    key = two_phase_key(ingest.full_xid(prepared.xid))
    ingest.put_value(key, record.end_lsn, ValueKind.IMAGE, prepared.state_file)
    ingest.advance_origin(decoded.origin, record.end_lsn, prepared.origin_lsn)
    return True


def _apply_smgr(ingest: "WalIngest", record: WalRecord, decoded: DecodedRecord) -> bool:
    if decoded.header.info & INFO_MASK != SMGR_TRUNCATE:
        return False
    blocks, spc, db, rel, flags = _TRUNCATE.unpack_from(decoded.main_data)
    relation = Relation(spc, db, rel)
    if flags & TRUNCATE_MAIN:
        key = relation_size_key(relation, Fork.MAIN)
        size = ingest.size(key)
        if size is None or blocks < size:
            ingest.truncate_fork(key, record.end_lsn, 0 if size is None else blocks)
    if flags & TRUNCATE_VM:
        _truncate_visibility_map(ingest, record, relation, blocks)
    if flags & TRUNCATE_FSM:
        # What the map's pages say is advice and not in WAL: an empty map cannot point behind the end.
        key = relation_size_key(relation, Fork.FSM)
        if ingest.size(key):
            ingest.truncate_fork(key, record.end_lsn, 0)
    return True


def _truncate_visibility_map(
    ingest: "WalIngest", record: WalRecord, relation: Relation, heap_blocks: int
) -> None:
    """visibilitymap_prepare_truncate: the last page that stays loses the bits of blocks that went."""
    key = relation_size_key(relation, Fork.VM)
    size = ingest.size(key)
    map_blocks, rest = divmod(heap_blocks, HEAP_BLOCKS_PER_VM_PAGE)
    if size is None or size <= map_blocks:
        return
    if rest:
        payload = encode_vm_truncate(heap_blocks)
        block_key = relation_block_key(relation, Fork.VM, map_blocks)
        ingest.put_value(block_key, record.end_lsn, ValueKind.NATIVE, payload)
        map_blocks += 1
    if map_blocks < size:
        ingest.truncate_fork(key, record.end_lsn, map_blocks)


def _apply_relation_map(ingest: "WalIngest", record: WalRecord, decoded: DecodedRecord) -> bool:
    """The record carries the file, its own CRC included; database 0 means the shared map."""
    if decoded.header.info & INFO_MASK != RELMAP_UPDATE:
        return False
    db, spc, size = _RELMAP.unpack_from(decoded.main_data)
    content = decoded.main_data[_RELMAP.size : _RELMAP.size + size]
    if len(content) != size:
        raise MalformedRecordError("relation map is shorter than it says")
    ingest.put_value(make_key(KeyKind.RELATION_MAP, spc, db), record.end_lsn, ValueKind.IMAGE, content)
    return True


def _apply_tablespace(ingest: "WalIngest", record: WalRecord, decoded: DecodedRecord) -> bool:
    """Nothing to keep: keys carry the tablespace, and where it lies is the compute's affair."""
    return decoded.header.info & INFO_MASK in (TBLSPC_CREATE, TBLSPC_DROP)


def _apply_origin(ingest: "WalIngest", record: WalRecord, decoded: DecodedRecord) -> bool:
    match decoded.header.info & INFO_MASK:
        case info if info == REPLORIGIN_SET:
            change = decode_origin_set(decoded.main_data)
            if change.may_go_back:
                ingest.put_origin(change.origin, record.end_lsn, change.remote_lsn)
            else:
                ingest.advance_origin(change.origin, record.end_lsn, change.remote_lsn)
        case info if info == REPLORIGIN_DROP:
            ingest.put_origin(decode_origin_drop(decoded.main_data), record.end_lsn, None)
        case _:
            return False
    return True


_Handler = Callable[["WalIngest", WalRecord, DecodedRecord], bool]
"""False: the resource manager has no such record."""

_HANDLERS: dict[int, _Handler] = {
    Rmgr.XLOG: _apply_xlog,
    Rmgr.XACT: _apply_prepare,
    Rmgr.SMGR: _apply_smgr,
    Rmgr.CLOG: apply_clog_record,
    Rmgr.DBASE: apply_database_record,
    Rmgr.TBLSPC: _apply_tablespace,
    Rmgr.MULTIXACT: apply_multixact_record,
    Rmgr.RELMAP: _apply_relation_map,
    Rmgr.COMMIT_TS: apply_commit_ts_record,
    Rmgr.REPLORIGIN: _apply_origin,
}
