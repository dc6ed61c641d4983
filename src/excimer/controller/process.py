"""The controller's process: lock, store, HTTP API, and the background round that finishes things."""

from pathlib import Path

from fastapi import Depends, FastAPI
from prometheus_client import CollectorRegistry

import excimer
from excimer.base.clock import Clock
from excimer.base.errors import RefusedError
from excimer.controller.access import Access
from excimer.controller.endpoints.access_api import make_access_router
from excimer.controller.endpoints.api import make_router
from excimer.controller.endpoints.cache_size_api import make_cache_size_router
from excimer.controller.endpoints.compute_node_api import make_registration_router
from excimer.controller.endpoints.settings_api import make_settings_router, owner_or_user
from excimer.controller.endpoints.suspension_api import make_suspension_router
from excimer.controller.metrics import add_suspends
from excimer.controller.settings import ControllerSettings
from excimer.controller.shell import Controller
from excimer.controller.sqlite_store import SqliteStore
from excimer.controller.suspension import Suspension
from excimer.controller.tokens import TokenMaker
from excimer.service.disk_watch import DiskWatch
from excimer.service.health import Health
from excimer.service.http import bearer_auth, create_app, serving_http
from excimer.service.instance_lock import InstanceLock
from excimer.service.made_ahead import MadeAhead
from excimer.service.metrics import add_disks, new_registry
from excimer.service.tasks import SystemClock, TaskScope
from excimer.wire.auth import Right, TokenVerifier


class KeyFileError(RefusedError):
    """A key file cannot be read."""


async def serve_controller(settings: ControllerSettings) -> None:
    """The controller's life, until cancelled."""
    clock = SystemClock()
    health = Health("controller")
    verifier = TokenVerifier(_read_key(settings.auth_public_key_path))
    tokens = TokenMaker(
        _read_key(settings.auth_private_key_path),
        clock,
        settings.endpoint_token_life_s,
        settings.wal_token_life_s,
    )
    with InstanceLock(settings.data_dir, "controller"):
        store = SqliteStore(settings.data_dir)
        try:
            store.put_nodes(settings.pageservers, settings.safekeepers)
            controller = Controller(store, tokens, clock)
            disk = DiskWatch(health, [settings.data_dir])
            registry = make_registry()
            add_disks(registry, disk)
            add_suspends(registry, controller.suspension.counts)
            app = make_app(
                controller, controller.access, controller.suspension, verifier, clock, health, registry
            )
            async with (
                serving_http(app, settings.http_listen, "controller http_listen"),
                TaskScope() as scope,
            ):
                health.ready = True
                scope.supervise("disk", disk.run)
                await scope.supervise("reconcile", controller.reconcile_for_ever)
        finally:
            store.close()


@MadeAhead
def make_registry() -> CollectorRegistry:
    return new_registry("controller", excimer.__version__)


@MadeAhead
def make_app(
    controller: Controller,
    access: Access,
    suspension: Suspension,
    verifier: TokenVerifier,
    clock: Clock,
    health: Health,
    registry: CollectorRegistry,
) -> FastAPI:
    """The whole API, with what each route asks of a token."""
    app = create_app("Excimer controller", excimer.__version__, health, registry, verifier=verifier)
    app.include_router(
        make_router(controller), dependencies=[Depends(bearer_auth(verifier, clock, Right.MANAGE))]
    )
    app.include_router(make_settings_router(controller, verifier, clock))
    app.include_router(make_suspension_router(suspension, owner_or_user(verifier, clock)))
    app.include_router(make_cache_size_router(controller, owner_or_user(verifier, clock)))
    app.include_router(make_access_router(access, bearer_auth(verifier, clock)))
    app.include_router(make_registration_router(controller, bearer_auth(verifier, clock)))
    return app


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeyFileError(f"cannot read key {path}: {error.strerror}") from error
