"""Fetches one basebackup from the pageserver over the page service."""

import asyncio

import msgspec
import zstandard

from excimer.base.errors import CorruptionError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn, format_lsn
from excimer.pgformat.basebackup import FORMAT_VERSION, Basebackup, BasebackupContentError, decode_basebackup
from excimer.service.logs import get_logger
from excimer.service.tls import client_tls
from excimer.wire.page_service import (
    BasebackupAnswer,
    ErrorAnswer,
    GetBasebackup,
    Hello,
    HelloOk,
    ServerMessage,
    ServerMessageParser,
    encode_client_message,
    error_from_answer,
)

NOTICE_S = 5.0
"""Who waits for longer learns from the log for what."""
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 90.0
"""Longer than the pageserver's own wait for an LSN, whose error says more than a time-out here."""

_BASEBACKUP_SIZE_BYTES_MAX = 1 << 30
_READ_SIZE_BYTES = 1 << 20
_REQUEST_ID = 1

log = get_logger(__name__)


class PageserverUnreachableError(RetryableError):
    """No connection to the pageserver, or it was lost."""


class BasebackupError(CorruptionError):
    """The pageserver's answer is not a basebackup that this version understands."""


async def fetch_awaited(
    address: str, tenant_id: TenantId, timeline_id: TimelineId, token: str, lsn: Lsn
) -> Basebackup:
    """As `fetch_basebackup`, and says when it takes long."""
    notice = asyncio.get_running_loop().call_later(NOTICE_S, _log_wait, lsn)
    try:
        return await fetch_basebackup(address, tenant_id, timeline_id, token, lsn)
    finally:
        notice.cancel()


def _log_wait(lsn: Lsn) -> None:
    reason = f"it may not have WAL up to {format_lsn(lsn)}"
    log.warning("the pageserver sends no basebackup yet", reason=reason)


async def fetch_basebackup(
    address: str, tenant_id: TenantId, timeline_id: TimelineId, token: str, lsn: Lsn
) -> Basebackup:
    """The basebackup at `lsn`, waiting until the pageserver has received WAL up to there.

    Raises `PageserverUnreachableError`, `BasebackupError`, or the error family that the pageserver
    answered with.
    """
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, int(port), ssl=client_tls())
    except (OSError, TimeoutError) as error:
        raise PageserverUnreachableError(f"the pageserver at {address} cannot be reached: {error}") from error
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S) as limit:
            writer.write(encode_client_message(Hello(tenant_id, timeline_id, token)))
            writer.write(encode_client_message(GetBasebackup(_REQUEST_ID, lsn)))
            return _decode(await _answer(reader, ServerMessageParser()))
    except (OSError, EOFError) as error:  # TimeoutError is an OSError: of the limit, or ETIMEDOUT
        problem = f"hung up: {error}"
        if limit.expired():
            problem = f"sent no basebackup at {format_lsn(lsn)} in {ANSWER_TIMEOUT_S:.0f} s"
        raise PageserverUnreachableError(f"the pageserver at {address} {problem}") from error
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader, parser: ServerMessageParser) -> bytes:
    while True:
        data = await reader.read(_READ_SIZE_BYTES)
        if not data:
            raise EOFError("no answer")
        for message in parser.feed(data):
            found = _compressed_of(message)
            if found is not None:
                return found


def _compressed_of(message: ServerMessage) -> bytes | None:
    match message:
        case HelloOk():
            return None
        case BasebackupAnswer(request_id, compressed) if request_id == _REQUEST_ID:
            return compressed
        case ErrorAnswer():
            raise error_from_answer(message)
        case _:
            raise BasebackupError(f"the pageserver answered with {type(message).__name__}")


def _decode(compressed: bytes) -> Basebackup:
    try:
        decompressor = zstandard.ZstdDecompressor()
        backup = decode_basebackup(decompressor.decompress(compressed, _BASEBACKUP_SIZE_BYTES_MAX))
    except (zstandard.ZstdError, msgspec.DecodeError, BasebackupContentError) as error:
        raise BasebackupError(f"the basebackup cannot be read: {error}") from error
    if backup.format_version != FORMAT_VERSION:
        raise BasebackupError(f"the basebackup has format {backup.format_version}, not {FORMAT_VERSION}")
    return backup
