"""The connection to the broker: publish statuses, hear others', keep the latest of each timeline.

The broker may be away at any time, also at the start: `BrokerClient` connects in the background
and reconnects for ever. While it is away, publishing does nothing (a status is repeated anyway) and
the caches keep what they last heard. Whoever listens to safekeepers asks them for everything at each
connection, because what stands still is repeated rarely.

Not here: what the messages mean (`excimer.wire.broker`), and any guarantee of delivery.
"""

import asyncio
import contextlib
import ssl
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
from excimer.service.tls import client_tls
from excimer.wire.broker import (
    ALIVE_PREFIX,
    ASK_SAFEKEEPERS_SUBJECT,
    PageserverTimelineStatus,
    SafekeeperTimelineStatus,
    TimelineStatus,
    alive_subject,
    decode_status,
    encode_status,
    pageserver_subject,
    parse_alive_subject,
    safekeeper_subject,
    subject_of,
)

FRESH_S: Final = 5.0
"""A node that has not been heard of for so long is gone, and what it said does not count."""

FORGET_S: Final = 3600.0
RECONNECT_WAIT_S: Final = 1
CONNECT_TIMEOUT_S: Final = 2

S = TypeVar("S", SafekeeperTimelineStatus, PageserverTimelineStatus)

log = get_logger(__name__)


class LatestStatuses(Generic[S]):
    """The newest status of each timeline from each node, and waiting for news of one."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._latest: dict[tuple[TenantId, TimelineId], dict[NodeId, tuple[S, Monotonic]]] = {}
        self._seen: dict[NodeId, Monotonic] = {}
        self._waiting: dict[tuple[TenantId, TimelineId], set[asyncio.Future[None]]] = {}

    def of_timeline(self, tenant_id: TenantId, timeline_id: TimelineId, fresh_s: float = FRESH_S) -> list[S]:
        """Statuses of nodes that were heard of in the last `fresh_s`, in the order of node ids."""
        oldest = self._clock.monotonic() - fresh_s
        by_node = self._latest.get((tenant_id, timeline_id), {})
        return [status for node_id, (status, _) in sorted(by_node.items()) if self._seen[node_id] >= oldest]

    async def wait_for_news(
        self, tenant_id: TenantId, timeline_id: TimelineId, timeout_s: float | None
    ) -> bool:
        """Waits until a status of the timeline arrives. False after `timeout_s`; None waits for ever."""
        key = tenant_id, timeline_id
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, set()).add(arrived)
        try:
            async with asyncio.timeout(timeout_s):
                await arrived
        except TimeoutError:
            return False
        finally:
            waiting = self._waiting[key]
            waiting.discard(arrived)
            if not waiting:
                del self._waiting[key]
        return True

    def put(self, node_id: NodeId, status: S) -> None:
        key = status.tenant_id, status.timeline_id
        now = self._clock.monotonic()
        self._seen[node_id] = now
        self._latest.setdefault(key, {})[node_id] = (status, now)
        self._wake(key)

    def alive(self, node_id: NodeId) -> None:
        """The node lives, and what it said last still holds; which is news if it was thought to be gone."""
        now = self._clock.monotonic()
        was_gone = now - self._seen.get(node_id, now) > FRESH_S
        self._seen[node_id] = now
        if was_gone:
            for key in list(self._waiting):
                self._wake(key)

    def _wake(self, key: tuple[TenantId, TimelineId]) -> None:
        for arrived in self._waiting.get(key, ()):
            if not arrived.done():
                arrived.set_result(None)

    def forget_old(self) -> None:
        """Drops what has not been heard of for `FORGET_S`, so that deleted timelines do not pile up."""
        oldest = self._clock.monotonic() - FORGET_S
        for key, by_node in list(self._latest.items()):
            kept = {node: entry for node, entry in by_node.items() if entry[1] >= oldest}
            if kept:
                self._latest[key] = kept
            else:
                del self._latest[key]


class _NatsClient(Client):
    """Makes each connection, also after a loss, with the process's certificates as they are then."""

    @property
    def ssl_context(self) -> ssl.SSLContext:
        return client_tls() or super().ssl_context


class BrokerClient:
    """One connection of a process. Use as a context; `url` is ``nats://user:password@host:port``,
    or several of a cluster with commas between; reserved characters are percent-encoded.

    `safekeepers` and `pageservers` fill once `listen_safekeepers` / `listen_pageservers` was called.
    """

    def __init__(self, url: str, name: str, clock: Clock) -> None:
        self._url = url
        self._name = name
        self._client = _NatsClient()
        self._scope = TaskScope()
        self._subjects: set[str] = set()
        self._connected = asyncio.Event()
        self._closing = False
        self._asks = False
        self._on_asked: Callable[[], None] | None = None
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
        await self._send(subject_of(status), encode_status(status))

    async def tell_alive(self, safekeeper_id: NodeId) -> None:
        """Says that this safekeeper lives. Never raises, never waits for the network."""
        await self._send(alive_subject(safekeeper_id))

    async def listen_safekeepers(
        self, tenant_id: TenantId | None = None, timeline_id: TimelineId | None = None
    ) -> None:
        """From now on `safekeepers` hears of one timeline, a tenant's, or (no arguments) all.

        All safekeepers are asked, now and at each new connection.
        """
        self._asks = True
        await self._listen(safekeeper_subject(tenant_id, timeline_id))
        await self._listen(alive_subject())
        await self._send(ASK_SAFEKEEPERS_SUBJECT)

    async def answer_asking(self, on_asked: Callable[[], None]) -> None:
        """`on_asked` is called on the event loop when somebody wants to hear of all timelines, and at
        each new connection: what was published while there was none is lost.
        """
        self._on_asked = on_asked
        await self._listen(ASK_SAFEKEEPERS_SUBJECT)

    async def listen_pageservers(
        self, tenant_id: TenantId | None = None, timeline_id: TimelineId | None = None
    ) -> None:
        """From now on `pageservers` hears of one timeline, a tenant's, or (no arguments) all."""
        await self._listen(pageserver_subject(tenant_id, timeline_id))

    async def _send(self, subject: str, payload: bytes = b"") -> None:
        if self._client.is_connected:
            with contextlib.suppress(OSError, NatsError):
                await self._client.publish(subject, payload)

    async def _ask_and_answer(self) -> None:
        """Both sides have missed something while there was no connection."""
        if self._asks:
            await self._send(ASK_SAFEKEEPERS_SUBJECT)
        if self._on_asked is not None:
            self._on_asked()

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
            tls=client_tls() if self._url.startswith("tls://") else None,
            error_cb=self._failed,
            disconnected_cb=self._disconnected,
            reconnected_cb=self._reconnected,
        )
        self._connected.set()
        for subject in self._subjects:
            await self._client.subscribe(subject, cb=self._heard)
        await self._ask_and_answer()
        log.info("broker connected", address=_address(self._url))

    async def _heard(self, message: Msg) -> None:
        if message.subject == ASK_SAFEKEEPERS_SUBJECT:
            if self._on_asked is not None:
                self._on_asked()
            return
        try:
            if message.subject.startswith(ALIVE_PREFIX + "."):
                self.safekeepers.alive(parse_alive_subject(message.subject))
                return
            status = decode_status(message.subject, message.data)
        except RefusedError as error:
            log.warning("broker message ignored", error=error)
            return
        if isinstance(status, SafekeeperTimelineStatus):
            self.safekeepers.put(status.safekeeper_id, status)
        else:
            self.pageservers.put(status.pageserver_id, status)

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
        await self._ask_and_answer()


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
