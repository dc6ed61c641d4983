"""All timelines of a safekeeper: found on disk at start, created, looked up, deleted.

::

    data_dir/LOCK
    data_dir/TENANT/TIMELINE/control
    data_dir/TENANT/TIMELINE/000000010000000000000001 ...
    data_dir/TENANT/TIMELINE.new            being created: removed at start
    data_dir/TENANT/TIMELINE.deleted        being deleted: removed at start

A timeline whose files are damaged is kept, and refused by name; the others are served.

Not here: HTTP, tokens.
"""

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from excimer.base.errors import ConflictError, CorruptionError, NotFoundError
from excimer.base.ids import (
    InvalidIdError,
    NodeId,
    TenantId,
    TimelineId,
    parse_tenant_id,
    parse_timeline_id,
)
from excimer.base.lsn import Lsn, format_lsn
from excimer.consensus.acceptor import AcceptorState
from excimer.safekeeper.control_file import ControlRecord
from excimer.safekeeper.disk import Disk
from excimer.safekeeper.metrics import SafekeeperMetrics
from excimer.safekeeper.timeline import SafekeeperTimeline, TimelineClosedError, TimelineDeletedError
from excimer.service.logs import get_logger
from excimer.wire.safekeeping import TimelineIdentity

log = get_logger(__name__)

TimelineKey = tuple[TenantId, TimelineId]

_PREPARERS_MAX = 2
_NEW_SUFFIX = ".new"
_DELETED_SUFFIX = ".deleted"


class TimelineNotFoundError(NotFoundError):
    """This safekeeper does not keep the timeline."""


class TimelineExistsError(ConflictError):
    """A timeline of that id exists with other properties."""


class TimelineRegistry:
    """Belongs to the event loop; `find` may be called from any thread."""

    def __init__(self, data_dir: Path, node_id: NodeId, metrics: SafekeeperMetrics, disk: Disk) -> None:
        self._data_dir = data_dir
        self._node_id = node_id
        self._metrics = metrics
        self._disk = disk
        self._preparer = ThreadPoolExecutor(_PREPARERS_MAX, thread_name_prefix="prepare-segment")
        self._timelines: dict[TimelineKey, SafekeeperTimeline] = {}
        self._damaged: dict[TimelineKey, str] = {}
        self._changing = asyncio.Lock()

    def open_all(self) -> None:
        """Opens what is on disk. Blocks; meant for the start. Raises OSError."""
        tenants = (each for each in self._data_dir.iterdir() if each.is_dir())
        for directory in sorted(each for tenant in tenants for each in tenant.iterdir()):
            if directory.name.endswith((_NEW_SUFFIX, _DELETED_SUFFIX)):
                shutil.rmtree(directory)
                continue
            try:
                key = parse_tenant_id(directory.parent.name), parse_timeline_id(directory.name)
            except InvalidIdError:
                continue
            try:
                self._timelines[key] = self._open(directory)
            except CorruptionError as error:
                log.error("timeline is damaged", timeline_id=key[1], error=error)
                self._damaged[key] = str(error)
        self._metrics.timelines.set(len(self._timelines))

    @property
    def damaged(self) -> dict[TimelineKey, str]:
        """Timelines that cannot be served, and why."""
        return self._damaged

    def all(self) -> list[SafekeeperTimeline]:
        return list(self._timelines.values())

    def find(self, tenant_id: TenantId, timeline_id: TimelineId) -> SafekeeperTimeline:
        """Raises `TimelineNotFoundError`, CorruptionError for a damaged one."""
        timeline = self._timelines.get((tenant_id, timeline_id))
        if timeline is not None:
            return timeline
        if (tenant_id, timeline_id) in self._damaged:
            raise CorruptionError(self._damaged[tenant_id, timeline_id])
        raise TimelineNotFoundError(
            f"safekeeper {self._node_id} does not keep timeline {timeline_id} of tenant {tenant_id}"
        )

    async def create(self, identity: TimelineIdentity, start_lsn: Lsn) -> SafekeeperTimeline:
        """Creates it durably, or returns the one that is there already with just these properties.

        Raises `TimelineExistsError`, OSError.
        """
        key = identity.tenant_id, identity.timeline_id
        async with self._changing:
            existing = self._timelines.get(key)
            if existing is not None:
                if existing.identity != identity or existing.start_lsn != start_lsn:
                    raise TimelineExistsError(
                        f"timeline {key[1]} exists with another start ({format_lsn(existing.start_lsn)}), "
                        "PostgreSQL version, system id or segment size"
                    )
                return existing
            directory = self._directory(key)
            record = ControlRecord.of(self._node_id, identity, start_lsn, AcceptorState.bootstrap(start_lsn))
            await asyncio.to_thread(SafekeeperTimeline.create, directory, record, self._disk)
            self._timelines[key] = self._open(directory)
            self._metrics.timelines.set(len(self._timelines))
            log.info("timeline created", tenant_id=key[0], timeline_id=key[1], start_lsn=start_lsn)
            return self._timelines[key]

    async def delete(self, tenant_id: TenantId, timeline_id: TimelineId) -> None:
        """Removes it with its WAL; connections to it end. Absent ones are no error. Raises OSError."""
        key = tenant_id, timeline_id
        async with self._changing:
            timeline = self._timelines.pop(key, None)
            self._damaged.pop(key, None)
            self._metrics.timelines.set(len(self._timelines))
            directory = self._directory(key)
            if timeline is not None:
                timeline.close(TimelineDeletedError(f"timeline {timeline_id} was deleted"))
            if directory.exists():
                await asyncio.to_thread(self._remove, directory)
                log.info("timeline deleted", tenant_id=tenant_id, timeline_id=timeline_id)

    def close(self) -> None:
        """Ends all timelines, saving their commit LSNs. Blocks for the disk."""
        for timeline in self._timelines.values():
            timeline.close(TimelineClosedError("the safekeeper is stopping"))
        self._preparer.shutdown()

    def _open(self, directory: Path) -> SafekeeperTimeline:
        return SafekeeperTimeline(directory, disk=self._disk, preparer=self._preparer, metrics=self._metrics)

    def _remove(self, directory: Path) -> None:
        doomed = directory.with_name(directory.name + _DELETED_SUFFIX)
        directory.rename(doomed)
        self._disk.sync_directory(directory.parent)
        shutil.rmtree(doomed)

    def _directory(self, key: TimelineKey) -> Path:
        return self._data_dir / key[0] / key[1]
