"""A client of the page service for tests: one connection, any message, answers as they come."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import zstandard

from excimer.base.address import Address
from excimer.base.ids import TenantId, TimelineId
from excimer.pgformat.basebackup import Basebackup, decode_basebackup
from excimer.wire.page_service import (
    NEWEST_LSN,
    BasebackupAnswer,
    ClientMessage,
    ErrorAnswer,
    GetBasebackup,
    GetPages,
    Hello,
    HelloOk,
    Pages,
    ServerMessage,
    ServerMessageParser,
    encode_client_message,
    error_from_answer,
)


class PageClient:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._parser = ServerMessageParser()
        self._messages: list[ServerMessage] = []
        self._request_id = 0

    def send(self, message: ClientMessage) -> None:
        self.writer.write(encode_client_message(message))

    async def receive(self) -> ServerMessage:
        """The next message. Raises EOFError when the server has closed."""
        while not self._messages:
            data = await self.reader.read(1 << 20)
            if not data:
                raise EOFError("closed by the server")
            self._messages += self._parser.feed(data)
        return self._messages.pop(0)

    async def hello(self, tenant_id: TenantId, timeline_id: TimelineId, token: str) -> HelloOk:
        self.send(Hello(tenant_id, timeline_id, token))
        answer = await self._answer()
        assert isinstance(answer, HelloOk)
        return answer

    async def get_pages(
        self, key: tuple[int, ...], count: int, lsn: int = NEWEST_LSN, since: int = 0
    ) -> bytes:
        """`key` is (kind, spc, db, rel, fork, block)."""
        kind, spc, db, rel, fork, block = key
        self._request_id += 1
        self.send(GetPages(self._request_id, lsn, since, kind, fork, spc, db, rel, block, count))
        answer = await self._answer()
        assert isinstance(answer, Pages)
        assert answer.request_id == self._request_id
        return answer.pages

    async def get_basebackup(self, lsn: int) -> Basebackup:
        self._request_id += 1
        self.send(GetBasebackup(self._request_id, lsn))
        answer = await self._answer()
        assert isinstance(answer, BasebackupAnswer)
        return decode_basebackup(zstandard.ZstdDecompressor().decompress(answer.compressed, 1 << 30))

    async def _answer(self) -> ServerMessage:
        answer = await self.receive()
        if isinstance(answer, ErrorAnswer):
            raise error_from_answer(answer)
        return answer


@contextlib.asynccontextmanager
async def connect_pages(address: Address) -> AsyncIterator[PageClient]:
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield PageClient(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
