"""Who is who among the processes of an installation.

A pid alone may belong to somebody else after a restart of the machine, so `run/PART.pid` also holds the
process's start time and the boot's id. Whoever was killed between starting a process and recording it has
left no record; then the process's own instance lock leads to it.
"""

import fcntl
import os
from pathlib import Path
from typing import Final

import msgspec

from excimer.io.private_files import write_private
from excimer.service.instance_lock import LOCK_FILE_NAME

_START_TIME: Final = 19
"""Index of a process's start time among the fields of /proc/PID/stat after the program's name."""


class ProcessRecord(msgspec.Struct, frozen=True):
    """Identifies one process on one boot of the machine."""

    pid: int
    start_ticks: int
    boot_id: str

    def is_alive(self) -> bool:
        return self.boot_id == boot_id() and start_ticks(self.pid) == self.start_ticks


def find_process(run_dir: Path, part: str, lock_dir: Path) -> ProcessRecord | None:
    """The running process of a part, from its record or else from its instance lock."""
    record = read_record(record_path(run_dir, part))
    if record is not None and record.is_alive():
        return record
    return _find_by_lock(lock_dir, settings_path(run_dir, part))


def settings_path(run_dir: Path, part: str) -> Path:
    return run_dir / f"{part}.toml"


def record_path(run_dir: Path, part: str) -> Path:
    return run_dir / f"{part}.pid"


def write_record(run_dir: Path, part: str, pid: int) -> ProcessRecord | None:
    """Records a process that we have just started; None if it is over already. Raises OSError."""
    ticks = start_ticks(pid)
    if ticks is None:
        return None
    record = ProcessRecord(pid, ticks, boot_id())
    write_private(record_path(run_dir, part), msgspec.json.encode(record))
    return record


def read_record(path: Path) -> ProcessRecord | None:
    """None if there is none, or a damaged one: the instance lock knows too."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ProcessRecord)
    except (OSError, msgspec.DecodeError):
        return None


def start_ticks(pid: int) -> int | None:
    """When the process started, in ticks since boot; None if there is no such process or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[_START_TIME])


def is_halted(pid: int) -> bool:
    """Whether somebody has stopped the process (SIGSTOP)."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _find_by_lock(lock_dir: Path, settings: Path) -> ProcessRecord | None:
    try:
        with open(lock_dir / LOCK_FILE_NAME) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = int(file.read())
            else:
                return None
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    ticks = start_ticks(pid)
    if ticks is None or os.fsencode(settings) not in arguments:
        return None
    return ProcessRecord(pid, ticks, boot_id())
