"""The arena, seen from the compute manager: what PostgreSQL's files are, and where their pages come from.

The manager builds it before it starts PostgreSQL with libhydrate preloaded (`preload_environment`), and
keeps it open to change the page server's address, the token or the LSN of a running compute, and to
read statistics. The bytes are drawn in `csrc/libhydrate/arena.h`.

Start-up lists directories before anything can complete them, and looks there for `_init` forks and SLRU
segments. Those are therefore made at once; every other file is made by the library when it is first used.
`Arena.set_ready` must follow as soon as PostgreSQL says that it is ready, before clients are let in:
until then a listing (CREATE DATABASE with FILE_COPY, pg_database_size) lacks files that nobody has opened.

Not here: which files and pages there are (`excimer.compute.data_directory`).
"""

import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

from excimer._native import arena_file
from excimer._native.cache_eviction import Evictor
from excimer.base.errors import CorruptionError, RefusedError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.base.lsn import INVALID_LSN, MAX_LSN, Lsn
from excimer.io.cache import reachable_file
from excimer.io.processes import give_to_user, unprivileged_user

DEADLINE_S_DEFAULT = 60.0
"""How long a read waits for the page server: longer than its restart takes."""
READ_AHEAD_BLOCKS_DEFAULT = 128
MISSES_KEPT = 8192
FILES_ADOPTED_MAX = 65536
"""Files made by PostgreSQL of which blocks can be evicted; further ones stay whole."""
TAILS_MAX = 4096
"""Files of which blocks can be evicted that they did not have at the start."""
WAL_SEGMENT_SIZE_DEFAULT = 16 << 20
NO_DIRECTORY_ID = bytes(16)
UNLIMITED = (1 << 64) - 1
_LISTED, _GONE = 0, 2
"""States of a file (`arena.h`)."""
_FILE_MODE = 0o600
_DIRECTORY_MODE = 0o700


class BadArenaError(CorruptionError):
    """A file is not an arena that this version can read: the endpoint must be started afresh."""


class BadArenaFileError(RefusedError):
    """A file cannot be in an arena: only relations of the two built-in tablespaces and SLRU segments can."""


class ArenaFile(NamedTuple):
    """A file of the manifest, by its path in the data directory."""

    path: str
    blocks: int
    local: bool = False
    """Make the file at once, sparse, instead of at its first use. Always so for `_init` forks and SLRUs."""


class ArenaStatistics(NamedTuple):
    """What all processes of this PostgreSQL did together since the start."""

    fetches: int
    """Answered requests; a read that misses makes at least one."""
    blocks: int
    bytes: int
    wait_ns: int
    wait_ns_max: int
    connections: int
    retries: int
    errors: int
    """Reads that failed."""
    cancelled: int
    """Of those, given up because the query was cancelled."""
    claim_waits: int
    kept: int
    """Fetched blocks that were thrown away, because PostgreSQL had written or cut them meanwhile."""
    write_guards: int
    truncations: int
    files_made: int
    hints: int
    hints_fetched: int
    stale_descriptors: int
    misses: int
    bulk_waits: int
    """Of processes that make much WAL, for the pageserver to catch up."""
    bulk_wait_ns: int
    wal_waits: int
    """Writes of WAL that would have passed the limit."""
    wal_wait_ns: int
    room_waits: int
    """Writes that found a full disk, and may not fail."""
    room_wait_ns: int
    reads: int
    """Blocks that PostgreSQL read from files which the arena knows."""
    read_misses: int
    """Of those, blocks that were not here."""
    evicted: int
    reads_again: int
    """Reads that an eviction overtook."""
    adopted: int
    """Files that PostgreSQL made and that blocks may be evicted of."""


class Miss(NamedTuple):
    """Adjacent blocks fetched at once: `needed` of them were asked for, the others are read-ahead."""

    path: str
    block: int
    fetched: int
    needed: int


class ArenaSettings(NamedTuple):
    """What may change while PostgreSQL runs."""

    pageserver_address: str
    """HOST:PORT, or the path of a Unix socket."""
    tenant_id: TenantId
    timeline_id: TimelineId
    token: str
    lsn: Lsn = MAX_LSN
    """`MAX_LSN` asks for the newest there is, as a primary does; otherwise pages as of exactly this LSN."""
    not_modified_since: Lsn = Lsn(0)
    deadline_s: float = DEADLINE_S_DEFAULT
    read_ahead_blocks: int = READ_AHEAD_BLOCKS_DEFAULT


class Arena:
    """An open arena. Methods that change pages or files are for the time before PostgreSQL starts."""

    def __init__(self, memory: mmap.mmap, settings: ArenaSettings, connection_generation: int) -> None:
        self._memory = memory
        self._settings = settings
        self._connection_generation = connection_generation

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises `BadArenaError`, OSError."""
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        try:
            arena_file.check(memory)
        except ValueError as error:
            memory.close()
            raise BadArenaError(f"{path}: {error}") from error
        lsn, since, generation, deadline_ms, ahead, tenant, timeline, address, token = (
            arena_file.read_settings(memory)
        )
        settings = ArenaSettings(
            address.decode(),
            TenantId(tenant.hex()),
            TimelineId(timeline.hex()),
            token.decode(),
            Lsn(lsn),
            Lsn(since),
            deadline_ms / 1000,
            ahead,
        )
        return cls(memory, settings, generation)

    def close(self) -> None:
        self._memory.close()

    @property
    def settings(self) -> ArenaSettings:
        return self._settings

    @property
    def data_dir(self) -> Path:
        return Path(os.fsdecode(arena_file.data_dir(self._memory)))

    @property
    def directory_id(self) -> bytes:
        """Of the data directory that it belongs to."""
        return arena_file.directory_id(self._memory)

    def renew(self, *, evicts: bool = False) -> None:
        """For a new PostgreSQL on a directory that was kept: what is here stays, statistics begin anew."""
        arena_file.renew(self._memory, evicts)

    @property
    def evicts(self) -> bool:
        """Whether blocks may be evicted while this PostgreSQL runs."""
        return arena_file.evicts(self._memory)

    def make_evictor(self, path: Path, *, clean_only: bool) -> Evictor:
        """Of this arena, whose file is `path`; to be closed first. Raises ValueError unless it `evicts`."""
        return Evictor(self._memory, str(path), str(self.data_dir), clean_only)

    def set_cache(self, limit_bytes: int, used_bytes: int) -> None:
        """For whoever looks: the bound of the cache, and what it takes."""
        arena_file.set_cache(self._memory, limit_bytes, used_bytes)

    def cache(self) -> tuple[int, int]:
        """Bound and use in bytes, as they were set last."""
        return arena_file.cache(self._memory)

    def set_ready(self) -> None:
        """PostgreSQL has started: from now on listings of directories are complete."""
        arena_file.publish_ready(self._memory)

    def set_pageserver(self, address: str) -> None:
        """Every process reconnects at its next fetch; those that wait for an answer do so at once."""
        self.change(self._settings._replace(pageserver_address=address))

    def set_token(self, token: str) -> None:
        self.change(self._settings._replace(token=token))

    def set_lsn(self, lsn: Lsn, not_modified_since: Lsn) -> None:
        """For a replica: what pages to ask for from now on."""
        self.change(self._settings._replace(lsn=lsn, not_modified_since=not_modified_since))

    def throttle(self, allowed_bytes: int, wal_limit_lsn: int) -> None:
        """How much bulk WAL may have been made, ever (`bulk_bytes`), and how far pg_wal may be written;
        `UNLIMITED` for either. Who waits looks again.
        """
        arena_file.publish_throttle(self._memory, allowed_bytes, wal_limit_lsn)

    def set_quorum(self, lsn: Lsn) -> None:
        """A majority of safekeepers has all WAL below `lsn`: what leaves the endpoint waits for it."""
        arena_file.publish_quorum(self._memory, lsn)

    @property
    def memory(self) -> mmap.mmap:
        """For native code that tells it what these methods do; not to be held when it is closed."""
        return self._memory

    def bulk_bytes(self) -> int:
        """Bulk WAL since the start that was made while it was limited, or waits to be allowed."""
        return arena_file.taken(self._memory)

    def written_lsn(self) -> Lsn:
        """How far pg_wal is written; 0 before PostgreSQL's first write."""
        return Lsn(arena_file.written_lsn(self._memory))

    def waiting_for_room(self) -> int:
        """Processes of PostgreSQL that wait now for space on the disk."""
        return arena_file.waiting_for_room(self._memory)

    def change(self, settings: ArenaSettings) -> None:
        """Makes all settings current at once. Raises ValueError for an address or token that is too long."""
        connects_by = slice(0, 4)
        generation = self._connection_generation + (settings[connects_by] != self._settings[connects_by])
        arena_file.publish_settings(
            self._memory,
            settings.lsn,
            settings.not_modified_since,
            generation,
            round(settings.deadline_s * 1000),
            settings.read_ahead_blocks,
            bytes.fromhex(settings.tenant_id),
            bytes.fromhex(settings.timeline_id),
            numeric_address(settings.pageserver_address).encode(),
            settings.token.encode(),
        )
        self._settings, self._connection_generation = settings, generation

    def place_pages(self, runs: Iterable[tuple[str, int, bytes]]) -> int:
        """Writes (path, first block, pages) into the data directory and marks them present; how many pages.

        Raises `BadArenaFileError` for a file that is not listed, ValueError for blocks past its end, OSError.
        """
        placed = 0
        for path, block, pages in runs:
            index = arena_file.find(self._memory, path)
            if index < 0:
                raise BadArenaFileError(f"{path} is not in the manifest that this arena was built from")
            count = len(pages) // BLOCK_SIZE_BYTES
            if count * BLOCK_SIZE_BYTES != len(pages):
                raise ValueError(f"{path}: {len(pages)} bytes are not whole pages")
            if block + count > arena_file.file_info(self._memory, index)[1]:
                raise ValueError(f"{path}: block {block + count - 1} lies past the end")
            descriptor = self._make_file(index)
            try:
                _write_fully(descriptor, pages, block * BLOCK_SIZE_BYTES)
                arena_file.mark_present(self._memory, index, block, count)
            finally:
                os.close(descriptor)
            placed += count
        return placed

    def statistics(self) -> ArenaStatistics:
        return ArenaStatistics(**arena_file.statistics(self._memory))

    def misses(self) -> list[Miss]:
        """The first `MISSES_KEPT` misses, in order: what the next start had better bring along."""
        return [Miss._make(fields) for fields in arena_file.misses(self._memory)]

    def present_blocks(self, path: str) -> list[bool]:
        """Which blocks of a file are here. Raises `BadArenaFileError` for a file that is not listed."""
        index = arena_file.find(self._memory, path)
        if index < 0:
            raise BadArenaFileError(f"{path} is not in this arena")
        return [byte != 0 for byte in arena_file.presence(self._memory, index)]

    def presence(self, path: str, block: int, count: int) -> list[bool]:
        """Which of these blocks are in the file on the disk, if the file has them: those that the arena does
        not know are, for PostgreSQL has written them.
        """
        index = arena_file.find(self._memory, path)
        if index < 0 or arena_file.file_info(self._memory, index)[2] == _GONE:
            return [True] * count
        known = [byte != 0 for byte in arena_file.presence(self._memory, index)[block : block + count]]
        return known + [True] * (count - len(known))

    def unmade_files(self) -> Iterator[tuple[str, int]]:
        """Path and blocks of each file that is not in the data directory yet."""
        for index in range(arena_file.file_count(self._memory)):
            path, blocks, state = arena_file.file_info(self._memory, index)
            if state == _LISTED:
                yield path, blocks

    def unmade_blocks(self, path: str) -> int | None:
        """Blocks of such a file; None for any other."""
        index = arena_file.find(self._memory, path)
        if index < 0:
            return None
        _, blocks, state = arena_file.file_info(self._memory, index)
        return blocks if state == _LISTED else None

    def find_presence(self, path: str) -> bytes | None:
        """Of each block of a file, whether it is here (not zero); None: it is not listed, and wholly
        local.
        """
        index = arena_file.find(self._memory, path)
        if index < 0 or arena_file.file_info(self._memory, index)[2] == _GONE:
            return None
        return arena_file.presence(self._memory, index)

    def presence_marks(self, path: str) -> bytes | None:
        """Of each block of a file its presence byte (`arena.h`); None: it is not listed, and wholly local."""
        index = arena_file.find(self._memory, path)
        if index < 0 or arena_file.file_info(self._memory, index)[2] == _GONE:
            return None
        return arena_file.marks(self._memory, index)

    def _make_file(self, index: int) -> int:
        path, blocks, _ = arena_file.file_info(self._memory, index)
        descriptor = os.open(self.data_dir / path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        if os.fstat(descriptor).st_size < blocks * BLOCK_SIZE_BYTES:
            os.ftruncate(descriptor, blocks * BLOCK_SIZE_BYTES)
        _give(descriptor)
        arena_file.mark_made(self._memory, index)
        return descriptor


def build_arena(
    path: Path,
    *,
    files: Iterable[ArenaFile],
    settings: ArenaSettings,
    data_dir: Path,
    wal_segment_size: int = WAL_SEGMENT_SIZE_DEFAULT,
    wal_start_lsn: Lsn = INVALID_LSN,
    directory_id: bytes = NO_DIRECTORY_ID,
    evicts: bool = False,
) -> Arena:
    """Makes the arena of a new data directory, with every block absent, and the files that must be there.

    With `evicts` there is room for what PostgreSQL makes, too, and blocks may be evicted while it runs.

    What pg_wal has below `wal_start_lsn` is no WAL of the branch, and is sent to nobody.
    `data_dir` must exist and be absolute; directories of listed files are made in it. All that is made
    belongs to the user that PostgreSQL runs as. Raises `BadArenaFileError`, ValueError for an address or
    token that is too long, OSError.
    """
    listed = list(files)
    blocks = sum(file[1] for file in listed)
    file_capacity = len(listed) + (FILES_ADOPTED_MAX if evicts else 0)
    tails = TAILS_MAX if evicts else 0
    size = arena_file.arena_size(file_capacity, blocks, MISSES_KEPT, tails)
    path.unlink(missing_ok=True)  # never truncated: an older PostgreSQL may still have it mapped
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
    try:
        os.ftruncate(descriptor, size)
        _give(descriptor)
        memory = mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
    try:
        arena_file.build(
            memory,
            listed,
            MISSES_KEPT,
            os.fsencode(data_dir),
            wal_segment_size,
            wal_start_lsn,
            directory_id,
            file_capacity,
            tails,
            evicts,
        )
    except ValueError as error:
        raise BadArenaFileError(str(error)) from error
    arena = Arena(memory, settings, 0)
    arena.change(settings)
    _make_directories(data_dir, listed)
    for index, file in enumerate(listed):
        if file[0][0] == "p" or file[0].endswith("_init") or file[2:3] == (True,):
            os.close(arena._make_file(index))
    return arena


def preload_environment(arena: Path) -> dict[str, str]:
    """What PostgreSQL's environment needs besides its own. Raises `CacheUnusableError`."""
    library = reachable_file(Path(arena_file.__file__).with_name("libhydrate.so"))
    return {"LD_PRELOAD": str(library), "EXCIMER_ARENA": str(arena)}


def numeric_address(address: str) -> str:
    """The address with its host as a number, as libhydrate wants it. Raises OSError, ValueError."""
    host, separator, port = address.rpartition(":")
    if address.startswith("/"):
        return address
    if not separator or not port.isdigit():
        raise ValueError(f"{address!r} is not HOST:PORT")
    bare = host.removeprefix("[").removesuffix("]")
    if bare.replace(".", "").isdigit() or ":" in bare:
        return address
    import socket  # only for names: the usual start does without

    family, _, _, _, found = socket.getaddrinfo(bare, int(port), type=socket.SOCK_STREAM)[0]
    return f"[{found[0]}]:{port}" if family == socket.AF_INET6 else f"{found[0]}:{port}"


def _make_directories(data_dir: Path, files: list[ArenaFile]) -> None:
    for parent in sorted({file[0].rpartition("/")[0] for file in files}):
        missing = [data_dir / parent]
        while not missing[-1].exists():
            missing.append(missing[-1].parent)
        for directory in reversed(missing[:-1]):
            directory.mkdir(mode=_DIRECTORY_MODE)
            give_to_user(directory)


def _give(descriptor: int) -> None:
    user = unprivileged_user()
    if user is not None:
        os.fchown(descriptor, user.uid, user.gid)


def _write_fully(descriptor: int, data: bytes, offset: int) -> None:
    remaining = memoryview(data)
    while remaining:
        written = os.pwrite(descriptor, remaining, offset)
        remaining, offset = remaining[written:], offset + written
