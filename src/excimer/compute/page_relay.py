"""The way of an endpoint's postgres to the pageserver where services speak TLS: a Unix socket of the manager.

libhydrate is C inside of every postgres process and must not bring a TLS library into them, so it speaks
plainly to this socket, which only PostgreSQL's user can reach; from here on the bytes go over TLS.

::

    postgres, libhydrate --Unix socket--> relay (in the manager) --TLS--> pageserver

A connection of the one side is one of the other, and ends with it. Who may read pages is still decided by the
pageserver, from the token in libhydrate's own first message.

Not here: any look at the bytes.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from excimer.base.address import Address
from excimer.io.processes import give_to_user
from excimer.service.logs import get_logger
from excimer.service.tasks import TaskScope
from excimer.service.tls import client_tls

CONNECT_TIMEOUT_S: Final = 5.0
_COPY_SIZE_BYTES: Final = 256 << 10

log = get_logger(__name__)


@contextlib.asynccontextmanager
async def relaying_pages(path: Path, pageserver: Address) -> AsyncIterator[None]:
    """Serves on the socket `path`, which may be left from before, while the block runs. Raises OSError."""
    async with TaskScope() as scope:

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            scope.contain("page relay", _relay(reader, writer, pageserver))

        server = await asyncio.start_unix_server(accepted, path, limit=_COPY_SIZE_BYTES)
        os.chmod(path, 0o600)
        give_to_user(path)
        try:
            yield
        finally:
            server.close()


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pageserver: Address) -> None:
    """libhydrate notices the end of either connection, and dials again."""
    remote_writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            remote_reader, remote_writer = await asyncio.open_connection(
                pageserver.host, pageserver.port, ssl=client_tls(), limit=_COPY_SIZE_BYTES
            )
        async with TaskScope() as scope:
            up = scope.start("to the pageserver", _copy(reader, remote_writer))
            down = scope.start("from the pageserver", _copy(remote_reader, writer))
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
    except OSError as error:  # TimeoutError is one
        log.info("the pageserver cannot be reached for pages", address=str(pageserver), error=error)
    finally:
        writer.close()
        if remote_writer is not None:
            remote_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_COPY_SIZE_BYTES):
            writer.write(data)
            await writer.drain()
