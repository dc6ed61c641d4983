"""The manager's shell: carries out what `core` decides, and answers /healthz and /metrics."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from excimer.base.address import parse_address
from excimer.base.ids import parse_tenant_id, parse_timeline_id
from excimer.base.lsn import parse_lsn
from excimer.compute.attempt import Attempt
from excimer.compute.cache_bound import CacheBound
from excimer.compute.core import (
    EXIT_CLEAN,
    EXIT_SUSPENDED,
    AttemptEnd,
    DelayOver,
    Effect,
    Ended,
    Endpoint,
    Event,
    Exit,
    Launch,
    Revoked,
    Started,
    State,
    StopAttempt,
    StopRequested,
    SuspendRequested,
    Wait,
)
from excimer.compute.endpoint_record import EndpointRecord
from excimer.compute.idle_watch import IdleWatch, SuspensionDoor
from excimer.compute.kept_space import keep_watching
from excimer.compute.outside_work import OutsideWork
from excimer.compute.places import find_places, leave_places
from excimer.compute.server_certificate import CertificateFiles, check_listen, choose_certificate
from excimer.compute.settings import ComputeSettings
from excimer.compute.settings_keeper import ControllerDoor, SettingsKeeper
from excimer.compute.slot_keeper import SLOTS_REQUEST, SlotKeeper
from excimer.compute.slot_return import SlotReturn
from excimer.compute.slot_watch import SlotWatch
from excimer.compute.spec import ComputeSpec
from excimer.compute.state_collection import StateLimits
from excimer.compute.state_keeper import StateKeeper, StateOwner
from excimer.compute.stop_progress import StopBeat
from excimer.compute.token_renewal import EndpointGoneError, TokenRenewal
from excimer.compute.warm_start import told
from excimer.io.cgroup_files import read_size
from excimer.postgres import endpoint_module, find_build
from excimer.postgres.setting_check import at_start_only
from excimer.service.disk_watch import DiskWatch
from excimer.service.health import Health
from excimer.service.logs import get_logger
from excimer.service.tasks import SystemClock, TaskScope
from excimer.wire.compute_limits import shared_buffers_mib
from excimer.wire.endpoint_tokens import EndpointTokens

log = get_logger(__name__)


def make_spec(settings: ComputeSettings) -> ComputeSpec:
    """Checks the settings and finds PostgreSQL. Raises `RefusedError`s that say what to change."""
    listen = parse_address(settings.postgres_listen)
    build = find_build(settings.pg_version)
    certificate = choose_certificate(
        build,
        own=_files(settings.tls_certificate_path, settings.tls_key_path),
        default=_files(settings.default_tls_certificate_path, settings.default_tls_key_path),
    )
    check_listen(listen, build, certificate)
    return ComputeSpec(
        endpoint_name=settings.endpoint_name,
        tenant_id=parse_tenant_id(settings.tenant_id),
        timeline_id=parse_timeline_id(settings.timeline_id),
        mode=settings.mode,
        static_lsn=parse_lsn(settings.lsn) if settings.lsn is not None else None,
        build=build,
        module=endpoint_module(build),
        host=listen.host,
        port=listen.port,
        trusts_local=settings.trusts_local,
        certificate=certificate,
        pageserver_address=settings.pageserver_address,
        pageserver_http_address=settings.pageserver_http_address,
        lease_holder=settings.lease_holder,
        safekeepers=list(settings.safekeepers),
        wal_sources=list(settings.wal_sources),
        branch_start_lsn=parse_lsn(settings.branch_start_lsn),
        outside_work=OutsideWork(settings.quieting_id or None, settings.extension_workers),
        places=find_places(settings.endpoint_dir),
        cache=CacheBound(settings.cache_size_mib << 20),
        shared_buffers_mib=shared_buffers_mib(settings.limits),
        prefetch_bytes_max=settings.prefetch_max_mib << 20,
        lag_bytes_max=settings.pageserver_lag_max_mib << 20,
    )


def make_keeper(
    settings: ComputeSettings, spec: ComputeSpec, health: Health, record: EndpointRecord
) -> SettingsKeeper:
    """Keeps the endpoint's list at the controller, and shows it in `health`."""
    return SettingsKeeper(
        ControllerDoor(record),
        spec.places.data_dir,
        settings.postgres_settings,
        at_start_only=lambda names: at_start_only(spec.build, names),
        report=lambda facts: health.facts.update(facts),
    )


def make_states(
    settings: ComputeSettings, owner: StateOwner, tokens: Callable[[], EndpointTokens]
) -> StateKeeper:
    """Keeps at the pageserver what WAL does not carry."""
    limits = StateLimits(settings.saved_state_max_mib << 20, settings.saved_unlogged_max_mib << 20)
    return StateKeeper(owner, limits, tokens)


def _files(certificate: Path | None, key: Path | None) -> CertificateFiles | None:
    return None if certificate is None or key is None else CertificateFiles(certificate, key)


class Manager:
    """Runs one endpoint until it is stopped, refused or fenced."""

    def __init__(
        self,
        spec: ComputeSpec,
        settings: ComputeSettings,
        tokens: EndpointTokens,
        health: Health,
        beat: StopBeat | None = None,
        report_ready: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """`beat` hears how a stop gets on, `report_ready` whenever PostgreSQL begins or ceases to accept
        connections.
        """
        self._report_ready = report_ready
        self._spec = spec
        self._health = health
        self._renewal = TokenRenewal(
            tokens,
            controller_address=settings.controller_address,
            endpoint_name=settings.endpoint_name,
            clock=SystemClock(),
            chance=random.SystemRandom(),
            health=health,
            on_renewed=self._renewed,
        )
        self._record = EndpointRecord(
            settings.controller_address, settings.endpoint_name, lambda: self._renewal.current.renewal
        )
        self._cgroup_dir = settings.cgroup_dir
        self._keeper = make_keeper(settings, spec, health, self._record)
        owner = StateOwner(
            spec.tenant_id, spec.timeline_id, spec.build.version, settings.pageserver_http_address
        )
        self._states = make_states(settings, owner, lambda: self._renewal.current)
        slot_wal_limit_bytes = settings.slot_wal_max_mib << 20
        self._slot_keeper = SlotKeeper(
            owner, spec.places.data_dir, slot_wal_limit_bytes, lambda: self._renewal.current
        )
        self.idle = IdleWatch(
            SuspensionDoor(self._record),
            settings.suspend_delay_s,
            SystemClock(),
            suspend=lambda reason: self._events.put_nowait(SuspendRequested(reason)),
        )
        self._endpoint = Endpoint()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._attempt: Attempt | None = None
        health.on_ask = self._report_awaited
        self.disk = DiskWatch(health, [settings.endpoint_dir], self._waiting_for_room)
        self._watch_kept = partial(
            keep_watching, settings.endpoint_dir.parent, settings.stopped_directories_max_mib << 20
        )
        self._beat = beat or StopBeat()
        self._slots = SlotReturn(self._slot_keeper, SlotWatch(health, slot_wal_limit_bytes))
        self.starts = 0

    @property
    def attempt(self) -> Attempt | None:
        """The attempt under way, for metrics."""
        return self._attempt

    def _cache_size_bytes(self) -> int:
        """What is kept to now: one that began without a bound has none until its next start."""
        arena = None if self._attempt is None else self._attempt.arena
        return self._spec.cache.size_bytes if arena is None or arena.evicts else 0

    def _waiting_for_room(self) -> str | None:
        """Postgres is another user, who may be refused room that we would get."""
        arena = None if self._attempt is None else self._attempt.arena
        waiting = 0 if arena is None else arena.waiting_for_room()
        return (
            f"full: {waiting} of postgres's processes wait for room, and commits with them"
            if waiting
            else None
        )

    def _report_awaited(self) -> None:
        """What a start waits for makes it unwell; that commits wait while postgres runs is a warning."""
        self._health.facts.update(self.idle.facts())
        if self._cgroup_dir is not None:
            size = read_size(self._cgroup_dir)
            self._health.facts |= {"cpu_milli": size.cpu_milli, "memory_mib": size.memory_mib}
        self._health.facts["cache_size_mib"] = self._cache_size_bytes() >> 20
        attempt = self._attempt
        if attempt is not None and attempt.replica is not None:
            self._health.facts.update(attempt.replica.facts())
        awaited = None if attempt is None or self._endpoint.state is State.WAITING else attempt.awaited
        starts = self._endpoint.state is State.STARTING
        self._health.report("start", f"waits for {awaited}" if awaited and starts else None)
        waits = f"without {awaited}; commits wait" if awaited and self.is_running else None
        self._health.warn("the endpoint", waits)

    @property
    def is_running(self) -> bool:
        return self._endpoint.state is State.RUNNING

    async def run(self) -> Exit:
        """Until the endpoint is over. Cancelling it is the request to stop; it then still ends cleanly."""
        loop = asyncio.get_running_loop()
        async with TaskScope() as scope, self._serving_library():
            loop.add_signal_handler(signal.SIGHUP, self._take_over_changes, scope)
            scope.start("renew tokens", self._renew_tokens())
            scope.supervise("disk", self.disk.run)
            scope.supervise("kept directories", self._watch_kept)
            try:
                return await self._drive(scope, self._endpoint.begin())
            except asyncio.CancelledError:
                await self._drive(scope, self._endpoint.step(StopRequested()))
                raise
            finally:
                loop.remove_signal_handler(signal.SIGHUP)
                leave_places(self._spec.places)

    def _serving_library(self) -> contextlib.AbstractAsyncContextManager[None]:
        others = {SLOTS_REQUEST: self._slot_keeper.keep}
        return self._keeper.serving(self._spec.places.settings_socket, others)

    def _take_over_changes(self, scope: TaskScope) -> None:
        scope.start("settings", self._keeper.refresh())
        scope.start("suspend delay", self.idle.refresh())
        scope.start("cache size", self._spec.cache.refresh(self._record))

    async def _drive(self, scope: TaskScope, effects: list[Effect]) -> Exit:
        while True:
            for effect in effects:
                if isinstance(effect, Exit):
                    if effect.code not in (EXIT_CLEAN, EXIT_SUSPENDED):
                        log.error("the endpoint is over", reason=effect.reason)
                    return effect
                await self._carry_out(scope, effect)
            event = await self._events.get()
            effects = self._endpoint.step(event)
            if self._health.ready != self.is_running:
                self._health.ready = self.is_running
                self._report_ready(self.is_running)
            if self._health.ready:
                self._health.report("postgres", None)

    async def _carry_out(self, scope: TaskScope, effect: Launch | StopAttempt | Wait) -> None:
        match effect:
            case Launch():
                self._attempt = Attempt(
                    self._spec,
                    lambda: self._renewal.current,
                    self._keeper,
                    self._states,
                    self._started,
                    self.idle,
                    self._beat,
                    self._slots,
                )
                self.starts += 1
                scope.start("attempt", self._report_end(self._attempt))
            case StopAttempt():
                if self._attempt is not None:
                    await self._attempt.stop()
            case Wait(delay_s, reason):
                log.warning("postgres will be started afresh", reason=reason, delay_s=delay_s)
                self._health.report("postgres", reason)
                scope.start("delay", self._report_delay(delay_s))

    async def _renew_tokens(self) -> None:
        try:
            await self._renewal.run()
        except EndpointGoneError as error:
            self._events.put_nowait(Revoked(str(error)))

    def _renewed(self, tokens: EndpointTokens) -> None:
        if self._attempt is not None:
            self._attempt.renew_tokens(tokens)

    def _started(self) -> None:
        if self._attempt is not None:
            self._health.facts.update(told(self._attempt.decided))
        self._events.put_nowait(Started(time.monotonic()))

    async def _report_end(self, attempt: Attempt) -> None:
        end: AttemptEnd | None = None
        try:
            end = await attempt.run()
        finally:
            # Unforeseen errors end the manager, too, which on its way waits until the attempt has ended.
            self._events.put_nowait(end or Ended(time.monotonic(), "an unforeseen error"))

    async def _report_delay(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self._events.put_nowait(DelayOver())
