"""The manager's session in a PostgreSQL that has just started, before clients are let in.

Past the door at which clients wait (`admission`). Its commits wait for the quorum, whatever the settings of
roles and databases say.
"""

from typing import Final

from excimer.compute.admission import OWN_NAMES
from excimer.compute.manager_session import connect_as_manager
from excimer.compute.proposer import PostgresAddress
from excimer.service.replication_client import ReplicationClient

_NAME: Final = f"{OWN_NAMES}branch_start"
_OPTIONS: Final = "-c synchronous_commit=on -c default_transaction_read_only=off"


async def connect_at_start(address: PostgresAddress) -> ReplicationClient:
    """Raises PostgresError, `ReplicationLostError`."""
    return await connect_as_manager(address, _NAME, {"replication": "database", "options": _OPTIONS})


async def leave_start_lsn(address: PostgresAddress) -> None:
    """Returns when a majority of safekeepers has WAL beyond the LSN of the start.

    What was saved there then counts no more (RFC 7). A restore point alone would not be waited for, nor would
    a transaction that has written nothing. Raises PostgresError, `ReplicationLostError`.
    """
    client = await connect_at_start(address)
    try:
        await client.query(
            "SELECT pg_catalog.pg_current_xact_id(), pg_catalog.pg_create_restore_point('excimer_start')"
        )
    finally:
        client.close()
