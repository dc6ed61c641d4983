"""A safekeeper's disk that forgets what was not synced: WAL bytes and one control file.

Not here: the truncation of leftovers after a crash; the acceptor must ask for it.
"""

import random

from excimer.consensus.acceptor import AcceptorState

SECTOR_SIZE_BYTES = 8


class SimulatedDisk:
    def __init__(self, state: AcceptorState, wal: bytes) -> None:
        self.control = state
        self.durable = bytearray(wal)
        """What a crash leaves."""
        self.live = bytearray(wal)
        """What a read sees."""
        self.unsynced: list[tuple[int, bytes]] = []
        self.start_lsn = 0
        """Below, bytes are of no meaning: WAL was discarded."""
        self.durable_lsn = 0
        """What the control file says of object storage."""

    def discard(self, lsn: int) -> None:
        """Whoever takes what is below for WAL will be found out."""
        self.start_lsn = lsn
        self.unsynced.clear()
        self.durable = bytearray(b"\xee" * lsn)
        self.live = bytearray(self.durable)

    def write(self, lsn: int, wal: bytes) -> None:
        _put(self.live, lsn, wal)
        self.unsynced.append((lsn, wal))

    def sync(self, write_count: int) -> None:
        """Makes the oldest `write_count` unsynced writes durable."""
        for lsn, wal in self.unsynced[:write_count]:
            _put(self.durable, lsn, wal)
        del self.unsynced[:write_count]

    def truncate(self, lsn: int) -> None:
        self.sync(len(self.unsynced))
        del self.durable[lsn:]
        del self.live[lsn:]

    def crash(self, chance: random.Random) -> None:
        """Each unsynced write is lost, kept, or torn: some of its sectors are kept, in no order."""
        for lsn, wal in self.unsynced:
            fate = chance.randrange(3)
            if fate == 0:
                continue
            for start in range(0, len(wal), SECTOR_SIZE_BYTES):
                if fate == 1 or chance.random() < 0.5:
                    _put(self.durable, lsn + start, wal[start : start + SECTOR_SIZE_BYTES])
        self.unsynced.clear()
        self.live = bytearray(self.durable)


def _put(buffer: bytearray, lsn: int, wal: bytes) -> None:
    if len(buffer) < lsn:
        buffer.extend(bytes(lsn - len(buffer)))
    buffer[lsn : lsn + len(wal)] = wal
