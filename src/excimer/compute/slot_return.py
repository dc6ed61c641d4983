"""An attempt's dealings with replication slots: brings back those that were kept last, and has them watched.

Not here: keeping them (`slot_keeper`), fetching and laying their WAL (`slot_wal`).
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Never

from excimer.base.address import parse_address
from excimer.base.lsn import Lsn
from excimer.compute.proposer import PostgresAddress, Proposer
from excimer.compute.slot_keeper import SlotKeeper
from excimer.compute.slot_wal import Range, SlotWal, fetch_slot_wal
from excimer.compute.slot_watch import HeldWal, SlotWatch, drop_unused, held_wal
from excimer.compute.spec import ComputeSpec
from excimer.compute.state_resumption import Resumption
from excimer.compute.wal_source import WalSource
from excimer.pgformat.basebackup import Basebackup
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.kept_slots import KeptSlots
from excimer.pgformat.replication_slot import unpack_slot
from excimer.wire.endpoint_tokens import EndpointTokens


class SlotReturn:
    """Of one manager."""

    def __init__(self, keeper: SlotKeeper, watch: SlotWatch) -> None:
        self.keeper = keeper
        self.watch = watch

    async def fetch(
        self,
        spec: ComputeSpec,
        kept: KeptSlots,
        backup: Basebackup,
        resumption: Resumption | None,
        tokens: Callable[[], EndpointTokens],
    ) -> SlotWal:
        """The slots that were taken over, for a directory that begins where `backup` does.

        Those whose WAL is gone are given up, and told. Raises as `SlotKeeper.give_up` and `fetch_slot_wal`.
        """
        source = WalSource(
            spec.tenant_id,
            spec.timeline_id,
            [parse_address(address) for address in spec.wal_sources],
            lambda: tokens().read_wal or "",
            f"excimer endpoint {spec.endpoint_name}",
        )
        lsn = Lsn(backup.lsn)
        own = Range(lsn if resumption is None else resumption.wal_lsn, lsn)
        control = ControlFile.unpack(backup.control_file, backup.pg_version)
        slots = await fetch_slot_wal(source, kept, own, spec.places.run_dir, control)
        if slots.lost:
            await self.keeper.give_up(slots.lost)
            self.watch.tell_lost([unpack_slot(slot.state, backup.pg_version).name for slot in slots.lost])
        return slots

    def watching(
        self, spec: ComputeSpec, proposer: Proposer, address: PostgresAddress
    ) -> Callable[[], Awaitable[Never]]:
        """What they hold, for as long as this PostgreSQL lives."""

        def look() -> list[HeldWal]:
            return held_wal(spec.places.data_dir, spec.build.version, proposer.received_lsn)

        return partial(self.watch.run, look, partial(drop_unused, address))
