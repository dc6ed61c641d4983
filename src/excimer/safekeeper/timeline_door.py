"""How a connection gets to a timeline, whichever protocol it speaks: it names one and shows a token.

Not here: who issues tokens; the HTTP API, which asks for a token before it looks at what is wanted.
"""

from excimer.base.clock import Clock
from excimer.base.ids import TenantId, TimelineId
from excimer.safekeeper.registry import TimelineRegistry
from excimer.safekeeper.timeline import SafekeeperTimeline
from excimer.wire.auth import Claims, Resource, Right, TokenVerifier, authorize


def confirms_durability(claims: Claims) -> bool:
    """Whether the holder's word that WAL is durable in object storage counts: only a pageserver's (D2)."""
    return claims.holder.startswith("pageserver:")


class TimelineDoor:
    """Shared by the ports; may be used from any thread."""

    def __init__(self, timelines: TimelineRegistry, verifier: TokenVerifier, clock: Clock) -> None:
        self._timelines = timelines
        self._verifier = verifier
        self._clock = clock

    def enter(
        self, token: str, right: Right, tenant_id: TenantId, timeline_id: TimelineId
    ) -> tuple[SafekeeperTimeline, Claims]:
        """The timeline, and who has come for it.

        Raises AuthError, `TimelineNotFoundError`, CorruptionError for a damaged timeline.
        """
        claims = self._verifier.verify(token, self._clock.now())
        authorize(claims, right, Resource(tenant_id, timeline_id))
        return self._timelines.find(tenant_id, timeline_id), claims

    def check_current(self, claims: Claims) -> None:
        """For a connection that lives on. Raises `TokenExpiredError`."""
        claims.check_current(self._clock.now())
