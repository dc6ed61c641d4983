"""Pages of many runs in the order asked for, over one connection of the page service.

::

    runs ----> [ asked, not yet delivered: at most IN_FLIGHT_MAX ] ----> (whose run, pages)
                     ^ answers come in any order

A lost connection, or an error that may pass, costs a new connection and the same questions again; only
when nothing has come for `patience_s` is it given up. Runs may be of different moments.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

from excimer.base.address import parse_address
from excimer.base.errors import ExcimerError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES, parse_key
from excimer.base.lsn import Lsn
from excimer.export.layout import PageFile, PageRun, page_runs
from excimer.export.reading_token import ReadingToken
from excimer.service.tls import client_tls
from excimer.wire.page_service import (
    ErrorAnswer,
    GetPages,
    Hello,
    HelloOk,
    PageProtocolError,
    Pages,
    ServerMessage,
    ServerMessageParser,
    encode_client_message,
    error_from_answer,
)

IN_FLIGHT_MAX: Final = 12
"""Requests asked and not delivered, of up to 2 MiB each: a bound on memory, below the server's own of 16."""

CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 90.0
"""Longer than the pageserver's own wait for an LSN, whose error says more than a time-out here."""

PATIENCE_S: Final = 60.0
RETRY_DELAY_S_FIRST: Final = 0.1
RETRY_DELAY_S_MAX: Final = 2.0
_READ_SIZE_BYTES: Final = 1 << 20


class PageserverUnreachableError(RetryableError):
    """No connection to the pageserver, or it was lost."""


@dataclass(frozen=True, slots=True)
class BranchAccess:
    """Where a branch can be read, and the right to do so, which is renewed."""

    tenant_id: TenantId
    timeline_id: TimelineId
    page_service_address: str
    pageserver_http_address: str
    token: ReadingToken


T = TypeVar("T")


class RunRequest(NamedTuple, Generic[T]):
    """A run to read at one LSN, for somebody whom `tag` names."""

    tag: T
    run: PageRun
    lsn: Lsn


@dataclass(slots=True)
class _Asked(Generic[T]):
    request_id: int
    request: RunRequest[T]
    answer: bytes | ExcimerError | None = None


class PageStream(Generic[T]):
    """One reader of one branch."""

    def __init__(self, access: BranchAccess, *, patience_s: float = PATIENCE_S) -> None:
        self._access = access
        self._patience_s = patience_s
        self._asked: deque[_Asked[T]] = deque()
        self._request_id = 0
        self._progress_at = 0.0

    async def read(
        self, requests: Callable[[int], Iterator[RunRequest[T]]]
    ) -> AsyncGenerator[tuple[T, bytes | ExcimerError]]:
        """The pages of each run, in the order of the requests, or why they cannot be had.

        `requests` is called once, with the number of blocks that one run may have at most, and is asked for
        the next when there is room for it. Raises what concerns the whole connection, errors that may pass
        and do not, and `PageserverUnreachableError`.
        """
        source: Iterator[RunRequest[T]] | None = None
        delay_s = RETRY_DELAY_S_FIRST
        self._progress_at = time.monotonic()
        while True:
            try:
                async with _connected(self._access) as connection:
                    source = source or requests(connection.blocks_max)
                    for asked in self._asked:
                        self._ask(connection, asked)
                    while self._fill(connection, source):
                        answer = self._asked[0].answer
                        if answer is None:
                            await self._take_answers(connection)
                            continue
                        done = self._asked.popleft()
                        delay_s, self._progress_at = RETRY_DELAY_S_FIRST, time.monotonic()
                        yield done.request.tag, answer
                    return
            except RetryableError:
                if time.monotonic() - self._progress_at > self._patience_s:
                    raise
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_DELAY_S_MAX)

    def _fill(self, connection: "_Connection", source: Iterator[RunRequest[T]]) -> bool:
        """Asks for more; whether anything is still to come."""
        while len(self._asked) < IN_FLIGHT_MAX:
            following = next(source, None)
            if following is None:
                break
            self._request_id += 1
            asked = _Asked(self._request_id, following)
            self._asked.append(asked)
            self._ask(connection, asked)
        return bool(self._asked)

    def _ask(self, connection: "_Connection", asked: _Asked[T]) -> None:
        if asked.answer is None:
            fields = parse_key(asked.request.run.key)
            connection.send(
                GetPages(
                    request_id=asked.request_id,
                    lsn=asked.request.lsn,
                    not_modified_since=0,
                    kind=fields.kind,
                    fork=fields.fork,
                    spc=fields.spc,
                    db=fields.db,
                    rel=fields.rel,
                    block=fields.block,
                    count=asked.request.run.blocks,
                )
            )

    async def _take_answers(self, connection: "_Connection") -> None:
        asked = {each.request_id: each for each in self._asked}
        for message in await connection.receive():
            match message:
                case Pages(request_id, pages) if request_id in asked:
                    if len(pages) != asked[request_id].request.run.blocks * BLOCK_SIZE_BYTES:
                        raise PageProtocolError("an answer has another number of pages than was asked for")
                    asked[request_id].answer = pages
                case ErrorAnswer(request_id):
                    error = error_from_answer(message)
                    if request_id not in asked or isinstance(error, RetryableError):
                        raise error
                    asked[request_id].answer = error
                case _:
                    raise PageProtocolError(f"the pageserver answered with {type(message).__name__}")


async def read_files(
    access: BranchAccess, lsn: Lsn, files: Iterable[PageFile], *, patience_s: float = PATIENCE_S
) -> AsyncGenerator[tuple[PageFile, bytes]]:
    """The pages of all files at one LSN in their order, in pieces; a file without blocks yields nothing.

    Raises what the pageserver answers with, and `PageserverUnreachableError`.
    """

    def requests(blocks_max: int) -> Iterator[RunRequest[PageFile]]:
        for file in files:
            for run in page_runs(file, blocks_max):
                yield RunRequest(file, run, lsn)

    stream = PageStream[PageFile](access, patience_s=patience_s)
    async with contextlib.aclosing(stream.read(requests)) as pieces:
        async for file, answer in pieces:
            if isinstance(answer, ExcimerError):
                raise answer
            yield file, answer


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._parser = ServerMessageParser()
        self.blocks_max = 1

    def send(self, message: Hello | GetPages) -> None:
        """Questions are small and few: they fit any socket's buffer."""
        self._writer.write(encode_client_message(message))

    async def receive(self) -> list[ServerMessage]:
        """At least one message. Raises EOFError, OSError, TimeoutError."""
        messages: list[ServerMessage] = []
        while not messages:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                data = await self._reader.read(_READ_SIZE_BYTES)
            if not data:
                raise EOFError("it closed the connection")
            messages = self._parser.feed(data)
        return messages

    async def hello(self, access: BranchAccess) -> None:
        self.send(Hello(access.tenant_id, access.timeline_id, access.token.text))
        answer = (await self.receive())[0]
        if isinstance(answer, ErrorAnswer):
            raise error_from_answer(answer)
        if not isinstance(answer, HelloOk):
            raise PageProtocolError(f"the pageserver answered Hello with {type(answer).__name__}")
        self.blocks_max = answer.blocks_max


@contextlib.asynccontextmanager
async def _connected(access: BranchAccess) -> AsyncIterator[_Connection]:
    """A connection after its Hello. Its losses come out as `PageserverUnreachableError`."""
    address = parse_address(access.page_service_address)
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(
                address.host, address.port, limit=2 * _READ_SIZE_BYTES, ssl=client_tls()
            )
        connection = _Connection(reader, writer)
        await connection.hello(access)
        yield connection
    except (OSError, EOFError) as error:  # TimeoutError is an OSError
        raise PageserverUnreachableError(
            f"the pageserver at {access.page_service_address} cannot be reached, or hung up: {error}"
        ) from error
    finally:
        if writer is not None:
            writer.close()
