"""What becomes of a service that has ended: left alone, or started again after a wait. Pure.

=============================== ==================================================================
it ended                        then
=============================== ==================================================================
with exit code 0, or of SIGTERM it was stopped on purpose (SIGTERM came before it could handle it): left alone
with another, soon after it was it cannot start: left alone, and whoever started it hears why
started by a person
otherwise                       started again after `FIRST_WAIT_S`, doubling up to `WAIT_MAX_S`; the
                                first wait again once it has lived for `PROVEN_S`
=============================== ==================================================================
"""

import signal
from dataclasses import dataclass
from typing import Final

FIRST_WAIT_S: Final = 0.25
WAIT_MAX_S: Final = 30.0
STOPPED: Final = (0, -signal.SIGTERM)
START_S: Final = 10.0
"""Who ends by itself within this time has never served."""
PROVEN_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Life:
    """One life of a process that has ended."""

    lived_s: float
    exit_code: int | None
    """As `subprocess` has it, negative for a signal; None when that cannot be known."""
    is_restart: bool
    """Whether we had started it, rather than a person."""


@dataclass(frozen=True, slots=True)
class Leave:
    """It stays ended."""

    is_failure: bool


@dataclass(frozen=True, slots=True)
class Restart:
    wait_s: float
    failures: int
    """In a row, this one included."""


def plan_restart(life: Life, failures: int) -> Leave | Restart:
    """`failures` have come before in a row."""
    if life.exit_code in STOPPED:
        return Leave(is_failure=False)
    has_failed_by_itself = life.exit_code is not None and life.exit_code > 0
    if has_failed_by_itself and not life.is_restart and life.lived_s < START_S:
        return Leave(is_failure=True)
    failures = 1 if life.lived_s >= PROVEN_S else failures + 1
    return Restart(min(WAIT_MAX_S, FIRST_WAIT_S * 2.0 ** min(failures - 1, 30)), failures)
