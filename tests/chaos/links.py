"""TCP connections between parts that can be cut, or go dead: a proxy for each address, all in one thread."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from enum import Enum, auto
from typing import Any

CHUNK_SIZE_BYTES = 65536


class LinkState(Enum):
    OPEN = auto()
    CUT = auto()
    """Connections are reset, and new ones refused at once."""
    DEAD = auto()
    """Nothing arrives any more, and nobody is told: as when a cable is pulled."""


class Link:
    """A port of 127.0.0.1 that leads to `target`, for as long as the link is open."""

    def __init__(self, name: str, target: tuple[str, int]) -> None:
        self.name = name
        self._target = target
        self._state = LinkState.OPEN
        self._opened = asyncio.Event()
        self._opened.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def change(self, state: LinkState) -> None:
        """What went over a dead link is lost with its connections, so opening it resets them."""
        was_dead = self._state is LinkState.DEAD
        self._state = state
        if state is LinkState.DEAD:
            self._opened.clear()
        else:
            self._opened.set()
        if state is LinkState.CUT or was_dead:
            for writer in list(self._writers):
                writer.transport.abort()

    async def close(self) -> None:
        await self.change(LinkState.CUT)
        assert self._server is not None
        self._server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._state is LinkState.CUT:
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            await self._opened.wait()
            with contextlib.suppress(OSError):
                peer_reader, peer_writer = await asyncio.open_connection(*self._target)
                self._writers.add(peer_writer)
                try:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._pump(reader, peer_writer))
                        group.create_task(self._pump(peer_reader, writer))
                finally:
                    self._writers.discard(peer_writer)
                    peer_writer.transport.abort()
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_SIZE_BYTES):
                await self._opened.wait()
                writer.write(data)
                await writer.drain()
        if not writer.is_closing():
            with contextlib.suppress(OSError):
                writer.write_eof()


class Links:
    """Links by name, in a thread of their own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._links: dict[str, Link] = {}

    def add(self, name: str, target: str) -> str:
        """The address at which `target` (host:port) is to be reached from now on."""
        host, _, port = target.rpartition(":")
        link = Link(name, (host, int(port)))
        self._call(link.start())
        self._links[name] = link
        return link.address

    @property
    def names(self) -> list[str]:
        return list(self._links)

    def change(self, name: str, state: LinkState) -> None:
        self._call(self._links[name].change(state))

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def __enter__(self) -> "Links":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for link in self._links.values():
            self._call(link.close())
        self._call(_let_tasks_end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _let_tasks_end() -> None:
    current = asyncio.current_task()
    tasks = [task for task in asyncio.all_tasks() if task is not current]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def running_links() -> Iterator[Links]:
    with Links() as links:
        yield links
