"""Finds out which blocks an endpoint uses most, from what its PostgreSQL has left or has at the moment.

::

    1  in shared buffers when PostgreSQL was shut down, used again and again   csrc/endpoint/hot_buffers.c
    2  there, used little; in the local file, read more than once              presence bytes of the arena
    3  in the local file: fetched for a read, or written                       presence bytes, sizes of files

What was fetched ahead and never read is not hot. Where the cache has no size, no marks of reads are left, and
the second level has only what is in shared buffers. Within a level small files go first: catalogs, say.

Not here: the list's bytes (`pgformat.hot_blocks`), when it is made (`hot_keeper`).
"""

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from excimer.base.ids import TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES, SEGMENT_BLOCKS, Fork, Relation, relation_path
from excimer.compute.arena import Arena
from excimer.pgformat.cluster_files import FileKind, identify_file
from excimer.pgformat.hot_blocks import HOT_BLOCKS_MAX, HotBlocks, HotFile

LEVELS: Final = 3
OFTEN_USED: Final = 2
"""From here on a shared buffer's use count is the first level's."""
FORKS: Final = (Fork.MAIN, Fork.VM)
"""Free space maps are carried whole by a saved state."""
BUFFERS_READ_MAX: Final = HOT_BLOCKS_MAX

_BUFFER: Final = struct.Struct("<6I")
"""Same as in csrc/endpoint/hot_buffers.c: tablespace, database, relation, fork, block, use count."""
_PRESENT, _TOUCHED, _AHEAD = 1, 2, 8
"""Same as in csrc/libhydrate/arena.h."""
_HERE: Final = bytes(
    0 if not value & _PRESENT else LEVELS - 1 if value & _TOUCHED else 0 if value & _AHEAD else LEVELS
    for value in range(256)
)
"""Of each presence byte the level, from 1; 0: not hot."""
_RUNS: Final = tuple(re.compile(b"%c+" % level) for level in range(1, LEVELS + 1))


def collect_hot_blocks(
    data_dir: Path, arena: Arena, buffers: Path | None, timeline_id: TimelineId
) -> HotBlocks:
    """`buffers`: what the shutdown left, if it was one. Blocks for as long as looking at all files takes."""
    levels = {path: bytearray(found) for path, found in _local_blocks(data_dir, arena)}
    if buffers is not None:
        for path, block, level in _buffers(buffers):
            known = levels.get(path)
            if known is not None and block < len(known):
                known[block] = min(level, known[block] or level)
    by_size = sorted(levels.items(), key=lambda item: len(item[1]))
    found: list[list[HotFile]] = []
    room = HOT_BLOCKS_MAX
    for pattern in _RUNS:
        files: list[HotFile] = []
        for path, known in by_size:
            runs, room = _runs(pattern, known, room)
            if runs:
                files.append(HotFile(path, runs))
        found.append(files)
    return HotBlocks(timeline_id=timeline_id, levels=found)


def _runs(pattern: re.Pattern[bytes], known: bytearray, room: int) -> tuple[list[int], int]:
    """Of one level, and the room that is left after them."""
    runs: list[int] = []
    for match in pattern.finditer(known):
        if room == 0:
            break
        count = min(match.end() - match.start(), room)
        runs += (match.start(), count)
        room -= count
    return runs, room


def _local_blocks(data_dir: Path, arena: Arena) -> Iterator[tuple[str, bytes]]:
    """Of each relation's file that is there, the level of each block."""
    for path, size_bytes in _relation_files(data_dir):
        blocks = min(size_bytes // BLOCK_SIZE_BYTES, SEGMENT_BLOCKS)
        known = arena.presence_marks(path)
        here = b"" if known is None else known[:blocks].translate(_HERE)
        yield path, here + bytes([LEVELS]) * (blocks - len(here))


def _relation_files(data_dir: Path) -> Iterator[tuple[str, int]]:
    databases = (name for name in os.listdir(data_dir / "base") if name.isdecimal())
    for folder in ("global", *(f"base/{name}" for name in databases)):
        try:
            entries = list(os.scandir(data_dir / folder))
        except FileNotFoundError:
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}"
            found = identify_file(path)
            if found is None or found.kind is not FileKind.RELATION or found.fork not in FORKS:
                continue
            try:
                yield path, entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue  # PostgreSQL may run


def _buffers(path: Path) -> Iterator[tuple[str, int, int]]:
    """Path, block and level of each shared buffer."""
    try:
        with path.open("rb") as file:
            data = file.read(BUFFERS_READ_MAX * _BUFFER.size)
    except FileNotFoundError:
        return
    for spc, db, rel, fork, block, usage in _BUFFER.iter_unpack(data[: len(data) - len(data) % _BUFFER.size]):
        if fork not in FORKS:
            continue
        try:
            file_path = relation_path(Relation(spc, db, rel), fork, block // SEGMENT_BLOCKS)
        except ValueError:
            continue
        yield file_path, block % SEGMENT_BLOCKS, 1 if usage >= OFTEN_USED else 2
