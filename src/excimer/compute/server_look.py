"""Asks a running PostgreSQL who is there: one short connection, one statement, by the private socket.

Not over a connection that stays: that would be a process more, keep a database from being dropped or copied,
and hold one of the places that clients have. As the bootstrap superuser it may use those that
superuser_reserved_connections keeps free; if there is none left, clients have all the others.

The session is a moment long, so it holds no horizon back; it runs no login trigger, and is not counted as a
login (`admission`).
"""

import asyncio
from typing import Final

from excimer.base.errors import RetryableError
from excimer.compute.activity_sampler import ServerLook, ServerProcess
from excimer.compute.admission import OWN_NAMES
from excimer.compute.manager_session import connect_as_manager
from excimer.compute.postgres_settings import PROPOSER_NAME
from excimer.compute.proposer import PROPOSER_SLOT, PostgresAddress
from excimer.service.replication_client import ReplicationClient

LOOK_LIMIT_S: Final = 5.0
"""Clients may be held meanwhile: less than they wait (`csrc/endpoint/admission.c`)."""

_OLD_EVENT_TRIGGERS: Final = 16
"""Up to here there are no triggers at login, and no setting that switches event triggers off."""

HORIZON_NAME: Final = f"{OWN_NAMES}cache"
"""Of the moments in which the bounded cache asks (`wal_horizon`): nobody's use."""

_PROCESS: Final = b"process"
_QUESTION: Final = f"""
SELECT 'process', pid, backend_type,
       xact_start IS NOT NULL OR backend_xid IS NOT NULL OR backend_xmin IS NOT NULL,
       backend_type = 'walsender' AND (
           EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = '{PROPOSER_SLOT}' AND active_pid = pid)
           OR application_name = '{PROPOSER_NAME}' AND usesysid = 10 AND client_addr IS NULL)
FROM pg_stat_activity
WHERE pid <> pg_backend_pid()
AND NOT (application_name = '{HORIZON_NAME}' AND usesysid = 10 AND client_addr IS NULL)
UNION ALL
SELECT 'subscription', oid::int8, subname, NULL, NULL FROM pg_subscription
WHERE subenabled AND NOT pg_is_in_recovery()
"""


class LookTimeoutError(RetryableError):
    """PostgreSQL did not answer in time."""


async def look_at_server(address: PostgresAddress) -> ServerLook:
    """Raises `LookTimeoutError`, PostgresError, `ReplicationLostError`."""
    try:
        async with asyncio.timeout(LOOK_LIMIT_S):
            return _understood(await _ask(address))
    except TimeoutError as error:
        raise LookTimeoutError(f"PostgreSQL did not answer within {LOOK_LIMIT_S:g} s") from error


async def _ask(address: PostgresAddress) -> list[list[bytes | None]]:
    client = await connect_briefly(address, f"{OWN_NAMES}idle")
    try:
        return await client.query(_QUESTION)
    finally:
        client.close()


async def connect_briefly(address: PostgresAddress, application_name: str) -> ReplicationClient:
    """A session for one question, to be closed at once. Raises PostgresError, `ReplicationLostError`."""
    session = {"search_path": "pg_catalog", "log_statement": "none", "pg_stat_statements.track": "none"}
    session |= {"log_min_duration_statement": "-1", "max_parallel_workers_per_gather": "0", "jit": "off"}
    if address.pg_version > _OLD_EVENT_TRIGGERS:
        session["event_triggers"] = "off"
    return await connect_as_manager(address, application_name, {**session, "replication": "false"})


def _understood(rows: list[list[bytes | None]]) -> ServerLook:
    processes: dict[int, ServerProcess] = {}
    subscriptions = 0
    for what, number, name, is_in_transaction, is_ours in rows:
        if what != _PROCESS:
            subscriptions += 1
        elif number is not None:
            kind = (name or b"").decode(errors="replace")
            processes[int(number)] = ServerProcess(kind, is_in_transaction == b"t", is_ours == b"t")
    return ServerLook(processes, subscriptions)
