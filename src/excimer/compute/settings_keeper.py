"""Keeps an endpoint's settings: ALTER SYSTEM goes to the controller, the controller's list to PostgreSQL.

::

    ALTER SYSTEM -> postgresql.auto.conf.tmp -> rename -> libhydrate --"keep"--> this --PATCH--> controller
                                                              ^                   |
                                                              +---- "kept" -------+-> postgresql.auto.conf
    excimer endpoint config -> controller; SIGHUP -> this --GET--> controller; -> postgresql.auto.conf, reload

The list is the controller's (its database is durable); the file in the data directory is only a copy, and
only this class writes it. So the client of ALTER SYSTEM hears success when the setting is durable, and hears
the reason when it is refused or cannot be stored.

Not here: which settings are allowed (`excimer.postgres.setting_rules`), and the library's side
(`csrc/libhydrate/kept_settings.c`).
"""

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec

from excimer.base.errors import ExcimerError, RefusedError
from excimer.compute.endpoint_record import EndpointRecord, read_when_heard
from excimer.io.processes import give_to_user
from excimer.pgformat.auto_conf import (
    AUTO_CONF_NAME,
    AUTO_CONF_NEW_NAME,
    AutoConfError,
    parse_auto_conf,
    render_auto_conf,
)
from excimer.service.logs import get_logger

CALL_LIMIT_S: Final = 8.0
"""Less than the library waits (10 s)."""

REQUEST_LIMIT_S: Final = 2.0
RECENT_S: Final = 30.0
"""How long ago a backend may have read the file that it is about to replace."""

ANSWER_SIZE_MAX: Final = 500
ALL: Final = "*"
_PART: Final = "settings"

log = get_logger(__name__)


class KeptSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The controller's answer."""

    settings: dict[str, str]


class SettingsDoor(Protocol):
    """The controller, as far as an endpoint's own settings go."""

    async def read(self) -> KeptSettings: ...

    async def change(self, to_set: Mapping[str, str], to_unset: list[str]) -> KeptSettings:
        """Durable when it returns. Raises `RefusedError` with the reason, or `RetryableError`."""


class ControllerDoor:
    """The settings route of one endpoint."""

    def __init__(self, record: EndpointRecord) -> None:
        self._record = record

    async def read(self) -> KeptSettings:
        return await self._record.read(_PART, KeptSettings, CALL_LIMIT_S)

    async def change(self, to_set: Mapping[str, str], to_unset: list[str]) -> KeptSettings:
        body = {"set": to_set, "unset": to_unset}
        return await self._record.change(_PART, body, KeptSettings, CALL_LIMIT_S)


class _Version(NamedTuple):
    written_at_s: float
    settings: dict[str, str]


class SettingsKeeper:
    """One endpoint's list, from one start of the manager to its end."""

    def __init__(
        self,
        door: SettingsDoor | None,
        data_dir: Path,
        settings: Mapping[str, str],
        *,
        at_start_only: Callable[[Collection[str]], Collection[str]],
        report: Callable[[dict[str, str]], None],
    ) -> None:
        """`door` None: nobody keeps a list, and ALTER SYSTEM is refused.

        `at_start_only` says which settings PostgreSQL reads only when it starts, and may block; `report`
        gets new `facts`.
        """
        self._door = door
        self._report = report
        self._ask_at_start_only = at_start_only
        self._data_dir = data_dir
        self._versions = deque([_Version(time.monotonic(), dict(settings))], maxlen=16)
        self._at_start_only: set[str] = set()
        self._started_with = dict(settings)
        self._postmaster_pid: int | None = None
        self._changing = asyncio.Lock()
        self._connections: set[asyncio.StreamWriter] = set()
        self._others: Mapping[str, Callable[[str], Awaitable[str]]] = {}
        report(self.facts())

    @property
    def settings(self) -> dict[str, str]:
        return self._versions[0].settings

    def facts(self) -> dict[str, str]:
        """For /healthz: which list is in the file or will be laid, and what of it waits for a new start."""
        waiting = [
            name
            for name in sorted(self._at_start_only)
            if self._postmaster_pid is not None and self._started_with.get(name) != self.settings.get(name)
        ]
        return {"settings": digest_of(self.settings), "restart_pending": ",".join(waiting)}

    # PostgreSQL's life

    def starting(self) -> dict[str, str]:
        """The list with which postgres is about to start."""
        self._started_with = dict(self.settings)
        return self._started_with

    def started(self, postmaster_pid: int) -> None:
        """postgres reads the file now. What has changed since it was laid is put in force."""
        self._postmaster_pid = postmaster_pid
        if self._started_with != self.settings:
            self._put_in_force()
        self._report(self.facts())

    def ended(self) -> None:
        """Nobody reads the file any more."""
        self._postmaster_pid = None
        self._report(self.facts())

    # Changes from the controller

    async def refresh(self) -> None:
        """Takes the controller's list over, trying again until it is heard of."""
        if self._door is not None:
            await read_when_heard("the settings", partial(self._take_over, self._door))

    async def _take_over(self, door: SettingsDoor) -> None:
        async with self._changing:
            await self._adopt(await door.read())
            self._put_in_force()
            self._report(self.facts())

    async def _adopt(self, kept: KeptSettings) -> None:
        if kept.settings != self.settings:
            names = kept.settings.keys() | self.settings.keys() | self._started_with.keys()
            self._at_start_only |= set(await asyncio.to_thread(self._ask_at_start_only, names))
            self._versions.appendleft(_Version(time.monotonic(), kept.settings))
            log.info("settings taken over", settings=sorted(kept.settings))

    def _put_in_force(self) -> None:
        if self._postmaster_pid is None:
            return  # the next start lays the file
        try:
            self._write_file()
            os.kill(self._postmaster_pid, signal.SIGHUP)
        except OSError as error:  # its end is noticed elsewhere
            log.warning("the settings cannot be put in force", reason=str(error))

    def _write_file(self) -> None:
        # Another name than ALTER SYSTEM's, which may be writing its own now.
        new = self._data_dir / f"{AUTO_CONF_NAME}.kept"
        new.write_text(render_auto_conf(self.settings))
        new.chmod(0o600)
        give_to_user(new)
        new.replace(self._data_dir / AUTO_CONF_NAME)

    # ALTER SYSTEM

    @contextlib.asynccontextmanager
    async def serving(
        self, path: Path, others: Mapping[str, Callable[[str], Awaitable[str]]] | None = None
    ) -> AsyncIterator[None]:
        """Answers libhydrate on the socket `path`, however long its name. `others`: who answers requests that
        begin with another word, and gets the rest.
        """
        self._others = others or {}
        listener = _bound(path)
        server = await asyncio.start_unix_server(self._connected, sock=listener)
        try:
            yield
        finally:
            server.close()
            for writer in self._connections:
                writer.close()
            _remove(path)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                word, _, rest = (await reader.readline()).decode().removesuffix("\n").partition(" ")
            if word in self._others:
                answer = await self._others[word](rest)
            elif word == "keep" and not rest:
                answer = await self._keep()
            else:
                return
            writer.write(" ".join(answer.split()).encode()[:ANSWER_SIZE_MAX])
            await writer.drain()
        except (OSError, TimeoutError, ValueError) as error:
            log.debug("a request of libhydrate failed", error=error)
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _keep(self) -> str:
        """What libhydrate is told."""
        if self._door is None:
            return "refused: this endpoint has nobody who keeps its settings"
        try:
            async with asyncio.timeout(CALL_LIMIT_S), self._changing:
                await self._keep_new_file(self._door)
        except (RefusedError, AutoConfError) as error:
            return f"refused: {str(error).removeprefix('the controller: ')}"
        except TimeoutError:
            return "failed: the controller did not say in time whether the setting is kept"
        except (ExcimerError, OSError) as error:
            return f"failed: the setting cannot be kept: {error}"
        return "kept"

    async def _keep_new_file(self, door: SettingsDoor) -> None:
        new = self._data_dir / AUTO_CONF_NEW_NAME
        to_set, to_unset = self._difference(parse_auto_conf(new.read_text()))
        await self._adopt(await door.change(to_set, to_unset))
        self._write_file()
        new.unlink()
        self._report(self.facts())

    def _difference(self, wanted: dict[str, str]) -> tuple[dict[str, str], list[str]]:
        """What an ALTER SYSTEM that wrote `wanted` changed.

        It read the file before it wrote, and we may have written another list in between. It changes one
        name, or removes all: so of the recent lists the one that is nearest was what it read.
        """
        if not wanted and len(self.settings) > 1:
            return {}, [ALL]
        since = time.monotonic() - RECENT_S
        recent = [
            self.settings,
            *(old.settings for old in list(self._versions)[1:] if old.written_at_s > since),
        ]
        read = min(recent, key=lambda settings: _distance(settings, wanted))
        to_set = {name: value for name, value in wanted.items() if read.get(name) != value}
        return to_set, [name for name in read if name not in wanted]


def _bound(path: Path) -> socket.socket:
    """A socket for PostgreSQL's user only, also where its path is longer than the 107 bytes of a socket's."""
    _remove(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(listener.close)
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            listener.bind(f"/proc/self/fd/{parent}/{path.name}")
        finally:
            os.close(parent)
        path.chmod(0o600)
        give_to_user(path)
        on_failure.pop_all()
    return listener


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _distance(one: Mapping[str, str], other: Mapping[str, str]) -> int:
    return sum(one.get(name) != other.get(name) for name in one.keys() | other.keys())


def digest_of(settings: Mapping[str, str]) -> str:
    """Tells one list from another in /healthz without showing it."""
    return hashlib.sha256(msgspec.json.encode(sorted(settings.items()))).hexdigest()[:16]
