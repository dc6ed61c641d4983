"""The files of a cluster as the content of a timeline: file bytes in, keys and whole values out.

Everything that has a key is taken: relations with all their forks, SLRU segments, relation maps, each
database's PG_VERSION, prepared transactions, replication origins' progress, pg_control and the
checkpoint in it. Pages of zeros are left out: a block below its relation's size without a value is one.
Three things come in changed:

* **unlogged relations** are empty, as after a crash: only their init forks count;
* **data checksums** are off from here on. The checksums that pages carry stay, and nobody looks at them;
* **PostgreSQL's timeline id** is 1: our WAL has no other, and branches are Excimer's own timelines.

The free space map is taken as it is: it is advice, which PostgreSQL checks and mends as it uses it.

Not here: where the bytes come from (`initdb_import`, `cluster_import`), which paths matter
(`pgformat.cluster_files`).
"""

from collections.abc import Callable
from typing import Final

import msgspec

from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    SEGMENT_BLOCKS,
    Fork,
    KeyKind,
    Relation,
    make_key,
    origin_key,
    relation_block_key,
    relation_size_key,
    slru_block_key,
    slru_size_key,
    two_phase_key,
)
from excimer.pgformat.checkpoint_state import CheckpointState, ClusterSettings
from excimer.pgformat.cluster_files import WHOLE_FILE_SIZE_BYTES_MAX, ClusterFile, ClusterFileError, FileKind
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.replication_origins import parse_origins
from excimer.storage.format.relation_size import FIRST_BIRTH_LSN, RelationSize, pack_relation_size
from excimer.wire.replication import POSTGRES_TIMELINE

_ZERO_PAGE = bytes(BLOCK_SIZE_BYTES)
_POSTGRES_EPOCH_S = 946_684_800
_BLOCK_SIZE_OF_KEY = 4
_PAGED = (FileKind.RELATION, FileKind.SLRU)

FIXED_BY_BUILD: Final = (
    *("catalog_version", "max_align", "float_format", "block_size", "relation_segment_blocks"),
    *("wal_block_size", "name_data_len", "index_max_keys", "toast_max_chunk_size"),
    *("large_object_block_size", "float8_by_value"),
)
"""What PostgreSQL itself compares with how it was built before it opens a cluster."""


class ClusterBuiltDifferentlyError(ClusterFileError):
    """No PostgreSQL that Excimer runs could open the cluster."""


class ClusterImages:
    """File after file: `begin_file`, `feed`, `end_file`; then `finish`. Calls `add` for each image."""

    def __init__(self, pg_version: int, add: Callable[[bytes, bytes], None]) -> None:
        self.control_file: ControlFile | None = None
        """As it came; None until it has."""
        self._pg_version = pg_version
        self._add = add
        self._file: ClusterFile | None = None
        self._seen: set[ClusterFile] = set()
        self._prefix = b""
        self._block = 0
        self._rest = b""
        self._relation_sizes: dict[tuple[Relation, int], int] = {}
        self._two_phase: dict[int, bytes] = {}

    def begin_file(self, file: ClusterFile) -> None:
        """Raises `ClusterFileError` when it was there already: keys are added once."""
        if file in self._seen:
            raise ClusterFileError(f"a file of kind {file.kind.name.lower()} comes twice")
        self._seen.add(file)
        self._file = file
        self._rest = b""
        if file.kind is FileKind.RELATION:
            self._block = file.segment * SEGMENT_BLOCKS
            self._prefix = relation_block_key(file.relation, file.fork, 0)[:-_BLOCK_SIZE_OF_KEY]
        elif file.kind is FileKind.SLRU:
            self._block = 0
            self._prefix = slru_block_key(file.slru, file.segment, 0)[:-_BLOCK_SIZE_OF_KEY]

    def feed(self, data: bytes) -> None:
        """The file's next bytes. Raises `ClusterFileError`, and what `add` does."""
        if self._file is None:
            return
        rest = self._rest + data if self._rest else data
        if self._file.kind in _PAGED:
            whole = len(rest) - len(rest) % BLOCK_SIZE_BYTES
            for at in range(0, whole, BLOCK_SIZE_BYTES):
                page = rest[at : at + BLOCK_SIZE_BYTES]
                if page != _ZERO_PAGE:
                    self._add(self._prefix + self._block.to_bytes(_BLOCK_SIZE_OF_KEY, "big"), page)
                self._block += 1
            rest = rest[whole:]
        elif len(rest) > WHOLE_FILE_SIZE_BYTES_MAX:
            raise ClusterFileError(f"a file of kind {self._file.kind.name.lower()} is too large")
        self._rest = rest

    def end_file(self) -> None:
        """Part of a block at the end does not count, as PostgreSQL does not count it.

        Raises `ControlFileError`, `OriginsFileError`, and what `add` does.
        """
        file, self._file = self._file, None
        if file is None:
            return
        match file.kind:
            case FileKind.RELATION:
                # Truncated relations keep empty files for the segments they had.
                first = file.segment * SEGMENT_BLOCKS
                blocks = self._block if self._block > first or not file.segment else 0
                fork = file.relation, file.fork
                self._relation_sizes[fork] = max(blocks, self._relation_sizes.get(fork, 0))
            case FileKind.SLRU:
                self._add(slru_size_key(file.slru, file.segment), self._block.to_bytes(4, "little"))
            case FileKind.RELATION_MAP:
                self._add(make_key(KeyKind.RELATION_MAP, *file.relation[:2]), self._rest)
            case FileKind.DATABASE:
                self._add(make_key(KeyKind.DATABASE, *file.relation[:2]), self._rest)
            case FileKind.TWO_PHASE:
                self._two_phase[file.xid] = self._rest
            case FileKind.ORIGINS:
                for origin, remote_lsn in parse_origins(self._rest):
                    self._add(origin_key(origin), remote_lsn.to_bytes(8, "little"))
            case FileKind.CONTROL:
                self.control_file = ControlFile.unpack(self._rest, self._pg_version)

    def finish(self) -> None:
        """Adds what only all files together say. Raises `ClusterFileError`."""
        if self.control_file is None:
            raise ClusterFileError("there is no global/pg_control among the files")
        control = as_imported(self.control_file)
        checkpoint = control.checkpoint
        unlogged = {relation for relation, fork in self._relation_sizes if fork == Fork.INIT}
        for (relation, fork), size in self._relation_sizes.items():
            if fork == Fork.INIT or relation not in unlogged:
                stored = pack_relation_size(RelationSize(size, FIRST_BIRTH_LSN))
                self._add(relation_size_key(relation, fork), stored)
        for xid, content in self._two_phase.items():
            full_xid = _full_xid(xid, checkpoint.next_xid, self._pg_version)
            self._add(two_phase_key(full_xid), content)
        state = CheckpointState(checkpoint, ClusterSettings.from_control_file(control))
        commit_time = (checkpoint.time - _POSTGRES_EPOCH_S) * 1_000_000
        self._add(make_key(KeyKind.CHECKPOINT), state.pack())
        self._add(make_key(KeyKind.CONTROL_FILE), control.pack())
        self._add(make_key(KeyKind.COMMIT_TIME), commit_time.to_bytes(8, "little", signed=True))


def as_imported(control: ControlFile) -> ControlFile:
    """pg_control as a timeline keeps it: without checksums, on PostgreSQL's timeline 1."""
    checkpoint = msgspec.structs.replace(
        control.checkpoint, timeline=POSTGRES_TIMELINE, prev_timeline=POSTGRES_TIMELINE
    )
    return msgspec.structs.replace(control, checkpoint=checkpoint, data_checksum_version=0)


def check_built_alike(control: ControlFile, ours: ControlFile) -> None:
    """Raises `ClusterBuiltDifferentlyError`; `ours` is of a cluster that our build has made."""
    for name in FIXED_BY_BUILD:
        theirs, wanted = getattr(control, name), getattr(ours, name)
        if theirs != wanted:
            raise ClusterBuiltDifferentlyError(
                f"the cluster has {name.replace('_', ' ')} {theirs}, PostgreSQL as we run it has {wanted}: "
                "move it with pg_dump and pg_restore instead"
            )


def _full_xid(xid: int, next_xid: int, pg_version: int) -> int:
    """With the epoch, which file names lack before PostgreSQL 17: a prepared xid is before the next one."""
    if pg_version >= 17:
        return xid
    full = next_xid >> 32 << 32 | xid
    return full if full < next_xid else full - (1 << 32)
