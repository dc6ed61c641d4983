RECORDS_PER_KEY: int
SUITES: dict[int, tuple[int, str]]

def expand_label(secret: bytes, label: bytes, size: int, digest: str) -> bytes: ...

class TlsRecords:
    def __init__(
        self,
        suite: int,
        *,
        read_secret: bytes,
        write_secret: bytes,
        is_client: bool,
        record_size_max: int = ...,
        records_per_key: int = ...,
    ) -> None: ...
    def decrypt(self, data: bytes) -> bytes: ...
    def encrypt(self, data: bytes) -> bytes: ...
    def take_output(self) -> bytes: ...
    def shutdown(self) -> bytes: ...
