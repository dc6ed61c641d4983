"""What of CPU and memory the endpoints of this node have: a group for each, and its size in force.

Where a controller lacks that a limit needs, the endpoint is refused or started all the same, as the operator
wants; it says so itself then.

Not here: the files of a group (`cgroups`).
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from excimer.base.clock import Clock
from excimer.base.errors import RefusedError
from excimer.compute_node.cgroups import Cgroup, Cgroups, soft_limit_mib
from excimer.compute_node.group_sample import read_sample
from excimer.compute_node.scaling_policy import Scaling, adjust, advance, begin
from excimer.service.logs import get_logger
from excimer.service.tasks import SystemClock
from excimer.wire.compute_limits import ComputeLimits, ComputeSize

WhenUnkept = Literal["tell", "refuse"]

SYSTEM_CLOCK: Final = SystemClock()
RELEASE_POLL_S: Final = 0.02
RELEASE_LIMIT_S: Final = 5.0
"""So long after its manager what is left in a group may take to end by itself; then it is killed."""

log = get_logger(__name__)


class MemoryInUseError(RefusedError):
    """A limit of memory is below what an endpoint cannot do without."""


class LimitsUnkeptError(RefusedError):
    """An endpoint has limits that this machine cannot keep to, and the operator wants none like that."""


@dataclass(slots=True)
class _Entry:
    group: Cgroup | None
    limits: ComputeLimits
    """Those that can be kept to."""
    scaling: Scaling

    @property
    def size(self) -> ComputeSize:
        """In force."""
        return self.scaling.size


class Resources:
    """Everything runs on the event loop; files of cgroups answer at once."""

    def __init__(
        self,
        cgroups: Cgroups,
        when_unkept: WhenUnkept = "tell",
        warn: Callable[[str, str | None], None] = lambda _about, _warning: None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`warn` hears of each endpoint whose limits are not kept to, and (None) when that is over."""
        self._warn = warn
        self._cgroups = cgroups
        self._when_unkept = when_unkept
        self._clock = clock
        self._entries: dict[str, _Entry] = {}

    @property
    def sizes(self) -> Mapping[str, ComputeSize]:
        return {name: entry.size for name, entry in self._entries.items()}

    def size(self, name: str) -> ComputeSize:
        entry = self._entries.get(name)
        return ComputeSize() if entry is None else entry.size

    def unkept(self, limits: ComputeLimits) -> str:
        """Which limits this machine cannot keep to, and why; empty: it can."""
        lacks = self._cgroups.lacks
        reasons = {lacks[name] for name in limits.limited if name in lacks}
        names = " and ".join(name for name in limits.limited if name in lacks)
        return f"limits of {names} are not kept to: {'; '.join(sorted(reasons))}" if reasons else ""

    def check(self, name: str, limits: ComputeLimits) -> str:
        """As `unkept`. Raises `LimitsUnkeptError` where the operator wants that."""
        unkept = self.unkept(limits)
        if unkept and self._when_unkept == "refuse":
            raise LimitsUnkeptError(
                f"endpoint {name} is not started: its {unkept}; "
                f"`excimer endpoint limits {name} --cpu unlimited --memory unlimited` takes them away, "
                'and unenforced_limits = "tell" starts it all the same'
            )
        return unkept

    def place(self, name: str, limits: ComputeLimits) -> Cgroup | None:
        """The group of a manager that is about to be forked. Raises `LimitsUnkeptError`."""
        unkept = self.check(name, limits)
        group = self._cgroups.group(name)
        if group is not None:
            try:
                group.make()
            except OSError as error:
                log.warning("no group for an endpoint", endpoint=name, error=error)
                group = None
        kept = self._kept(limits)
        entry = self._entries[name] = _Entry(group, kept, begin(kept, self._clock.monotonic()))
        self._apply(name, entry, unkept)
        return group

    def adopt(self, name: str, pid: int, limits: ComputeLimits) -> None:
        """Of a manager that was found running: its group is where it was born."""
        group = self._cgroups.group(name)
        if group is not None and not group.holds(pid):
            log.warning("an endpoint runs outside of its group", endpoint=name, pid=pid)
            group = None
        kept = self._kept(limits)
        state = begin(kept, self._clock.monotonic())
        if group is not None:
            state = adjust(state._replace(size=group.size()), kept)
        self._entries[name] = _Entry(group, kept, state)
        self._tell(name, self.unkept(limits))

    def change(self, name: str, limits: ComputeLimits) -> str:
        """Other limits of one that runs; what of them is not kept to. Raises `LimitsUnkeptError`, and
        `MemoryInUseError` rather than have the kernel kill it.
        """
        unkept, kept = self.check(name, limits), self._kept(limits)
        entry = self._entries[name]
        if entry.group is not None and kept.memory_max_mib:
            in_use_mib = read_sample(entry.group.path, 0.0, 0).in_use_mib
            if in_use_mib > soft_limit_mib(kept.memory_max_mib):
                raise MemoryInUseError(
                    f"endpoint {name} has {in_use_mib} MiB in use that cannot be taken back: stop it first, "
                    f"or give it more than {kept.memory_max_mib} MiB"
                )
        entry.limits, entry.scaling = kept, adjust(entry.scaling, kept)
        return self._apply(name, entry, unkept)

    def elastic(self) -> list[str]:
        """Endpoints that may have another size than they have."""
        return [
            name
            for name, entry in self._entries.items()
            if entry.group is not None and entry.limits.minimum != entry.limits.maximum
        ]

    def scale(self, name: str, reads: int) -> None:
        """Looks what an endpoint uses, and gives it the size that follows. `reads`: of its arena."""
        entry = self._entries[name]
        if entry.group is None:
            return
        before = entry.size
        sample = read_sample(entry.group.path, self._clock.monotonic(), reads)
        entry.scaling = advance(entry.scaling, sample, entry.limits)
        if entry.size != before:
            log.info(
                "size changed",
                endpoint=name,
                cpu_milli=entry.size.cpu_milli,
                memory_mib=entry.size.memory_mib,
            )
            self._apply(name, entry, "")

    def _kept(self, limits: ComputeLimits) -> ComputeLimits:
        """Without those that this machine cannot keep to."""
        none = {
            field: 0
            for controller in self._cgroups.lacks
            for field in limits.__struct_fields__
            if field.startswith(controller)
        }
        return msgspec.structs.replace(limits, **none)

    def left_behind(self) -> list[str]:
        """Endpoints of groups that are there and belong to nobody who runs."""
        return [name for name in self._cgroups.groups() if name not in self._entries]

    def _apply(self, name: str, entry: _Entry, unkept: str) -> str:
        """Has the kernel keep to the size. `unkept`: what it cannot, of which more may be found."""
        group, size = entry.group, entry.size
        try:
            if group is None:
                unkept = unkept or ("no group of its own" if entry.limits.limited else "")
            else:
                if "cpu" in group.controllers:
                    group.limit_cpu(size.cpu_milli)
                if "memory" in group.controllers:
                    group.limit_memory(size.memory_mib)
        except OSError as error:
            unkept = f"limits are not kept to: {error.filename}: {error.strerror}"
        self._tell(name, unkept)
        return unkept

    def _tell(self, name: str, unkept: str) -> None:
        self._warn(f"endpoint {name}", f"without what was asked for: {unkept}" if unkept else None)

    def release(self, name: str) -> Coroutine[None, None, None]:
        """When its manager has ended: the group goes with the last process in it, unless it is started anew
        before the answer is awaited.
        """
        entry = self._entries.pop(name, None)
        self._tell(name, "")
        return self._release(name, self._cgroups.group(name) if entry is None else entry.group)

    async def _release(self, name: str, group: Cgroup | None) -> None:
        if group is None or await self._remove(name, group):
            return
        if name not in self._entries:
            log.warning("what an endpoint has left in its group is killed", endpoint=name)
            with contextlib.suppress(OSError):
                group.kill()
            if not await self._remove(name, group):
                log.error("the group of an endpoint cannot be removed", endpoint=name, path=str(group.path))

    async def _remove(self, name: str, group: Cgroup) -> bool:
        """Whether it is gone in time, or wanted again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RELEASE_LIMIT_S):
                while name not in self._entries and not group.remove():  # noqa: ASYNC110 - no event tells it
                    await asyncio.sleep(RELEASE_POLL_S)
                return True
        return False

    def close(self) -> None:
        """The node ends; endpoints go on in their groups."""
        self._cgroups.leave()


def no_resources() -> Resources:
    """For a node that has no groups."""
    return Resources(Cgroups(None, {}))
