"""Reads from a cleanly stopped data directory what WAL does not carry, within bounds, the most worth first.

::

    pg_control, WAL from the last record on       without which there is no state
    1 free space maps     2 statistics            VACUUM brings the one back late, nothing the other
    3 replication slots, each with its WAL and what decoding needs
    4 sequences that WAL is ahead of              5 unlogged relations, up to a bound of their own
    6 the list of hot blocks (`hot_collection`)

Within a group the small go first; what does not fit is left out and said. A block that was never fetched
from the page store is not read: its file's hole is no page.

Not here: whether the stop was a clean one and a quorum has it (`attempt`), the bytes
(`pgformat.saved_state`).
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from excimer.base.errors import RefusedError
from excimer.base.keys import BLOCK_SIZE_BYTES, Fork
from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, Lsn
from excimer.pgformat.clean_start import check_shut_down, find_clean_end
from excimer.pgformat.cluster_files import FileKind, identify_file
from excimer.pgformat.cluster_paths import UnsafePathError, check_carried_path
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.replication_slot import DamagedSlotError, ReplicationSlot, unpack_slot
from excimer.pgformat.saved_state import SavedState, StateFile, StateFork, StateRun, relation_file
from excimer.pgformat.sequence_page import log_count
from excimer.pgformat.wal_prefix import wal_segment_file_name

Presence = Callable[[str], bytes | None]
"""Of a file's blocks, not zero: it is here. None: the file is wholly local."""

LAST_RECORD_BYTES_MAX: Final = 2 * WAL_PAGE_SIZE_BYTES
LEFT_OUT_NAMED_MAX: Final = 20
MIB: Final = 1 << 20

Item = TypeVar("Item")


class StateUnreadableError(RefusedError):
    """The stopped directory lacks what a state cannot be without."""


class StateLimits(NamedTuple):
    size_bytes_max: int
    """Of everything, before it is compressed."""
    unlogged_bytes_max: int
    """Of that, of unlogged relations."""


class CollectedState(NamedTuple):
    lsn: Lsn
    """End of the shutdown checkpoint."""
    state: SavedState


class _LocalFile(NamedTuple):
    path: str
    size_bytes: int


class _Slot(NamedTuple):
    path: str
    content: bytes
    slot: ReplicationSlot


class _Directory:
    """What there is, and what was left out of it."""

    def __init__(self, root: Path, presence: Presence) -> None:
        self.root = root
        self.presence = presence
        self.left_out: list[str] = []

    def files(self, *folders: str) -> Iterator[_LocalFile]:
        for folder in folders:
            try:
                entries = sorted(os.scandir(self.root / folder), key=lambda entry: entry.name)
            except FileNotFoundError:
                continue
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    yield _LocalFile(f"{folder}/{entry.name}", entry.stat(follow_symlinks=False).st_size)

    def relation_files(self) -> Iterator[_LocalFile]:
        databases = sorted(name for name in os.listdir(self.root / "base") if name.isdecimal())
        for file in self.files("global", *(f"base/{name}" for name in databases)):
            found = identify_file(file.path)
            if found is not None and found.kind is FileKind.RELATION:
                yield file

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def read_fork(self, file: _LocalFile) -> StateFork:
        """Its blocks that are here, neighbours joined."""
        blocks = file.size_bytes // BLOCK_SIZE_BYTES
        known = self.presence(file.path)
        runs: list[StateRun] = []
        with (self.root / file.path).open("rb") as opened:
            block = 0
            while block < blocks:
                end = block
                while end < blocks and (known is None or end >= len(known) or known[end]):
                    end += 1
                if end > block:
                    opened.seek(block * BLOCK_SIZE_BYTES)
                    runs.append(StateRun(block, opened.read((end - block) * BLOCK_SIZE_BYTES)))
                block = end + 1
        return StateFork(file.path, blocks, runs)

    def leave_out(self, what: str, items: Sequence[tuple[str, int]], reason: str) -> None:
        if items:
            names = ", ".join(name for name, _ in items[:LEFT_OUT_NAMED_MAX])
            more = f" and {len(items) - LEFT_OUT_NAMED_MAX} more" if len(items) > LEFT_OUT_NAMED_MAX else ""
            size = sum(size for _, size in items) / MIB
            size_text = f" ({size:.1f} MiB)" if size else ""
            self.left_out.append(f"{what} {names}{more}{size_text}: {reason}")


def fit(sizes: Iterable[tuple[Item, int]], budget_bytes: int) -> tuple[list[Item], list[tuple[Item, int]]]:
    """The smallest that fit together, and the others with their sizes; both in the order of size."""
    taken: list[Item] = []
    left: list[tuple[Item, int]] = []
    used = 0
    for item, size in sorted(sizes, key=lambda pair: pair[1]):
        if not left and used + size <= budget_bytes:
            taken.append(item)
            used += size
        else:
            left.append((item, size))
    return taken, left


def collect_state(
    root: Path,
    presence: Presence,
    pg_version: int,
    limits: StateLimits,
    ignored_slots: Collection[str] = (),
    hot_blocks: bytes = b"",
) -> CollectedState:
    """`ignored_slots`: of our own making, made anew at each start. Blocks.

    Raises `UncleanError`, `ControlFileError`, `StateUnreadableError`, OSError.
    """
    directory = _Directory(root, presence)
    control_file = directory.read("global/pg_control")
    control = ControlFile.unpack(control_file, pg_version)
    check_shut_down(control)
    wal = LocalWal(root / "pg_wal", control.wal_segment_size)
    end = find_clean_end(control, pg_version, wal.read(control.checkpoint_lsn, LAST_RECORD_BYTES_MAX))
    first_wal_lsn = _page_start(end.checkpoint_lsn)
    budget = limits.size_bytes_max - len(control_file) - (end.end_lsn - first_wal_lsn)
    if budget < 0:
        raise StateUnreadableError(f"a state needs more than {limits.size_bytes_max} bytes")
    relations = list(directory.relation_files())
    unlogged_names = {
        relation_file(file.path)[0] for file in relations if relation_file(file.path)[1] == Fork.INIT
    }
    free_space = _collect_free_space(directory, relations, unlogged_names, budget)
    budget -= _forks_size(free_space)
    statistics = _collect_small(directory, "statistics", ("pg_stat",), budget)
    budget -= _files_size(statistics)
    slots, decoding, wal_lsn = _collect_slots(
        directory, wal, pg_version, (first_wal_lsn, end.end_lsn), budget, ignored_slots
    )
    budget -= _files_size([*slots, *decoding]) + first_wal_lsn - wal_lsn
    sequences = _collect_sequences(directory, relations, unlogged_names, budget)
    budget -= _forks_size(sequences)
    unlogged = _collect_unlogged(directory, relations, unlogged_names, min(budget, limits.unlogged_bytes_max))
    budget -= _forks_size(unlogged)
    state = SavedState(
        control=control_file,
        wal_lsn=wal_lsn,
        wal=wal.read(wal_lsn, end.end_lsn - wal_lsn),
        free_space=free_space,
        statistics=statistics,
        slots=slots,
        decoding=decoding,
        sequences=sequences,
        unlogged=unlogged,
        hot_blocks=hot_blocks if len(hot_blocks) <= budget else b"",
        left_out=directory.left_out,
    )
    return CollectedState(end.end_lsn, state)


def _collect_free_space(
    directory: _Directory, relations: list[_LocalFile], unlogged: Collection[str], budget: int
) -> list[StateFork]:
    found = [
        (file, file.size_bytes)
        for file in relations
        if relation_file(file.path)[1] == Fork.FSM
        and relation_file(file.path)[0] not in unlogged
        and file.size_bytes
    ]
    taken, left = fit(found, budget)
    _leave_files_out(directory, "free space maps", left)
    return [directory.read_fork(file) for file in taken]


def _collect_small(
    directory: _Directory, what: str, folders: tuple[str, ...], budget: int
) -> list[StateFile]:
    found = [(file, file.size_bytes) for file in directory.files(*folders) if _is_carried(file.path)]
    taken, left = fit(found, budget)
    _leave_files_out(directory, what, left)
    return [StateFile(file.path, directory.read(file.path)) for file in taken]


def _collect_slots(
    directory: _Directory,
    wal: "LocalWal",
    pg_version: int,
    last_page: tuple[Lsn, Lsn],
    budget: int,
    ignored: Collection[str],
) -> tuple[list[StateFile], list[StateFile], Lsn]:
    """Slots, their decoding's files, and where WAL must begin for all of them.

    A logical slot without these files would skip rows silently: either all go along or none does.
    """
    wal_lsn, end_lsn = last_page
    slots = [slot for slot in _read_slots(directory, pg_version) if slot.slot.name not in ignored]
    decoding: list[StateFile] = []
    if any(slot.slot.is_logical for slot in slots):
        files = list(directory.files("pg_logical/snapshots", "pg_logical/mappings"))
        size = sum(file.size_bytes for file in files)
        if size <= budget and all(_is_carried(file.path) for file in files):
            decoding = [StateFile(file.path, directory.read(file.path)) for file in files]
            budget -= size
        else:
            gone = [(slot.slot.name, 0) for slot in slots if slot.slot.is_logical]
            directory.leave_out("replication slots", gone, f"their decoding has files of {size} bytes")
            slots = [slot for slot in slots if not slot.slot.is_logical]
    taken: list[StateFile] = []
    for each in sorted(slots, key=lambda slot: -_needed_lsn(slot.slot, end_lsn)):
        start = min(wal_lsn, _page_start(_needed_lsn(each.slot, end_lsn)))
        cost = len(each.content) + wal_lsn - start
        if not wal.has(start, end_lsn):
            directory.leave_out("replication slot", [(each.slot.name, cost)], "its WAL is no longer here")
        elif (
            cost <= budget
        ):  # else it is kept all the same, and its WAL is on the safekeepers (`slot_keeper`)
            taken.append(StateFile(each.path, each.content))
            wal_lsn, budget = start, budget - cost
    return taken, decoding if taken else [], wal_lsn


def _read_slots(directory: _Directory, pg_version: int) -> Iterator[_Slot]:
    root = directory.root / "pg_replslot"
    for name in sorted(os.listdir(root) if root.exists() else ()):
        path = f"pg_replslot/{name}/state"
        try:
            content = directory.read(path)
            yield _Slot(path, content, unpack_slot(content, pg_version))
        except FileNotFoundError:
            continue
        except DamagedSlotError as error:
            directory.leave_out("replication slot", [(name, 0)], str(error))


def _needed_lsn(slot: ReplicationSlot, end_lsn: Lsn) -> Lsn:
    """The oldest WAL that it needs; the end of all where it needs none."""
    return end_lsn if slot.is_invalidated or not slot.restart_lsn else min(slot.restart_lsn, end_lsn)


def _collect_sequences(
    directory: _Directory, relations: list[_LocalFile], unlogged: Collection[str], budget: int
) -> list[StateFork]:
    """Those that WAL is ahead of. Each is one page, so that the number of looks is what costs."""
    found = []
    for file in relations:
        name, fork = relation_file(file.path)
        if fork != Fork.MAIN or file.size_bytes != BLOCK_SIZE_BYTES or name in unlogged:
            continue
        page = directory.read_fork(file)
        if page.is_whole and log_count(page.runs[0].data):
            found.append((page, BLOCK_SIZE_BYTES))
    taken, left = fit(found, budget)
    directory.leave_out("sequences", [(fork.path, size) for fork, size in left], _TOO_MUCH)
    return taken


def _collect_unlogged(
    directory: _Directory, relations: list[_LocalFile], unlogged: Collection[str], budget: int
) -> list[StateFork]:
    """All files of a relation, or none."""
    files: dict[str, list[_LocalFile]] = {name: [] for name in unlogged}
    for file in relations:
        name, fork = relation_file(file.path)
        if name in files and fork != Fork.INIT:
            files[name].append(file)
    sizes = [(name, sum(file.size_bytes for file in found)) for name, found in files.items() if found]
    taken, left = fit(sizes, budget)
    directory.leave_out("unlogged relations", left, f"{_TOO_MUCH}; they will be empty, as after a crash")
    forks: list[StateFork] = []
    for name in sorted(taken):
        found = [directory.read_fork(file) for file in files[name]]
        if all(fork.is_whole for fork in found):
            forks += found
        else:
            directory.leave_out("unlogged relation", [(name, 0)], "a part of it is not here")
    return forks


_TOO_MUCH = "more than a saved state may hold"


def _leave_files_out(directory: _Directory, what: str, left: Sequence[tuple[_LocalFile, int]]) -> None:
    directory.leave_out(what, [(file.path, size) for file, size in left], _TOO_MUCH)


def _is_carried(path: str) -> bool:
    try:
        check_carried_path(path)
    except UnsafePathError:
        return False
    return True


def _page_start(lsn: int) -> Lsn:
    return Lsn(lsn - lsn % WAL_PAGE_SIZE_BYTES)


def _forks_size(forks: Iterable[StateFork]) -> int:
    return sum(len(run.data) for fork in forks for run in fork.runs)


def _files_size(files: Iterable[StateFile]) -> int:
    return sum(len(file.content) for file in files)


class LocalWal:
    """WAL of a directory, over its segments."""

    def __init__(self, folder: Path, segment_size: int) -> None:
        self._folder = folder
        self._segment_size = segment_size

    def has(self, start: int, end: int) -> bool:
        """Whether all its segments are there."""
        first, last = start // self._segment_size, max(start, end - 1) // self._segment_size
        return all(self._segment(number).exists() for number in range(first, last + 1))

    def read(self, start: int, size: int) -> bytes:
        """What there is of it. Raises FileNotFoundError if even its beginning is missing."""
        parts: list[bytes] = []
        while size > 0:
            number, offset = divmod(start, self._segment_size)
            wanted = min(size, self._segment_size - offset)
            try:
                with self._segment(number).open("rb") as segment:
                    segment.seek(offset)
                    part = segment.read(wanted)
            except FileNotFoundError:
                if not parts:
                    raise
                break
            parts.append(part)
            start, size = start + wanted, size - wanted
        return b"".join(parts)

    def _segment(self, number: int) -> Path:
        return self._folder / wal_segment_file_name(number * self._segment_size, self._segment_size)
