"""The manager's session in a PostgreSQL that has just started, before clients are let in.

As the bootstrap superuser, by the private socket, past the door at which clients wait (`admission`). Its
commits wait for the quorum, whatever the settings of roles and databases say.
"""

from typing import Final

from excimer.base.address import Address
from excimer.compute.admission import OWN_NAMES
from excimer.compute.proposer import PostgresAddress
from excimer.service.replication_client import ReplicationClient, connect_replication
from excimer.wire.pg_client import PostgresError, unlimited_session

DATABASES: Final = ("postgres", "template1")
"""What is asked and done here is the same in each database; a cluster nearly always has both of these."""

_NAME: Final = f"{OWN_NAMES}branch_start"
_OPTIONS: Final = "-c synchronous_commit=on -c default_transaction_read_only=off"
_NO_SUCH_DATABASE: Final = ("3D000", "55000")


async def connect_at_start(address: PostgresAddress) -> ReplicationClient:
    """Raises PostgresError, `ReplicationLostError`."""
    refused: PostgresError | None = None
    for database in DATABASES:
        try:
            return await connect_replication(
                Address(address.socket_dir, address.port),
                user=address.user,
                application_name=_NAME,
                parameters={
                    **unlimited_session(address.pg_version),
                    "replication": "database",
                    "database": database,
                    "options": _OPTIONS,
                },
            )
        except PostgresError as error:
            if not is_no_database(error):
                raise
            refused = error
    assert refused is not None
    raise refused


def is_no_database(error: PostgresError) -> bool:
    """Whether a connection failed because its database is not there, or takes none."""
    return error.sqlstate in _NO_SUCH_DATABASE


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
