"""Asks a running PostgreSQL how far its WAL goes, and which transactions have ended for certain.

Eviction must know both (`csrc/libhydrate/eviction.h`). One short connection, as `server_look` has it.
"""

import asyncio
from typing import Final, NamedTuple

from excimer.base.errors import RetryableError
from excimer.base.lsn import Lsn, parse_lsn
from excimer.compute.proposer import PostgresAddress
from excimer.compute.server_look import HORIZON_NAME, connect_briefly

ASK_LIMIT_S: Final = 5.0

_QUESTION: Final = "SELECT pg_current_wal_insert_lsn(), pg_snapshot_xmin(pg_current_snapshot())"


class HorizonTimeoutError(RetryableError):
    """PostgreSQL did not answer in time."""


class WalHorizon(NamedTuple):
    end_lsn: Lsn
    """All records that were made before the question lie below."""
    oldest_xid: int
    """All transactions below have ended: 64 bits."""


async def ask_horizon(address: PostgresAddress) -> WalHorizon:
    """Raises `HorizonTimeoutError`, PostgresError, `ReplicationLostError`."""
    try:
        async with asyncio.timeout(ASK_LIMIT_S):
            client = await connect_briefly(address, HORIZON_NAME)
            try:
                rows = await client.query(_QUESTION)
            finally:
                client.close()
    except TimeoutError as error:
        raise HorizonTimeoutError(f"PostgreSQL did not answer within {ASK_LIMIT_S:g} s") from error
    lsn, xid = rows[0]
    assert lsn is not None
    assert xid is not None
    return WalHorizon(parse_lsn(lsn.decode()), int(xid))
