from excimer.base.lsn import Lsn

class WalScanner:
    last_record_start: Lsn
    last_record_end: Lsn
    record_count: int
    def __init__(
        self,
        start_lsn: int,
        pg_version: int,
        segment_size_bytes: int = ...,
        *,
        previous_lsn: int = 0,
        check_crc: bool = True,
        keep_records: bool = False,
    ) -> None: ...
    @property
    def position(self) -> Lsn: ...
    @property
    def held_size_bytes(self) -> int: ...
    def feed(self, chunk: bytes) -> None: ...
