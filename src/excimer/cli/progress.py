"""How far a long command is: one line on a terminal's standard error, several times a second."""

import sys
import time
from typing import Final

from excimer.cli.session import Session

PROGRESS_INTERVAL_S: Final = 0.2


class Progress:
    """Bytes done of all, while a command works."""

    def __init__(self, session: Session) -> None:
        self._is_shown = sys.stderr.isatty() and not session.as_json
        self._begun = time.monotonic()
        self._next = 0.0

    def report(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if not self._is_shown or now < self._next:
            return
        self._next = now + PROGRESS_INTERVAL_S
        percent = 100 * done_bytes // max(total_bytes, 1)
        speed = (done_bytes >> 20) / max(now - self._begun, 0.001)
        print(
            f"\r{percent:3d} %  {done_bytes >> 20} of {total_bytes >> 20} MiB, {speed:.0f} MiB/s ",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        if self._is_shown and self._next:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
