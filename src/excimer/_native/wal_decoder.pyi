from excimer._native.change_set import ChangeSet
from excimer.base.lsn import Lsn
from excimer.pgformat.wal_record import WalRecord

DONE: int
SPECIAL: int
UNKNOWN_SIZES: int
LONG_RECORD: int
LONG_XACT_SIZE_BYTES: int

class WalDecoder:
    changes: ChangeSet
    applied_end: Lsn
    applied_start: Lsn
    def __init__(
        self,
        start_lsn: int,
        pg_version: int,
        segment_size_bytes: int,
        checkpoint_state: bytes,
        *,
        previous_lsn: int = 0,
        long_xact_size_bytes: int = ...,
    ) -> None: ...
    @property
    def position(self) -> Lsn: ...
    @property
    def special_record(self) -> WalRecord: ...
    @property
    def unknown_keys(self) -> list[bytes]: ...
    def feed(self, chunk: bytes) -> None: ...
    def run(self) -> int: ...
    def finish_special(self) -> None: ...
