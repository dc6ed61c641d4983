"""What a cleanly stopped PostgreSQL leaves behind that WAL does not carry, as one object: a *saved state*.

It belongs to one LSN of one timeline, the end of the shutdown checkpoint, and is worth something there only::

    excimer saved state 1 CRC32C\\n     format version, crc32c (8 hex digits) of all that follows
    u32  size of the header
    header: MessagePack of StateHeader  whose it is, and how large the content is unpacked
    content: a zstd frame with the MessagePack of SavedState

The content holds pg_control and WAL as they were, from the page of the last record (or of the oldest record
that a replication slot still needs) up to the LSN: with them stock PostgreSQL starts as after any clean
shutdown, and redoes nothing. All else is a file, or a fork in runs of pages, because a fork's absent blocks
were never fetched from the page store.

Bytes come from object storage: whatever they are, `unpack_state` gives a state that is safe to lay into a
data directory, or raises `DamagedStateError`.

Not here: which files are worth it (`excimer.compute.state_collection`), and laying them (`state_resumption`).
"""

import re
import struct
from collections.abc import Iterable, Sequence

import google_crc32c
import msgspec
import zstandard

from excimer.base.errors import CorruptionError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES, FORK_SUFFIXES, SEGMENT_BLOCKS, Fork
from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, format_lsn
from excimer.pgformat.cluster_files import ClusterFileError, FileKind, identify_file
from excimer.pgformat.cluster_paths import UnsafePathError, check_carried_path
from excimer.pgformat.control_file import CONTROL_FILE_SIZE_BYTES, CONTROL_VERSIONS

FORMAT_VERSION = 1
OBJECT_SIZE_BYTES_MAX = 63 << 20
"""Of a packed state: who keeps or fetches it takes no more."""
CONTENT_SIZE_BYTES_MAX = 256 << 20
COMPRESSION_LEVEL = 1

_FIRST_LINE = re.compile(rb"excimer saved state (\d{1,9}) ([0-9a-f]{8})\n")
_FIRST_LINE_BYTES_MAX = 40
_SIZE = struct.Struct("<I")
_HEADER_BYTES_MAX = 4096
_SLOT = re.compile(r"pg_replslot/([a-z0-9_]{1,63})/state")


class DamagedStateError(CorruptionError):
    """A saved state's bytes are not what was written, or not for what they are used: go on without."""


class StateHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Whose state it is; enough for whoever keeps it."""

    tenant_id: str
    timeline_id: str
    lsn: int
    """End of the shutdown checkpoint's record: where a start must begin for the state to hold."""
    pg_version: int
    content_size_bytes: int
    """Of the MessagePack."""


class StateFile(msgspec.Struct, frozen=True, array_like=True):
    """A small file, whole."""

    path: str
    content: bytes


class StateRun(msgspec.Struct, frozen=True, array_like=True):
    """Adjacent pages of a file."""

    block: int
    data: bytes


class StateFork(msgspec.Struct, frozen=True, array_like=True):
    """One file of a relation's fork: its length, and those of its pages that were there."""

    path: str
    blocks: int
    runs: list[StateRun]

    @property
    def is_whole(self) -> bool:
        return sum(len(run.data) for run in self.runs) == self.blocks * BLOCK_SIZE_BYTES


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    control: bytes
    """pg_control of the stopped cluster, 8 KiB."""
    wal_lsn: int
    """Start of a WAL page; `wal` reaches from there to the state's LSN."""
    wal: bytes
    free_space: list[StateFork] = []
    statistics: list[StateFile] = []
    slots: list[StateFile] = []
    """pg_replslot/NAME/state; each one's WAL is in `wal`."""
    decoding: list[StateFile] = []
    """pg_logical/snapshots and mappings, without which a slot skips rows."""
    sequences: list[StateFork] = []
    """Pages of sequences that WAL is ahead of."""
    unlogged: list[StateFork] = []
    """All files of the unlogged relations that are carried; of others there are none."""
    hot_blocks: bytes = b""
    """Which blocks were used most (`hot_blocks`): a hint, which nothing here looks into."""
    left_out: list[str] = []
    """What was not carried and why, for people."""


def pack_state(
    tenant_id: TenantId, timeline_id: TimelineId, lsn: int, pg_version: int, state: SavedState
) -> bytes:
    """Raises `DamagedStateError` when it could not be unpacked again."""
    content = msgspec.msgpack.encode(state)
    header = StateHeader(
        tenant_id=tenant_id,
        timeline_id=timeline_id,
        lsn=lsn,
        pg_version=pg_version,
        content_size_bytes=len(content),
    )
    _check_header(header, "this")
    _check_state(header, state, "this")
    packed_header = msgspec.msgpack.encode(header)
    frame = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress(content)
    body = b"".join((_SIZE.pack(len(packed_header)), packed_header, frame))
    return b"excimer saved state %d %08x\n" % (FORMAT_VERSION, google_crc32c.value(body)) + body


def unpack_header(data: bytes, name: str) -> StateHeader:
    """Checks the checksum of everything. Raises `DamagedStateError`, which names the object `name`."""
    return _split(data, name)[0]


def unpack_state(data: bytes, name: str) -> tuple[StateHeader, SavedState]:
    """Everything checked. Raises `DamagedStateError`, which names the object `name`."""
    header, frame = _split(data, name)
    size = header.content_size_bytes
    try:
        if zstandard.frame_content_size(frame) != size:  # before room for it is made
            raise DamagedStateError(f"saved state {name} is damaged: its content has not {size} bytes")
        content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedStateError(f"saved state {name} is damaged: {error}") from error
    try:
        state = msgspec.msgpack.decode(content, type=SavedState)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedStateError(f"saved state {name} cannot be understood: {error}") from error
    _check_state(header, state, name)
    return header, state


def _split(data: bytes, name: str) -> tuple[StateHeader, bytes]:
    """The header, checked, and the frame behind it."""
    match = _FIRST_LINE.match(data[:_FIRST_LINE_BYTES_MAX])
    if match is None:
        raise DamagedStateError(f"saved state {name} is damaged: its first line is not a state's")
    if int(match[1]) != FORMAT_VERSION:
        raise DamagedStateError(f"saved state {name} has version {int(match[1])}, this program knows 1")
    body = memoryview(data)[match.end() :]
    if google_crc32c.value(bytes(body)) != int(match[2], 16):
        raise DamagedStateError(f"saved state {name} is damaged: it fails its checksum")
    if len(body) < _SIZE.size:
        raise DamagedStateError(f"saved state {name} is damaged: it has no header")
    (size,) = _SIZE.unpack_from(body)
    if size > min(_HEADER_BYTES_MAX, len(body) - _SIZE.size):
        raise DamagedStateError(f"saved state {name} is damaged: a header of {size} bytes")
    try:
        header = msgspec.msgpack.decode(body[_SIZE.size : _SIZE.size + size], type=StateHeader)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedStateError(f"saved state {name} cannot be understood: {error}") from error
    _check_header(header, name)
    return header, bytes(body[_SIZE.size + size :])


def _check_header(header: StateHeader, name: str) -> None:
    if header.pg_version not in CONTROL_VERSIONS:
        raise DamagedStateError(f"saved state {name} is of PostgreSQL {header.pg_version}")
    if not 0 < header.lsn < 1 << 64:
        raise DamagedStateError(f"saved state {name} is of the impossible LSN {header.lsn}")
    if not 0 < header.content_size_bytes <= CONTENT_SIZE_BYTES_MAX:
        raise DamagedStateError(f"saved state {name} unpacks to {header.content_size_bytes} bytes")


def _check_state(header: StateHeader, state: SavedState, name: str) -> None:
    try:
        _check_wal(header, state)
        _check_files(state.statistics, "pg_stat/")
        _check_files(state.slots, "pg_replslot/")
        _check_files(state.decoding, "pg_logical/snapshots/", "pg_logical/mappings/")
        _check_forks(state.free_space, {Fork.FSM})
        _check_forks(state.sequences, {Fork.MAIN})
        _check_forks(state.unlogged, {Fork.MAIN, Fork.FSM, Fork.VM})
        forks = [fork.path for fork in (*state.free_space, *state.sequences, *state.unlogged)]
        if len(set(forks)) != len(forks):
            raise ValueError("it has a file twice")
        if not all(fork.is_whole for fork in (*state.sequences, *state.unlogged)):
            raise ValueError("it has an unlogged relation or a sequence in part")
    except (ValueError, UnsafePathError, ClusterFileError) as error:
        raise DamagedStateError(f"saved state {name} is damaged: {error}") from error


def _check_wal(header: StateHeader, state: SavedState) -> None:
    if len(state.control) != CONTROL_FILE_SIZE_BYTES:
        raise ValueError(f"its pg_control has {len(state.control)} bytes")
    if state.wal_lsn < 0 or state.wal_lsn % WAL_PAGE_SIZE_BYTES:
        raise ValueError(f"its WAL begins at {state.wal_lsn:#x}, which is no page")
    if not state.wal or state.wal_lsn + len(state.wal) != header.lsn:
        end = format_lsn(header.lsn)
        raise ValueError(f"its WAL of {len(state.wal)} bytes from {state.wal_lsn:#x} does not end at {end}")


def _check_files(files: Sequence[StateFile], *folders: str) -> None:
    for file in files:
        if not check_carried_path(file.path).startswith(folders):
            raise ValueError(f"{file.path} is no file of {folders[0]}")
    if len({file.path for file in files}) != len(files):
        raise ValueError("it has a file twice")


def _check_forks(forks: Iterable[StateFork], kinds: set[Fork]) -> None:
    for fork in forks:
        found = identify_file(fork.path)
        if found is None or found.kind is not FileKind.RELATION or found.fork not in kinds:
            raise ValueError(f"{fork.path!r} is not a file that a state carries there")
        if fork.path != _canonical(fork.path) or not 0 <= fork.blocks <= SEGMENT_BLOCKS:
            raise ValueError(f"{fork.path!r} with {fork.blocks} blocks is no file of PostgreSQL's")
        end = 0
        for run in fork.runs:
            count = len(run.data) // BLOCK_SIZE_BYTES
            if count == 0 or count * BLOCK_SIZE_BYTES != len(run.data):
                raise ValueError(f"{fork.path} has a run of {len(run.data)} bytes")
            if run.block < end or run.block + count > fork.blocks:
                raise ValueError(f"{fork.path} has a run at block {run.block} that does not fit")
            end = run.block + count


def _canonical(path: str) -> str:
    """The path as PostgreSQL writes it, numbers without leading zeros."""
    stem, dot, segment = path.partition(".")
    directory, _, name = stem.rpartition("/")
    number, underscore, fork = name.partition("_")
    parts = directory.split("/")
    if len(parts) > 1:
        parts[1] = str(int(parts[1]))
    suffix = f".{int(segment)}" if dot and int(segment) else ""
    return f"{'/'.join(parts)}/{int(number)}{underscore}{fork}{suffix}"


def slot_name(path: str) -> str | None:
    """Of pg_replslot/NAME/state the name; None for another path."""
    match = _SLOT.fullmatch(path)
    return match[1] if match else None


def relation_file(path: str) -> tuple[str, int]:
    """Of a path that `identify_file` calls a relation's: directory and number as text, and its fork."""
    directory, _, name = path.partition(".")[0].rpartition("/")
    number, _, suffix = name.partition("_")
    return f"{directory}/{number}", FORK_SUFFIXES.index(f"_{suffix}" if suffix else "")
