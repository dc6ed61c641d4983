"""Keeps readable what an endpoint that only reads may read: asks the pageserver for a lease and renews it.

A static endpoint needs one moment, a replica all from what it has replayed on: its lease moves with it.

A lease holds for a while (the tenant's `lsn_lease_length_s`) and is renewed three times as often, so that two
renewals in a row may fail. One that cannot be had for now is asked for again; if the history is gone, that is
said once, and what the endpoint has not read yet stays unreadable.

A static endpoint's is not given back here, because a manager that ends does not know whether its endpoint
goes on elsewhere or later; whoever stops the endpoint for good tells the controller. A replica begins at
another LSN the next time, and gives its lease back whenever it ends.

Not here: what the pageserver keeps for a lease (`excimer.storage.plan.retention`).
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from excimer.base.errors import RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn, format_lsn
from excimer.service.http_client import HttpClient, path_of
from excimer.service.logs import get_logger

log = get_logger(__name__)

CALL_TIMEOUT_S: Final = 5.0
RENEWALS_PER_LEASE: Final = 3
RENEW_AFTER_S_MIN: Final = 0.2
RENEW_AFTER_S_MAX: Final = 60.0
"""A pageserver that forgot its leases in a restart hears of them again within this."""
RETRY_AFTER_S: Final = 1.0
RELEASE_TIMEOUT_S: Final = 2.0


class LeaseRefusedError(RefusedError):
    """The history at the endpoint's LSN is gone."""


class LeasedMoment(NamedTuple):
    pageserver_http_address: str
    tenant_id: TenantId
    timeline_id: TimelineId
    token: Callable[[], str]
    """The newest: it is renewed."""
    lsn: Callable[[], Lsn]
    """From which LSN on, or (not `onwards`) which one."""
    onwards: bool
    holder: str


class LsnLease:
    def __init__(self, moment: LeasedMoment) -> None:
        self._moment = moment
        self._wait_s = RETRY_AFTER_S

    async def acquire(self) -> None:
        """One try, before anything is read. Raises `LeaseRefusedError`; unreachable is no error yet."""
        try:
            await self._ask()
        except RetryableError as error:
            log.warning("no lease on the endpoint's LSN yet, will ask again", error=error)

    async def run(self) -> None:
        """Renews it until cancelled, or until the history is gone."""
        while True:
            await asyncio.sleep(self._wait_s)
            try:
                await self._ask()
            except RetryableError as error:
                self._wait_s = RETRY_AFTER_S
                log.warning("the lease on the endpoint's LSN is not renewed, trying again", error=error)
            except LeaseRefusedError as error:
                log.error("what this endpoint has not read yet is gone", error=error)
                return

    async def release(self) -> None:
        """Gives it back. If the pageserver cannot be told, the lease runs out by itself."""
        moment = self._moment
        client = HttpClient(
            "the pageserver", moment.pageserver_http_address, moment.token(), timeout_s=RELEASE_TIMEOUT_S
        )
        path = path_of(
            *("v1", "tenant", moment.tenant_id, "timeline", moment.timeline_id, "lsn_lease"), moment.holder
        )
        try:
            await client.call("DELETE", path)
        except (RetryableError, RefusedError) as error:
            log.warning("the lease on the endpoint's history runs out by itself", error=error)

    async def _ask(self) -> None:
        moment = self._moment
        lsn = moment.lsn()
        client = HttpClient(
            "the pageserver", moment.pageserver_http_address, moment.token(), timeout_s=CALL_TIMEOUT_S
        )
        path = path_of("v1", "tenant", moment.tenant_id, "timeline", moment.timeline_id, "lsn_lease")
        try:
            body = {"lsn": format_lsn(lsn), "holder": moment.holder, "onwards": moment.onwards}
            answer: Any = await client.post(path, body)
            length_s = float(answer["valid_for_s"])
        except RefusedError as error:
            raise LeaseRefusedError(f"LSN {format_lsn(lsn)} cannot be kept: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise RetryableError(f"the pageserver's answer to a lease is not understood: {error}") from error
        self._wait_s = min(max(length_s / RENEWALS_PER_LEASE, RENEW_AFTER_S_MIN), RENEW_AFTER_S_MAX)
