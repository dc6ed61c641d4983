"""Asks the pageserver how far a timeline is ingested, again and again over one connection."""

import asyncio
from typing import Final

from excimer.base.errors import RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.compute.basebackup_client import PageserverUnreachableError
from excimer.service.tls import client_tls
from excimer.wire.page_service import (
    ErrorAnswer,
    GetPosition,
    Hello,
    HelloOk,
    PositionAnswer,
    ServerMessageParser,
    encode_client_message,
    error_from_answer,
)

ANSWER_TIMEOUT_S: Final = 5.0
_READ_SIZE_BYTES: Final = 4096


class UnexpectedAnswerError(RetryableError):
    """The pageserver answered with something else."""


class PositionClient:
    """Connects at the first question. After an error, make a new one."""

    def __init__(self, address: str, tenant_id: TenantId, timeline_id: TimelineId, token: str) -> None:
        self._address = address
        self._hello = Hello(tenant_id, timeline_id, token)
        self._parser = ServerMessageParser()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._request_id = 0

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()

    async def position(self) -> Lsn:
        """End of the last record that can be read; 0 while the pageserver waits for an ancestor's WAL.

        Raises `PageserverUnreachableError` and what the pageserver answers with.
        """
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await self._ask()
        except (OSError, EOFError, TimeoutError) as error:
            raise PageserverUnreachableError(
                f"the pageserver at {self._address} cannot be asked: {type(error).__name__} {error}"
            ) from error

    async def _ask(self) -> Lsn:
        if self._streams is None:
            if self._address.startswith("/"):  # the relay of this manager, as libhydrate's connections
                self._streams = await asyncio.open_unix_connection(self._address)
            else:
                host, _, port = self._address.rpartition(":")
                self._streams = await asyncio.open_connection(host, int(port), ssl=client_tls())
            self._streams[1].write(encode_client_message(self._hello))
        reader, writer = self._streams
        self._request_id += 1
        writer.write(encode_client_message(GetPosition(self._request_id)))
        while True:
            data = await reader.read(_READ_SIZE_BYTES)
            if not data:
                raise EOFError("it hung up")
            for message in self._parser.feed(data):
                match message:
                    case HelloOk():
                        continue
                    case PositionAnswer(request_id, lsn) if request_id == self._request_id:
                        return Lsn(lsn)
                    case ErrorAnswer():
                        raise error_from_answer(message)
                    case _:
                        raise UnexpectedAnswerError(f"the pageserver answered with {type(message).__name__}")
