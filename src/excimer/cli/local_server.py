"""SQL on a running endpoint as its bootstrap superuser, through its Unix socket, which needs no password.

One connection, one statement at a time, results as text. Used where starting psql would be slow, and for
statements with verifiers of passwords, which must show in no log.
"""

import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Final

from excimer.base.address import Address
from excimer.base.errors import RefusedError, RetryableError
from excimer.cli.errors import NotRunningError
from excimer.compute.local_access import LocalAccess
from excimer.wire.pg_client import (
    ClientConnection,
    ClientEvent,
    PostgresError,
    QueryDone,
    QueryFailed,
    Ready,
    unlimited_session,
)
from excimer.wire.pg_messages import TERMINATE, ProtocolViolationError

ANSWER_TIMEOUT_S: Final = 60.0
DATABASES: Final = ("postgres", "template1")
"""Either may have been dropped, hardly both."""

_NO_SUCH_DATABASE: Final = "3D000"
_RETRYABLE_CLASSES: Final = ("08", "53", "57")
_RECEIVE_SIZE_BYTES: Final = 1 << 16
_SESSION: Final = {
    "log_statement": "none",
    "log_min_duration_statement": "-1",
    "log_min_duration_sample": "-1",
    "log_min_error_statement": "panic",
    "log_transaction_sample_rate": "0",
    "pg_stat_statements.track": "none",
    "pg_stat_statements.track_utility": "off",
    "auto_explain.log_min_duration": "-1",
    "search_path": "pg_catalog",
    "standard_conforming_strings": "on",
    "default_transaction_read_only": "off",
    "client_encoding": "UTF8",
}
"""Above what the role, the database or the configuration have set."""


class EndpointAnswerError(RetryableError):
    """An endpoint did not answer, or not as PostgreSQL does."""


class LocalServer:
    """A connection; made by `connected`. Statements may raise `PostgresError`, `EndpointAnswerError`."""

    def __init__(self, connection: socket.socket, access: LocalAccess, database: str) -> None:
        session = unlimited_session(access.pg_version) | _SESSION
        options = " ".join(f"-c {name}={value}" for name, value in session.items())
        self._socket = connection
        self._machine = ClientConnection(
            {
                "user": access.superuser,
                "database": database,
                "application_name": "excimer",
                "options": options,
            },
            None,
        )
        self._event(Ready)

    def rows(self, sql: str) -> list[list[str | None]]:
        """The rows of one statement."""
        self._machine.query(sql)
        event = self._event(QueryDone)
        assert isinstance(event, QueryDone)
        return [[None if value is None else value.decode() for value in row] for row in event.rows]

    def _event(self, expected: type[ClientEvent]) -> ClientEvent:
        try:
            while True:
                self._socket.sendall(self._machine.take_output())
                if (event := self._machine.next_event()) is not None:
                    break
                data = self._socket.recv(_RECEIVE_SIZE_BYTES)
                if not data:
                    raise EndpointAnswerError("the endpoint closed the connection: it may be stopping")
                self._machine.feed(data)
        except TimeoutError as error:
            limit = self._socket.gettimeout()
            raise EndpointAnswerError(f"the endpoint did not answer within {limit:g} s") from error
        except (OSError, ProtocolViolationError) as error:
            raise EndpointAnswerError(f"the endpoint does not answer: {error}") from error
        if isinstance(event, QueryFailed):
            raise event.error
        if not isinstance(event, expected):
            raise EndpointAnswerError(f"{type(event).__name__} is no answer to what was asked")
        return event


@contextlib.contextmanager
def connected(
    access: LocalAccess, databases: Sequence[str] = DATABASES, *, timeout_s: float = ANSWER_TIMEOUT_S
) -> Iterator[LocalServer]:
    """To the first of the databases that is there; a statement may take `timeout_s`.

    Raises `NotRunningError` when nobody listens, RefusedError when PostgreSQL does not let us in.
    """
    with contextlib.ExitStack() as stack:
        yield _connect(access, stack, databases, timeout_s)


def _connect(
    access: LocalAccess, stack: contextlib.ExitStack, databases: Sequence[str], timeout_s: float
) -> LocalServer:
    path = Address(access.socket_dir, access.port).unix_path
    assert path is not None
    for database in databases:
        connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connection.settimeout(timeout_s)
        try:
            connection.connect(path)
        except OSError as error:
            raise NotRunningError(f"no PostgreSQL answers at {path}: {error.strerror or error}") from error
        try:
            server = LocalServer(connection, access, database)
        except PostgresError as error:
            if error.sqlstate == _NO_SUCH_DATABASE and database != databases[-1]:
                continue
            if error.sqlstate[:2] in _RETRYABLE_CLASSES:
                raise NotRunningError(f"the endpoint takes no connections now: {error}") from error
            raise
        stack.callback(_terminate, connection)
        return server
    raise RefusedError(f"the endpoint has none of the databases {', '.join(databases)}")


def _terminate(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(TERMINATE)


def quote_name(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def quote_text(text: str) -> str:
    """An SQL string, under standard_conforming_strings."""
    return "'" + text.replace("'", "''") + "'"
