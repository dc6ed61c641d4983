from collections.abc import Callable
from typing import Protocol

from excimer._native.accepted_wal import AcceptedWal
from excimer._native.channel import Channel
from excimer._native.native_lock import NativeLock
from excimer._native.wal_scanner import WalScanner
from excimer.base.lsn import Lsn

class CommitMark:
    commit_lsn: Lsn
    def __init__(self, commit_lsn: int) -> None: ...
    def wait_next(self) -> None: ...
    def advance(self, commit_lsn: int) -> bool: ...

class _Disk(Protocol):
    def pwrite(self, fd: int, data: bytes, offset: int) -> None: ...
    def fdatasync(self, fd: int) -> None: ...

class AppendPath:
    lock: NativeLock
    def __init__(
        self,
        mark: CommitMark,
        *,
        failed: Callable[[Exception], Exception],
        notify: Callable[[list[float], int, bool], None],
        disk: _Disk | None = None,
    ) -> None: ...
    def open(
        self,
        connection: int,
        accepted: AcceptedWal,
        scanner: WalScanner,
        *,
        fd: int,
        segment_start_lsn: int,
        end_lsn: int,
        commit_end_lsn: int,
    ) -> None: ...
    def close(self) -> None: ...
    def take_flushes(self) -> tuple[list[float], int]: ...
    @property
    def open_to(self) -> int | None: ...
    def serve(self, connection: int, channel: Channel, buffer: bytearray, size_bytes: int) -> int: ...
