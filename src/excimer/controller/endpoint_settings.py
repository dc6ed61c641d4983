"""The list of PostgreSQL settings of each endpoint: the one place where it is kept.

`endpoint config`, `endpoint create --set` and ALTER SYSTEM in SQL all change this list, each by what
it sets and unsets, so that none undoes another's work. A list is tried out by the PostgreSQL build that is to
have it before it is stored.

Not here: putting a list in force (the compute's manager).
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from excimer.controller.model import Endpoint
from excimer.controller.store import MetadataStore
from excimer.postgres.discovery import find_build
from excimer.postgres.setting_check import at_start_only, check_settings
from excimer.service.logs import get_logger

ALL: Final = "*"
"""In `unset`: every setting."""

log = get_logger(__name__)


class SettingsCheck(Protocol):
    """What PostgreSQL thinks of settings. Both block."""

    def check(self, pg_version: int, settings: Mapping[str, str]) -> dict[str, str]:
        """The settings, names in lower case. Raises `RefusedError` that names the one at fault."""

    def at_start_only(self, pg_version: int, names: Sequence[str]) -> list[str]:
        """Those that only a new start puts in force."""


class BuildCheck:
    """Asks the build of this machine that an endpoint here would run."""

    def check(self, pg_version: int, settings: Mapping[str, str]) -> dict[str, str]:
        return check_settings(find_build(pg_version), settings)

    def at_start_only(self, pg_version: int, names: Sequence[str]) -> list[str]:
        return at_start_only(find_build(pg_version), names)


class SettingsChange(msgspec.Struct, frozen=True, kw_only=True):
    """The list after a change."""

    settings: dict[str, str]
    changed: list[str]
    """Names whose value is another one now, or that are gone or new."""
    at_start_only: list[str]
    """Of the listed and the changed names: those that only a new start puts in force."""


class EndpointSettings:
    """Reads and changes lists, one change at a time."""

    def __init__(
        self,
        store: MetadataStore,
        find_endpoint: Callable[[str], Awaitable[tuple[Endpoint, str]]],
        check: SettingsCheck,
    ) -> None:
        self._store = store
        self._find_endpoint = find_endpoint
        self._check = check
        self._changing = asyncio.Lock()

    async def check(self, pg_version: int, settings: Mapping[str, str]) -> dict[str, str]:
        """A list for a new endpoint. Raises `RefusedError` that names the setting at fault."""
        if not settings:
            return {}
        return await asyncio.to_thread(self._check.check, pg_version, settings)

    async def read(self, name: str) -> SettingsChange:
        endpoint, _ = await self._find_endpoint(name)
        return await self._answer(endpoint, endpoint.postgres_settings, [])

    async def change(self, name: str, to_set: Mapping[str, str], to_unset: Sequence[str]) -> SettingsChange:
        """Unsets (`ALL`: everything), then sets; durable when it returns. All of it or nothing.

        Unsetting what is not set is no error. Raises `UnknownNameError`, and `RefusedError` for what is
        unsafe or not understood.
        """
        async with self._changing:
            endpoint, _ = await self._find_endpoint(name)
            before = endpoint.postgres_settings
            gone = {given.lower() for given in to_unset}
            kept = {} if ALL in gone else {key: value for key, value in before.items() if key not in gone}
            given = {key.lower(): value for key, value in to_set.items()}
            # What was stored long ago is not refused now: it would be in the way of every other change.
            await self.check(endpoint.pg_version, to_set)
            after = kept | given
            if given:
                await self.check(endpoint.pg_version, after)
            changed = sorted(key for key in before | after if before.get(key) != after.get(key))
            if changed:
                await asyncio.to_thread(self._store.put_postgres_settings, endpoint.name, after)
                log.info("settings changed", endpoint=endpoint.name, settings=changed)
            return await self._answer(endpoint, after, changed)

    async def _answer(
        self, endpoint: Endpoint, settings: Mapping[str, str], changed: list[str]
    ) -> SettingsChange:
        names = sorted({*settings, *changed})
        late = await asyncio.to_thread(self._check.at_start_only, endpoint.pg_version, names) if names else []
        return SettingsChange(settings=dict(settings), changed=changed, at_start_only=late)
