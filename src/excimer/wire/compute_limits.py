"""How much CPU and memory an endpoint may have: between a minimum that it always has and a maximum.

CPU is in thousandths of a core, memory in MiB; 0 is no limit. Both ends of a range are given, or neither.
What PostgreSQL cannot change while it runs is chosen from the minimum (`shared_buffers_mib`), so that it fits
whatever size the endpoint has; the rest of its memory is backends' and the kernel's cache of its files.
"""

from typing import Annotated, Final

import msgspec

Milli = Annotated[int, msgspec.Meta(ge=0, le=1_024_000)]
Mebibytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 26)]

CPU_MILLI_MIN: Final = 100
MEMORY_MIB_MIN: Final = 256
CPU_MILLI_MAX: Final = 256_000
MEMORY_MIB_MAX: Final = 1 << 24
"""16 TiB."""
SHARED_BUFFERS_MIB_MAX: Final = 8192
"""What lies there lies a second time in the kernel's cache, and only that one grows and shrinks."""


class ComputeSize(msgspec.Struct, frozen=True):
    """What an endpoint may use now; 0: no limit."""

    cpu_milli: Milli = 0
    memory_mib: Mebibytes = 0


class ComputeLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    cpu_min_milli: Milli = 0
    cpu_max_milli: Milli = 0
    memory_min_mib: Mebibytes = 0
    memory_max_mib: Mebibytes = 0

    @property
    def minimum(self) -> ComputeSize:
        return ComputeSize(self.cpu_min_milli, self.memory_min_mib)

    @property
    def maximum(self) -> ComputeSize:
        return ComputeSize(self.cpu_max_milli, self.memory_max_mib)

    @property
    def limited(self) -> tuple[str, ...]:
        """The controllers of the kernel that it takes to keep to them."""
        wanted = {"cpu": self.cpu_max_milli, "memory": self.memory_max_mib}
        return tuple(name for name, value in wanted.items() if value)


NO_LIMITS: Final = ComputeLimits()


def limits_problem(limits: ComputeLimits) -> str | None:
    """Why they cannot be, as a sentence; or None."""
    for name, low, high, least, most, unit in (
        ("CPU", limits.cpu_min_milli, limits.cpu_max_milli, CPU_MILLI_MIN, CPU_MILLI_MAX, "millicores"),
        ("memory", limits.memory_min_mib, limits.memory_max_mib, MEMORY_MIB_MIN, MEMORY_MIB_MAX, "MiB"),
    ):
        if low == high == 0:
            continue
        if not least <= low <= most or not least <= high <= most:
            return f"limits of {name} are {least} to {most} {unit}, or none (0 to 0): {low} to {high} are not"
        if low > high:
            return f"the minimum of {name}, {low} {unit}, is above its maximum, {high} {unit}"
    return None


def shared_buffers_mib(limits: ComputeLimits) -> int | None:
    """A quarter of the minimum, as PostgreSQL's documentation advises; None: nothing is said about memory."""
    if not limits.memory_min_mib:
        return None
    return min(limits.memory_min_mib // 4, SHARED_BUFFERS_MIB_MAX)
