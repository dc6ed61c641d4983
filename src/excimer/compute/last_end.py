"""Why an endpoint ended by itself: one line in its directory, until it is started again.

Not here: crashes of postgres, after which it starts afresh (`core`).
"""

from contextlib import suppress
from pathlib import Path

FILE_NAME = "ended"


def record_end(endpoint_dir: Path, reason: str) -> None:
    (endpoint_dir / FILE_NAME).write_text(reason.replace("\n", " ") + "\n")


def forget_end(endpoint_dir: Path) -> None:
    (endpoint_dir / FILE_NAME).unlink(missing_ok=True)


def read_end(endpoint_dir: Path) -> str | None:
    """None for an endpoint that runs, was stopped, or was never started."""
    with suppress(OSError):
        return (endpoint_dir / FILE_NAME).read_text().strip()
    return None
