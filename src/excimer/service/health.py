"""Health: what `/healthz` answers. A service is ready once started and while all its checks hold.

Not here: restarting anything; that is the business of whoever asks.
"""

import os
from dataclasses import dataclass, field

import msgspec

HTTP_OK = 200
HTTP_UNAVAILABLE = 503


@dataclass(slots=True)
class Health:
    """Set by the service, read by its HTTP endpoint. `problems` maps what is wrong to a sentence."""

    service: str
    ready: bool = False
    problems: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str | int] = field(default_factory=dict)

    def report(self, check: str, problem: str | None) -> None:
        """Records that `check` fails because of `problem`, or (None) that it holds."""
        if problem is None:
            self.problems.pop(check, None)
        else:
            self.problems[check] = problem

    @property
    def is_well(self) -> bool:
        return self.ready and not self.problems

    def answer(self) -> tuple[int, bytes]:
        """HTTP status and JSON body. The pid tells a service from another one that took its port."""
        status = "starting" if not self.ready else "unhealthy" if self.problems else "ok"
        body = {
            "status": status,
            "service": self.service,
            "pid": os.getpid(),
            "problems": self.problems,
            **self.facts,
        }
        return (HTTP_OK if self.is_well else HTTP_UNAVAILABLE), msgspec.json.encode(body)
