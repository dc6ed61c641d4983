"""What a replica has beside its PostgreSQL: where it begins, its WAL, and when it must begin anew.

::

    find_start --> hold the history from there on --> basebackup --> relay, postgres --> watch
                                                                                          |
    begin anew <-- the primary allows more than we --, somebody promoted it --, its WAL is gone

PostgreSQL itself only stops replaying when its primary gets more connections or the like than it has, and
goes on to show what is old. So its pg_control, in which replay notes what the primary has, is looked at. One
that somebody has promoted takes no more WAL, and its commits never return: it begins anew as well.

Not here: where WAL comes from (`wal_source`), the walreceiver's side (`wal_relay`).
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from excimer.base.address import parse_address
from excimer.base.errors import RefusedError
from excimer.base.lsn import Lsn, format_lsn
from excimer.compute.kept_directory import CONTROL_FILE_NAME
from excimer.compute.replica_start import ReplicaStart, find_replica_start
from excimer.compute.spec import ComputeSpec
from excimer.compute.wal_relay import LocalWal, WalRelay, socket_path
from excimer.compute.wal_source import WalSource
from excimer.pgformat.basebackup import Basebackup
from excimer.pgformat.checkpoint_state import ClusterSettings
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.standby_start import PrimaryLimits, limits_of, raised_limits
from excimer.service.logs import get_logger
from excimer.service.tasks import TaskScope

LOOK_S: Final = 1.0
STANDBY_SIGNAL: Final = "standby.signal"

log = get_logger(__name__)


class Progress(NamedTuple):
    """How far a replica is."""

    replayed_lsn: Lsn
    commit_lsn: Lsn
    lag_bytes: int


class Replica:
    """Of one attempt."""

    def __init__(self, spec: ComputeSpec, token: Callable[[], str | None]) -> None:
        """`token` gives the newest one that reads WAL."""
        self._spec = spec
        self._token = token
        self._source = WalSource(
            spec.tenant_id,
            spec.timeline_id,
            [parse_address(address) for address in spec.wal_sources],
            self._read_token,
            f"excimer replica {spec.endpoint_name}",
        )
        self._relay = WalRelay(self._source)
        self._start: ReplicaStart | None = None
        self._limits: PrimaryLimits = {}

    def _read_token(self) -> str:
        token = self._token()
        if token is None:
            raise RefusedError("a replica needs a token that reads WAL, and was given none")
        return token

    @property
    def progress(self) -> Progress | None:
        """None before it has said where it is."""
        relay = self._relay
        lag_bytes = relay.lag_bytes
        return None if lag_bytes is None else Progress(relay.replayed_lsn, relay.commit_lsn, lag_bytes)

    def facts(self) -> dict[str, str | int]:
        """For /healthz."""
        progress = self.progress
        if progress is None:
            return {}
        return {"replayed_lsn": format_lsn(progress.replayed_lsn), "lag_bytes": progress.lag_bytes}

    @property
    def needed_lsn(self) -> Lsn:
        """It reads no page as of an earlier LSN any more."""
        assert self._start is not None, "asked after find_start"
        return max(self._start.begin.lsn, self._relay.replayed_lsn)

    async def find_start(self) -> ReplicaStart:
        """Raises `NoStandbyStartError`, `NoWalSourceError`."""
        spec = self._spec
        self._start = await find_replica_start(self._source, spec.branch_start_lsn, spec.build.version)
        return self._start

    def begun(self, backup: Basebackup) -> ReplicaStart:
        """Where it begins, with `backup`; PostgreSQL gets the limits of that, raised to what WAL has told
        since."""
        assert self._start is not None, "called after find_start"
        control = ControlFile.unpack(backup.control_file, backup.pg_version)
        raised = raised_limits(control, self._start.begin.limits)
        self._limits = limits_of(ClusterSettings.from_control_file(raised))
        pg_wal = self._spec.places.data_dir / "pg_wal"
        self._relay.local = LocalWal(pg_wal, Lsn(backup.lsn), control.wal_segment_size)
        return self._start

    async def serve(self, scope: TaskScope) -> None:
        """From here on the walreceiver finds its WAL. Raises OSError."""
        await self._relay.start(scope, socket_path(self._spec.places.socket_dir))

    async def wait_outdated(self) -> str:
        """Until it must begin anew; why."""
        while True:
            if self._relay.gone.done():
                return str(self._relay.gone.result())
            reason = await asyncio.to_thread(self._why_outdated, self._spec.places.data_dir)
            if reason is not None:
                return reason
            await asyncio.sleep(LOOK_S)

    def _why_outdated(self, data_dir: Path) -> str | None:
        if not (data_dir / STANDBY_SIGNAL).exists():
            return "somebody has promoted it within PostgreSQL: what it writes is not kept"
        try:
            control = ControlFile.unpack(
                (data_dir / CONTROL_FILE_NAME).read_bytes(), self._spec.build.version
            )
        except (OSError, ValueError):  # it is being written
            return None
        asked = limits_of(ClusterSettings.from_control_file(control))
        more = [f"{name} = {value}" for name, value in asked.items() if value > self._limits.get(name, 0)]
        return f"its primary has {', '.join(more)} now" if more else None
