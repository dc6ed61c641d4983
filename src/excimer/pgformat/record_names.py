"""What a WAL record is called: its resource manager and operation, as `pg_waldump` writes them.

Source: rmgrlist.h and each resource manager's *_identify function, PostgreSQL 14 to 18.
"""

from collections.abc import Mapping

from excimer.pgformat.wal_record import RMGR_CUSTOM_MIN, Rmgr

RMGR_NAMES: Mapping[int, str] = {
    Rmgr.XLOG: "XLOG",
    Rmgr.XACT: "Transaction",
    Rmgr.SMGR: "Storage",
    Rmgr.CLOG: "CLOG",
    Rmgr.DBASE: "Database",
    Rmgr.TBLSPC: "Tablespace",
    Rmgr.MULTIXACT: "MultiXact",
    Rmgr.RELMAP: "RelMap",
    Rmgr.STANDBY: "Standby",
    Rmgr.HEAP2: "Heap2",
    Rmgr.HEAP: "Heap",
    Rmgr.BTREE: "Btree",
    Rmgr.HASH: "Hash",
    Rmgr.GIN: "Gin",
    Rmgr.GIST: "Gist",
    Rmgr.SEQ: "Sequence",
    Rmgr.SPGIST: "SPGist",
    Rmgr.BRIN: "BRIN",
    Rmgr.COMMIT_TS: "CommitTs",
    Rmgr.REPLORIGIN: "ReplicationOrigin",
    Rmgr.GENERIC: "Generic",
    Rmgr.LOGICALMSG: "LogicalMessage",
}

_INIT_PAGE = 0x80
_OPERATION_WITH_INIT = 0x70
_OPERATION = 0xF0

_MASKS: Mapping[int, int] = dict.fromkeys((Rmgr.XACT, Rmgr.HEAP, Rmgr.HEAP2, Rmgr.BRIN), _OPERATION_WITH_INIT)
"""The others use all four high bits for the operation."""

_INITS_PAGE: Mapping[int, frozenset[int]] = {
    Rmgr.HEAP: frozenset((0x00, 0x20, 0x40)),
    Rmgr.HEAP2: frozenset((0x50,)),
    Rmgr.BRIN: frozenset((0x10, 0x20)),
}
"""Operations whose fifth bit says that they make the page; of a commit it says something else."""


def _numbered(*names: str, first: int = 0) -> Mapping[int, str]:
    """Operations that count up by 0x10; an empty name is a number that is not used."""
    return {first + 0x10 * index: name for index, name in enumerate(names) if name}


_OPERATIONS: Mapping[int, Mapping[int, str]] = {
    Rmgr.XLOG: _numbered(
        *("CHECKPOINT_SHUTDOWN", "CHECKPOINT_ONLINE", "NOOP", "NEXTOID", "SWITCH", "BACKUP_END"),
        *("PARAMETER_CHANGE", "RESTORE_POINT", "FPW_CHANGE", "END_OF_RECOVERY", "FPI_FOR_HINT", "FPI"),
        *("", "OVERWRITE_CONTRECORD", "CHECKPOINT_REDO"),
    ),
    Rmgr.XACT: _numbered(
        *("COMMIT", "PREPARE", "ABORT", "COMMIT_PREPARED", "ABORT_PREPARED", "ASSIGNMENT", "INVALIDATION")
    ),
    Rmgr.SMGR: _numbered("CREATE", "TRUNCATE", first=0x10),
    Rmgr.CLOG: _numbered("ZEROPAGE", "TRUNCATE"),
    Rmgr.DBASE: _numbered("CREATE_FILE_COPY", "CREATE_WAL_LOG", "DROP"),
    Rmgr.TBLSPC: _numbered("CREATE", "DROP"),
    Rmgr.MULTIXACT: _numbered("ZERO_OFF_PAGE", "ZERO_MEM_PAGE", "CREATE_ID", "TRUNCATE_ID"),
    Rmgr.RELMAP: _numbered("UPDATE"),
    Rmgr.STANDBY: _numbered("LOCK", "RUNNING_XACTS", "INVALIDATIONS"),
    Rmgr.HEAP2: _numbered(
        *("REWRITE", "PRUNE_ON_ACCESS", "PRUNE_VACUUM_SCAN", "PRUNE_VACUUM_CLEANUP", "VISIBLE"),
        *("MULTI_INSERT", "LOCK_UPDATED", "NEW_CID"),
    ),
    Rmgr.HEAP: _numbered(
        *("INSERT", "DELETE", "UPDATE", "TRUNCATE", "HOT_UPDATE", "HEAP_CONFIRM", "LOCK", "INPLACE")
    ),
    Rmgr.BTREE: _numbered(
        *("INSERT_LEAF", "INSERT_UPPER", "INSERT_META", "SPLIT_L", "SPLIT_R", "INSERT_POST", "DEDUP"),
        *("DELETE", "UNLINK_PAGE", "UNLINK_PAGE_META", "NEWROOT", "MARK_PAGE_HALFDEAD", "VACUUM"),
        *("REUSE_PAGE", "META_CLEANUP"),
    ),
    Rmgr.HASH: _numbered(
        *("INIT_META_PAGE", "INIT_BITMAP_PAGE", "INSERT", "ADD_OVFL_PAGE", "SPLIT_ALLOCATE_PAGE"),
        *("SPLIT_PAGE", "SPLIT_COMPLETE", "MOVE_PAGE_CONTENTS", "SQUEEZE_PAGE", "DELETE", "SPLIT_CLEANUP"),
        *("UPDATE_META_PAGE", "VACUUM_ONE_PAGE"),
    ),
    Rmgr.GIN: _numbered(
        *("CREATE_PTREE", "INSERT", "SPLIT", "VACUUM_PAGE", "DELETE_PAGE", "UPDATE_META_PAGE"),
        *("INSERT_LISTPAGE", "DELETE_LISTPAGE", "VACUUM_DATA_LEAF_PAGE"),
        first=0x10,
    ),
    Rmgr.GIST: _numbered(
        "PAGE_UPDATE", "DELETE", "PAGE_REUSE", "PAGE_SPLIT", "", "", "PAGE_DELETE", "ASSIGN_LSN"
    ),
    Rmgr.SEQ: _numbered("LOG"),
    Rmgr.SPGIST: _numbered(
        *("ADD_LEAF", "MOVE_LEAFS", "ADD_NODE", "SPLIT_TUPLE", "PICKSPLIT", "VACUUM_LEAF", "VACUUM_ROOT"),
        "VACUUM_REDIRECT",
        first=0x10,
    ),
    Rmgr.BRIN: _numbered(
        "CREATE_INDEX", "INSERT", "UPDATE", "SAMEPAGE_UPDATE", "REVMAP_EXTEND", "DESUMMARIZE"
    ),
    Rmgr.COMMIT_TS: _numbered("ZEROPAGE", "TRUNCATE"),
    Rmgr.REPLORIGIN: _numbered("SET", "DROP"),
    Rmgr.GENERIC: _numbered("Generic"),
    Rmgr.LOGICALMSG: _numbered("MESSAGE"),
}
"""As of 18."""

_HEAP2_UNTIL_16 = _numbered(
    "REWRITE", "PRUNE", "VACUUM", "FREEZE_PAGE", "VISIBLE", "MULTI_INSERT", "LOCK_UPDATED", "NEW_CID"
)
_DATABASE_14 = _numbered("CREATE", "DROP")


def record_name(rmid: int, info: int, pg_version: int) -> str:
    """``Heap INSERT+INIT``; an operation nobody knows is written as pg_waldump does, ``UNKNOWN (f0)``."""
    if rmid >= RMGR_CUSTOM_MIN or rmid not in RMGR_NAMES:
        return f"{'custom' if rmid >= RMGR_CUSTOM_MIN else 'unknown'}{rmid:03d} {info & _OPERATION:02x}"
    operation = info & _MASKS.get(rmid, _OPERATION)
    name = _operations_of(rmid, pg_version).get(operation)
    if name is None:
        return f"{RMGR_NAMES[rmid]} UNKNOWN ({info & _OPERATION:x})"
    inits = info & _INIT_PAGE and operation in _INITS_PAGE.get(rmid, ())
    return f"{RMGR_NAMES[rmid]} {name}{'+INIT' if inits else ''}"


def _operations_of(rmid: int, pg_version: int) -> Mapping[int, str]:
    if rmid == Rmgr.HEAP2 and pg_version <= 16:
        return _HEAP2_UNTIL_16
    if rmid == Rmgr.DBASE and pg_version <= 14:
        return _DATABASE_14
    return _OPERATIONS[rmid]
