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

from excimer.base.errors import RefusedError
from excimer.compute_node.cgroups import Cgroup, Cgroups
from excimer.service.logs import get_logger
from excimer.wire.compute_limits import NO_LIMITS, ComputeLimits, ComputeSize

WhenUnkept = Literal["tell", "refuse"]

RELEASE_POLL_S: Final = 0.02
RELEASE_LIMIT_S: Final = 5.0
"""So long after its manager what is left in a group may take to end by itself; then it is killed."""

log = get_logger(__name__)


class LimitsUnkeptError(RefusedError):
    """An endpoint has limits that this machine cannot keep to, and the operator wants none like that."""


@dataclass(slots=True)
class _Entry:
    group: Cgroup | None
    limits: ComputeLimits
    size: ComputeSize
    """In force, as far as the kernel can."""


class Resources:
    """Everything runs on the event loop; files of cgroups answer at once."""

    def __init__(
        self,
        cgroups: Cgroups,
        when_unkept: WhenUnkept = "tell",
        warn: Callable[[str, str | None], None] = lambda _about, _warning: None,
    ) -> None:
        """`warn` hears of each endpoint whose limits are not kept to, and (None) when that is over."""
        self._warn = warn
        self._cgroups = cgroups
        self._when_unkept = when_unkept
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
        self.check(name, limits)
        group = self._cgroups.group(name)
        if group is not None:
            try:
                group.make()
            except OSError as error:
                log.warning("no group for an endpoint", endpoint=name, error=error)
                group = None
        entry = self._entries[name] = _Entry(group, limits, limits.maximum)
        self._apply(name, entry)
        return group

    def adopt(self, name: str, pid: int, limits: ComputeLimits) -> None:
        """Of a manager that was found running: its group is where it was born."""
        group = self._cgroups.group(name)
        if group is not None and not group.holds(pid):
            log.warning("an endpoint runs outside of its group", endpoint=name, pid=pid)
            group = None
        self._entries[name] = _Entry(group, limits, limits.maximum if group is None else group.size())
        self._tell(name, self.unkept(limits))

    def change(self, name: str, limits: ComputeLimits) -> str:
        """Other limits of one that runs; what of them is not kept to. Raises `LimitsUnkeptError`."""
        self.check(name, limits)
        entry = self._entries[name]
        entry.limits, entry.size = limits, limits.maximum
        return self._apply(name, entry)

    def left_behind(self) -> list[str]:
        """Endpoints of groups that are there and belong to nobody who runs."""
        return [name for name in self._cgroups.groups() if name not in self._entries]

    def limits(self, name: str) -> ComputeLimits:
        entry = self._entries.get(name)
        return NO_LIMITS if entry is None else entry.limits

    def _apply(self, name: str, entry: _Entry) -> str:
        """Has the kernel keep to the size; why it does not, or nothing."""
        group, size = entry.group, entry.size
        unkept = self.unkept(entry.limits)
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
