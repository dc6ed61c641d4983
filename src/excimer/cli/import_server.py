"""A running server as an import stream: BASE_BACKUP as it comes, then WAL from where the backup starts.

::

    connection 1: temporary slot (keeps the WAL) ............ START_REPLICATION ---> up to the target
    connection 2:          BASE_BACKUP ---> tar

The bytes of the backup are passed on without being looked at, and nothing is stored on the way. Without
`to_lsn` the target is where the server's WAL ends when the backup is complete; with it, the import waits
until the server has come so far.

The server is spoken to through libpq (psycopg's low-level module), not through our own machine
(`wire.pg_client`), because a foreign server wants all that its users know from libpq: SCRAM with channel
binding, md5, certificates, sslmode and sslrootcert, ~/.pgpass and PGPASSWORD, service files, several
hosts. Ours speaks to our own services and to a local socket only. Passwords stay inside libpq, and a URL
that cannot be parsed is not repeated in the error.

Not here: sending the frames (`import_upload`).
"""

import secrets
import select
import time
from collections.abc import Callable, Iterator
from typing import Final

from psycopg import Error, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from excimer.base.clock import UnixTime, unix_to_timestamptz
from excimer.base.lsn import INVALID_LSN, Lsn, format_lsn, parse_lsn, record_end
from excimer.cli.import_source import (
    SourceLostError,
    SourceRefusedError,
    check_target,
    one_line,
    tar_frames,
)
from excimer.pgformat.control_file import CONTROL_VERSIONS
from excimer.wire.import_stream import (
    FilesEnd,
    ImportBegin,
    encode_begin,
    encode_end,
    encode_files_end,
    encode_wal,
)
from excimer.wire.pg_messages import ProtocolViolationError
from excimer.wire.replication import (
    Keepalive,
    StandbyStatus,
    StartReplication,
    decode_from_server,
    encode_status,
    format_start_replication,
)

APPLICATION_NAME: Final = "excimer_import"
STATUS_INTERVAL_S: Final = 5.0
NO_REPLICATION_LINE: Final = "no pg_hba.conf entry for replication connection"
REPLICATION_HINT: Final = (
    " (a line `host replication ROLE ADDRESS scram-sha-256` there lets it in; endpoints of Excimer have "
    "none: make a branch, or use excimer export)"
)
_NO_SLOT_SQLSTATES: Final = ("53400", "55000")
"""No slot is free, or the server allows none."""
_SIZE_UNITS: Final = {"kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}
_NEW_ARCHIVE, _ARCHIVE_DATA = b"n", b"d"


class ServerSource:
    """An `ImportSource`. Connects at once. Raises `SourceRefusedError`, `SourceLostError`."""

    def __init__(
        self, url: str, to_lsn: Lsn | None, check_version: Callable[[int], None] = lambda _: None
    ) -> None:
        """`check_version` is called with the major version before a backup is asked for; it may raise."""
        self._to_lsn = to_lsn
        self._connections: list[pq.abc.PGconn] = []
        self._wal = self._connect(url)
        self._files = self._connect(url)
        self.phase = "waiting for the server's checkpoint"
        self.total_size_bytes = 0
        self.pg_version = self._files.server_version // 10_000
        self._check_server()
        check_version(self.pg_version)
        self._system_id, self._postgres_timeline, _ = self._identify()
        self._segment_size = _parse_size(self._show("wal_segment_size"))
        self._slot = self._reserve_wal()
        self._start_lsn = INVALID_LSN
        self._begin_backup()

    def close(self) -> None:
        for connection in self._connections:
            connection.finish()

    def frames(self) -> Iterator[bytes]:
        start_lsn = record_end(self._start_lsn, self._segment_size)
        yield encode_begin(
            ImportBegin(
                pg_version=self.pg_version,
                system_id=self._system_id,
                wal_segment_size_bytes=self._segment_size,
                start_lsn=start_lsn,
                prev_record_lsn=INVALID_LSN,
            )
        )
        self.phase = "copying files"
        yield from tar_frames(self._backup_bytes())
        readable_lsn = self._end_backup()
        check_target(self._to_lsn, readable_lsn)
        yield encode_files_end(FilesEnd(readable_lsn=readable_lsn))
        target_lsn = self._to_lsn or max(readable_lsn, self._identify()[2])
        self.phase = f"reading WAL up to {format_lsn(target_lsn)}"
        yield from self._wal_frames(start_lsn, target_lsn)
        yield encode_end()

    # The server

    def _connect(self, url: str) -> pq.abc.PGconn:
        try:
            conninfo_to_dict(url)
            conninfo = make_conninfo(url, replication="true", application_name=APPLICATION_NAME)
        except Error:
            raise SourceRefusedError(
                "the URL is not one that libpq understands: write postgres://USER@HOST:PORT"
            ) from None
        connection = pq.PGconn.connect(conninfo.encode())
        if connection.status != pq.ConnStatus.OK:
            message = connection.get_error_message()
            connection.finish()
            hint = REPLICATION_HINT if NO_REPLICATION_LINE in message else ""
            raise SourceRefusedError(f"cannot connect to the server: {one_line(message)}{hint}")
        self._connections.append(connection)
        return connection

    def _check_server(self) -> None:
        if self.pg_version not in CONTROL_VERSIONS:
            versions = f"{min(CONTROL_VERSIONS)} to {max(CONTROL_VERSIONS)}"
            raise SourceRefusedError(
                f"the server is PostgreSQL {self.pg_version}: only {versions} can be imported"
            )
        for name, wanted in (("block_size", "8192"), ("wal_block_size", "8192"), ("segment_size", "1GB")):
            found = self._show(name)
            if found != wanted:
                raise SourceRefusedError(f"the server has {name} {found}: only {wanted} can be imported")

    def _identify(self) -> tuple[int, int, Lsn]:
        """System id, PostgreSQL's timeline, and where WAL ends now."""
        row = self._rows(self._wal, "IDENTIFY_SYSTEM")[0]
        return int(row[0]), int(row[1]), parse_lsn(row[2])

    def _show(self, name: str) -> str:
        return self._rows(self._wal, f"SHOW {name}")[0][0]

    def _reserve_wal(self) -> str | None:
        """A slot that lives as long as its connection; None when there is none to be had."""
        slot = f"{APPLICATION_NAME}_{secrets.token_hex(6)}"
        result = self._wal.exec_(f"CREATE_REPLICATION_SLOT {slot} TEMPORARY PHYSICAL RESERVE_WAL".encode())
        if result.status == pq.ExecStatus.TUPLES_OK:
            return slot
        sqlstate = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
        if sqlstate in _NO_SLOT_SQLSTATES:
            return None
        raise _failure(result)

    def _rows(self, connection: pq.abc.PGconn, command: str) -> list[list[str]]:
        return _tuples(connection.exec_(command.encode()))

    # Files

    def _begin_backup(self) -> None:
        options = (
            "(LABEL 'excimer import', PROGRESS, CHECKPOINT 'fast', WAIT false)"
            if self.pg_version >= 15
            else "LABEL 'excimer import' PROGRESS FAST NOWAIT"
        )
        self._files.send_query(f"BASE_BACKUP {options}".encode())
        start = _tuples(_next_result(self._files))
        self._start_lsn = parse_lsn(start[0][0])
        self._postgres_timeline = int(start[0][1])
        tablespaces = _tuples(_next_result(self._files))
        if any(oid for oid, *_ in tablespaces):
            raise SourceRefusedError(
                "the server has tablespaces, which Excimer's computes do not have: "
                "move what is in them to pg_default, and drop them"
            )
        self.total_size_bytes = sum(int(size or 0) for *_, size in tablespaces) << 10

    def _backup_bytes(self) -> Iterator[bytes]:
        """The tar file. From PostgreSQL 15 on each message says what it is."""
        result = _next_result(self._files)
        if result.status != pq.ExecStatus.COPY_OUT:
            raise _failure(result)
        for message in _copy_data(self._files):
            if self.pg_version < 15:
                yield message
            elif message[:1] == _ARCHIVE_DATA:
                yield message[1:]

    def _end_backup(self) -> Lsn:
        """Where the backup is consistent. Raises when the server found it wanting."""
        end_lsn = INVALID_LSN
        while (result := self._files.get_result()) is not None:
            if result.status == pq.ExecStatus.TUPLES_OK:
                end_lsn = parse_lsn(_tuples(result)[0][0])
            elif result.status != pq.ExecStatus.COMMAND_OK:
                raise _failure(result)
        if end_lsn == INVALID_LSN:
            raise SourceLostError("the server did not say where the backup ends")
        return end_lsn

    # WAL

    def _wal_frames(self, start_lsn: Lsn, target_lsn: Lsn) -> Iterator[bytes]:
        command = format_start_replication(StartReplication(start_lsn, self._postgres_timeline, self._slot))
        result = self._wal.exec_(command.encode())
        if result.status != pq.ExecStatus.COPY_BOTH:
            raise _failure(result)
        lsn = start_lsn
        while lsn < target_lsn:
            data = self._next_wal(lsn)[: target_lsn - lsn]
            yield encode_wal(lsn, data)  # empty while the server has no more: a sign of life
            lsn = Lsn(lsn + len(data))

    def _next_wal(self, lsn: Lsn) -> bytes:
        """What has arrived, up to a frame's worth; nothing when the server is silent for a while."""
        parts: list[bytes] = []
        size = 0
        deadline = time.monotonic() + STATUS_INTERVAL_S
        while size < (1 << 20) and time.monotonic() < deadline:
            status, message = self._wal.get_copy_data(1)
            if status > 0:
                payload = bytes(message)
                part = self._wal_of(payload, Lsn(lsn + size))
                parts.append(part)
                size += len(part)
            elif status == 0:
                if parts:
                    break
                _wait_for_input(self._wal, deadline - time.monotonic())
            else:
                _end_of_copy(self._wal, status)
        self._report(Lsn(lsn + size))
        return b"".join(parts)

    def _wal_of(self, payload: bytes, due_lsn: Lsn) -> bytes:
        try:
            message = decode_from_server(payload)
        except ProtocolViolationError as error:
            raise SourceLostError(str(error)) from error
        if isinstance(message, Keepalive):
            if message.is_reply_requested:
                self._report(due_lsn)
            return b""
        if message.start_lsn != due_lsn:
            raise SourceLostError(f"the server sent WAL of {format_lsn(message.start_lsn)} out of turn")
        return message.data

    def _report(self, lsn: Lsn) -> None:
        now = unix_to_timestamptz(UnixTime(time.time()))
        self._wal.put_copy_data(encode_status(StandbyStatus(lsn, lsn, INVALID_LSN, now, False)))
        self._wal.flush()


def _copy_data(connection: pq.abc.PGconn) -> Iterator[bytes]:
    while True:
        status, message = connection.get_copy_data(1)
        if status > 0:
            yield bytes(message)
        elif status == 0:
            _wait_for_input(connection, STATUS_INTERVAL_S)
        elif status == -1:
            return
        else:
            _end_of_copy(connection, status)


def _end_of_copy(connection: pq.abc.PGconn, status: int) -> None:
    """Raises what ended a copy too early."""
    result = connection.get_result() if status == -1 else None
    if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
        raise _failure(result)
    raise SourceLostError(f"the server closed the connection: {one_line(connection.get_error_message())}")


def _wait_for_input(connection: pq.abc.PGconn, timeout_s: float) -> None:
    """Interruptible, as libpq's own waiting is not."""
    readable, _, _ = select.select([connection.socket], [], [], max(timeout_s, 0.0))
    if readable:
        try:
            connection.consume_input()
        except Error as error:
            raise SourceLostError(f"the server closed the connection: {one_line(str(error))}") from error


def _next_result(connection: pq.abc.PGconn) -> pq.abc.PGresult:
    """Waits for it, interruptibly."""
    while connection.is_busy():
        _wait_for_input(connection, STATUS_INTERVAL_S)
    result = connection.get_result()
    if result is None:
        raise SourceLostError("the server gave no answer")
    return result


def _tuples(result: pq.abc.PGresult) -> list[list[str]]:
    """Rows as text; NULL is empty."""
    if result.status != pq.ExecStatus.TUPLES_OK:
        raise _failure(result)
    return [
        [(result.get_value(row, column) or b"").decode() for column in range(result.nfields)]
        for row in range(result.ntuples)
    ]


def _failure(result: pq.abc.PGresult) -> SourceRefusedError:
    return SourceRefusedError(f"the server refused: {one_line(result.get_error_message())}")


def _parse_size(text: str) -> int:
    """``16MB`` as PostgreSQL shows sizes."""
    for unit, factor in _SIZE_UNITS.items():
        if text.endswith(unit):
            return int(text.removesuffix(unit)) * factor
    raise SourceRefusedError(f"the server has WAL segments of {text}")
