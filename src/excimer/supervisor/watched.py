"""One part that the supervisor watches: what it is, and how it has fared."""

import time
from dataclasses import dataclass, field

from excimer.service.process_records import ProcessRecord
from excimer.supervisor.protocol import StartPart, WatchedPart


@dataclass(slots=True)
class Watched:
    start: StartPart
    """How a person has started it last, which is how it is started again."""
    record: ProcessRecord | None
    """None: it does not run, or was over before it could be recorded."""
    is_adopted: bool = False
    """It was started by another supervisor: it is not our child."""
    pid: int | None = None
    started_at: float = field(default_factory=time.monotonic)
    restarts: int = 0
    failures: int = 0
    restart_at: float | None = None
    """When it is to be started again; None while it runs, or when it is not."""
    ended_at: float | None = None
    last_end: str = ""
    last_exit_code: int | None = None

    def __post_init__(self) -> None:
        if self.record is not None:
            self.pid = self.record.pid

    def launched(self, pid: int, now: float) -> None:
        self.pid, self.record, self.started_at = pid, None, now
        self.restart_at, self.ended_at, self.is_adopted = None, None, False

    def adopted(self, record: ProcessRecord) -> None:
        self.pid, self.record, self.restart_at, self.is_adopted = record.pid, record, None, True
        self.ended_at = None

    def ended(self, how: str, code: int | None, now: float) -> None:
        self.pid, self.record, self.is_adopted = None, None, False
        self.last_end, self.last_exit_code, self.ended_at = how, code, now

    def state(self) -> WatchedPart:
        return WatchedPart(
            pid=self.pid,
            restarts=self.restarts,
            last_end=self.last_end,
            last_exit_code=self.last_exit_code,
            is_awaited=self.restart_at is not None,
        )
