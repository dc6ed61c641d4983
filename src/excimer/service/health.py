"""Health: what `/healthz` answers. A service is ready once started and while all its checks hold.

A *warning* is what somebody should look at while the service does its work, which it then calls degraded:
starting it again would not help.

Not here: restarting anything; that is the business of whoever asks.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

HTTP_OK = 200
HTTP_UNAVAILABLE = 503


@dataclass(slots=True)
class Health:
    """Set by the service, read by its HTTP endpoint. `problems` and `warnings`: what, a sentence."""

    service: str
    ready: bool = False
    problems: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str | int] = field(default_factory=dict)
    on_ask: Callable[[], None] | None = None
    """Called before each answer: what only somebody who asks wants to know is looked up then."""

    def report(self, check: str, problem: str | None) -> None:
        """Records that `check` fails because of `problem`, or (None) that it holds."""
        if problem is None:
            self.problems.pop(check, None)
        else:
            self.problems[check] = problem

    def warn(self, about: str, warning: str | None) -> None:
        """Records something to look at, or (None) that it is no more. The service stays well."""
        if warning is None:
            self.warnings.pop(about, None)
        else:
            self.warnings[about] = warning

    @property
    def is_well(self) -> bool:
        return self.ready and not self.problems

    def answer(self) -> tuple[int, bytes]:
        """HTTP status and JSON body. The pid tells a service from another one that took its port."""
        if self.on_ask is not None:
            self.on_ask()
        well = "degraded" if self.warnings else "ok"
        status = "starting" if not self.ready else "unhealthy" if self.problems else well
        body = {
            "status": status,
            "service": self.service,
            "pid": os.getpid(),
            "problems": self.problems,
            "warnings": self.warnings,
            **self.facts,
        }
        return (HTTP_OK if self.is_well else HTTP_UNAVAILABLE), msgspec.json.encode(body)
