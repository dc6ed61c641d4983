"""One client of a port that speaks the server's side of PostgreSQL's physical replication protocol.

Over an asyncio stream whose TLS, if any, is done: events of `wire.pg_server` in, messages out, and the frames
of a copy in both directions.

Not here: who may connect, what the commands are answered, where the WAL comes from.
"""

import asyncio

from excimer.base.clock import UnixTime, unix_to_timestamptz
from excimer.base.lsn import Lsn
from excimer.wire import pg_messages as pg
from excimer.wire.pg_server import ServerConnection, ServerEvent, Terminated
from excimer.wire.replication import Keepalive, encode_keepalive, wal_data_head

_RECEIVE_SIZE_BYTES = 1 << 16


class ReplicationServerStream:
    """Reads and writes; nothing is sent for sure before `drain`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._protocol = ServerConnection()

    async def next_event(self) -> ServerEvent | None:
        """None when the client has closed. Raises `ProtocolViolationError`, OSError."""
        while True:
            event = self._protocol.next_event()
            self._writer.write(self._protocol.take_output())
            if event is not None:
                return None if isinstance(event, Terminated) else event
            data = await self._reader.read(_RECEIVE_SIZE_BYTES)
            if not data:
                return None
            self._protocol.feed(data)

    def authenticated(self) -> None:
        """From here on the client's queries are events."""
        self._protocol.authenticated()

    def write(self, messages: bytes) -> None:
        self._writer.write(messages)

    async def drain(self) -> None:
        """Waits while the client is slower than what is written. Raises OSError."""
        await self._writer.drain()

    def begin_copy(self) -> None:
        """Answers START_REPLICATION: both sides send from here on."""
        self._writer.write(pg.COPY_BOTH_RESPONSE)
        self._protocol.begin_copy()

    def end_copy(self, is_connected: bool) -> None:
        """After the client has ended its side, or (not connected) has gone."""
        self._protocol.end_copy()
        if is_connected:
            done = pg.encode_command_complete("START_STREAMING") + pg.READY_FOR_QUERY
            self._writer.write(pg.COPY_DONE + done)

    def send_wal(self, start_lsn: Lsn, wal: bytes | memoryview, end_lsn: Lsn, now: UnixTime) -> None:
        """WAL from `start_lsn` on; `end_lsn` is where the server's ends."""
        head = wal_data_head(start_lsn, end_lsn, unix_to_timestamptz(now))
        self._writer.writelines((pg.copy_data_head(len(head) + len(wal)), head, wal))

    def send_keepalive(self, end_lsn: Lsn, now: UnixTime) -> None:
        """Asks for no answer."""
        message = Keepalive(end_lsn, unix_to_timestamptz(now), False)
        self._writer.write(pg.encode_copy_data(encode_keepalive(message)))
