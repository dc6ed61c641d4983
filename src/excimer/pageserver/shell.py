"""The running pageserver: sockets, threads, the broker, and the tasks that join them; and its end.

Start: the data directory is locked, both ports are bound, then everything else begins, so that a second
instance or a taken port is found before anything is touched. Stop: ports close, computes are
disconnected, timelines stop, after a flush if that is quick; else what is only in memory comes again as
WAL from the safekeepers.

Not here: decisions. This module only connects parts.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fastapi import Depends, FastAPI
from prometheus_client import CollectorRegistry

from excimer import __version__
from excimer._native.native_apply import apply_native
from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.io.filesystem import LocalFilesystem
from excimer.io.object_store import ObjectStore
from excimer.io.object_store_probe import check_object_store
from excimer.io.obstore_object_store import ObstoreObjectStore
from excimer.pageserver.active_timeline import TimelineWorld
from excimer.pageserver.endpoints.history_api import make_history_router
from excimer.pageserver.endpoints.http_api import make_router
from excimer.pageserver.endpoints.import_api import is_import
from excimer.pageserver.endpoints.inspection_api import make_inspection_router
from excimer.pageserver.endpoints.page_connection import PageService
from excimer.pageserver.endpoints.retention_api import make_lease_router, make_retention_router
from excimer.pageserver.endpoints.slots_api import is_slots, make_slots_router
from excimer.pageserver.endpoints.state_api import is_state, make_state_routers
from excimer.pageserver.history_keeper import HistoryKeeper
from excimer.pageserver.metrics import EngineMetrics, PageServiceMetrics, RedoMetrics, TimelineMetrics
from excimer.pageserver.object_metrics import ObjectMetrics
from excimer.pageserver.redo_pools import RedoPools, check_confinement
from excimer.pageserver.settings import PageserverSettings
from excimer.pageserver.tenant_records import TenantRecords
from excimer.pageserver.tenants import Tenants
from excimer.pageserver.wal_access import WalAccessBook
from excimer.pageserver.wal_sources import TimelineSources
from excimer.service.announcements import Announcements
from excimer.service.broker_client import BrokerClient
from excimer.service.disk_watch import DiskWatch
from excimer.service.health import Health
from excimer.service.http import bearer_auth, create_app, serving_http
from excimer.service.instance_lock import InstanceLock
from excimer.service.listen import bind_listen, bound_address
from excimer.service.logs import get_logger
from excimer.service.made_ahead import MadeAhead
from excimer.service.metrics import add_disks, new_registry
from excimer.service.tasks import SystemClock, TaskScope, running
from excimer.storage.engine.context import MIB, StorageContext, StorageSettings
from excimer.storage.engine.local_disk import LocalDisk
from excimer.wire.auth import Right, TokenVerifier
from excimer.wire.broker import PageserverTimelineStatus

log = get_logger(__name__)

STORAGE_THREADS = 16
"""Reads; those that wait for object storage must leave some to those that need not."""
UPLOAD_THREADS = 8
INGEST_THREADS_MAX = 64
"""Timelines that can be ingesting at the same moment; more take turns."""
CHANGE_CHECK_S = 0.1


async def serve(settings: PageserverSettings) -> None:
    """Runs until cancelled. Raises `AlreadyRunningError`, `ListenError`, RefusedError for wrong settings and
    for an object store that cannot be trusted, `ObjectStoreError` when it cannot be reached.
    """
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(InstanceLock(settings.data_dir, "pageserver"))
        listening = bind_listen(settings.page_service_listen, "page service")
        stack.callback(listening.close)
        health = Health("pageserver")
        registry = make_registry()
        tenants, keeper, service = await stack.enter_async_context(_parts(settings, health, registry))
        app = make_app(tenants, keeper, service.verifier, health, registry)
        http = await stack.enter_async_context(serving_http(app, settings.http_listen, "pageserver API"))
        stack.callback(service.close_all)
        await stack.enter_async_context(running("page service", service.serve(listening)))
        health.ready = True
        log.info("pageserver serves", page_service=str(bound_address(listening)), http=str(http))
        await asyncio.Event().wait()


@MadeAhead
def make_registry() -> CollectorRegistry:
    return new_registry("pageserver", __version__)


@MadeAhead
def make_app(
    tenants: Tenants,
    keeper: HistoryKeeper,
    verifier: TokenVerifier,
    health: Health,
    registry: CollectorRegistry,
) -> FastAPI:
    """The whole management API, with what each route asks of a token."""
    app = create_app(
        "Excimer pageserver",
        __version__,
        health,
        registry,
        verifier=verifier,
        is_stream=lambda *route: is_import(*route) or is_state(*route) or is_slots(*route),
    )
    clock = SystemClock()
    may_manage = Depends(bearer_auth(verifier, clock, Right.MANAGE))
    routers = make_router(tenants), make_history_router(tenants), make_inspection_router(tenants)
    for router in (*routers, make_retention_router(keeper)):
        app.include_router(router, dependencies=[may_manage])
    app.include_router(make_lease_router(keeper, bearer_auth(verifier, clock)))
    may_write = bearer_auth(verifier, clock, Right.WRITE_WAL)
    for router in make_state_routers(tenants, may_write, bearer_auth(verifier, clock, Right.READ_PAGES)):
        app.include_router(router)
    app.include_router(make_slots_router(tenants, may_write))
    return app


@contextlib.asynccontextmanager
async def _parts(
    settings: PageserverSettings, health: Health, registry: CollectorRegistry
) -> AsyncIterator[tuple[Tenants, HistoryKeeper, PageService]]:
    async with contextlib.AsyncExitStack() as stack:
        storage_threads = ThreadPoolExecutor(STORAGE_THREADS, thread_name_prefix="storage")
        stack.callback(storage_threads.shutdown, wait=False, cancel_futures=True)
        upload_threads = ThreadPoolExecutor(UPLOAD_THREADS, thread_name_prefix="upload")
        stack.callback(upload_threads.shutdown, wait=False, cancel_futures=True)
        ingest_threads = ThreadPoolExecutor(INGEST_THREADS_MAX, thread_name_prefix="ingest")
        stack.callback(ingest_threads.shutdown, wait=False, cancel_futures=True)
        await asyncio.to_thread(check_confinement, health, must_confine=settings.redo_confinement_required)
        pools = RedoPools(
            settings.data_dir / "redo",
            settings.redo_workers,
            processes_max=settings.redo_processes_max,
            must_confine=settings.redo_confinement_required,
        )
        RedoMetrics(registry, pools.process_count, pools.recycled_count)
        stack.push_async_callback(pools.close)
        broker = await _broker(settings, stack)
        scope = await stack.enter_async_context(TaskScope())
        world = TimelineWorld(
            scope=scope,
            executor=ingest_threads,
            clock=SystemClock(),
            health=health,
            metrics=TimelineMetrics(registry),
            sources=partial(_sources, settings, _access_book(settings, health), broker),
        )
        store = ObstoreObjectStore(settings.object_store_url, settings.object_store_options)
        await asyncio.to_thread(check_object_store, store, settings.object_store_url)
        context = _storage_context(settings, store, pools, storage_threads, upload_threads)
        stack.callback(context.local_disk.close)
        EngineMetrics(registry, context.counters)
        ObjectMetrics(registry, context.uploads, context.local_disk)
        tenants = Tenants(
            context=context,
            records=TenantRecords(settings.data_dir / "tenants"),
            world=world,
            chance=random.SystemRandom(),
        )
        stack.push_async_callback(tenants.stop)
        stack.callback(context.uploads.stop)
        await tenants.start()
        disk = DiskWatch(health, _written_directories(settings))
        add_disks(registry, disk)
        scope.supervise("disk", disk.run)
        scope.supervise("statuses", partial(_publish_statuses, settings, tenants, world.metrics, broker))
        keeper = HistoryKeeper(tenants, scope, SystemClock(), random.SystemRandom())
        scope.supervise("garbage collection", keeper.run)
        yield tenants, keeper, _page_service(settings, tenants, scope, registry)


async def _broker(settings: PageserverSettings, stack: contextlib.AsyncExitStack) -> BrokerClient | None:
    if not settings.broker_url:
        return None
    client = BrokerClient(settings.broker_url, f"pageserver-{settings.id}", SystemClock())
    broker = await stack.enter_async_context(client)
    await broker.listen_safekeepers()
    return broker


def _written_directories(settings: PageserverSettings) -> list[Path]:
    """Its own, and the object store if that is one."""
    url = urlsplit(settings.object_store_url)
    objects = [Path(unquote(url.path))] if url.scheme == "file" else []
    return [settings.data_dir, *objects]


def _access_book(settings: PageserverSettings, health: Health) -> WalAccessBook:
    return WalAccessBook(
        settings.data_dir / "wal_access",
        controller_address=settings.controller_address,
        token=settings.auth_token_path.read_text().strip(),
        clock=SystemClock(),
        health=health,
    )


def _sources(
    settings: PageserverSettings,
    book: WalAccessBook,
    broker: BrokerClient | None,
    tenant_id: TenantId,
    timeline_id: TimelineId,
) -> TimelineSources:
    statuses = None if broker is None else broker.safekeepers
    return TimelineSources(
        (tenant_id, timeline_id), book, statuses, SystemClock(), f"pageserver-{settings.id}"
    )


def _storage_context(
    settings: PageserverSettings,
    store: ObjectStore,
    pools: RedoPools,
    threads: ThreadPoolExecutor,
    upload_threads: ThreadPoolExecutor,
) -> StorageContext:
    return StorageContext(
        store=store,
        filesystem=LocalFilesystem(),
        local_dir=settings.data_dir / "layers",
        redo=pools,
        apply_native=apply_native,
        executor=threads,
        settings=StorageSettings(
            flush_size_bytes=settings.flush_size_mib * MIB, flush_interval_s=settings.flush_interval_s
        ),
        local_disk=LocalDisk(settings.local_disk_max_mib * MIB or None),
        upload_executor=upload_threads,
    )


def _page_service(
    settings: PageserverSettings, tenants: Tenants, scope: TaskScope, registry: CollectorRegistry
) -> PageService:
    return PageService(
        find_timeline=tenants.active_for_compute,
        verifier=TokenVerifier(settings.auth_public_key_path.read_bytes()),
        spawn=scope.contain,
        metrics=PageServiceMetrics(registry),
        lsn_wait_timeout_s=settings.lsn_wait_timeout_s,
    )


async def _publish_statuses(
    settings: PageserverSettings, tenants: Tenants, metrics: TimelineMetrics, broker: BrokerClient | None
) -> None:
    """Tells each timeline's progress: within `CHANGE_CHECK_S` of a change, then ever more rarely."""
    loop = asyncio.get_running_loop()
    announcements: Announcements[tuple[TenantId, TimelineId]] = Announcements()
    while True:
        now = loop.time()
        for key in tenants.take_moved():
            announcements.changed(key, now)
        for key in announcements.due(now):
            timeline = tenants.find_active(*key)
            if timeline is None:
                announcements.forget(key)
                metrics.forget(*key)
                continue
            status = PageserverTimelineStatus(
                pageserver_id=NodeId(settings.id),
                tenant_id=key[0],
                timeline_id=key[1],
                last_record_lsn=timeline.store.last_record_lsn,
                disk_consistent_lsn=timeline.store.disk_consistent_lsn,
                remote_consistent_lsn=timeline.store.remote_consistent_lsn,
            )
            metrics.tell(status, timeline.store.stack.disk.level_zero_count)
            if broker is not None:
                await broker.publish(status)
        await asyncio.sleep(CHANGE_CHECK_S)
