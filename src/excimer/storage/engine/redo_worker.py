"""One redo worker: a process, its directory, and the exchange of batches with it.

Everything here blocks and belongs to one thread at a time; `redo_pool` supplies the threads. An exchange
writes and reads at once, so that it cannot stop with both pipes full, and gives up when the worker has
made no progress for a while. A worker that has failed in any way is not used again: PostgreSQL's redo may
have corrupted its memory.

Not here: which worker gets what, and what to do after a failure (`redo_supervisor`).
"""

import contextlib
import fcntl
import os
import re
import select
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from excimer.base.errors import RefusedError, RetryableError
from excimer.io.confinement import Confinement
from excimer.io.processes import describe_exit, spawn
from excimer.postgres.build import PostgresBuild
from excimer.postgres.redo_template import make_redo_directory
from excimer.wire.redo import (
    ANSWER_ERROR,
    ANSWER_HEAD,
    ANSWER_PAGE,
    ANSWER_READY,
    PAGE_ANSWER_HEAD,
    PAGE_ANSWER_SIZE_BYTES,
    Sandbox,
    parse_greeting,
)

START_TIMEOUT_S = 30.0
PIPE_SIZE_BYTES = 1 << 20
"""What Linux allows any user to ask for; smaller pipes only mean more system calls."""
READ_SIZE_BYTES = 1 << 20
ERROR_TEXT_SIZE_BYTES_MAX = 1 << 16

_POSITION = struct.Struct("<QQII")
_POSITION_FILE = "excimer_position"
_LOG_FILE = "log"
LOG_SIZE_MAX = 1 << 20
_RECORD = re.compile(r"record ([0-9A-F]+)/([0-9A-F]+) ")

_SETTINGS = {
    "shared_buffers": "1MB",
    "max_connections": "4",
    "max_wal_senders": "0",
    "max_worker_processes": "0",
    "max_prepared_transactions": "0",
    "max_locks_per_transaction": "10",
    "wal_level": "minimal",
    "fsync": "off",
    "huge_pages": "off",
    "log_min_messages": "warning",
    # Of its own directory rather than /dev/shm, where a killed worker would leave it behind.
    "dynamic_shared_memory_type": "mmap",
}


class RedoWorkerStartError(RetryableError):
    """A redo worker did not start; the message carries what it logged."""


class RedoWorkerError(RefusedError):
    """A worker refused a request, or died of it."""


class Position(NamedTuple):
    """Where a worker is, or was when it died."""

    request: int
    """Number of the request, counted from 1 over the worker's life."""
    record_lsn: int
    """Start of the record being applied; 0 between records."""
    resource_manager: int
    info: int


class Failure(NamedTuple):
    """Why an exchange ended early."""

    request: int | None
    """The request at fault; None when the worker was killed while it had nothing to do."""
    reason: str
    record_lsn: int
    answered: bool
    """The worker itself reported the error, rather than dying or falling silent."""


class Exchange(NamedTuple):
    """Outcome of one batch: pages of the first requests, and why there are no more."""

    pages: list[bytes]
    failure: Failure | None


class RedoWorker:
    """A running worker. Raises `RedoWorkerStartError` when it does not start."""

    def __init__(
        self,
        build: PostgresBuild,
        extension: Path,
        control_file: bytes,
        parent: Path,
        *,
        wal_log_hints: bool = False,
        without: Sequence[str] = (),
    ) -> None:
        """`without`: layers of the sandbox (``landlock``, ``root``) to leave out, for tests of the others."""
        self._version = build.version
        self.directory = Path(tempfile.mkdtemp(prefix="worker-", dir=parent))
        self._sent = 0
        self._incoming = bytearray(READ_SIZE_BYTES)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            make_redo_directory(self.directory, build.version, control_file)
            self._process = self._start(build, extension, wal_log_hints, without)
            self.sandbox = self._wait_ready()
            """What of it is in force."""
            on_failure.pop_all()

    @property
    def confinement(self) -> Confinement:
        """What keeps the worker from files that are not its own."""
        if self.sandbox.landlock_version > 0:
            return Confinement.LANDLOCK
        return Confinement.OWN_ROOT if self.sandbox.has_own_root else Confinement.NONE

    def _start(
        self, build: PostgresBuild, extension: Path, wal_log_hints: bool, without: Sequence[str]
    ) -> "subprocess.Popen[bytes]":
        settings = dict(_SETTINGS)
        # Decides whether some records stamp pages with their LSN, so it must be the cluster's.
        settings["wal_log_hints"] = "on" if wal_log_hints else "off"
        if build.version >= 18:
            settings["io_method"] = "sync"
        arguments: list[str | Path] = [build.postgres, "--single", "-D", self.directory]
        for name, value in settings.items():
            arguments += ["-c", f"{name}={value}"]
        # An environment of its own: nothing of ours is a redo worker's business.
        environment = {"LC_ALL": "C", "TZ": "UTC", **build.environment(), "LD_PRELOAD": str(extension)}
        if without:
            environment["EXCIMER_REDO_WITHOUT"] = ",".join(without)
        # Appends, so that it may be cut while the worker has it open.
        self._log = (self.directory / _LOG_FILE).open("ab", buffering=0)
        process = spawn(
            [*arguments, "postgres"],
            environment=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            new_session=False,
        )
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            with contextlib.suppress(OSError):
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_SIZE_BYTES)
        return process

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    @property
    def process_id(self) -> int:
        return self.process.pid

    @property
    def request_count(self) -> int:
        """Requests sent so far."""
        return self._sent

    def _wait_ready(self) -> Sandbox:
        answers = _Answers(self._incoming, 1)
        problem = self._converse(b"", answers, START_TIMEOUT_S)
        if answers.status != ANSWER_READY:
            raise RedoWorkerStartError(
                f"the redo worker of PostgreSQL {self._version} did not start ({problem}): {self._read_log()}"
            )
        return parse_greeting(answers.last)

    def exchange(self, requests: Sequence[bytes], timeout_s: float) -> Exchange:
        """Sends requests for pages and answers with the pages, in order.

        `timeout_s` is how long the worker may take without any progress. After a failure, only `close`
        may follow.
        """
        first = self._sent + 1
        self._sent += len(requests)
        needed = len(requests) * PAGE_ANSWER_SIZE_BYTES + ERROR_TEXT_SIZE_BYTES_MAX
        if needed > len(self._incoming):
            self._incoming = bytearray(needed)
        answers = _Answers(self._incoming, len(requests))
        problem = self._converse(b"".join(requests), answers, timeout_s)
        pages = answers.pages()
        self._keep_log_short()
        if len(pages) == len(requests):
            return Exchange(pages, None)
        if answers.error is not None:
            return Exchange(pages, Failure(len(pages), answers.error, _record_lsn(answers.error), True))
        return Exchange(pages, self._blame(problem or "it fell silent", first, len(pages), len(requests)))

    def ask(self, request: bytes, timeout_s: float = 10.0) -> bytes:
        """The answer to a request of another kind, masking or statistics. Raises `RedoWorkerError`."""
        self._sent += 1
        answers = _Answers(self._incoming, 1)
        problem = self._converse(request, answers, timeout_s)
        if problem is not None or answers.error is not None:
            raise RedoWorkerError(answers.error or problem)
        return answers.last

    def _blame(self, problem: str, first: int, answered: int, count: int) -> Failure:
        position = self._position()
        index = position.request - first
        if not answered <= index < count:
            return Failure(None, problem, 0, False)
        where = f"resource manager {position.resource_manager}, info 0x{position.info:02X}"
        return Failure(index, f"{problem} ({where})", position.record_lsn, False)

    def _converse(self, outgoing: bytes, answers: "_Answers", timeout_s: float) -> str | None:
        """Writes and reads until all answers (or an error) are there; else answers what went wrong."""
        sending, receiving = self._pipes()
        unsent = memoryview(outgoing)
        poller = select.poll()
        poller.register(receiving, select.POLLIN)
        if unsent:
            poller.register(sending, select.POLLOUT)
        deadline = time.monotonic() + timeout_s
        while not answers.complete:
            ready = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready:
                return f"the redo worker made no progress for {timeout_s:g} s"
            for descriptor, _events in ready:
                if descriptor == receiving:
                    count = os.readv(receiving, [answers.room()])
                    if count == 0:
                        return self._describe_death()
                    answers.received(count)
                elif unsent:
                    try:
                        unsent = unsent[os.write(sending, unsent) :]
                    except BrokenPipeError:
                        unsent = unsent[:0]  # it has died; what it still said is read first
                    if not unsent:
                        poller.unregister(sending)
            deadline = time.monotonic() + timeout_s
        return None

    def _pipes(self) -> tuple[int, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin.fileno(), self.process.stdout.fileno()

    def _describe_death(self) -> str:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "the redo worker closed its output"
        return f"the redo worker {describe_exit(code)}"

    def _position(self) -> Position:
        try:
            return Position._make(_POSITION.unpack((self.directory / _POSITION_FILE).read_bytes()))
        except (OSError, struct.error):
            return Position(0, 0, 0, 0)

    def _keep_log_short(self) -> None:
        """Records that PostgreSQL warns of may come by the million. Nobody reads a worker's log but
        `_read_log`, so what is cut off is not kept.
        """
        if self._log is not None and os.fstat(self._log.fileno()).st_size > LOG_SIZE_MAX:
            self._log.truncate(0)

    def _read_log(self) -> str:
        try:
            text = (self.directory / _LOG_FILE).read_bytes()[-2000:].decode(errors="replace")
        except OSError:
            return "it left no log"
        return " ".join(text.split()) or "its log is empty"

    def memory_bytes(self) -> int:
        """Resident memory; 0 when the system does not tell."""
        try:
            fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        except OSError:
            return 0
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def scratch_bytes(self) -> int:
        """Disk space that its directory takes; its files are sparse."""
        return sum(path.lstat().st_blocks * 512 for path in self.directory.rglob("*") if not path.is_dir())

    def close(self) -> None:
        """Kills the process and removes its directory. May be called more than once."""
        process = self._process
        if self._log is not None:
            self._log.close()
            self._log = None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class _Answers:
    """Answers as they come in, in one buffer that is used again and again."""

    def __init__(self, buffer: bytearray, expected: int) -> None:
        self._buffer = memoryview(buffer)
        self._expected = expected
        self._filled = 0
        self._start = 0
        self._page_count = 0
        self.status: int | None = None
        self.last = b""
        self.error: str | None = None
        self.complete = False

    def room(self) -> memoryview:
        return self._buffer[self._filled :]

    def received(self, count: int) -> None:
        self._filled += count
        buffer, head_size = self._buffer, ANSWER_HEAD.size
        while not self.complete and self._filled - self._start >= head_size:
            start = self._start
            if buffer[start : start + head_size] == PAGE_ANSWER_HEAD:
                if self._filled - start < PAGE_ANSWER_SIZE_BYTES:
                    return
                self._start += PAGE_ANSWER_SIZE_BYTES
                self._page_count += 1
                self.complete = self._page_count == self._expected
                if self._expected == 1:
                    self.last = bytes(buffer[start + head_size : self._start])
            elif not self._take_other(start):
                return

    def _take_other(self, start: int) -> bool:
        """An error, a text, the greeting: each ends the exchange."""
        status, length = ANSWER_HEAD.unpack_from(self._buffer, start)
        if length > ERROR_TEXT_SIZE_BYTES_MAX - ANSWER_HEAD.size:
            self.error = f"the redo worker's answer makes no sense: status {status}, {length} bytes"
        else:
            end = start + ANSWER_HEAD.size + length
            if self._filled < end:
                return False
            self.last = bytes(self._buffer[start + ANSWER_HEAD.size : end])
            if status == ANSWER_ERROR:
                self.error = self.last.decode(errors="replace")
            elif status not in (ANSWER_PAGE, ANSWER_READY):
                self.error = f"the redo worker's answer makes no sense: status {status}"
        self.status = status
        self.complete = True
        return True

    def pages(self) -> list[bytes]:
        buffer, head_size, size = self._buffer, ANSWER_HEAD.size, PAGE_ANSWER_SIZE_BYTES
        return [
            bytes(buffer[start + head_size : start + size])
            for start in range(0, self._page_count * size, size)
        ]


def _record_lsn(text: str) -> int:
    """The record that a worker's error text names; 0 if none."""
    match = _RECORD.match(text)
    return int(match[1], 16) << 32 | int(match[2], 16) if match else 0
