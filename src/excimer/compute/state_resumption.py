"""What of a saved state goes into a new data directory: decided from it and the basebackup of the same LSN.

A branch's own state goes back whole. What an ancestor saved at the branch point is used in part: maps,
statistics and sequences are facts about the data, which the branch has; replication slots belong to the
parent's subscribers, and unlogged relations are empty on every branch, wherever it begins.

PostgreSQL then starts as after a clean shutdown and resets nothing by itself. So an unlogged relation that
does not come back is laid as its init fork says, which is what PostgreSQL does after a crash.

Not here: writing any of it (`data_directory`).
"""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from excimer.base.errors import CorruptionError
from excimer.base.ids import TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES, Fork, KeyKind, Relation, parse_key, relation_path
from excimer.base.lsn import Lsn, format_lsn, record_end
from excimer.compute.data_directory import Carried
from excimer.pgformat.basebackup import Basebackup, unpack_relation_forks
from excimer.pgformat.clean_start import build_clean_start
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.saved_state import SavedState, StateFork, StateHeader, relation_file
from excimer.pgformat.wal_prefix import WalPrefix


class UnusableStateError(CorruptionError):
    """A saved state is whole and does not fit: the start goes on without it."""


class Resumption(NamedTuple):
    prefix: WalPrefix
    wal_lsn: Lsn
    """Where the branch's own WAL begins in the prefix."""
    carried: Carried
    is_inherited: bool
    left_out: list[str]


def plan_resumption(
    header: StateHeader, state: SavedState, backup: Basebackup, timeline_id: TimelineId
) -> Resumption:
    """Raises `UnusableStateError`, `UncleanError`, `ControlFileError`."""
    control = ControlFile.unpack(backup.control_file, backup.pg_version)
    _check_fits(header, state, backup, control)
    prefix = build_clean_start(
        pg_version=backup.pg_version,
        control_file=state.control,
        wal_lsn=Lsn(state.wal_lsn),
        wal=state.wal,
        end_lsn=Lsn(header.lsn),
    )
    if backup.prev_lsn and backup.prev_lsn != prefix.checkpoint_lsn:
        raise UnusableStateError(
            f"its last record is at {format_lsn(prefix.checkpoint_lsn)}, the branch's at "
            f"{format_lsn(Lsn(backup.prev_lsn))}"
        )
    is_inherited = header.timeline_id != timeline_id
    if is_inherited:
        state = msgspec.structs.replace(state, slots=[], decoding=[], unlogged=[], left_out=[])
    small = [*state.statistics, *state.slots, *state.decoding]
    forks = [*state.free_space, *state.sequences, *state.unlogged]
    files = [(file.path, file.content) for file in small]
    files += [(fork.path, _content(fork)) for fork in forks if fork.is_whole]
    files += _reset_unlogged(backup, {relation_file(fork.path)[0] for fork in state.unlogged})
    partial = [fork for fork in forks if not fork.is_whole]
    return Resumption(prefix, Lsn(state.wal_lsn), Carried(files, partial), is_inherited, list(state.left_out))


def _check_fits(header: StateHeader, state: SavedState, backup: Basebackup, control: ControlFile) -> None:
    own = ControlFile.unpack(state.control, header.pg_version)
    lsn = record_end(backup.lsn, control.wal_segment_size)
    if header.pg_version != backup.pg_version or record_end(header.lsn, control.wal_segment_size) != lsn:
        raise UnusableStateError(f"it is of {format_lsn(Lsn(header.lsn))}, the start of {format_lsn(lsn)}")
    for name in ("system_id", "catalog_version", "wal_segment_size", "block_size", "data_checksum_version"):
        if getattr(own, name) != getattr(control, name):
            raise UnusableStateError(
                f"its {name} is {getattr(own, name)}, the branch's {getattr(control, name)}"
            )


def _content(fork: StateFork) -> bytes:
    return b"".join(run.data for run in fork.runs)


def _reset_unlogged(backup: Basebackup, kept: Iterable[str]) -> list[tuple[str, bytes]]:
    """The main forks, made of the init forks, of unlogged relations that are not `kept`."""
    pages: dict[Relation, dict[int, bytes]] = {}
    for page in backup.pages:
        fields = parse_key(page.key)
        if fields.kind == KeyKind.RELATION_BLOCK and fields.fork == Fork.INIT:
            pages.setdefault(Relation(fields.spc, fields.db, fields.rel), {})[fields.block] = page.page
    files = []
    names = set(kept)
    for spc, db, rel, fork, blocks in unpack_relation_forks(backup.relation_forks):
        path = relation_path(Relation(spc, db, rel), Fork.MAIN, 0)
        if fork != Fork.INIT or path in names:
            continue
        found = pages.get(Relation(spc, db, rel), {})
        if len(found) != blocks:
            raise UnusableStateError(f"the basebackup has {len(found)} of {blocks} pages of {path}_init")
        content = b"".join(found[block] for block in sorted(found))
        assert len(content) == blocks * BLOCK_SIZE_BYTES
        files.append((path, content))
    return files
