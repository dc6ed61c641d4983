"""Where a replica begins: reads the end of the branch's WAL back until it finds the place.

Not here: what makes a place good (`pgformat.standby_start`).
"""

from typing import Final, NamedTuple

from excimer.base.errors import RetryableError
from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, Lsn, format_lsn
from excimer.compute.wal_source import WalRemovedError, WalSource, open_stream
from excimer.pgformat.standby_start import StandbyStart, find_standby_start

WINDOWS_BYTES: Final = (256 << 10, 4 << 20, 64 << 20)
"""How much of the end of WAL is read; more only when the place is not in it."""


class NoStandbyStartError(RetryableError):
    """The branch's WAL does not say yet what transactions run."""


class ReplicaStart(NamedTuple):
    begin: StandbyStart
    end_lsn: Lsn
    """All that was committed when it was asked: the replica opens when it has replayed it."""


async def find_replica_start(source: WalSource, branch_start_lsn: Lsn, pg_version: int) -> ReplicaStart:
    """Raises `NoStandbyStartError`, and as `WalSource.connected` does."""
    best: ReplicaStart | None = None
    for window_bytes in WINDOWS_BYTES:
        async with source.connected() as sources:
            end_lsn = sources[0].end_lsn
            size = await sources[0].client.show("wal_segment_size")
            segment_size_bytes = int(size.removesuffix("MB")) << 20
            page_lsn = end_lsn - window_bytes
            begin_lsn = Lsn(max(page_lsn - page_lsn % WAL_PAGE_SIZE_BYTES, branch_start_lsn))
            if begin_lsn >= end_lsn:
                break
            try:
                _, stream = await open_stream(sources, begin_lsn)
            except WalRemovedError:
                break
            wal = bytearray()
            while len(wal) < end_lsn - begin_lsn:
                wal += (await stream.next_chunk()).data
        is_all = begin_lsn == branch_start_lsn
        found = find_standby_start(
            bytes(wal[: end_lsn - begin_lsn]), begin_lsn, pg_version, segment_size_bytes, is_record_end=is_all
        )
        if found is not None:
            best = ReplicaStart(found, end_lsn)
            if found.is_sure:
                return best
        if is_all:
            break
    if best is None:
        raise NoStandbyStartError(
            f"the branch's WAL up to {format_lsn(end_lsn)} does not say which transactions run: "
            "its primary must have run, and says so within 15 s of its last change"
        )
    return best
