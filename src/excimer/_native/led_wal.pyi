from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from excimer.base.lsn import Lsn

class MemberWal:
    connected: bool
    adopted: bool
    flush_lsn: Lsn
    commit_lsn: Lsn
    sent_lsn: Lsn | None
    announced_commit_lsn: Lsn

M = TypeVar("M", bound=MemberWal)

class LedWal(Generic[M]):
    start_lsn: Lsn
    window_start_lsn: Lsn
    window_end_lsn: Lsn
    commit_lsn: Lsn
    horizon_lsn: Lsn
    boundaries: list[Lsn]
    members: list[M]
    chunk_size_bytes: int
    in_flight_size_bytes_max: int
    def __init__(
        self,
        members: Sequence[M],
        *,
        start_lsn: Lsn,
        chunk_size_bytes: int,
        in_flight_size_bytes_max: int,
        **rest: Any,
    ) -> None: ...
    @property
    def newest_boundary_lsn(self) -> Lsn: ...
    @property
    def window_size_bytes(self) -> int: ...
    def wal_appended(self, end_lsn: Lsn, last_record_end_lsn: Lsn) -> None: ...
    def answered(self, member: M, flush_lsn: Lsn, commit_lsn: Lsn) -> None: ...
    def majority_flush_lsn(self) -> Lsn: ...
    def advance_commit(self) -> bool: ...
    def next_append(self, member: M) -> tuple[Lsn, Lsn] | None: ...
