"""The node at work: carries out orders, each of them safe to repeat, and knows what runs.

Orders on one endpoint follow one another up to the fork or the end of its manager; who waits until it is
ready waits outside of that, so that a stop can end a start. Starts of all endpoints are let in in the order
in which they came, a few at a time: a hundred that are woken at once would otherwise share two cores, and all
be late.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Final

from excimer.base.errors import ConflictError, ExcimerError, RefusedError
from excimer.compute.endpoint_remains import has_remains, remove_remains
from excimer.compute.places import leave_places, locate_places
from excimer.compute_node.forks import run_in_fork
from excimer.compute_node.manager_process import ManagerProcess, forget_record
from excimer.compute_node.manager_settings import manager_settings, part_name
from excimer.compute_node.resources import Resources, no_resources
from excimer.compute_node.settings import ComputeNodeSettings
from excimer.postgres import find_build
from excimer.service.logs import get_logger
from excimer.service.process_records import settings_path
from excimer.service.settings import SettingsError, load_settings
from excimer.service.tasks import TaskScope
from excimer.wire.compute_limits import ComputeLimits
from excimer.wire.compute_orders import (
    LimitsInForce,
    RunningEndpoint,
    RunningEndpoints,
    Started,
    StartOrder,
    StopOrder,
    Stopped,
)

SLOT_LIMIT_S: Final = 5.0
"""Who takes longer waits for something else than this machine, and lets others go on."""

log = get_logger(__name__)


class OvertakenError(ConflictError):
    """The controller has decided otherwise since."""


class StillRunningError(ConflictError):
    """Something of a running endpoint is not removed."""


class RemainsError(ExcimerError):
    """What a stop has left cannot be removed; the log says why."""


class ComputeNode:
    """All endpoints of this machine. Everything runs on the event loop, and nothing in threads."""

    def __init__(
        self,
        settings: ComputeNodeSettings,
        settings_file: Path,
        scope: TaskScope,
        starts_at_once: int,
        resources: Resources | None = None,
    ) -> None:
        """`resources` None: endpoints have no groups and no limits."""
        self._settings = settings
        self._settings_file = settings_file
        self._scope = scope
        self._managers: dict[str, ManagerProcess] = {}
        self._stopped: dict[str, int] = {}
        """By endpoint the generation of its last stop: its start may come late."""
        self._locks: dict[str, asyncio.Lock] = {}
        self._slots = asyncio.Semaphore(starts_at_once)
        self.resources = resources or no_resources()
        self._known_builds: set[int] = set()
        self.starting = 0
        self.waiting = 0
        self.starts = 0
        self.failures = 0
        self.ends = 0

    def adopt(self) -> None:
        """Finds who runs here already. Once, before orders are taken."""
        directory = self._settings.endpoints_dir
        for endpoint_dir in sorted(directory.iterdir()) if directory.is_dir() else []:
            found = ManagerProcess.find(self._settings.run_dir, endpoint_dir)
            if found is not None:
                self._watch(found)
                self.resources.adopt(found.name, found.pid, found.settings.limits)
        for name in self.resources.left_behind():
            self._scope.contain("remove group", self.resources.release(name))

    def running(self) -> RunningEndpoints:
        return RunningEndpoints(
            endpoints=[
                RunningEndpoint(
                    name=manager.name,
                    pid=manager.pid,
                    generation=manager.generation,
                    timeline_id=manager.settings.timeline_id,
                    mode=manager.settings.mode,
                    size=self.resources.size(manager.name),
                )
                for manager in self._managers.values()
            ]
        )

    # Orders

    async def start(self, order: StartOrder) -> Started:
        """Returns when it accepts connections. Raises `OvertakenError`, `EndpointFailedError` with the
        reason, `EndpointSlowError` when `limit_s` is over; it goes on starting then.
        """
        manager, is_new = await self._launch_unless_running(order)
        deadline = time.monotonic() + order.limit_s
        while True:
            try:
                is_ready = await manager.wait_ready(deadline)
            except TimeoutError:
                raise await manager.slowness() from None
            if is_ready:
                return Started(pid=manager.pid, is_new=is_new)
            successor = await self._successor(order, is_new=is_new)
            if successor is None:
                self.failures += 1
                raise manager.failure()
            manager, is_new = successor

    async def _successor(self, order: StartOrder, *, is_new: bool) -> tuple[ManagerProcess, bool] | None:
        """Of a manager that ended before it was ready: who took its place; or a new one, if we only found it
        on its way out.
        """
        async with self._lock(order.endpoint):
            running = self._managers.get(order.endpoint)
        if running is not None:
            return running, is_new
        was_stopped = self._stopped.get(order.endpoint, -1) >= order.generation
        return None if is_new or was_stopped else await self._launch_unless_running(order)

    async def _launch_unless_running(self, order: StartOrder) -> tuple[ManagerProcess, bool]:
        async with self._lock(order.endpoint):
            if order.endpoint in self._managers:
                self._managers[order.endpoint].look()
            running = self._managers.get(order.endpoint)
            known = max(self._stopped.get(order.endpoint, -1) + 1, running.generation if running else 0)
            if order.generation < known:
                raise OvertakenError(f"endpoint {order.endpoint} was stopped, or started anew, meanwhile")
            if running is not None and running.generation == order.generation:
                return running, False
            if running is not None:
                await running.stop(is_immediate=order.is_immediate)
                await self._clean(order.endpoint, kept_too=False)
            return await self._launch(order), True

    async def _launch(self, order: StartOrder) -> ManagerProcess:
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._slots.release)
            settings = self._fresh_settings()
            self._warm_up(order.pg_version)
            group = self.resources.place(order.endpoint, order.limits)
            join = (lambda: None) if group is None else group.join
            given = manager_settings(order, settings, None if group is None else group.path)
            manager = ManagerProcess.launch(given, settings.run_dir, order.tokens, join)
            on_failure.pop_all()
        self.starts += 1
        self._watch(manager)
        self._scope.contain("start", self._hold_slot(manager))
        return manager

    async def _hold_slot(self, manager: ManagerProcess) -> None:
        self.starting += 1
        try:
            with contextlib.suppress(TimeoutError):
                await manager.wait_ready(time.monotonic() + SLOT_LIMIT_S)
        finally:
            self.starting -= 1
            self._slots.release()

    def _fresh_settings(self) -> ComputeNodeSettings:
        """What endpoints take from this machine may have been changed since the node started."""
        try:
            return load_settings(self._settings_file, ComputeNodeSettings)
        except SettingsError as error:
            log.warning("the settings cannot be read again", error=error)
            return self._settings

    async def stop(self, name: str, order: StopOrder) -> Stopped:
        """Returns when nothing of it runs any more. Raises `EndpointStuckError`, `OvertakenError`."""
        async with self._guarded_stop(name, order.generation) as running:
            if running is not None:
                await running.stop(is_immediate=order.is_immediate)
            await self._clean(name, kept_too=False)
            await self.resources.release(name)
        return Stopped(was_running=running is not None)

    @contextlib.asynccontextmanager
    async def _guarded_stop(self, name: str, generation: int) -> AsyncIterator[ManagerProcess | None]:
        running = self._managers.get(name)
        if running is not None and running.generation > generation:
            raise OvertakenError(f"endpoint {name} was started anew meanwhile")
        self._stopped[name] = max(generation, self._stopped.get(name, -1))
        async with self._lock(name):
            yield self._managers.get(name)

    async def change_limits(self, name: str, limits: ComputeLimits) -> LimitsInForce:
        """Of one that runs; in force when it returns. Raises `LimitsUnkeptError`."""
        async with self._lock(name):
            running = self._managers.get(name)
            if running is None:
                unkept = self.resources.check(name, limits)
                return LimitsInForce(is_running=False, size=limits.maximum, unkept=unkept)
            unkept = self.resources.change(name, limits)
            running.note_limits(self._settings.run_dir, limits)
            return LimitsInForce(is_running=True, size=self.resources.size(name), unkept=unkept)

    async def remove(self, name: str) -> None:
        """What stops of an endpoint have kept, its logs apart. Raises `StillRunningError`, `RemainsError`."""
        async with self._lock(name):
            if name in self._managers:
                raise StillRunningError(f"endpoint {name} runs: stop it first")
            await self._clean(name, kept_too=True)
            part = part_name(name)
            settings_path(self._settings.run_dir, part).unlink(missing_ok=True)
            forget_record(self._settings.run_dir, part)
        self._stopped.pop(name, None)
        self._locks.pop(name, None)

    async def _clean(self, name: str, *, kept_too: bool) -> None:
        """Nothing of a stopped endpoint runs, and what cannot be used again goes."""
        directory = self._settings.endpoints_dir / name
        forget_record(self._settings.run_dir, part_name(name))
        if not directory.exists():
            return
        if kept_too or has_remains(directory):
            log_path = self._settings.logs_dir / f"{part_name(name)}.log"
            work = partial(_remove, directory, kept_too=kept_too)
            if not await run_in_fork(f"clean-{name}", log_path, work):
                raise RemainsError(f"the files of endpoint {name} cannot be removed: excimer logs {name}")
        else:
            leave_places(locate_places(directory))

    def _warm_up(self, pg_version: int) -> None:
        """What is known of a build is remembered, and so shared with each fork: that takes some 0.1 s, once.

        Each manager looks by itself whether it has changed, and says so if there is none.
        """
        if pg_version not in self._known_builds:
            with contextlib.suppress(RefusedError, OSError):
                find_build(pg_version)
                self._known_builds.add(pg_version)

    # What runs

    def _watch(self, manager: ManagerProcess) -> None:
        self._managers[manager.name] = manager
        manager.on_end = self._ended

    def _ended(self, manager: ManagerProcess) -> None:
        self.ends += 1
        if self._managers.get(manager.name) is manager:
            del self._managers[manager.name]
            self._scope.contain("remove group", self.resources.release(manager.name))

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    @property
    def awake(self) -> int:
        return len(self._managers)


def _remove(directory: Path, *, kept_too: bool) -> None:
    import shutil

    remove_remains(directory, kept_too=kept_too)
    if kept_too:
        shutil.rmtree(directory, ignore_errors=True)
