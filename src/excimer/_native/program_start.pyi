def start(
    path: bytes,
    arguments: list[bytes],
    environment: list[bytes],
    directory: bytes,
    streams: tuple[int, int, int],
    user: tuple[int, int, tuple[int, ...]] | None,
    death_signal: int,
) -> int: ...
