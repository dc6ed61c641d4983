from collections.abc import Sequence
from mmap import mmap
from typing import Any

from excimer._native.led_wal import LedWal, MemberWal
from excimer._native.openssl import TlsConnection
from excimer._native.wal_scanner import WalScanner
from excimer.base.lsn import Lsn

class Link:
    def __init__(self, fd: int, member: MemberWal, tls: TlsConnection | None = None) -> None: ...
    def take_results(self) -> tuple[bool, bytes | None, bytes]: ...

class CommitPath:
    links: list[Link]
    server_end_lsn: Lsn
    confirmed_lsn: Lsn
    has_committed: bool
    is_failed: bool
    is_left: bool
    def __init__(
        self, led: LedWal[Any], scanner: WalScanner, links: Sequence[Link], *, source_fd: int, term: int
    ) -> None: ...
    def start(
        self,
        wal: bytes,
        *,
        server_end_lsn: Lsn,
        confirmed_lsn: Lsn,
        confirm_limit_lsn: Lsn,
        window_size_max: int,
        returns_at_commit: bool,
        arena: mmap | bytearray | None = None,
    ) -> None: ...
    def wait(self, epoll_fd: int, timeout_ms: int) -> list[tuple[int, int]]: ...
    def take_results(self) -> tuple[bytes, bytes, bytes]: ...
