"""Processes that do file calls through libhydrate, with sanitizers, on a lazy directory of tagged blocks.

A block of file number f (in `FILES`) and number b holds the tag ``(f + 1) << 32 | b``, repeated.
"""

import atexit
import functools
import os
import queue
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES, SEGMENT_BLOCKS
from excimer.base.lsn import INVALID_LSN, Lsn
from excimer.compute.arena import Arena, ArenaFile, ArenaSettings, build_arena
from tests.kit.fake_page_server import FakePageServer

SOURCES = Path(__file__).parents[2] / "csrc" / "libhydrate"
TENANT = TenantId("a1" * 16)
TIMELINE = TimelineId("b2" * 16)
WAIT_S = 20.0

FILES = {
    "base/5/1000": 600,
    "base/5/1001": 600,
    "base/5/1002": 600,
    "base/5/1000_fsm": 3,
    "base/5/2000": SEGMENT_BLOCKS,
    "base/5/2000.1": 40,
    "base/5/3000": 0,
    "base/5/4000_init": 1,
    "global/1262": 3,
    "pg_xact/0000": 32,
    "pg_multixact/members/00AB": 32,
}
SPARSE = "base/5/2000"
"""Only its last block is written: a gigabyte of tags would be too much."""


NOT_MODIFIED_SINCE = Lsn(0xFFFFFFFF_00000000)
"""Above what any page has where its LSN is: a tag's lower half, which is its block, comes first."""


def tag(path: str, block: int) -> int:
    return (list(FILES).index(path) + 1) << 32 | block


def tags(path: str, start: int, end: int) -> list[int]:
    return [tag(path, block) for block in range(start, end)]


class Mutation(NamedTuple):
    """A line of the library that is changed to see whether the tests notice."""

    source: str
    old: str
    new: str


@functools.cache
def program(name: str, mutation: Mutation | None = None) -> Path:
    """Builds driver or torture with the library inside: with sanitizers, or quickly with a mutation."""
    directory = Path(tempfile.mkdtemp(prefix="excimer-libhydrate-"))
    atexit.register(_remove, directory, os.getpid())
    sources = {path.name: path.read_text() for path in SOURCES.glob("*.c")}
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if mutation is not None:
        assert sources[mutation.source].count(mutation.old) == 1, f"{mutation} no longer applies"
        sources[mutation.source] = sources[mutation.source].replace(mutation.old, mutation.new)
        flags = ["-O0"]
    for source, text in sources.items():
        (directory / source).write_text(text)
    command = ["cc", "-std=gnu11", "-g", *flags, "-Wall", "-Wextra", "-DHYDRATE_PREFIXED", f"-I{SOURCES}"]
    wrapped = ["-Wl,--wrap=system_pwrite"] + ["-Wl,--wrap=system_pread"] * (name == "torture")
    command += [*sources, str(SOURCES / "tests" / f"{name}.c"), *wrapped, "-o", name]
    subprocess.run(command, cwd=directory, check=True)
    return directory / name


def _remove(directory: Path, owner_pid: int) -> None:
    """Not by a fork of the owner, which ends before it does."""
    if os.getpid() == owner_pid:
        shutil.rmtree(directory)


class LazyDirectory:
    """Pages at a fake server, an arena and an empty data directory."""

    def __init__(
        self,
        root: Path,
        *,
        deadline_s: float = WAIT_S,
        read_ahead_blocks: int = 1,
        wal_start_lsn: Lsn = INVALID_LSN,
        evicts: bool = False,
    ) -> None:
        self.pages_dir = root / "pages"
        self.data_dir = root / "data"
        self.arena_path = root / "arena"
        write_pages(self.pages_dir)
        self.data_dir.mkdir()
        self.server = FakePageServer(self.pages_dir)
        self.arena: Arena = build_arena(
            self.arena_path,
            files=[ArenaFile(path, blocks) for path, blocks in FILES.items()],
            settings=ArenaSettings(
                self.server.address,
                TENANT,
                TIMELINE,
                "token",
                not_modified_since=NOT_MODIFIED_SINCE,
                deadline_s=deadline_s,
                read_ahead_blocks=read_ahead_blocks,
            ),
            data_dir=self.data_dir,
            wal_start_lsn=wal_start_lsn,
            evicts=evicts,
        )
        self._drivers: list[Driver] = []

    def driver(self, mutation: Mutation | None = None, file_size_max: int | None = None) -> "Driver":
        """Another process on this directory."""
        driver = Driver(self, mutation, file_size_max)
        self._drivers.append(driver)
        return driver

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "EXCIMER_ARENA": str(self.arena_path),
            "EXCIMER_FORCE": "1",
            "ASAN_OPTIONS": "detect_leaks=0",
        }

    def close(self) -> None:
        for driver in self._drivers:
            driver.stop()
        self.server.behaviour.hang = False
        self.server.close()
        self.arena.close()


def write_pages(pages_dir: Path) -> None:
    for path, blocks in FILES.items():
        (pages_dir / path).parent.mkdir(parents=True, exist_ok=True)
        with (pages_dir / path).open("wb") as file:
            file.truncate(blocks * BLOCK_SIZE_BYTES)
            for block in range(blocks - 1 if path == SPARSE else 0, blocks):
                file.seek(block * BLOCK_SIZE_BYTES)
                file.write(struct.pack("<Q", tag(path, block)) * (BLOCK_SIZE_BYTES // 8))


class Driver:
    """One process; commands are those of csrc/libhydrate/tests/driver.c."""

    def __init__(
        self, directory: LazyDirectory, mutation: Mutation | None, file_size_max: int | None
    ) -> None:
        command = [str(program("driver", mutation))]
        if file_size_max is not None:  # bash counts in kilobytes; a call past the limit fails with EFBIG
            limit = f"trap '' XFSZ; ulimit -f {file_size_max // 1024}; exec {command[0]}"
            command = ["bash", "-c", limit]
        self._process = subprocess.Popen(
            command,
            cwd=directory.data_dir,
            env=directory.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self.errors: list[str] = []
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=_pump, args=(self._process.stdout, self._lines.put)),
            threading.Thread(target=_pump, args=(self._process.stderr, self.errors.append)),
        ]
        for reader in self._readers:
            reader.start()
        assert self.answer() == "ready"

    def begin(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")

    def answer(self, timeout_s: float = WAIT_S) -> str:
        """Raises queue.Empty when there is none in time."""
        return self._lines.get(timeout=timeout_s)

    def call(self, command: str) -> str:
        self.begin(command)
        return self.answer()

    def open(self, path: str, flags: str = "w") -> int:
        return number(self.call(f"open {path} {flags}"))

    def read(self, fd: int, block: int, count: int = 1) -> list[int]:
        return tags_of(self.call(f"pread {fd} {block} {count}"))

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stop(self) -> None:
        """Ends it; an error that a sanitizer found fails the test."""
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        assert not re.search("Sanitizer|runtime error", "\n".join(self.errors)), "\n".join(self.errors)


def _pump(lines: Iterable[str], put: Callable[[str], None]) -> None:
    for line in lines:
        put(line.rstrip("\n"))


def number(answer: str) -> int:
    assert answer.startswith("ok "), answer
    return int(answer.split()[1])


def tags_of(answer: str) -> list[int]:
    """The tags of an answer's blocks; -1 for a torn one."""
    assert answer.startswith("ok "), answer
    return [-1 if word == "torn" else int(word) for word in answer.split()[2:]]


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)
