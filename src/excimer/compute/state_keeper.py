"""Has what WAL does not carry saved at a clean stop, and brings it back at a start there. Neither can fail
either.

::

    stop:   postmaster gone, pg_control "shut down", a quorum has it -> collect, pack -> pageserver
    start:  end of WAL is known -> ask the pageserver, beside the basebackup -> lay it, or go on without

A save that does not work costs a warning: the next cold start is as after a crash. So does a state that is
missing or damaged, and one with which PostgreSQL would not start is not tried again.

Not here: what is in a state (`state_collection`), how it is laid (`state_resumption`).
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from excimer.base.errors import CorruptionError, ExcimerError, NotFoundError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn, format_lsn
from excimer.compute.arena import Arena
from excimer.compute.proposer import PROPOSER_SLOT
from excimer.compute.state_collection import CollectedState, StateLimits, collect_state
from excimer.compute.state_resumption import Resumption, plan_resumption
from excimer.pgformat.basebackup import Basebackup
from excimer.pgformat.saved_state import (
    OBJECT_SIZE_BYTES_MAX,
    SavedState,
    StateHeader,
    pack_state,
    unpack_state,
)
from excimer.service.http_client import HttpClient, path_of
from excimer.service.logs import get_logger
from excimer.wire.endpoint_tokens import EndpointTokens

SAVE_LIMIT_S: Final = 6.0
"""A stop waits no longer for it."""
FETCH_LIMIT_S: Final = 5.0
"""A start waits no longer for it, while it waits for its basebackup anyway."""
SLOT_FAULT: Final = "replication slot"
"""In PostgreSQL's reasons not to start that settings can heal: nobody's slot is given up for them."""

log = get_logger(__name__)


FetchedState = tuple[StateHeader, SavedState]


class StateTooLargeError(CorruptionError):
    """A packed state is larger than the pageserver takes."""


class StateOwner(NamedTuple):
    """Whose states these are, and where."""

    tenant_id: TenantId
    timeline_id: TimelineId
    pg_version: int
    pageserver_http_address: str
    """Empty: nobody keeps any."""


class StateKeeper:
    """One for all attempts of a manager."""

    def __init__(self, owner: StateOwner, limits: StateLimits, tokens: Callable[[], EndpointTokens]) -> None:
        self._owner = owner
        self._limits = limits
        self._tokens = tokens
        self._in_use: Lsn | None = None
        self._distrusted: Lsn | None = None
        self._may_count_again = False

    @property
    def is_on(self) -> bool:
        return bool(self._owner.pageserver_http_address and self._limits.size_bytes_max)

    @property
    def may_count_again(self) -> bool:
        """Whether unlogged rows may have been saved where the start is that was prepared last.

        They would come back at a start after a crash, if WAL had not left that LSN meanwhile.
        """
        return self._may_count_again

    async def fetch(self, lsn: Lsn) -> FetchedState | None:
        """What was saved at exactly this LSN; None without, and why is in the log."""
        self._may_count_again = bool(self._owner.pageserver_http_address)
        if not self.is_on or lsn == self._distrusted:
            return None
        client = HttpClient(
            "the pageserver",
            self._owner.pageserver_http_address,
            self._tokens().read_pages,
            timeout_s=FETCH_LIMIT_S,
        )
        try:
            data = await client.get_bytes(self._path(lsn))
            header, state = await asyncio.to_thread(unpack_state, data, format_lsn(lsn))
        except NotFoundError:
            self._may_count_again = False
            return None
        except (ExcimerError, OSError) as error:
            self.not_used(lsn, error)
            return None
        is_own = header.timeline_id == self._owner.timeline_id  # a branch takes no unlogged rows
        self._may_count_again = is_own and bool(state.unlogged)
        if header.tenant_id != self._owner.tenant_id:
            self.not_used(lsn, CorruptionError(f"it is tenant {header.tenant_id}'s"))
            return None
        return header, state

    def resume(self, fetched: FetchedState | None, backup: Basebackup) -> Resumption | None:
        """How to begin with it where `backup` is; None without, and why is in the log. Any thread."""
        self._in_use = None
        if fetched is None:
            return None
        lsn = Lsn(backup.lsn)
        try:
            resumption = plan_resumption(*fetched, backup, self._owner.timeline_id)
        except CorruptionError as error:
            self.not_used(lsn, error)
            return None
        self._in_use = lsn
        for left_out in resumption.left_out:
            log.warning("not brought back, because it was not saved", what=left_out)
        log.info("begins with what was saved", lsn=format_lsn(lsn), of_ancestor=resumption.is_inherited)
        return resumption

    def not_used(self, lsn: Lsn, error: Exception) -> None:
        """The start goes on without."""
        log.warning(
            "the state that was saved is not used: the endpoint starts as after a crash",
            lsn=format_lsn(lsn),
            reason=str(error),
        )

    def start_ended(self, failure: str | None) -> None:
        """None: PostgreSQL is up. One that did not come up with a state does without it next time."""
        lsn, self._in_use = self._in_use, None
        if lsn is None or failure is None or SLOT_FAULT in failure:
            return
        self._distrusted = lsn
        self.not_used(lsn, CorruptionError(f"PostgreSQL did not start with it: {failure}"))

    async def save(self, data_dir: Path, arena: Arena, commit_lsn: Lsn, hot_blocks: bytes = b"") -> bool:
        """Of a directory whose postgres is gone. `commit_lsn`: what a quorum has. Logs how it went.

        Whether unlogged rows are among it, or may be: an answer can be lost.
        """
        if not self.is_on:
            return False
        started = time.monotonic()
        try:
            async with asyncio.timeout(SAVE_LIMIT_S):
                collected, size = await self._save(data_dir, arena, commit_lsn, hot_blocks)
        except (ExcimerError, OSError, ValueError) as error:
            reason = (
                f"it took longer than {SAVE_LIMIT_S:.0f} s" if isinstance(error, TimeoutError) else str(error)
            )
            log.warning(
                "what WAL does not carry was not saved: the next start elsewhere is as after a crash",
                reason=reason,
            )
            return True
        for left_out in collected.state.left_out:
            log.warning("not saved", what=left_out)
        log.info(
            "what WAL does not carry is saved",
            lsn=format_lsn(collected.lsn),
            bytes=size,
            ms=round((time.monotonic() - started) * 1000),
        )
        return bool(collected.state.unlogged)

    async def _save(
        self, data_dir: Path, arena: Arena, commit_lsn: Lsn, hot_blocks: bytes
    ) -> tuple[CollectedState, int]:
        owner = self._owner
        collected, packed = await asyncio.to_thread(self._collect, data_dir, arena, hot_blocks)
        if commit_lsn < collected.lsn:
            raise CorruptionError(
                f"the last record ends at {format_lsn(collected.lsn)}, and a majority of safekeepers has "
                f"WAL up to {format_lsn(commit_lsn)}"
            )
        client = HttpClient(
            "the pageserver",
            owner.pageserver_http_address,
            self._tokens().write_wal or "",
            timeout_s=SAVE_LIMIT_S,
        )
        await client.put_bytes(self._path(collected.lsn), packed)
        return collected, len(packed)

    def _collect(self, data_dir: Path, arena: Arena, hot_blocks: bytes) -> tuple[CollectedState, bytes]:
        owner = self._owner
        collected = collect_state(
            data_dir,
            arena.find_presence,
            owner.pg_version,
            self._limits,
            ignored_slots={PROPOSER_SLOT},
            hot_blocks=hot_blocks,
        )
        packed = pack_state(
            owner.tenant_id, owner.timeline_id, collected.lsn, owner.pg_version, collected.state
        )
        if len(packed) > OBJECT_SIZE_BYTES_MAX:
            raise StateTooLargeError(
                f"it takes {len(packed)} bytes of at most {OBJECT_SIZE_BYTES_MAX}: lower saved_state_max_mib"
            )
        return collected, packed

    def _path(self, lsn: Lsn) -> str:
        owner = self._owner
        ids = "tenant", owner.tenant_id, "timeline", owner.timeline_id
        return path_of("v1", *ids, "saved_state", f"{lsn:016x}")
