"""A client of PostgreSQL's replication protocol: streams WAL from a walsender or a safekeeper.

Bytes go to a `WalSink` straight from the socket's callback, without a task in between, because commit
latency of a compute hangs on it. `WalStream` is the sink for readers that rather await chunks, as the
pageserver does: it merges what has arrived and stops reading the socket while too much waits.

Keepalives are answered here. Positions are reported when `report` is called and once a second.

**Not here:** reconnecting, choosing where to connect, what the WAL says.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, cast

from excimer.base.address import Address
from excimer.base.clock import unix_to_timestamptz
from excimer.base.errors import ExcimerError, RetryableError
from excimer.base.lsn import INVALID_LSN, Lsn, format_lsn
from excimer.service.tls import native_client_tls
from excimer.service.tls_protocol import connect_tls
from excimer.wire.pg_client import (
    ClientConnection,
    ClientEvent,
    CopyBothStarted,
    CopyDataReceived,
    CopyEnded,
    PostgresError,
    QueryDone,
    QueryFailed,
    Ready,
)
from excimer.wire.pg_messages import TERMINATE, ProtocolViolationError, encode_copy_data
from excimer.wire.replication import (
    POSTGRES_TIMELINE,
    ConfirmDurable,
    Keepalive,
    StartReplication,
    SystemIdentity,
    WalData,
    decode_from_server,
    decode_system_identity,
    decode_whole_wal,
    encode_whole_status,
    format_confirm_durable,
    format_start_replication,
)

CONNECT_TIMEOUT_S = 10.0
REPORT_INTERVAL_S = 1.0
STREAM_BUFFER_SIZE_BYTES = 8 << 20
"""A `WalStream` stops reading its socket while more than this waits."""
_DUPLICATE_OBJECT = "42710"
_RETRYABLE_SQLSTATE_CLASSES = ("08", "53", "57")


class ReplicationLostError(RetryableError):
    """The WAL stream ended: the other side closed it, went away, or is not ready."""


class WalSink(Protocol):
    """Takes WAL as it arrives, in order and without gaps."""

    def wal_received(self, start_lsn: Lsn, data: bytes) -> None: ...

    def stream_ended(self, error: ExcimerError) -> None:
        """Comes once, last."""


class ReplicationClient(asyncio.Protocol):
    """One connection. Create it with `connect_replication`; `close` it in a `finally`."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[ClientEvent] = self._loop.create_future()
        self._sink: WalSink | None = None
        self._expected_lsn = INVALID_LSN
        self._is_streaming = False
        self._positions = (INVALID_LSN, INVALID_LSN, INVALID_LSN)
        self._report_timer: asyncio.TimerHandle | None = None
        self._error: ExcimerError | None = None
        self.server_end_lsn = INVALID_LSN
        """The newest end of WAL that the server has told: how far behind this reader is."""

    @property
    def server_pid(self) -> int | None:
        """Of the walsender, if the server has said so."""
        return self._connection.server_pid

    async def identify_system(self) -> SystemIdentity:
        """Raises PostgresError, `ReplicationLostError`."""
        rows = await self._query("IDENTIFY_SYSTEM")
        return decode_system_identity(rows[0] if rows else [])

    async def show(self, name: str) -> str:
        """A setting of the server. Raises PostgresError, `ReplicationLostError`."""
        rows = await self._query(f"SHOW {name}")
        if not rows or not rows[0] or rows[0][0] is None:
            raise ProtocolViolationError(f"no answer to SHOW {name}")
        return rows[0][0].decode()

    async def reserve_wal(self, slot: str) -> None:
        """Makes a physical slot, unless it exists, so that the server keeps WAL that was not confirmed.

        Without one, a checkpoint may remove a segment while a walsender still reads it.
        Raises PostgresError, `ReplicationLostError`.
        """
        try:
            await self._query(f"CREATE_REPLICATION_SLOT {slot} PHYSICAL RESERVE_WAL")
        except PostgresError as error:
            if error.sqlstate != _DUPLICATE_OBJECT:
                raise

    async def query(self, statement: str) -> list[list[bytes | None]]:
        """Rows, as text, of SQL on a connection made with the parameter `replication=database`.

        Several statements are one transaction. Raises PostgresError, `ReplicationLostError`.
        """
        return await self._query(statement)

    async def confirm_durable(self, lsn: Lsn) -> None:
        """Tells a safekeeper that all below `lsn` is durable in object storage; it has heard on return.

        Raises PostgresError (refused), `ReplicationLostError`.
        """
        await self._query(format_confirm_durable(ConfirmDurable(lsn)))

    async def start_physical(self, start_lsn: Lsn, sink: WalSink, *, slot: str | None = None) -> None:
        """Begins to stream WAL from exactly `start_lsn` into the sink.

        Returns once the server has agreed; the sink may have been called by then.
        Raises PostgresError (the server does not have this WAL), `ReplicationLostError`.
        """
        self._expected_lsn = start_lsn
        self._sink = sink
        try:
            await self._ask(
                format_start_replication(StartReplication(start_lsn, POSTGRES_TIMELINE, slot)),
                CopyBothStarted,
            )
        except ExcimerError:
            self._sink = None
            raise

    def report(self, *, write_lsn: Lsn, flush_lsn: Lsn, apply_lsn: Lsn) -> None:
        """Tells the server at once how far we are, if that has changed."""
        positions = (write_lsn, flush_lsn, apply_lsn)
        if positions != self._positions:
            self._positions = positions
            self._send_status()

    @property
    def is_steady(self) -> bool:
        """Whether WAL comes, message by message: none waits to be sent, none has come in part."""
        transport = self._transport
        return (
            self._is_streaming
            and self._sink is not None
            and self._connection.is_between_messages
            and transport is not None
            and not transport.is_closing()
            and transport.is_reading()
            and transport.get_write_buffer_size() == 0
        )

    def fileno(self) -> int:
        """Of its socket, for native code to use between two calls while it is steady; see `relayed`."""
        assert self._transport is not None
        descriptor: int = self._transport.get_extra_info("socket").fileno()
        return descriptor

    def relayed(self, expected_lsn: Lsn, server_end_lsn: Lsn, reported_lsn: Lsn, unsent: bytes) -> None:
        """WAL below `expected_lsn` came, and `reported_lsn` was told, past this client, but for `unsent`."""
        self._expected_lsn = expected_lsn
        self.server_end_lsn = server_end_lsn
        self._positions = (reported_lsn, reported_lsn, reported_lsn)
        if unsent and self._transport is not None:
            self._transport.write(unsent)

    def send_feedback(self, payload: bytes) -> None:
        """Passes on what a hot standby has said that it needs: CopyData as `encode_feedback` makes it."""
        if self._is_streaming and self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_copy_data(payload))

    def pause(self) -> None:
        """Stops reading the socket; the server is held back by TCP."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self) -> None:
        """Ends the connection; the sink is not called again. May be called twice."""
        self._sink = None
        if self._report_timer is not None:
            self._report_timer.cancel()
        if self._transport is not None:
            self._transport.write(TERMINATE)
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            if self._is_streaming and self._connection.is_between_messages:
                message = decode_whole_wal(data)
                if message is not None:
                    self._wal_data(message)
                    return
            self._connection.feed(data)
            while (event := self._connection.next_event()) is not None:
                self._handle(event)
            self._flush()
        except ProtocolViolationError as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        why = f": {exc}" if exc else ""
        self._end(ReplicationLostError(f"the WAL source closed the connection{why}"))

    async def wait_ready(self) -> None:
        """Until start-up is done. Raises PostgresError, `ReplicationLostError`."""
        await self._wait_answer(Ready)

    def _handle(self, event: ClientEvent) -> None:
        match event:
            case CopyDataReceived(payload):
                self._copy_data(payload)
            case CopyEnded():
                self._end(ReplicationLostError("the WAL source ended the stream"))
            case CopyBothStarted():
                self._is_streaming = True
                self._schedule_report()
                self._resolve(event)
            case QueryFailed(error):
                if not self._resolve(event):
                    self._end(_as_failure(error))
            case Ready() | QueryDone():
                self._resolve(event)

    def _copy_data(self, payload: bytes) -> None:
        message = decode_from_server(payload)
        if isinstance(message, Keepalive):
            self.server_end_lsn = message.server_end_lsn
            if message.is_reply_requested:
                self._send_status()
            return
        self._wal_data(message)

    def _wal_data(self, message: WalData) -> None:
        if message.start_lsn != self._expected_lsn:
            raise ProtocolViolationError(
                f"WAL of {format_lsn(message.start_lsn)} came where {format_lsn(self._expected_lsn)} was due"
            )
        self._expected_lsn = Lsn(message.start_lsn + len(message.data))
        self.server_end_lsn = message.server_end_lsn
        if self._sink is not None:
            self._sink.wal_received(message.start_lsn, message.data)

    def _resolve(self, event: ClientEvent) -> bool:
        if self._answer.done():
            return False
        self._answer.set_result(event)
        return True

    def _end(self, error: ExcimerError) -> None:
        """Remembers the first reason, tells it to whoever waits, and closes the socket."""
        if self._error is None:
            self._error = error
        if not self._answer.done():
            self._answer.set_exception(self._error)
            self._answer.exception()  # whoever awaits it still gets it; nobody need to
        if self._report_timer is not None:
            self._report_timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.stream_ended(self._error)

    async def _query(self, text: str) -> list[list[bytes | None]]:
        event = await self._ask(text, QueryDone)
        assert isinstance(event, QueryDone)
        return event.rows

    async def _ask(self, text: str, expected: type[ClientEvent]) -> ClientEvent:
        if self._error is not None:
            raise self._error
        self._answer = self._loop.create_future()
        self._connection.query(text)
        self._flush()
        return await self._wait_answer(expected)

    async def _wait_answer(self, expected: type[ClientEvent]) -> ClientEvent:
        event = await self._answer
        if isinstance(event, QueryFailed):
            raise _as_failure(event.error)
        if not isinstance(event, expected):
            raise ProtocolViolationError(f"{event!r} is not an answer to what was asked")
        return event

    def _send_status(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        now = unix_to_timestamptz(time.time())
        self._transport.write(encode_whole_status(self._positions, now))

    def _schedule_report(self) -> None:
        self._report_timer = self._loop.call_later(REPORT_INTERVAL_S, self._report_again)

    def _report_again(self) -> None:
        self._send_status()
        self._schedule_report()

    def _flush(self) -> None:
        output = self._connection.take_output()
        if output and self._transport is not None:
            self._transport.write(output)


def _as_failure(error: PostgresError) -> ExcimerError:
    """Refusals that time heals (starting up, shutting down, out of connections) become retryable."""
    if error.sqlstate[:2] in _RETRYABLE_SQLSTATE_CLASSES:
        return ReplicationLostError(str(error))
    return error


async def connect_replication(
    address: Address,
    *,
    user: str,
    application_name: str,
    password: str | None = None,
    options: str | None = None,
    parameters: Mapping[str, str] | None = None,
) -> ReplicationClient:
    """A connection in replication mode, authenticated and ready.

    `options` names the timeline at a safekeeper (`wire.replication.format_options`) and `password` is
    the JWT. Raises PostgresError (refused), `ReplicationLostError` (cannot connect now).
    """
    startup = {"user": user, "replication": "true", "application_name": application_name}
    if options is not None:
        startup["options"] = options
    startup.update(parameters or {})
    loop = asyncio.get_running_loop()

    def make() -> ReplicationClient:
        return ReplicationClient(ClientConnection(startup, password))

    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            if address.unix_path is not None:
                _, client = await loop.create_unix_connection(make, address.unix_path)
            else:
                client = await _connect(make, address)
            is_ready = False
            try:
                await client.wait_ready()
                is_ready = True
            finally:
                if not is_ready:
                    client.close()
    except (OSError, TimeoutError) as error:
        raise ReplicationLostError(f"cannot connect to {address}: {error or 'no answer'}") from error
    return client


async def _connect(make: Callable[[], ReplicationClient], address: Address) -> ReplicationClient:
    """Over TCP. Raises OSError."""
    context = native_client_tls()
    if context is not None:
        return await connect_tls(make, address.host, address.port, context)
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(make, address.host, address.port)
    return client


class WalChunk(NamedTuple):
    start_lsn: Lsn
    data: bytes


class WalStream:
    """A sink to await chunks from; memory stays below `STREAM_BUFFER_SIZE_BYTES` and one socket read."""

    def __init__(self, client: ReplicationClient) -> None:
        self._client = client
        self._parts: list[bytes] = []
        self._size_bytes = 0
        self._start_lsn = INVALID_LSN
        self._error: ExcimerError | None = None
        self._arrived = asyncio.Event()

    def wal_received(self, start_lsn: Lsn, data: bytes) -> None:
        if not self._parts:
            self._start_lsn = start_lsn
        self._parts.append(data)
        self._size_bytes += len(data)
        if self._size_bytes > STREAM_BUFFER_SIZE_BYTES:
            self._client.pause()
        self._arrived.set()

    def stream_ended(self, error: ExcimerError) -> None:
        self._error = error
        self._arrived.set()

    async def next_chunk(self) -> WalChunk:
        """All WAL that has arrived since the last call, as one chunk; waits for some.

        Raises what ended the stream, after all that had arrived was taken.
        """
        while not self._parts:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        chunk = WalChunk(self._start_lsn, data)
        self._parts, self._size_bytes = [], 0
        self._client.resume()
        return chunk


async def stream_wal(client: ReplicationClient, start_lsn: Lsn) -> WalStream:
    """Starts physical streaming on an idle connection and returns the stream to await chunks from."""
    stream = WalStream(client)
    await client.start_physical(start_lsn, stream)
    return stream
