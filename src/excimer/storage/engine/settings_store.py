"""A tenant's settings in object storage: reading the newest, writing the next. Live for its timelines.

Written as manifests are (G1): create-if-absent, a generation in the name, the greatest name counts. Where
that cannot be read the defaults count, and nothing may go: the tenant may have chosen to keep more (S3). New
settings as a whole take its place.

Not here: what settings there are (`excimer.storage.format.tenant_settings`).
"""

from contextlib import suppress
from typing import Any, Final

from excimer.io.object_store import ObjectExistsError, ObjectMissingError, ObjectStore, ObjectStoreError
from excimer.storage.engine.manifest_store import OvertakenError, tenant_prefix
from excimer.storage.format.tenant_settings import (
    DamagedSettingsError,
    Overrides,
    SettingsName,
    TenantSettings,
    apply_overrides,
    pack_overrides,
    parse_settings_name,
    unpack_overrides,
)

OBJECTS_KEPT: Final = 3
"""Older ones are deleted."""


class LiveSettings:
    """A tenant's settings as its timelines see them: `current` is replaced as a whole when they change."""

    def __init__(self, defaults: TenantSettings, overrides: Overrides) -> None:
        self.defaults = defaults
        self.damage: str | None = None
        """Why nobody knows what the tenant has chosen: the defaults count. None: it is known."""
        self.set(overrides)

    def set(self, overrides: Overrides) -> None:
        """From here on these count. Raises `TenantSettingsError` and changes nothing then."""
        current = apply_overrides(self.defaults, overrides)
        self.overrides = dict(overrides)
        self.current = current
        self.damage = None

    def set_damaged(self, reason: str) -> None:
        """What the tenant has chosen cannot be read."""
        self.set({})
        self.damage = reason


class SettingsStore:
    """One tenant's settings objects, written by one thread at a time. Calls block."""

    def __init__(self, store: ObjectStore, tenant_id: str, generation: int) -> None:
        self._store = store
        self._prefix = f"{tenant_prefix(tenant_id)}/settings"
        self._generation = generation
        self._sequence = 0
        self._unanswered: bytes | None = None

    def read(self) -> dict[str, Any]:
        """The newest overrides; none when nothing was ever set.

        Raises `OvertakenError` if a newer generation has written some, `DamagedSettingsError`,
        `ObjectStoreError`.
        """
        for _ in range(OBJECTS_KEPT):
            newest = self._newest_name()
            if newest is None:
                return {}
            if newest.generation == self._generation:
                self._sequence = newest.sequence
            with suppress(ObjectMissingError):  # replaced meanwhile by one that is newer
                return self._unpack_twice(f"{self._prefix}/{newest}")
        raise ObjectStoreError(f"the settings in {self._prefix} change faster than they can be read")

    def _unpack_twice(self, name: str) -> dict[str, Any]:
        """What was only damaged on its way here is whole at the second try."""
        try:
            return unpack_overrides(self._store.get(name), name)
        except DamagedSettingsError:
            return unpack_overrides(self._store.get(name), name)

    def write(self, overrides: Overrides) -> None:
        """Makes the overrides the newest; durable on return.

        Raises `OvertakenError`; `ObjectStoreError`, after which they may or may not be there.
        """
        data = pack_overrides(overrides)
        self._newest_name()
        if self._unanswered is not None and self._is_there(self._unanswered):
            self._sequence += 1
        self._unanswered = data
        try:
            self._store.put(self._next_name(), data)
        except ObjectExistsError as error:
            if not self._is_there(data):  # else: this very one, its answer lost
                raise OvertakenError(
                    f"another process has written {self._next_name()}: this one must stop"
                ) from error
        self._unanswered = None
        self._sequence += 1
        self._delete_older()

    def _next_name(self) -> str:
        return f"{self._prefix}/{SettingsName(self._generation, self._sequence + 1)}"

    def _is_there(self, data: bytes) -> bool:
        """Whether a write whose answer was lost has happened."""
        try:
            return self._store.get(self._next_name()) == data
        except ObjectMissingError:
            return False

    def _newest_name(self) -> SettingsName | None:
        names = self._names()
        if not names:
            return None
        if names[-1].generation > self._generation:
            raise OvertakenError(
                f"the settings in {self._prefix} are owned by generation {names[-1].generation}: "
                f"this one, {self._generation}, must stop"
            )
        return names[-1]

    def _names(self) -> list[SettingsName]:
        found = (parse_settings_name(info.name.rsplit("/", 1)[-1]) for info in self._store.list(self._prefix))
        return sorted(name for name in found if name is not None)

    def _delete_older(self) -> None:
        with suppress(ObjectStoreError):  # one too many does no harm
            for name in self._names()[:-OBJECTS_KEPT]:
                self._store.delete(f"{self._prefix}/{name}")
