"""Which services do not answer: said to somebody who waits, and asked before an answer is given up.

All are asked at once, so that this takes as long as the slowest may take and no longer.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from excimer.base.errors import ExcimerError, NotFoundError, RetryableError
from excimer.cli.installation import Installation, Part, Process
from excimer.cli.local_processes import find_process, probe
from excimer.cli.part_state import ask_part
from excimer.cli.session import Session, current_session

PROBE_LIMIT_S: Final = 1.0
PATIENCE_S: Final = 0.5
"""How long an answer that is only wanted is waited for before its service is asked whether it lives."""

EARLY_WORD_S: Final = 3.0
"""After which somebody who waits hears for what."""
AGAIN_S: Final = 1.0
WORDLESS_S: Final = 10.0
"""A process that has not said anything of itself is mentioned only after this: it may just be slow."""


class Asked(NamedTuple):
    """The answer that was wanted, or why there is none."""

    answer: Any
    problem: str | None


def ask_service(installation: Installation, part_name: str, call: Callable[[], Any]) -> Asked:
    """What `call` answers, as long as the service that it needs answers at all; else why there is nothing.

    Waits at most `PATIENCE_S` and `PROBE_LIMIT_S` for a service that does not. Other errors than of services
    that are away are raised.
    """
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcomes.put(call())
        except (ExcimerError, OSError) as error:
            outcomes.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        try:
            outcome = outcomes.get(timeout=PATIENCE_S)
        except queue.Empty:
            silent = silent_services(installation, [part_name])
            if silent:
                return Asked(None, silent[0])
            continue
        if isinstance(outcome, RetryableError | NotFoundError):
            silent = silent_services(installation, [part_name])
            return Asked(None, silent[0] if silent else str(outcome))
        if isinstance(outcome, Exception):
            raise outcome
        return Asked(outcome, None)


def silent_services(installation: Installation, names: Sequence[str] | None = None) -> list[str]:
    """A sentence for each service that does not run or does not answer; of all, or of those named."""
    parts = [part for part in installation.service_parts() if names is None or part.name in names]
    said = at_once(lambda part: _silence_of(installation, part), parts)
    return [sentence for sentence in said if sentence is not None]


def _silence_of(installation: Installation, part: Part) -> str | None:
    process = find_process(installation, part.name, part.lock_dir)
    if process is None:
        return f"{part.name} does not run"
    if probe(part.http_address, process.pid, PROBE_LIMIT_S):
        return None
    return f"{part.name} (process {process.pid}) does not answer"


def at_once(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """``map`` by as many threads as there are items. The first error is raised.

    Not by a pool: its threads keep a command from ending.
    """
    results: list[Any] = [None] * len(items)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = work(items[index])
        except (ExcimerError, OSError, ValueError) as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(items))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@contextlib.contextmanager
def early_word(installation: Installation, what: str) -> Iterator[None]:
    """While this takes long, says once which services keep `what` waiting; nothing if all of them answer."""

    def words() -> list[str]:
        silent = silent_services(installation)
        return [f"waiting for {what}: {', '.join(silent)}"] if silent else []

    with _speaking(words, current_session()):
        yield


@contextlib.contextmanager
def early_word_of(
    session: Session, installation: Installation, parts: Sequence[Part | Process]
) -> Iterator[None]:
    """While this takes long, says what those of the parts wait for that are not well yet."""
    begun = time.monotonic()

    def words() -> list[str]:
        has_had_time = time.monotonic() - begun > WORDLESS_S
        said = at_once(lambda part: _words_of(installation, part, has_had_time=has_had_time), parts)
        pairs = zip(parts, said, strict=True)
        return [f"{part.name} is not ready yet: {each}" for part, each in pairs if each is not None]

    with _speaking(words, session):
        yield


def _words_of(installation: Installation, part: Part | Process, *, has_had_time: bool) -> str | None:
    """None for a part that is well, for one that is gone, of which whoever waits will hear, and at first for
    one that has nothing to say.
    """
    process = find_process(installation, part.name, part.lock_dir)
    if process is None:
        return None
    state, words, _ = ask_part(installation, process, part.http_address)
    if state == "running":
        return None
    if words:
        return "; ".join(words)
    says_nothing = state in ("starting", "silent") and has_had_time
    return f"process {process.pid} has said nothing yet" if says_nothing else None


@contextlib.contextmanager
def _speaking(words: Callable[[], list[str]], session: Session | None) -> Iterator[None]:
    """After `EARLY_WORD_S`, and each second from then on, what has not been said before."""
    if session is None or session.as_json:
        yield
        return
    is_over = threading.Event()

    def speak() -> None:
        said: set[str] = set()
        wait_s = EARLY_WORD_S
        while not is_over.wait(wait_s):
            wait_s = AGAIN_S
            with contextlib.suppress(ExcimerError, OSError):
                new = [each for each in words() if each not in said]
                if not is_over.is_set():
                    said.update(new)
                    for sentence in new:
                        session.note(f"{sentence} …")

    threading.Thread(target=speak, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
