"""The most recent WAL of a proposer, in memory: appended at the end, sliced by LSN, trimmed at the start.

::

        start_lsn                              end_lsn
          |======chunk======|===chunk===|==chunk==|
          ^ trimmed away below: a donor safekeeper has it

Not here: how much to keep and when to trim (`excimer.consensus.proposer` decides and says `TrimWindow`).
"""

from bisect import bisect_right
from collections import deque

from excimer.base.lsn import Lsn, format_lsn


class WalWindow:
    """Chunks are kept as they came; a slice that lies inside one chunk copies only itself."""

    def __init__(self, start_lsn: Lsn) -> None:
        self.start_lsn = start_lsn
        self.end_lsn = start_lsn
        self._chunks: deque[tuple[Lsn, bytes]] = deque()

    def append(self, wal: bytes) -> Lsn:
        """Adds WAL at `end_lsn` and returns the new end."""
        if wal:
            self._chunks.append((self.end_lsn, wal))
            self.end_lsn = Lsn(self.end_lsn + len(wal))
        return self.end_lsn

    def slice(self, start_lsn: Lsn, end_lsn: Lsn) -> bytes:
        """WAL [start_lsn, end_lsn). Raises IndexError when the window does not hold all of it."""
        if not self.start_lsn <= start_lsn <= end_lsn <= self.end_lsn:
            raise IndexError(
                f"WAL [{format_lsn(start_lsn)}, {format_lsn(end_lsn)}) is not within "
                f"[{format_lsn(self.start_lsn)}, {format_lsn(self.end_lsn)})"
            )
        if self._chunks and start_lsn >= self._chunks[-1][0]:  # as a rule: what has just come is sent
            chunk_lsn, wal = self._chunks[-1]
            return wal[start_lsn - chunk_lsn : end_lsn - chunk_lsn]
        parts = []
        index = max(0, bisect_right(self._chunks, start_lsn, key=lambda chunk: chunk[0]) - 1)
        while start_lsn < end_lsn:
            chunk_lsn, wal = self._chunks[index]
            part = wal[start_lsn - chunk_lsn : end_lsn - chunk_lsn]
            parts.append(part)
            start_lsn = Lsn(start_lsn + len(part))
            index += 1
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def trim(self, lsn: Lsn) -> None:
        """Forgets whole chunks below `lsn`; `start_lsn` becomes the first byte still held.

        So up to one chunk more than needed stays. Never trims beyond `end_lsn`.
        """
        while self._chunks and self._chunks[0][0] + len(self._chunks[0][1]) <= lsn:
            self._chunks.popleft()
        self.start_lsn = self._chunks[0][0] if self._chunks else self.end_lsn
