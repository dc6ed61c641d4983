"""Watches an endpoint while its PostgreSQL runs, and has it suspended when nobody uses it.

::

    sample --idle for the delay--> hold the door --> look --still idle--> shut it --> tell the controller
      ^                                               |                               |            |
      '------------ open the door <--- somebody came -+--------- not reachable -------'         suspend

The controller hears of it before PostgreSQL stops: where it cannot be told, nobody could be woken either, and
the endpoint goes on. If the manager dies after that, the controller knows a suspended endpoint that has
crashed: its next start is an ordinary one.

Not here: the decision (`idle_policy`), stopping (`core`, `attempt`).
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, Literal, NamedTuple, TypeAlias

import msgspec

from excimer.base.clock import Clock, UnixTime
from excimer.base.errors import ExcimerError
from excimer.compute.activity_sampler import ActivitySampler, ServerQuestion, child_pids
from excimer.compute.admission import Admission, Door
from excimer.compute.endpoint_record import EndpointRecord, read_when_heard
from excimer.compute.idle_policy import IdlePolicy, Stay
from excimer.service.logs import get_logger

CALL_LIMIT_S: Final = 3.0
"""Clients wait at the shut door meanwhile only to be refused; less than the time that a start waits for."""
RETRY_S: Final = 5.0
IDLE: Final = "idle"
_PART: Final = "suspension"

Told: TypeAlias = Literal["running", "suspended"]

log = get_logger(__name__)


class SuspendAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What of the controller's answer is used here."""

    suspend_delay_s: int


class SuspensionDoor:
    """The controller's route about when an endpoint is suspended, and whether it is."""

    def __init__(self, record: EndpointRecord) -> None:
        self._record = record

    async def read_delay(self) -> int:
        """Raises ExcimerError."""
        return (await self._record.read(_PART, SuspendAnswer, CALL_LIMIT_S)).suspend_delay_s

    async def tell(self, state: Told, last_active_at: UnixTime, reason: str) -> None:
        """Durable when it returns. Raises ExcimerError."""
        body = {"state": state, "last_active_at": last_active_at, "reason": reason}
        await self._record.change(_PART, body, SuspendAnswer, CALL_LIMIT_S)


class Serving(NamedTuple):
    """A PostgreSQL that clients may use."""

    postmaster_pid: int
    admission: Admission
    ask: ServerQuestion


class IdleWatch:
    """Of one endpoint, from one start of its manager to its end."""

    def __init__(
        self,
        door: SuspensionDoor,
        delay_s: int,
        clock: Clock,
        *,
        suspend: Callable[[str], None],
    ) -> None:
        """`suspend` is called with the reason, at most once."""
        self._door = door
        self._delay_s = delay_s
        self._clock = clock
        self._suspend = suspend
        self._policy: IdlePolicy | None = None
        self._told: Told | None = None
        """What the controller has surely heard last."""
        self._sampler: ActivitySampler | None = None
        self._changed = asyncio.Event()

    @property
    def delay_s(self) -> int:
        return self._delay_s

    @property
    def idle_s(self) -> float | None:
        """Since the last use; None while no PostgreSQL runs."""
        return None if self._policy is None else self._clock.monotonic() - self._policy.last_active_s

    @property
    def awake_for(self) -> str | None:
        """What keeps, or kept, it awake."""
        return None if self._policy is None else self._policy.awake_for

    @property
    def present(self) -> Mapping[str, int]:
        """Who is there that keeps it awake, by kind, as the newest sample has it."""
        return {} if self._policy is None else self._policy.present

    @property
    def questions(self) -> int:
        """How often this PostgreSQL was asked who is there."""
        return 0 if self._sampler is None else self._sampler.questions

    @property
    def samples(self) -> int:
        """How often it was looked who is there, since this PostgreSQL started."""
        return 0 if self._sampler is None else self._sampler.samples

    def facts(self) -> dict[str, str | int]:
        """For /healthz."""
        idle_s = self.idle_s
        facts: dict[str, str | int] = {"suspend_delay_s": self._delay_s}
        if idle_s is not None:
            facts |= {"last_active_at": int(self._clock.now() - idle_s), "awake_for": self.awake_for or ""}
        return facts

    async def refresh(self) -> None:
        """Takes over the delay that the controller has now, trying again until it is heard of."""
        delay_s = await read_when_heard("the suspend delay", self._door.read_delay)
        if delay_s is None:
            return
        self._delay_s = delay_s
        if self._policy is not None:
            self._policy.delay_s = delay_s
        self._changed.set()

    async def run(self, serving: Serving) -> None:
        """Until PostgreSQL is to be suspended, or until cancelled because it ends otherwise."""
        policy = self._policy = IdlePolicy(self._clock.monotonic(), self._delay_s)
        try:
            self._told = None
            sampler = self._sampler = ActivitySampler(
                lambda: child_pids(serving.postmaster_pid), serving.admission, serving.ask, self._clock
            )
            while True:
                if self._told != "running":
                    await self._tell("running", 0.0)
                decision = policy.step(await sampler.sample())
                stay = (
                    decision
                    if isinstance(decision, Stay)
                    else await self._suspend_if_still_idle(policy, sampler, serving.admission)
                )
                if stay is None:
                    return
                await self._wait(stay.wait_s)
        finally:
            self._policy = self._sampler = None

    async def _suspend_if_still_idle(
        self, policy: IdlePolicy, sampler: ActivitySampler, admission: Admission
    ) -> Stay | None:
        """None when the endpoint is being suspended; nobody is inside then, nor can come in."""
        admission.set(Door.HELD)
        is_leaving = False
        try:
            decision = policy.step(await sampler.look())
            if isinstance(decision, Stay):
                return decision
            admission.set(Door.SHUT)
            is_leaving = await self._tell("suspended", decision.idle_s)
        finally:
            if not is_leaving:
                admission.set(Door.OPEN)
        if not is_leaving:
            return Stay(RETRY_S)
        log.info(
            "nobody uses the endpoint: it is suspended",
            idle_s=round(decision.idle_s, 1),
            delay_s=self._delay_s,
        )
        self._suspend(f"nobody used it for {decision.idle_s:.0f} s")
        return None

    async def _tell(self, state: Told, idle_s: float) -> bool:
        """Whether the controller has heard it. If the answer was lost it may have; then it is told anew."""
        self._told = None
        try:
            await self._door.tell(state, UnixTime(self._clock.now() - idle_s), IDLE)
        except ExcimerError as error:
            log.warning(f"the controller cannot be told that the endpoint is {state}", error=error)
            return False
        self._told = state
        return True

    async def _wait(self, wait_s: float) -> None:
        """Less if the delay is changed meanwhile."""
        self._changed.clear()
        try:
            async with asyncio.timeout(wait_s):
                await self._changed.wait()
        except TimeoutError:
            return
