"""The file system and the object store of a process that may fail, or end, at any operation.

One `Fault` counts both kinds of operation together. When it is a crash, nothing can be done after it:
threads and tasks that are still under way meet `CrashError` wherever they turn. What a power failure
leaves of the local files is then up to `lose_unsynced`.
"""

import random
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import ParamSpec, TypeVar

from excimer.io.filesystem import FaultyFilesystem
from excimer.io.object_store import ObjectStoreError

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


class CrashError(Exception):
    """The process is gone."""


class Fault:
    """Counts operations and lets one of them fail: with an error, or as the end of the process."""

    def __init__(self, at: int = 0, mode: str = "crash") -> None:
        self.at = at
        """Number of the operation that fails, counted from 1; 0 for none."""
        self.mode = mode
        self.count = 0
        self.operation = ""
        """What failed."""
        self.crashed = False
        self._lock = threading.Lock()

    def crash_in(self, operations: int) -> None:
        """The `operations`-th from here on is the last that is tried."""
        self.count, self.at, self.mode = 0, operations, "crash"

    def step(self, operation: str, name: object) -> None:
        with self._lock:
            if self.crashed:
                raise CrashError("nothing runs after a crash")
            self.count += 1
            if self.count != self.at:
                return
            self.operation = f"{operation} {name}"
            self.crashed = self.mode == "crash"
        if self.crashed:
            raise CrashError(self.operation)
        if isinstance(name, Path):
            raise OSError(28, "No space left on device", str(name))
        raise ObjectStoreError(self.operation)


class UnsyncedFilesystem(FaultyFilesystem):
    """Knows which files would outlive a power failure: those written whole, by it or in `durable`."""

    def __init__(self, fault: Callable[[str, Path], None], durable: set[Path]) -> None:
        def step(operation: str, path: Path) -> None:
            fault(operation, path)
            if operation == "rename":  # what is renamed has been synced before
                durable.add(path)
            elif operation in ("write", "remove"):
                durable.discard(path)

        super().__init__(step)
        self._durable = durable

    def lose_unsynced(self, directory: Path, chance: random.Random) -> None:
        """What was not synced is cut somewhere, filled with zeros there, or gone."""
        for path in sorted(directory.rglob("*")):
            if not path.is_file() or path in self._durable:
                continue
            size = path.stat().st_size
            fate = chance.randrange(3)
            if fate == 0:
                path.unlink()
                continue
            kept = path.read_bytes()[: chance.randrange(size + 1)]
            path.write_bytes(kept if fate == 1 else kept.ljust(size, b"\0"))


class InlineExecutor(Executor):
    """Runs what it is given at once, in the caller's thread: the same order every time."""

    def __init__(self, *_: object, **__: object) -> None:
        """Takes what others take: how many threads, and their names."""

    def submit(
        self, function: Callable[_Given, _Result], /, *args: _Given.args, **kwargs: _Given.kwargs
    ) -> Future[_Result]:
        future: Future[_Result] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future
