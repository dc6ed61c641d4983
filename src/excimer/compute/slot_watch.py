"""Watches how much WAL replication slots hold on the endpoint's disk: says it, and gives up who is forgotten.

::

    every few seconds   pg_replslot/NAME/state, the end of WAL      PostgreSQL is asked nothing
                           | more than half of the limit: a warning, which status and doctor show
                           '-> more than the limit: those without a consumer are dropped

PostgreSQL has a limit of its own (max_slot_wal_keep_size), which would give up the proposer's slot as well,
and with it all commits; so it is off, and pg_replication_slots says `reserved` whatever a slot holds. A slot
with a consumer is never dropped, however slow that is.

The files may say less than PostgreSQL knows: a physical slot's is written at checkpoints. So what is dropped
is decided by PostgreSQL's own positions.

Not here: what becomes of slots when PostgreSQL ends (`state_collection`).
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple, Never

from excimer.base.errors import ExcimerError
from excimer.base.lsn import Lsn
from excimer.compute.proposer import PROPOSER_SLOT, PostgresAddress
from excimer.compute.start_session import connect_at_start
from excimer.pgformat.replication_slot import DamagedSlotError, unpack_slot
from excimer.service.health import Health
from excimer.service.logs import get_logger

LOOK_S: Final = 5.0
WARN_AT: Final = 0.5
"""Part of the limit from which on it is said."""
DROP_LIMIT_S: Final = 10.0
HOLDS: Final = "replication slot that holds WAL"
GIVEN_UP: Final = "replication slot that was given up"

log = get_logger(__name__)


class HeldWal(NamedTuple):
    slot: str
    size_bytes: int
    """From the oldest WAL that it needs to the end."""


LookAtSlots = Callable[[], list[HeldWal]]
"""Blocks."""
DropSlots = Callable[[int], Awaitable[list[HeldWal]]]
"""Drops those without a consumer that hold more bytes than so many, and says what that was."""


class SlotWatch:
    """Of one manager: what was given up is told for as long as it runs."""

    def __init__(self, health: Health, limit_bytes: int) -> None:
        """`limit_bytes` 0: slots may hold whatever the disk does."""
        self._health = health
        self._limit_bytes = limit_bytes

    async def run(self, held: LookAtSlots, drop: DropSlots) -> Never:
        """Of one life of PostgreSQL, until cancelled."""
        try:
            while True:
                await self.look(held, drop)
                await asyncio.sleep(LOOK_S)
        finally:
            self._health.warn(HOLDS, None)

    async def look(self, held: LookAtSlots, drop: DropSlots) -> None:
        slots = await asyncio.to_thread(held)
        self._health.warn(HOLDS, self._describe(slots))
        if not self._limit_bytes or all(each.size_bytes <= self._limit_bytes for each in slots):
            return
        try:
            async with asyncio.timeout(DROP_LIMIT_S):
                dropped = await drop(self._limit_bytes)
        except (ExcimerError, OSError, TimeoutError) as error:
            log.warning("slots that hold too much WAL are not dropped yet", error=error)
            return
        for slot, size_bytes in dropped:
            log.warning("a replication slot that nobody used is dropped", slot=slot, held_bytes=size_bytes)
        if dropped:
            names = ", ".join(f"{each.slot} ({each.size_bytes >> 20} MiB)" for each in dropped)
            reason = "nobody was connected, and it held more WAL than slot_wal_max_mib allows"
            told = f"gone: {names}: {reason}; its consumer needs a new slot and a new copy"
            self._health.warn(GIVEN_UP, told)

    def tell_lost(self, slots: list[str]) -> None:
        """Which could not be brought back at a start."""
        told = f"gone: {', '.join(slots)}: no safekeeper has the WAL that it needs any more"
        self._health.warn(GIVEN_UP, f"{told}; its consumer needs a new slot and a new copy")

    def _describe(self, slots: Iterable[HeldWal]) -> str | None:
        much = [each for each in slots if self._limit_bytes and each.size_bytes > self._limit_bytes * WARN_AT]
        if not much:
            return None
        slot, size_bytes = max(much, key=lambda each: each.size_bytes)
        others = f", and {len(much) - 1} more" if len(much) > 1 else ""
        return (
            f"{slot} ({size_bytes >> 20} MiB{others}): let its consumer go on, or drop it; beyond "
            f"{self._limit_bytes >> 20} MiB (slot_wal_max_mib) one that nobody is connected to is dropped"
        )


def held_wal(data_dir: Path, pg_version: int, end_lsn: Lsn) -> list[HeldWal]:
    """Of the slots of users, as their files say; nothing of one that needs none or cannot be read. Blocks."""
    found = []
    for path in data_dir.glob("pg_replslot/*/state"):
        with contextlib.suppress(OSError, DamagedSlotError):
            slot = unpack_slot(path.read_bytes(), pg_version)
            if slot.name != PROPOSER_SLOT and slot.restart_lsn and not slot.is_invalidated:
                found.append(HeldWal(slot.name, max(0, end_lsn - slot.restart_lsn)))
    return found


async def drop_unused(address: PostgresAddress, limit_bytes: int) -> list[HeldWal]:
    """Those without a consumer that hold more. Raises PostgresError, `ReplicationLostError`."""
    client = await connect_at_start(address)
    try:
        rows = await client.query(
            "SELECT slot_name, held::pg_catalog.int8, pg_catalog.pg_drop_replication_slot(slot_name) FROM ("
            "SELECT slot_name, active, "
            "pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), restart_lsn) AS held "
            f"FROM pg_catalog.pg_replication_slots WHERE slot_name <> '{PROPOSER_SLOT}') AS slots "
            f"WHERE NOT active AND held > {limit_bytes}"
        )
    finally:
        client.close()
    return [
        HeldWal(name.decode(), int(size)) for name, size, _ in rows if name is not None and size is not None
    ]
