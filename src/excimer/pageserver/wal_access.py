"""From which safekeepers a timeline's WAL may be read, and with which token: the controller's word, kept.

::

    get(timeline) --in memory, young--> it
                  --on disk, young----> it                      a pageserver that was started again
                  --else ask----------> the controller's answer, kept in memory and on disk
                  --no answer---------> what is there, until its token runs out; then `WalAccessError`

Asked for one timeline at a time, when it connects, so an idle one costs nothing. The pageserver proves only
which one it is; the controller makes the token. With the controller away everything that has asked goes on
for the rest of its token's life, also over a restart of the pageserver.

Not here: choosing among the safekeepers (`receiver_plan`).
"""

import asyncio
import os
from pathlib import Path
from typing import Final

import msgspec

from excimer.base.clock import Clock, UnixTime
from excimer.base.errors import ExcimerError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.service.health import Health
from excimer.service.http_client import HttpClient, path_of
from excimer.service.logs import get_logger
from excimer.wire.wal_access import WalAccess

CALL_TIMEOUT_S: Final = 5.0
RENEW_AFTER: Final = 0.5
"""Part of a token's life after which it is no longer young."""
ASK_INTERVAL_S: Final = 5.0
"""What seems wrong is asked for anew at most so often."""
_FILE_MODE: Final = 0o600
_CHECK: Final = "WAL access"

log = get_logger(__name__)

Key = tuple[TenantId, TimelineId]


class WalAccessError(RetryableError):
    """The controller gives no access to a timeline's WAL, and what it gave has run out."""


class HeldAccess(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller answered, and its time by this machine's clock."""

    access: WalAccess
    asked_at: UnixTime

    @property
    def expires_at(self) -> float:
        return self.asked_at + self.access.valid_for_s

    @property
    def renew_at(self) -> float:
        return self.asked_at + RENEW_AFTER * self.access.valid_for_s


class WalAccessBook:
    """Of all timelines of a pageserver. Belongs to the event loop."""

    def __init__(
        self, directory: Path, *, controller_address: str, token: str, clock: Clock, health: Health
    ) -> None:
        """`token` says which pageserver this is. `directory` may not exist yet."""
        self._directory = directory
        self._controller = HttpClient("the controller", controller_address, token, CALL_TIMEOUT_S)
        self._clock = clock
        self._health = health
        self._held: dict[Key, HeldAccess] = {}
        self._doubtful: set[Key] = set()
        self._waiting: dict[Key, str] = {}

    def known(self, key: Key) -> HeldAccess | None:
        """What was last heard, perhaps run out; its addresses are still worth a try with a newer token."""
        return self._held.get(key)

    def doubt(self, key: Key) -> None:
        """A safekeeper was not where it should be, or refused: the next `get` asks anew."""
        self._doubtful.add(key)

    async def get(self, key: Key) -> HeldAccess:
        """One whose token lives. Raises `WalAccessError`."""
        now = self._clock.now()
        held = self._held.get(key) or await asyncio.to_thread(self._read, key)
        if held is not None:
            self._held[key] = held
            is_doubtful = key in self._doubtful and now - held.asked_at >= ASK_INTERVAL_S
            if now < held.renew_at and not is_doubtful:
                return held
        try:
            return await self.renew(key)
        except WalAccessError as error:
            if held is not None and now < held.expires_at:
                return held
            self._say_waiting(key, str(error))
            raise

    async def renew(self, key: Key) -> HeldAccess:
        """A new one from the controller. Raises `WalAccessError`."""
        tenant_id, timeline_id = key
        asked_at = self._clock.now()
        path = path_of("v1", "tenants", tenant_id, "timelines", timeline_id, "wal_access")
        try:
            access = msgspec.convert(await self._controller.post(path), WalAccess)
        except (ExcimerError, msgspec.ValidationError) as error:
            raise WalAccessError(f"no access to WAL of timeline {timeline_id}: {error}") from error
        held = self._held[key] = HeldAccess(access=access, asked_at=asked_at)
        self._doubtful.discard(key)
        self._say_waiting(key, None)
        await asyncio.to_thread(self._write, key, held)
        return held

    def forget(self, key: Key) -> None:
        """The timeline is no longer in service here."""
        self._held.pop(key, None)
        self._doubtful.discard(key)
        self._say_waiting(key, None)
        self._path(key).unlink(missing_ok=True)

    def problem(self, key: Key) -> str | None:
        """Why the timeline's ingest waits for the controller; None while it does not."""
        return self._waiting.get(key)

    def _say_waiting(self, key: Key, reason: str | None) -> None:
        if reason is not None:
            self._waiting[key] = reason
        elif self._waiting.pop(key, None) is None:
            return
        if self._waiting:
            count, last = len(self._waiting), list(self._waiting.values())[-1]
            self._health.warn(_CHECK, f"missing: {count} timelines only serve what they have: {last}")
        else:
            self._health.warn(_CHECK, None)

    # On disk

    def _path(self, key: Key) -> Path:
        return self._directory / key[0] / key[1]

    def _read(self, key: Key) -> HeldAccess | None:
        try:
            return msgspec.json.decode(self._path(key).read_bytes(), type=HeldAccess)
        except (OSError, msgspec.DecodeError):
            return None  # none, or of another version: the controller has it

    def _write(self, key: Key, held: HeldAccess) -> None:
        """A pageserver that cannot write it only lacks it after a restart."""
        path = self._path(key)
        temporary = path.with_suffix(".new")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _FILE_MODE)
            with open(descriptor, "wb") as file:
                file.write(msgspec.json.encode(held))
            temporary.replace(path)
        except OSError as error:
            log.warning("access to WAL is not kept over a restart", path=str(path), error=error)
