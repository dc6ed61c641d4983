"""The manager's own sessions in its PostgreSQL: as the bootstrap superuser, by the private socket.

What is asked and done in them is the same in each database; a cluster nearly always has one of two that a
session can be opened in.
"""

from collections.abc import Mapping
from typing import Final

from excimer.base.address import Address
from excimer.compute.proposer import PostgresAddress
from excimer.service.replication_client import ReplicationClient, connect_replication
from excimer.wire.pg_client import PostgresError, unlimited_session

_DATABASES: Final = ("postgres", "template1")
_NO_SUCH_DATABASE: Final = ("3D000", "55000")
"""It is not there, or takes no connections."""


async def connect_as_manager(
    address: PostgresAddress, application_name: str, parameters: Mapping[str, str]
) -> ReplicationClient:
    """Without time limits of roles and databases. Raises PostgresError, `ReplicationLostError`."""
    refused: PostgresError | None = None
    for database in _DATABASES:
        try:
            return await connect_replication(
                Address(address.socket_dir, address.port),
                user=address.user,
                application_name=application_name,
                parameters={**unlimited_session(address.pg_version), **parameters, "database": database},
            )
        except PostgresError as error:
            if error.sqlstate not in _NO_SUCH_DATABASE:
                raise
            refused = error
    assert refused is not None
    raise refused
