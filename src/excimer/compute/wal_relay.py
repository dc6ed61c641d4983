"""What a replica's PostgreSQL takes for its primary: a Unix socket with the branch's committed WAL.

PostgreSQL must not hold a token that reads WAL where SQL could read it (A1), and would not know which
safekeeper to ask. So its walreceiver speaks to its manager, which asks whoever has most, and another one when
that goes::

    walreceiver --Unix socket--> relay (in the manager) --token--> a safekeeper, or another
                 <--WAL--                               <--WAL--
                 --positions, what it needs-->          --the same-->

A walreceiver asks for whole segments. What comes before the replica's beginning it laid itself for PostgreSQL
to start on, and gets back as it is.

The walreceiver's connection lasts while safekeepers come and go. What it says of itself gives the replica's
lag.

Not here: the WAL's way before (`wal_source`), what the safekeepers do with what a standby needs.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from excimer.base.clock import UnixTime
from excimer.base.errors import ExcimerError, RefusedError, RetryableError
from excimer.base.lsn import INVALID_LSN, WAL_PAGE_SIZE_BYTES, Lsn, format_lsn
from excimer.compute.wal_source import Source, WalRemovedError, WalSource, open_stream
from excimer.io.processes import give_to_user
from excimer.pgformat.wal_prefix import wal_segment_file_name
from excimer.service.logs import get_logger
from excimer.service.replication_client import WalStream
from excimer.service.replication_server import ReplicationServerStream
from excimer.service.tasks import Backoff, TaskScope
from excimer.wire import pg_messages as pg
from excimer.wire.pg_client import PostgresError
from excimer.wire.pg_server import (
    CopyDataReceived,
    CopyDoneReceived,
    QueryReceived,
    StartupReceived,
)
from excimer.wire.replication import (
    EmptyCommand,
    IdentifySystem,
    StandbyStatus,
    StartReplication,
    SystemIdentity,
    decode_from_client,
    encode_system_identity,
    parse_command,
)

PORT: Final = 1
"""The socket's name says a port, which nobody listens on."""
MESSAGE_SIZE_BYTES_MAX: Final = 128 << 10
"""As PostgreSQL's own walsender (MAX_SEND_SIZE)."""
KEEPALIVE_INTERVAL_S: Final = 1.0
QUIET_S: Final = 10.0
"""After so long without WAL the others are asked whether they have more."""
_BACKOFF: Final = Backoff(first_s=0.05, most_s=2.0)

log = get_logger(__name__)


def socket_path(socket_dir: Path) -> Path:
    return socket_dir / f".s.PGSQL.{PORT}"


def connection_string(socket_dir: Path) -> str:
    """primary_conninfo."""
    quoted = str(socket_dir).replace("\\", "\\\\").replace("'", "\\'")
    return f"host='{quoted}' port={PORT} user=postgres"


class LocalWal(NamedTuple):
    """What a replica's pg_wal held before it followed anybody."""

    pg_wal: Path
    end_lsn: Lsn
    segment_size_bytes: int

    def read(self, start_lsn: Lsn, size: int) -> bytes:
        """Less where it or a segment ends. Raises OSError."""
        offset = start_lsn % self.segment_size_bytes
        size = min(size, self.end_lsn - start_lsn, self.segment_size_bytes - offset)
        name = wal_segment_file_name(start_lsn, self.segment_size_bytes)
        with (self.pg_wal / name).open("rb") as file:
            file.seek(offset)
            return file.read(size)


class WalRelay:
    """Serves walreceivers from `start` on."""

    def __init__(self, source: WalSource) -> None:
        self._source = source
        self.local = LocalWal(Path(), INVALID_LSN, 0)
        """Set before PostgreSQL starts."""
        self.gone: asyncio.Future[WalRemovedError] = asyncio.get_running_loop().create_future()
        """Done when the replica needs WAL that is no more: it must begin anew."""
        self.commit_lsn = INVALID_LSN
        """End of the committed WAL that the safekeepers have told of."""
        self.replayed_lsn = INVALID_LSN
        """As the replica last said."""

    @property
    def lag_bytes(self) -> int | None:
        """How far the replica is behind what is committed; None before it has said where it is."""
        return None if not self.replayed_lsn else max(0, self.commit_lsn - self.replayed_lsn)

    def heard(self, status: StandbyStatus) -> None:
        self.replayed_lsn = max(self.replayed_lsn, status.apply_lsn)

    def told(self, commit_lsn: Lsn) -> None:
        self.commit_lsn = max(self.commit_lsn, commit_lsn)

    async def start(self, scope: TaskScope, path: Path) -> None:
        """Serves in `scope` on the socket `path`, which may be left from before. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            scope.contain("wal relay", _Session(self, self._source, reader, writer).run())

        server = await asyncio.start_unix_server(accepted, path)
        os.chmod(path, 0o600)
        give_to_user(path)
        scope.start("wal relay", _serve(server))


async def _serve(server: asyncio.Server) -> None:
    async with server:
        await server.serve_forever()


def cut_messages(start_lsn: Lsn, wal: bytes) -> Iterator[bytes]:
    """Parts of WAL, which ends with a record or a page, that each do so as well.

    Recovery takes what lies on a page up to where WAL has come for whole records, and else finds a wrong
    checksum.
    """
    at = 0
    while at < len(wal):
        limit_lsn = start_lsn + at + MESSAGE_SIZE_BYTES_MAX
        end = min(limit_lsn - limit_lsn % WAL_PAGE_SIZE_BYTES - start_lsn, len(wal))
        yield wal[at:end]
        at = end


class _Session:
    """One walreceiver."""

    def __init__(
        self, relay: WalRelay, source: WalSource, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._relay = relay
        self._source = source
        self._stream = ReplicationServerStream(reader, writer)
        self._writer = writer
        self._upstream: Source | None = None
        self._sent_lsn = INVALID_LSN

    async def run(self) -> None:
        try:
            await self._serve()
        except ExcimerError as error:
            log.info("a walreceiver is turned away", error=error)
            self._stream.write(pg.encode_error(str(error), "58P01", severity="FATAL"))
        except OSError as error:
            log.info("the walreceiver is gone", error=error)
        finally:
            self._writer.close()

    async def _serve(self) -> None:
        if not isinstance(await self._stream.next_event(), StartupReceived):
            return
        self._stream.authenticated()
        async with self._source.connected() as sources:
            identity = sources[0].identity
        self._stream.write(
            pg.AUTHENTICATION_OK + pg.encode_parameter_status("client_encoding", "UTF8") + pg.READY_FOR_QUERY
        )
        while (event := await self._stream.next_event()) is not None:
            if isinstance(event, QueryReceived):
                try:
                    await self._answer(event.query, identity)
                except RefusedError as error:
                    self._stream.write(pg.encode_error(str(error), "0A000") + pg.READY_FOR_QUERY)
            await self._stream.drain()

    async def _answer(self, query: str, identity: SystemIdentity) -> None:
        match parse_command(query):
            case IdentifySystem():
                self._stream.write(encode_system_identity(identity))
            case EmptyCommand():
                self._stream.write(pg.EMPTY_QUERY_RESPONSE + pg.READY_FOR_QUERY)
            case StartReplication(start_lsn):
                await self._send_from(start_lsn)
            case _:
                raise RefusedError(f"a replica's manager does not answer {query[:40]!r}")

    async def _send_from(self, start_lsn: Lsn) -> None:
        """CopyBoth until the walreceiver ends it."""
        self._stream.begin_copy()
        async with TaskScope() as scope:
            sending = scope.start("relay WAL", self._send_wal(start_lsn))
            is_connected = await self._receive()
            sending.cancel()
        self._stream.end_copy(is_connected)

    async def _receive(self) -> bool:
        """Reads the walreceiver's side; False when the connection ended with it."""
        while True:
            event = await self._stream.next_event()
            if event is None:
                return False
            if isinstance(event, CopyDoneReceived):
                return True
            if not isinstance(event, CopyDataReceived):
                continue
            message = decode_from_client(event.payload)
            upstream = self._upstream
            if not isinstance(message, StandbyStatus):
                if upstream is not None:
                    upstream.client.send_feedback(event.payload)
                continue
            self._relay.heard(message)
            if upstream is not None:
                upstream.client.report(
                    write_lsn=message.write_lsn, flush_lsn=message.flush_lsn, apply_lsn=message.apply_lsn
                )
            if message.is_reply_requested:
                self._send_keepalive()

    async def _send_wal(self, start_lsn: Lsn) -> None:
        """What was there before, then from one safekeeper after the other; until cancelled, or nobody
        listens."""
        self._sent_lsn = start_lsn
        with contextlib.suppress(ConnectionError):
            await self._send_local()
            await self._send_committed()

    async def _send_local(self) -> None:
        local = self._relay.local
        while self._sent_lsn < local.end_lsn:
            part = await asyncio.to_thread(local.read, self._sent_lsn, MESSAGE_SIZE_BYTES_MAX)
            if not part:
                raise WalRemovedError(
                    f"the replica has lost its own WAL from {format_lsn(self._sent_lsn)} on"
                )
            await self._send(part)

    async def _send_committed(self) -> None:
        failures = 0
        while True:
            before_lsn = self._sent_lsn
            try:
                async with self._source.connected() as sources:
                    self._upstream, stream = await open_stream(sources, self._sent_lsn)
                    await self._pass_on(self._upstream, stream)
            except WalRemovedError as error:
                if not self._relay.gone.done():
                    self._relay.gone.set_result(error)
                raise
            except (RetryableError, PostgresError) as error:  # a token that has run out is a PostgresError
                log.info("WAL comes from another safekeeper, or later", error=error)
            finally:
                self._upstream = None
            failures = 1 if self._sent_lsn > before_lsn else failures + 1
            self._send_keepalive()
            await asyncio.sleep(_BACKOFF.next_wait(failures))

    async def _pass_on(self, source: Source, stream: WalStream) -> None:
        """Returns when another source has more."""
        client, quiet_since = source.client, time.monotonic()
        self._relay.told(source.end_lsn)
        while True:
            try:
                chunk = await asyncio.wait_for(stream.next_chunk(), KEEPALIVE_INTERVAL_S)
            except TimeoutError:
                self._relay.told(client.server_end_lsn)
                self._send_keepalive()
                if time.monotonic() - quiet_since > QUIET_S:
                    if await self._is_outdone():
                        return
                    quiet_since = time.monotonic()
                continue
            quiet_since = time.monotonic()
            self._relay.told(client.server_end_lsn)
            for part in cut_messages(self._sent_lsn, chunk.data):
                await self._send(part)

    async def _send(self, wal: bytes) -> None:
        self._stream.send_wal(self._sent_lsn, wal, self._relay.commit_lsn, UnixTime(time.time()))
        self._sent_lsn = Lsn(self._sent_lsn + len(wal))
        await self._stream.drain()

    async def _is_outdone(self) -> bool:
        """Whether a safekeeper has more than has come."""
        try:
            async with self._source.connected() as sources:
                return sources[0].end_lsn > self._sent_lsn
        except RetryableError:
            return False

    def _send_keepalive(self) -> None:
        self._stream.send_keepalive(self._relay.commit_lsn, UnixTime(time.time()))
