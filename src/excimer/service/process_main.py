"""The life of a service process: `python -m excimer.<service> SETTINGS.toml`.

::

    run_service("pageserver", PageserverSettings, serve)

reads the settings, sets up the log, runs `serve(settings)` until SIGTERM or SIGINT, which cancels
it; clean-up is in its `finally` blocks and contexts. A stop that takes longer than `stop_limit_s`, or as long
since it last got on (`moved_s`), ends the process hard, naming the tasks that did not come to an end.

Exit codes: 0 clean stop, 1 expected failure (one line on standard error), 2 wrong usage or
settings, 70 unexpected crash (with a traceback in the log).
"""

import asyncio
import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from excimer.base.errors import ExcimerError
from excimer.io.private_files import PRIVATE_UMASK
from excimer.io.processes import release_freed_memory
from excimer.io.program_pages import release_program_pages
from excimer.service.log_files import LogRotation
from excimer.service.logs import configure_logging, get_logger
from excimer.service.settings import Settings, SettingsError, load_settings
from excimer.service.tasks import failure_of, running
from excimer.service.tls import TlsFilesError, configure_tls

EXIT_CLEAN: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_CRASHED: Final = 70

STOP_LIMIT_S: Final = 5.0
SETTLED_S: Final = 15.0
"""After its start a service has done what it does once."""

S = TypeVar("S", bound=Settings)

log = get_logger(__name__)


class StopLimit(NamedTuple):
    seconds: float
    moved_s: Callable[[], float]
    """From when on they are counted, if that is after the stop's beginning."""


def run_service(
    service: str,
    settings_type: type[S],
    serve: Callable[[S], Coroutine[Any, Any, None]],
    *,
    arguments: list[str] | None = None,
    stop_limit_s: float = STOP_LIMIT_S,
    moved_s: Callable[[], float] = lambda: 0.0,
    make_loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
    is_single_threaded: bool = False,
) -> int:
    """Runs a service to its end and returns its exit code (for `sys.exit`).

    `moved_s`: when a stop last got on, by the monotonic clock. `is_single_threaded`: it forks, so no thread
    is made for it, and it keeps its log short by itself.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(f"usage: python -m excimer.{service} SETTINGS.toml", file=sys.stderr)
        return EXIT_USAGE
    try:
        settings = load_settings(Path(arguments[0]), settings_type)
    except SettingsError as error:
        print(f"excimer {service}: {error}", file=sys.stderr)
        return EXIT_USAGE
    node_id = getattr(settings, "id", None)
    configure_logging(service if node_id is None else f"{service}-{node_id}", settings.log_level)
    os.umask(PRIVATE_UMASK)
    open_files_as_allowed()
    try:
        configure_tls(settings.tls)
    except TlsFilesError as error:
        print(f"excimer {service}: {error}", file=sys.stderr)
        return EXIT_USAGE
    limit = StopLimit(stop_limit_s, moved_s)
    settle = running("settle", _settle(in_thread=not is_single_threaded))

    def run() -> None:
        with asyncio.Runner(loop_factory=make_loop) as runner:
            runner.run(_until_signal(service, serve(settings), limit, settle))

    with rotating_logs([settings.log_path] if settings.log_path and not is_single_threaded else []):
        failure = failure_of(run)
    if failure is None:
        return EXIT_CLEAN
    log.error(f"{service} failed: {failure}", kind=type(failure).__name__)
    return EXIT_FAILED if isinstance(failure, ExcimerError) else EXIT_CRASHED


def open_files_as_allowed() -> None:
    """Raises the soft limit of open files to the hard one: the soft one is for users of select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def rotating_logs(paths: Sequence[Path]) -> Iterator[None]:
    """Keeps log files that this process and its children write short, while the block runs."""
    if not paths:
        yield
        return
    rotation = LogRotation(
        paths, failed=lambda path, error: log.warning("log not rotated", path=str(path), error=error)
    )
    try:
        yield
    finally:
        rotation.stop()


async def _until_signal(
    service: str,
    serving: Awaitable[None],
    limit: StopLimit,
    beside: contextlib.AbstractAsyncContextManager[object],
) -> None:
    """Awaits `serving`; the first SIGTERM or SIGINT cancels it and starts the clock of the hard end."""
    task = asyncio.current_task()
    assert task is not None
    stopping = False

    def stop(name: str) -> None:
        nonlocal stopping
        if stopping:
            return
        stopping = True
        log.info(f"{service} stops", signal=name)
        arguments = service, limit, asyncio.get_running_loop()
        threading.Thread(target=_end_hard, args=arguments, daemon=True).start()
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number.name)
    try:
        async with beside:
            await serving
    except asyncio.CancelledError:
        if not stopping:
            raise
        task.uncancel()
    log.info(f"{service} stopped")


async def _settle(*, in_thread: bool) -> None:
    """Gives back what only the start needed, some MiB in each service, when it is likely to be over. It takes
    some milliseconds.
    """
    await asyncio.sleep(SETTLED_S)
    for release in release_program_pages, release_freed_memory:
        if in_thread:
            await asyncio.to_thread(release)
        else:
            release()


def _end_hard(service: str, limit: StopLimit, loop: asyncio.AbstractEventLoop) -> None:
    """When the time is over; in a thread of its own, because the loop or another thread may be what hangs."""
    begun_s = time.monotonic()
    while (left_s := max(begun_s, limit.moved_s()) + limit.seconds - time.monotonic()) > 0:
        time.sleep(left_s)
    pending = sorted(task.get_name() for task in asyncio.all_tasks(loop))
    log.error(f"{service} did not stop in time", limit_s=limit.seconds, tasks=pending)
    os._exit(EXIT_FAILED)
