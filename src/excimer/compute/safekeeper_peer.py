"""One safekeeper as the proposer sees it: a connection that is dialled again whenever it ends.

Messages go to the proposer straight from the socket's callback, and frames go to the socket straight
from the proposer: no task stands in the path of a commit.

Not here: what messages mean (`consensus.proposer`).
"""

import asyncio
from typing import Protocol, cast

from excimer._native.commit_path import Link
from excimer._native.led_wal import MemberWal
from excimer.base.address import Address
from excimer.base.errors import CorruptionError, ExcimerError, FencedError, RefusedError, RetryableError
from excimer.service.logs import get_logger
from excimer.service.tasks import Backoff
from excimer.service.tls import native_client_tls
from excimer.service.tls_protocol import TlsTransport, connect_tls
from excimer.wire.safekeeping import (
    AcceptorFrame,
    AcceptorMessage,
    AcceptorMessageParser,
    ErrorCode,
    ErrorResponse,
    StandbysNeed,
)

CONNECT_TIMEOUT_S = 5.0
SILENT_S_MAX = 10.0
"""A connected safekeeper answers each heartbeat; one that is silent this long is dialled anew."""
ANSWER_S_MAX = 2.5
"""One that has said nothing for this long is not counted on; heartbeats come each second."""
GREETING_S_MAX = 1.0
"""The same for one that has not said anything yet on its connection."""
RECONNECT = Backoff(first_s=0.05, most_s=2.0, reset_after_s=10.0)

log = get_logger(__name__)


class SafekeeperFailedError(RetryableError):
    """A safekeeper cannot serve now; its own sentence says why."""


class SafekeeperRefusedError(RefusedError):
    """A safekeeper will not have this proposer as it is: wrong token, unknown timeline, other PostgreSQL."""


class SafekeeperLacksTimelineError(SafekeeperRefusedError):
    """A safekeeper does not keep the timeline: it was deleted there, or has not come yet."""


class SafekeeperFencedError(FencedError):
    """A safekeeper says that this proposer must stop."""


class SafekeeperDamagedError(CorruptionError):
    """A safekeeper's copy of the timeline is damaged."""


_FAILURES: dict[int, type[ExcimerError]] = {
    ErrorCode.REFUSED: SafekeeperRefusedError,
    ErrorCode.NO_TIMELINE: SafekeeperLacksTimelineError,
    ErrorCode.FENCED: SafekeeperFencedError,
    ErrorCode.CORRUPTION: SafekeeperDamagedError,
}


class PeerOwner(Protocol):
    """The proposer, to its peers. Called on the event loop; must not block."""

    def peer_connected(self, peer: "SafekeeperPeer") -> None: ...
    def peer_received(self, peer: "SafekeeperPeer", message: AcceptorMessage) -> None:
        """Raises a RefusedError when this safekeeper cannot be used."""

    def peer_disconnected(self, peer: "SafekeeperPeer") -> None: ...
    def standbys_need(self, peer: "SafekeeperPeer", needs: StandbysNeed) -> None: ...


class SafekeeperPeer:
    """`maintain` keeps it connected; `send_frame` may be called at any time."""

    def __init__(self, index: int, address: Address, owner: PeerOwner) -> None:
        self.index = index
        self.address = address
        self.failure: ExcimerError | None = None
        """Why it is not connected, as last heard; None while it is."""
        self._owner = owner
        self._connection: PeerConnection | None = None
        self._is_mute = False
        """The connection before this one ended because nothing came on it."""

    @property
    def connection(self) -> "PeerConnection | None":
        return self._connection

    @property
    def is_connected(self) -> bool:
        return self._connection is not None

    def silence(self, *, is_elected: bool) -> str | None:
        """That it cannot be counted on now, and why if that is known; None while it answers.

        Before an election it is only expected to speak once: heartbeats, which it answers, come after.
        """
        if self._connection is None:
            why = f": {self.failure}" if self.is_hopeless else ""
            return f"safekeeper {self.address} does not answer{why}"
        has_spoken = self._connection.has_heard
        is_late = self._connection.silent_s > (ANSWER_S_MAX if has_spoken else GREETING_S_MAX)
        if has_spoken and not is_elected:
            is_late = False
        if is_late or (self._is_mute and not has_spoken):
            return f"safekeeper {self.address} does not answer"
        return None

    @property
    def is_hopeless(self) -> bool:
        """Not connected for a reason that time alone does not mend."""
        return self.failure is not None and not isinstance(self.failure, RetryableError)

    async def maintain(self) -> None:
        """Dials until cancelled: at once, then later and later. An open connection outlives it."""
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            try:
                if self._connection is None:
                    await self._dial()
                await self._wait_disconnected()
            except (OSError, TimeoutError) as error:
                self.failure = SafekeeperFailedError(
                    f"cannot reach safekeeper {self.address}: {error or 'no answer'}"
                )
            failures = 1 if loop.time() - started >= RECONNECT.reset_after_s else failures + 1
            if failures == 1 or failures % 10 == 0:
                log.warning("safekeeper is away", address=str(self.address), error=self.failure)
            await asyncio.sleep(RECONNECT.next_wait(failures))

    def send_frame(self, frame: bytes) -> None:
        """Sends it, if there is a connection."""
        if self._connection is not None:
            self._connection.write(frame)

    def check_alive(self) -> None:
        """Drops a connection on which nothing has come for too long."""
        connection = self._connection
        if connection is not None and connection.has_heard:
            self._is_mute = False
        if connection is not None and connection.silent_s > SILENT_S_MAX:
            self._is_mute = True
            self.drop(SafekeeperFailedError(f"safekeeper {self.address} does not answer"))

    def drop(self, failure: ExcimerError) -> None:
        """Ends the connection, if there is one, for `failure`; `maintain` makes a new one."""
        self.failure = failure
        if self._connection is not None:
            self._connection.abort()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    async def _dial(self) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            host, port = self.address
            context = native_client_tls()
            if context is None:
                await loop.create_connection(lambda: PeerConnection(self), host, port)
            else:
                await connect_tls(lambda: PeerConnection(self), host, port, context)

    async def _wait_disconnected(self) -> None:
        if self._connection is not None:
            await self._connection.closed.wait()

    def connection_made(self, connection: "PeerConnection") -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = connection
        self._owner.peer_connected(self)

    def received(self, message: AcceptorFrame) -> None:
        self.failure = None
        if isinstance(message, StandbysNeed):
            self._owner.standbys_need(self, message)
            return
        if isinstance(message, ErrorResponse):
            kind = _FAILURES.get(message.code, SafekeeperFailedError)
            self.drop(kind(f"safekeeper {self.address}: {message.text}"))
            return
        try:
            self._owner.peer_received(self, message)
        except RefusedError as error:
            self.drop(error)

    def connection_lost(self, connection: "PeerConnection", error: Exception | None) -> None:
        if connection is not self._connection:
            return
        self._connection = None
        if self.failure is None:
            self.failure = SafekeeperFailedError(
                f"safekeeper {self.address} closed the connection{f': {error}' if error else ''}"
            )
        self._owner.peer_disconnected(self)


class PeerConnection(asyncio.Protocol):
    """One socket of a peer. Commits may pass by it: `link`, then `relayed`, then `read_on`."""

    def __init__(self, peer: SafekeeperPeer) -> None:
        self._peer = peer
        self._parser = AcceptorMessageParser()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._made_at = self._heard_at = self._loop.time()
        self.closed = asyncio.Event()

    @property
    def is_steady(self) -> bool:
        """Whether the socket takes and gives whole messages: none waits to be sent, none has come in part."""
        transport = self._transport
        return (
            transport is not None
            and not transport.is_closing()
            and transport.get_write_buffer_size() == 0
            and self._parser.is_greeted
            and self._parser.rest_size_bytes == 0
        )

    def link(self, member: MemberWal) -> Link:
        """Its socket, for native code to use between two calls, while it is steady."""
        assert self._transport is not None
        fd = self._transport.get_extra_info("socket").fileno()
        return Link(fd, member, self._transport.tls if isinstance(self._transport, TlsTransport) else None)

    def relayed(self, unsent: bytes, *, has_heard: bool) -> None:
        """What the link did, but for `read_on`; `unsent` is as it goes to the socket."""
        if has_heard:
            self._heard_at = self._loop.time()
            self._peer.failure = None
        if unsent and isinstance(self._transport, TlsTransport):
            self._transport.write_sealed(unsent)
        elif unsent:
            self.write(unsent)

    def read_on(self, data: bytes) -> None:
        """Takes what came on the link and was not its own."""
        if self._transport is None or self._transport.is_closing():
            return
        if data:
            self.data_received(data)
        if isinstance(self._transport, TlsTransport):
            self._transport.read_on()

    @property
    def silent_s(self) -> float:
        return self._loop.time() - self._heard_at

    @property
    def has_heard(self) -> bool:
        return self._heard_at > self._made_at

    def write(self, frame: bytes) -> None:
        if self._transport is not None:
            self._transport.write(frame)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._peer.connection_made(self)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        try:
            messages = self._parser.feed(data)
        except RefusedError as error:
            self._peer.drop(error)
            return
        for message in messages:
            self._peer.received(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        self._peer.connection_lost(self, exc)
