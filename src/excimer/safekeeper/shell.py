"""A safekeeper process: ports, timelines, what it tells the broker, and an orderly end.

Proposer connections are threads, everything else runs on the event loop; the two meet in
`SafekeeperTimeline`, under its lock, and in `CommitWatch`.

Not here: quorum commit (`consensus`), how WAL is stored (`wal_storage`).
"""

import asyncio
import contextlib
import sys

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from excimer import __version__
from excimer.base.clock import Clock
from excimer.base.errors import RefusedError
from excimer.base.ids import TimelineId
from excimer.base.lsn import Lsn
from excimer.safekeeper.disk import Disk
from excimer.safekeeper.endpoints.management import management_router
from excimer.safekeeper.endpoints.proposer_port import ProposerPort
from excimer.safekeeper.endpoints.replication_port import ReplicationPort
from excimer.safekeeper.metrics import SafekeeperMetrics
from excimer.safekeeper.registry import TimelineRegistry
from excimer.safekeeper.settings import SafekeeperSettings
from excimer.safekeeper.timeline import SafekeeperTimeline
from excimer.safekeeper.timeline_door import TimelineDoor
from excimer.safekeeper.wal_remover import WalRemover
from excimer.service.announcements import Announcements
from excimer.service.broker_client import BrokerClient
from excimer.service.disk_watch import DiskWatch
from excimer.service.health import Health
from excimer.service.http import create_app, serving_http
from excimer.service.instance_lock import InstanceLock
from excimer.service.listen import bind_listen, bound_address
from excimer.service.logs import get_logger
from excimer.service.made_ahead import MadeAhead
from excimer.service.metrics import add_disks, new_registry
from excimer.service.tasks import SystemClock, TaskScope
from excimer.wire.auth import TokenVerifier
from excimer.wire.broker import ALIVE_INTERVAL_S, SafekeeperTimelineStatus
from excimer.wire.safekeeping import Term

LOOK_INTERVAL_S = 0.1
CHANGE_INTERVAL_S = 0.5
"""A changed commit LSN is told to the broker this long after the last telling. It names a source of WAL,
nothing waits for it, and each telling costs five processes CPU that commits could use."""
PERSIST_INTERVAL_S = 1.0
_SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep the interpreter while another waits: 5 ms by default, too long for a commit."""

log = get_logger(__name__)


class KeyMissingError(RefusedError):
    """The public key of the installation cannot be read."""


async def serve_safekeeper(settings: SafekeeperSettings) -> None:
    """The safekeeper's life, until cancelled. Raises `AlreadyRunningError`, `ListenError`."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    clock = SystemClock()
    with InstanceLock(settings.data_dir, f"safekeeper {settings.id}"), contextlib.ExitStack() as closing:
        verifier = _load_verifier(settings)
        proposer_socket = closing.enter_context(bind_listen(settings.proposer_listen, "proposer_listen"))
        reader_socket = closing.enter_context(bind_listen(settings.replication_listen, "replication_listen"))
        metrics_registry, metrics = make_metrics()
        timelines = TimelineRegistry(settings.data_dir, settings.id, metrics, Disk())
        closing.callback(timelines.close)
        timelines.open_all()
        door = TimelineDoor(timelines, verifier, clock)
        proposers = ProposerPort(proposer_socket, door, metrics)
        closing.callback(proposers.close)
        readers = ReplicationPort(reader_socket, door, clock, metrics, tell_needs=proposers.tell_needs)
        health = Health("safekeeper")
        disk = DiskWatch(health, [settings.data_dir])
        add_disks(metrics_registry, disk)
        remover = WalRemover(timelines, settings, clock, metrics, health)
        app = make_app(timelines, remover, verifier, clock, health, metrics_registry)
        async with (
            BrokerClient(settings.broker_url, f"safekeeper-{settings.id}", clock) as broker,
            serving_http(app, settings.http_listen, "http_listen") as http_address,
            TaskScope() as scope,
        ):
            status = _StatusPublisher(
                settings, timelines, broker, clock, str(bound_address(reader_socket)), str(http_address)
            )
            scope.start("proposers", proposers.serve())
            scope.supervise("disk", disk.run)
            scope.start("readers", readers.serve())
            scope.supervise("broker statuses", status.run)
            scope.supervise("commit LSNs", lambda: _persist_commits(timelines))
            scope.supervise("removal of WAL", remover.run)
            health.ready = True
            for (_, timeline_id), problem in timelines.damaged.items():
                health.report(f"timeline {timeline_id}", problem)
            log.info(
                "safekeeper ready",
                timelines=len(timelines.all()),
                proposers=str(bound_address(proposer_socket)),
                readers=str(bound_address(reader_socket)),
            )
            await asyncio.Event().wait()


@MadeAhead
def make_metrics() -> tuple[CollectorRegistry, SafekeeperMetrics]:
    registry = new_registry("safekeeper", __version__)
    return registry, SafekeeperMetrics(registry)


@MadeAhead
def make_app(
    timelines: TimelineRegistry,
    remover: WalRemover,
    verifier: TokenVerifier,
    clock: Clock,
    health: Health,
    registry: CollectorRegistry,
) -> FastAPI:
    """The whole management API, with what each route asks of a token."""
    app = create_app("Excimer safekeeper", __version__, health, registry, verifier=verifier)
    app.include_router(management_router(timelines, remover, verifier, clock))
    return app


def _load_verifier(settings: SafekeeperSettings) -> TokenVerifier:
    try:
        return TokenVerifier(settings.auth_public_key_path.read_bytes())
    except OSError as error:
        raise KeyMissingError(f"cannot read {settings.auth_public_key_path}: {error.strerror}") from error


async def _persist_commits(timelines: TimelineRegistry) -> None:
    """Keeps commit LSNs on disk at most a second old, so that a restart can serve readers at once."""
    while True:
        await asyncio.sleep(PERSIST_INTERVAL_S)
        for timeline in timelines.all():
            if timeline.has_lsns_to_persist:
                await asyncio.to_thread(timeline.persist_lsns)


class _StatusPublisher:
    """Tells the broker of each timeline: soon after a change, then ever more rarely; and that we live."""

    def __init__(
        self,
        settings: SafekeeperSettings,
        timelines: TimelineRegistry,
        broker: BrokerClient,
        clock: Clock,
        replication_address: str,
        http_address: str,
    ) -> None:
        self._settings = settings
        self._timelines = timelines
        self._broker = broker
        self._clock = clock
        self._replication_address = replication_address
        self._http_address = http_address
        self._announcements: Announcements[TimelineId] = Announcements(CHANGE_INTERVAL_S)
        self._known: dict[TimelineId, tuple[int, Lsn, Lsn, Lsn]] = {}

    async def run(self) -> None:
        await self._broker.answer_asking(lambda: self._announcements.tell_all(self._clock.monotonic()))
        alive_told = -ALIVE_INTERVAL_S
        while True:
            now = self._clock.monotonic()
            if now - alive_told >= ALIVE_INTERVAL_S:
                alive_told = now
                await self._broker.tell_alive(self._settings.id)
            timelines = {timeline.identity.timeline_id: timeline for timeline in self._timelines.all()}
            self._notice_changes(timelines, now)
            for timeline_id in self._announcements.due(now):
                await self._broker.publish(self._status_of(timelines[timeline_id]))
            await asyncio.sleep(LOOK_INTERVAL_S)

    def _notice_changes(self, timelines: dict[TimelineId, SafekeeperTimeline], now: float) -> None:
        for timeline_id, timeline in timelines.items():
            state = timeline.term, timeline.flush_lsn, timeline.commit_lsn, timeline.durable_lsn
            if self._known.get(timeline_id) != state:
                self._known[timeline_id] = state
                self._announcements.changed(timeline_id, now)
        for timeline_id in self._known.keys() - timelines.keys():
            del self._known[timeline_id]
            self._announcements.forget(timeline_id)

    def _status_of(self, timeline: SafekeeperTimeline) -> SafekeeperTimelineStatus:
        return SafekeeperTimelineStatus(
            safekeeper_id=self._settings.id,
            tenant_id=timeline.identity.tenant_id,
            timeline_id=timeline.identity.timeline_id,
            term=Term(timeline.term),
            flush_lsn=timeline.flush_lsn,
            commit_lsn=timeline.commit_lsn,
            replication_address=self._replication_address,
            http_address=self._http_address,
            durable_lsn=timeline.durable_lsn,
        )
