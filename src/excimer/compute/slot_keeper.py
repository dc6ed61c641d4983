"""Keeps an endpoint's replication slots where a crash cannot reach them, and brings them back after one.

::

    a slot is made, moves on, is dropped -> rename in pg_replslot -> libhydrate --"slots FROM TO"--> this
                                                  ^                                                   |
                                                  +------------- "kept" <--- pageserver, one object --+

PostgreSQL lets go of WAL and of catalogs' old rows only after that renaming, and it fails if the slots cannot
be kept: so what was kept last can always be decoded from. It may be a little behind what the consumer has
confirmed, which gets that once more, as after a crash of any PostgreSQL; it is never ahead.

A start without a directory and without what a clean stop saved takes the slots over (`take_over`), under the
term of its election: who was replaced can change them no more.

An answer comes before its renaming, and another slot may be saved between the two: until the renaming is seen
in the directory, what was answered counts, and not what lies there.

Not here: the WAL that they need (`slot_wal`), the library's side (`csrc/libhydrate/kept_slots.c`).
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from excimer.base.errors import ExcimerError, NotFoundError, RetryableError
from excimer.base.lsn import Lsn
from excimer.compute.proposer import PROPOSER_SLOT
from excimer.compute.state_keeper import StateOwner
from excimer.pgformat.kept_slots import (
    OBJECT_SIZE_BYTES_MAX,
    KeptSlot,
    KeptSlots,
    pack_slots,
    snapshot_path,
    unpack_slots,
)
from excimer.pgformat.replication_slot import DamagedSlotError, unpack_slot
from excimer.service.http_client import HttpClient, path_of
from excimer.service.logs import get_logger
from excimer.wire.endpoint_tokens import EndpointTokens

SLOTS_REQUEST: Final = "slots"
KEEP_LIMIT_S: Final = 8.0
"""Less than the library waits (10 s): a pageserver that is started anew is waited for."""
RETRY_S: Final = 0.2
STOP_LIMIT_S: Final = 1.0
"""Of a stop, which is broken off when nothing moves for longer."""
RENAMING_S: Final = 60.0
"""So long after an answer a renaming may still come; later, its process is gone, or had given up waiting."""
REST_S: Final = 5.0
"""After a failure others fail at once for so long: a checkpoint saves one slot after the other."""

_FOLDER: Final = "pg_replslot"
_CHANGED = re.compile(rf"{_FOLDER}/([a-z0-9_]{{1,63}})/state\.tmp {_FOLDER}/\1/state")
_MADE = re.compile(rf"{_FOLDER}/([a-z0-9_]{{1,63}})\.tmp {_FOLDER}/\1")
_DROPPED = re.compile(rf"{_FOLDER}/([a-z0-9_]{{1,63}}) {_FOLDER}/\1\.tmp")

log = get_logger(__name__)


class SlotChange(NamedTuple):
    """One renaming."""

    name: str
    state_path: str | None
    """Where its state is until then; None: it is dropped."""


def parse_change(text: str) -> SlotChange | None:
    """Of "FROM TO"; None: it makes no difference to any slot."""
    if match := _CHANGED.fullmatch(text):
        return SlotChange(match[1], f"{_FOLDER}/{match[1]}/state.tmp")
    if match := _MADE.fullmatch(text):
        return SlotChange(match[1], f"{_FOLDER}/{match[1]}.tmp/state")
    if match := _DROPPED.fullmatch(text):
        return SlotChange(match[1], None)
    return None


def read_states(data_dir: Path) -> dict[str, bytes]:
    """The slots that are in the directory, by their names. Blocks. Raises OSError."""
    states = {}
    for path in (data_dir / _FOLDER).iterdir():
        if "." not in path.name:
            with contextlib.suppress(FileNotFoundError):  # dropped meanwhile, which asks for itself
                states[path.name] = (path / "state").read_bytes()
    return states


def slots_of(data_dir: Path, pg_version: int, states: Mapping[str, bytes]) -> list[KeptSlot]:
    """Of users and lasting, in the order of their names, and those that are being made. Blocks.

    The latter last once they are made, from a restart LSN that is chosen at the beginning. Raises
    `DamagedSlotError`, OSError.
    """
    slots = []
    for name in sorted(states.keys() - {PROPOSER_SLOT}):
        slot = unpack_slot(states[name], pg_version)
        if slot.is_persistent or (slot.is_unfinished and slot.needs_wal):
            slots.append(KeptSlot(state=states[name], snapshot=_read_snapshot(data_dir, slot.restart_lsn)))
    return slots


class AnsweredChanges:
    """Renamings that were allowed and may not have happened yet. One thread at a time."""

    def __init__(self) -> None:
        self._changes: dict[str, tuple[bytes | None, float]] = {}

    def add(self, name: str, state: bytes | None) -> None:
        """None: the slot is dropped."""
        self._changes[name] = state, time.monotonic() + RENAMING_S

    def lay_over(self, states: dict[str, bytes]) -> None:
        """What was answered in place of what is in the directory; what has happened is forgotten."""
        now = time.monotonic()
        for name, (state, until) in list(self._changes.items()):
            if states.get(name) == state or now >= until:
                del self._changes[name]
            elif state is None:
                del states[name]
            else:
                states[name] = state


def slot_arguments(data_dir: Path, pg_version: int) -> list[str]:
    """Options of the postgres program without which it would not start on the slots that are there. Blocks.

    They are the branch's: a promoted replica, or another endpoint after this one, has settings of its own.
    """
    for path in (data_dir / _FOLDER).glob("*/state"):
        with contextlib.suppress(OSError, DamagedSlotError):
            slot = unpack_slot(path.read_bytes(), pg_version)
            if slot.is_logical and slot.is_persistent:
                return ["-c", "wal_level=logical"]
    return []


def _read_snapshot(data_dir: Path, restart_lsn: Lsn) -> bytes | None:
    try:
        return (data_dir / snapshot_path(restart_lsn)).read_bytes()
    except FileNotFoundError:
        return None


class SlotKeeper:
    """One for all attempts of a manager; `begin` each."""

    def __init__(
        self, owner: StateOwner, data_dir: Path, wal_limit_bytes: int, tokens: Callable[[], EndpointTokens]
    ) -> None:
        self._owner = owner
        self._data_dir = data_dir
        self._wal_limit_bytes = wal_limit_bytes
        self._tokens = tokens
        self._term: int | None = None
        self._sequence = 0
        self._kept: list[KeptSlot] | None = None
        """What is kept now; None: not known."""
        self._answered = AnsweredChanges()
        self._changing = asyncio.Lock()
        self._is_stopping = False
        self._resting_until = 0.0

    def begin(self, term: int) -> None:
        """A new life of PostgreSQL, elected in `term`."""
        self._term, self._sequence, self._kept = term, 0, None
        self._answered = AnsweredChanges()
        self._is_stopping, self._resting_until = False, 0.0

    def stopping(self) -> None:
        """From here on it is waited for a pageserver for a moment only."""
        self._is_stopping = True

    async def take_over(self) -> KeptSlots | None:
        """What was kept last, ours from here on; None: there is nothing.

        Slots that were being made are dropped, as a restart of PostgreSQL drops them. Raises ExcimerError,
        OSError: try again.
        """
        if not self._owner.pageserver_http_address or self._term is None:
            return None
        try:
            data = await self._client(KEEP_LIMIT_S).post_for_bytes(self._path(self._term))
        except NotFoundError:
            return None
        taken = unpack_slots(data, "what was kept of the replication slots")
        self._kept = taken.slots
        unfinished = [slot for parsed, slot in taken.parsed() if parsed.is_unfinished]
        if unfinished:
            await self.give_up(unfinished)
        return msgspec.structs.replace(taken, slots=[slot for slot in taken.slots if slot not in unfinished])

    async def give_up(self, slots: list[KeptSlot]) -> None:
        """These cannot be brought back, and hold WAL no longer. Raises ExcimerError, OSError: try again."""
        assert self._term is not None
        async with asyncio.timeout(KEEP_LIMIT_S), self._changing:
            await self._save(self._term, [slot for slot in self._kept or [] if slot not in slots])

    async def keep(self, text: str) -> str:
        """What libhydrate is told of a renaming "FROM TO"."""
        change = parse_change(text)
        if change is None or self._term is None or not self._owner.pageserver_http_address:
            return "kept"
        started = time.monotonic()
        limit_s = STOP_LIMIT_S if self._is_stopping else KEEP_LIMIT_S
        try:
            async with asyncio.timeout(limit_s), self._changing:
                if started < self._resting_until:
                    return "failed: the pageserver did not keep the replication slots a moment ago"
                await self._keep(self._term, change)
        except (ExcimerError, OSError, TimeoutError) as error:
            self._resting_until = time.monotonic() + REST_S
            reason = str(error) or f"the pageserver has not answered within {limit_s:g} s"
            log.warning("replication slots are not kept", slot=change.name, reason=reason)
            return f"failed: {reason}"
        return "kept"

    async def _keep(self, term: int, change: SlotChange) -> None:
        state, slots = await asyncio.to_thread(self._look, change)
        is_new = slots or self._kept is not None or change.state_path is None
        if slots != self._kept and is_new:
            await self._save(term, slots)
        self._answered.add(change.name, state)

    def _look(self, change: SlotChange) -> tuple[bytes | None, list[KeptSlot]]:
        """The slot's state after `change`, and all slots as they are then."""
        states = read_states(self._data_dir)
        self._answered.lay_over(states)
        states.pop(change.name, None)
        state = None if change.state_path is None else (self._data_dir / change.state_path).read_bytes()
        if state is not None:
            states[change.name] = state
        return state, slots_of(self._data_dir, self._owner.pg_version, states)

    async def _save(self, term: int, slots: list[KeptSlot]) -> None:
        owner = self._owner
        packed = pack_slots(
            KeptSlots(
                tenant_id=owner.tenant_id,
                timeline_id=owner.timeline_id,
                pg_version=owner.pg_version,
                wal_limit_bytes=self._wal_limit_bytes,
                slots=slots,
            )
        )
        if len(packed) > OBJECT_SIZE_BYTES_MAX:
            raise DamagedSlotError(f"the replication slots and their snapshots take {len(packed)} bytes")
        self._kept = None
        self._sequence += 1
        await self._put(self._path(term, self._sequence), packed)
        self._kept = slots

    async def _put(self, path: str, packed: bytes) -> None:
        while True:
            try:
                await self._client(KEEP_LIMIT_S).put_bytes(path, packed)
                return
            except RetryableError as error:
                log.debug("replication slots are not kept yet", error=error)
            await asyncio.sleep(RETRY_S)

    def _client(self, timeout_s: float) -> HttpClient:
        token = self._tokens().write_wal or ""
        return HttpClient("the pageserver", self._owner.pageserver_http_address, token, timeout_s=timeout_s)

    def _path(self, *numbers: int) -> str:
        owner = self._owner
        ids = "tenant", owner.tenant_id, "timeline", owner.timeline_id
        return path_of("v1", *ids, "replication_slots", *(str(number) for number in numbers))
