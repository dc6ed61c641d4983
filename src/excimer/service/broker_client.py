"""The connection to the broker: publish statuses, hear others', keep the latest of each timeline.

The broker may be away at any time, also at the start: `BrokerClient` connects in the background
and reconnects for ever. While it is away, publishing does nothing (a status is repeated each
second anyway) and the caches keep what they last heard, with its age.

Not here: what the messages mean (`excimer.wire.broker`), and any guarantee of delivery.
"""

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Final, Generic, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from excimer.base.clock import Clock, Monotonic
from excimer.base.errors import RefusedError
from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.service.logs import get_logger
from excimer.service.tasks import TaskScope
from excimer.wire.broker import (
    PageserverTimelineStatus,
    SafekeeperTimelineStatus,
    TimelineStatus,
    decode_status,
    encode_status,
    pageserver_subject,
    safekeeper_subject,
    subject_of,
)

FRESH_S: Final = 5.0
"""A status older than this says that its sender is gone."""

FORGET_S: Final = 3600.0
RECONNECT_WAIT_S: Final = 1
CONNECT_TIMEOUT_S: Final = 2

S = TypeVar("S", SafekeeperTimelineStatus, PageserverTimelineStatus)

log = get_logger(__name__)


class LatestStatuses(Generic[S]):
    """The newest status of each timeline from each node, and waiting for news."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._latest: dict[tuple[TenantId, TimelineId], dict[NodeId, tuple[S, Monotonic]]] = {}
        self._news = asyncio.Condition()
        self._listeners: list[Callable[[S], None]] = []

    def add_listener(self, listener: Callable[[S], None]) -> None:
        """Calls `listener` for each status heard, on the event loop; it must not block."""
        self._listeners.append(listener)

    def of_timeline(self, tenant_id: TenantId, timeline_id: TimelineId, fresh_s: float = FRESH_S) -> list[S]:
        """Statuses not older than `fresh_s`, one per node, in the order of node ids."""
        oldest = self._clock.monotonic() - fresh_s
        by_node = self._latest.get((tenant_id, timeline_id), {})
        return [status for _, (status, heard) in sorted(by_node.items()) if heard >= oldest]

    async def wait_for_news(self, timeout_s: float) -> bool:
        """Waits until any status arrives. False after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._news:
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def put(self, node_id: NodeId, status: S) -> None:
        self._latest.setdefault((status.tenant_id, status.timeline_id), {})[node_id] = (
            status,
            self._clock.monotonic(),
        )
        for listener in self._listeners:
            listener(status)
        async with self._news:
            self._news.notify_all()

    def forget_old(self) -> None:
        """Drops what has not been heard of for `FORGET_S`, so that deleted timelines do not pile up."""
        oldest = self._clock.monotonic() - FORGET_S
        for key, by_node in list(self._latest.items()):
            kept = {node: entry for node, entry in by_node.items() if entry[1] >= oldest}
            if kept:
                self._latest[key] = kept
            else:
                del self._latest[key]


class BrokerClient:
    """One connection of a process. Use as a context; `url` is ``nats://user:password@host:port``,
    or several of a cluster with commas between; reserved characters are percent-encoded.

    `safekeepers` and `pageservers` fill once `listen_safekeepers` / `listen_pageservers` was called.
    """

    def __init__(self, url: str, name: str, clock: Clock) -> None:
        self._url = url
        self._name = name
        self._client = Client()
        self._scope = TaskScope()
        self._subjects: set[str] = set()
        self._connected = asyncio.Event()
        self._closing = False
        self.safekeepers: LatestStatuses[SafekeeperTimelineStatus] = LatestStatuses(clock)
        self.pageservers: LatestStatuses[PageserverTimelineStatus] = LatestStatuses(clock)

    async def __aenter__(self) -> "BrokerClient":
        await self._scope.__aenter__()
        self._scope.supervise("broker connection", self._connect)
        self._scope.supervise("broker caches", self._forget_now_and_then)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        try:
            with contextlib.suppress(OSError, NatsError, TimeoutError):
                async with asyncio.timeout(1):
                    await self._client.close()
        finally:
            await self._scope.__aexit__(kind, error, trace)

    @property
    def is_connected(self) -> bool:
        return self._client.is_connected

    async def wait_until_connected(self, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(self._connected.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def publish(self, status: TimelineStatus) -> None:
        """Sends if connected, else does nothing. Never raises, never waits for the network."""
        if self._client.is_connected:
            with contextlib.suppress(OSError, NatsError):
                await self._client.publish(subject_of(status), encode_status(status))

    async def listen_safekeepers(
        self, tenant_id: TenantId | None = None, timeline_id: TimelineId | None = None
    ) -> None:
        """From now on `safekeepers` hears of one timeline, a tenant's, or (no arguments) all."""
        await self._listen(safekeeper_subject(tenant_id, timeline_id))

    async def listen_pageservers(
        self, tenant_id: TenantId | None = None, timeline_id: TimelineId | None = None
    ) -> None:
        """From now on `pageservers` hears of one timeline, a tenant's, or (no arguments) all."""
        await self._listen(pageserver_subject(tenant_id, timeline_id))

    async def _listen(self, subject: str) -> None:
        if subject not in self._subjects:
            self._subjects.add(subject)
            if self._connected.is_set():
                await self._client.subscribe(subject, cb=self._heard)

    async def _connect(self) -> None:
        servers, user, password = _credentials(self._url)
        await self._client.connect(
            servers,
            user=user,
            password=password,
            name=self._name,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_WAIT_S,
            connect_timeout=CONNECT_TIMEOUT_S,
            error_cb=self._failed,
            disconnected_cb=self._disconnected,
            reconnected_cb=self._reconnected,
        )
        self._connected.set()
        for subject in self._subjects:
            await self._client.subscribe(subject, cb=self._heard)
        log.info("broker connected", address=_address(self._url))

    async def _heard(self, message: Msg) -> None:
        try:
            status = decode_status(message.subject, message.data)
        except RefusedError as error:
            log.warning("broker message ignored", error=error)
            return
        if isinstance(status, SafekeeperTimelineStatus):
            await self.safekeepers.put(status.safekeeper_id, status)
        else:
            await self.pageservers.put(status.pageserver_id, status)

    async def _forget_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(FORGET_S / 10)
            self.safekeepers.forget_old()
            self.pageservers.forget_old()

    async def _failed(self, error: Exception) -> None:
        log.debug("broker connection trouble", error=error, address=_address(self._url))

    async def _disconnected(self) -> None:
        if not self._closing:
            log.warning("broker disconnected, will reconnect", address=_address(self._url))

    async def _reconnected(self) -> None:
        log.info("broker connected again", address=_address(self._url))


def _credentials(url: str) -> tuple[list[str], str | None, str | None]:
    """Servers without credentials, user, password; nats-py itself does not decode ``%24`` in URLs."""
    user = password = None
    servers = []
    for text in url.split(","):
        parts = urlsplit(text)
        credentials, _, place = parts.netloc.rpartition("@")
        if credentials:
            name, _, secret = credentials.partition(":")
            user, password = unquote(name), unquote(secret)
        servers.append(urlunsplit(parts._replace(netloc=place)))
    return servers, user, password


def _address(url: str) -> str:
    """The URL without its password, for the log."""
    return ",".join(urlsplit(text).netloc.rpartition("@")[2] for text in url.split(","))
