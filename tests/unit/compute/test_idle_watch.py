"""The door while an endpoint goes to sleep: who comes in time keeps it awake, and nobody is cut off."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from excimer.base.clock import UnixTime
from excimer.base.errors import RetryableError
from excimer.compute import idle_watch
from excimer.compute.activity_sampler import ServerLook, ServerProcess
from excimer.compute.admission import ADMISSION_NAME, Admission, Door
from excimer.compute.idle_watch import IdleWatch, Serving, SuspensionDoor
from excimer.service.tasks import SystemClock

LIMIT_S = 30.0
NO_SUCH_PID = 2**22 + 1


class Controller(SuspensionDoor):
    def __init__(self) -> None:
        self.told: list[str] = []
        self.delay_s = 0
        self.is_away = False
        self.on_told: Callable[[str], None] = lambda _: None

    async def read_delay(self) -> int:
        return self.delay_s

    async def tell(self, state: str, last_active_at: UnixTime, reason: str) -> None:
        self.on_told(state)
        if self.is_away:
            raise RetryableError("the controller is away")
        self.told.append(state)


class World:
    """A watch over a server that nobody uses, unless a test says otherwise."""

    def __init__(self, directory: Path, delay_s: Any = 0.1) -> None:
        self.admission = Admission.make(directory)
        self.controller = Controller()
        self.reasons: list[str] = []
        self.watch = IdleWatch(self.controller, delay_s, SystemClock(), suspend=self.reasons.append)
        self.looks = 0
        self.on_look: Callable[[], None] = lambda: None
        self.processes: dict[int, ServerProcess] = {}

    async def ask(self) -> ServerLook:
        self.looks += 1
        await asyncio.sleep(0)
        self.on_look()
        return ServerLook(dict(self.processes), 0)

    def run(self) -> None:
        """Until it is suspended."""
        serving = Serving(NO_SUCH_PID, self.admission, self.ask)
        asyncio.run(asyncio.wait_for(self.watch.run(serving), LIMIT_S))

    def log_in(self) -> None:
        """As a client does (csrc/endpoint/admission.c), which counts itself before it looks at the door."""
        shared = self.admission._shared
        shared[0:8] = (self.admission.logins + 1).to_bytes(8, "little")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_who_is_not_used_is_suspended_once_with_the_door_shut(world: World) -> None:
    doors: list[Door] = []
    world.on_look = lambda: doors.append(world.admission.door)
    world.run()
    assert len(world.reasons) == 1
    assert doors == [Door.HELD], "the last look is while clients are held"
    assert world.admission.door is Door.SHUT
    assert world.controller.told == ["running", "suspended"]


def test_a_client_that_comes_during_the_last_look_keeps_it_awake(world: World) -> None:
    doors: list[Door] = []

    def come_twice() -> None:
        doors.append(world.admission.door)
        if len(doors) <= 2:
            world.log_in()

    world.on_look = come_twice
    world.run()
    assert doors == [Door.HELD] * 3, "each time it was let in, and the delay began anew"
    assert world.controller.told == ["running", "suspended"]


def test_the_door_is_open_again_after_somebody_came(world: World) -> None:
    seen: list[Door] = []
    waited = world.watch._wait

    async def wait(wait_s: float) -> None:
        seen.append(world.admission.door)
        await waited(wait_s)

    world.watch._wait = wait  # type: ignore[method-assign]
    world.on_look = lambda: world.log_in() if world.looks == 1 else None
    world.run()
    assert set(seen) == {Door.OPEN}
    assert world.looks == 2


def test_an_endpoint_whose_controller_is_away_stays_awake(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(idle_watch, "RETRY_S", 0.05)
    doors: list[tuple[str, Door]] = []

    def go_away(state: str) -> None:
        doors.append((state, world.admission.door))
        world.controller.is_away = state == "suspended" and len(doors) < 5

    world.controller.on_told = go_away
    world.run()
    assert doors == [("running", Door.OPEN), ("suspended", Door.SHUT)] * 3, (
        "it may have heard: it is told anew"
    )
    assert world.controller.told == ["running"] * 3 + ["suspended"]
    assert len(world.reasons) == 1


def test_a_session_keeps_it_awake_until_it_is_gone(world: World) -> None:
    world.processes[7] = ServerProcess("client backend", False)

    def leave() -> None:
        if world.looks == 5:
            world.processes.clear()

    world.on_look = leave
    world.run()
    assert world.looks == 5
    assert world.reasons


def test_the_door_opens_when_the_watch_is_ended_in_the_middle(world: World) -> None:
    async def story() -> None:
        looking = asyncio.Event()

        async def ask() -> ServerLook:
            looking.set()
            await asyncio.Event().wait()
            raise AssertionError

        watching = asyncio.create_task(world.watch.run(Serving(NO_SUCH_PID, world.admission, ask)))
        await looking.wait()
        doors = [world.admission.door]
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
        doors.append(world.admission.door)
        assert doors == [Door.HELD, Door.OPEN]
        assert world.watch.idle_s is None

    asyncio.run(asyncio.wait_for(story(), LIMIT_S))


def test_a_new_delay_is_in_force_at_once(tmp_path: Path) -> None:
    world = World(tmp_path, 3600)

    async def story() -> None:
        watching = asyncio.create_task(world.watch.run(Serving(NO_SUCH_PID, world.admission, world.ask)))
        running = asyncio.Event()
        world.controller.on_told = lambda _: running.set()
        await running.wait()
        world.controller.delay_s = 1
        await world.watch.refresh()
        assert world.watch.facts()["suspend_delay_s"] == 1
        await watching

    asyncio.run(asyncio.wait_for(story(), LIMIT_S))
    assert world.reasons


def test_a_new_start_has_an_open_door_whatever_was_left(tmp_path: Path) -> None:
    old = Admission.make(tmp_path)
    old.set(Door.SHUT)
    new = Admission.make(tmp_path)
    assert (new.door, new.logins, old.door) == (Door.OPEN, 0, Door.SHUT)
    assert (tmp_path / ADMISSION_NAME).stat().st_size == 16
    assert (tmp_path / ADMISSION_NAME).stat().st_mode & 0o777 == 0o600
