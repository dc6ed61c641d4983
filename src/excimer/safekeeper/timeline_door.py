"""How a connection gets to a timeline, whichever protocol it speaks: it names one and shows a token.

Not here: who issues tokens; the HTTP API, which asks for a token before it looks at what is wanted.
"""

from excimer.base.clock import Clock
from excimer.base.ids import TenantId, TimelineId
from excimer.safekeeper.registry import TimelineRegistry
from excimer.safekeeper.timeline import SafekeeperTimeline
from excimer.wire.auth import Scope, TokenVerifier, require_tenant


class TimelineDoor:
    """Shared by the ports; may be used from any thread."""

    def __init__(self, timelines: TimelineRegistry, verifier: TokenVerifier, clock: Clock) -> None:
        self._timelines = timelines
        self._verifier = verifier
        self._clock = clock

    def enter(self, token: str, tenant_id: TenantId, timeline_id: TimelineId) -> SafekeeperTimeline:
        """Raises AuthError, `TimelineNotFoundError`, CorruptionError for a damaged timeline."""
        claims = self._verifier.verify(token, self._clock.now())
        require_tenant(claims, tenant_id, Scope.SAFEKEEPER_DATA)
        return self._timelines.find(tenant_id, timeline_id)
