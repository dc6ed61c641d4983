"""Passwords of roles: which one a branch's data holds the verifier of, at which of its LSNs.

Roles and their verifiers are data of a branch: a branch inherits them, and one that is restored has older
ones again. So nothing is written into a branch to make a password fit. All passwords that were generated
are kept instead, with their verifiers; and whoever sees the verifier in force finds the password that fits:

* `look_up`, of a running endpoint: by the verifier itself, whatever was done to the branch;
* `in_force`, without one: the newest that is known to be set at or below an LSN, along the ancestors.

A fresh cluster's first verifier is chosen here and written by the pageserver with the cluster, before anybody
can connect. A password that its owner chose is not kept, only that there is one.

Not here: SQL; who sets a password does that, between `remember` without an LSN and `remember` with it.
"""

import asyncio
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

from excimer.base.clock import Clock
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import INVALID_LSN, MAX_LSN, Lsn
from excimer.controller.model import RolePassword, Timeline
from excimer.controller.store import MetadataStore
from excimer.wire.scram import PASSWORD_SIZE_BYTES, SALT_SIZE_BYTES, make_verifier, password_from

BOOTSTRAP_SUPERUSER: Final = "postgres"
"""Of clusters that Excimer makes; an imported one has its own."""


def password_in_force(
    timelines: Iterable[Timeline],
    passwords: Sequence[RolePassword],
    timeline_id: TimelineId,
    role: str | None,
    lsn: Lsn | None,
) -> RolePassword | None:
    """The newest that a role (None: the bootstrap superuser) is known to have at an LSN, or at the head."""
    for row in _inherited(timelines, passwords, timeline_id, MAX_LSN if lsn is None else lsn):
        if row.is_bootstrap if role is None else row.role == role:
            return row
    return None


def inherited_passwords(
    timelines: Iterable[Timeline], passwords: Sequence[RolePassword], timeline: Timeline
) -> list[RolePassword]:
    """What a timeline has from its ancestors, as its own: to be kept when it is parted from them."""
    return [
        msgspec.structs.replace(row, timeline_id=timeline.timeline_id)
        for row in _inherited(timelines, passwords, timeline.timeline_id, MAX_LSN)
        if row.timeline_id != timeline.timeline_id
    ]


def _inherited(
    timelines: Iterable[Timeline], passwords: Sequence[RolePassword], timeline_id: TimelineId, limit_lsn: Lsn
) -> Iterator[RolePassword]:
    """Rows that were set on the timeline or its ancestors, newest first."""
    by_id = {timeline.timeline_id: timeline for timeline in timelines}
    timeline = by_id.get(timeline_id)
    while timeline is not None:
        own = [
            (row.lsn, row.created_at, row)
            for row in passwords
            if row.timeline_id == timeline.timeline_id and row.lsn is not None and row.lsn <= limit_lsn
        ]
        own.sort(key=lambda entry: entry[:2], reverse=True)
        yield from (row for *_, row in own)
        limit_lsn = min(limit_lsn, timeline.ancestor_lsn or INVALID_LSN)
        timeline = by_id.get(timeline.ancestor_timeline_id) if timeline.ancestor_timeline_id else None


class RolePasswords:
    """The operations, each one look at the store and at most one change."""

    def __init__(self, store: MetadataStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def initial_verifier(self, timeline: Timeline) -> str:
        """For the bootstrap superuser of a fresh cluster; the same one when its creation is tried again."""
        known = await asyncio.to_thread(self._store.list_role_passwords, timeline.tenant_id)
        for row in known:
            if row.timeline_id == timeline.timeline_id and row.is_bootstrap and row.lsn == INVALID_LSN:
                return row.verifier
        password = password_from(secrets.token_bytes(PASSWORD_SIZE_BYTES))
        row = RolePassword(
            tenant_id=timeline.tenant_id,
            timeline_id=timeline.timeline_id,
            role=BOOTSTRAP_SUPERUSER,
            is_bootstrap=True,
            verifier=make_verifier(password, secrets.token_bytes(SALT_SIZE_BYTES)),
            password=password,
            lsn=INVALID_LSN,
            created_at=self._clock.now(),
        )
        await asyncio.to_thread(self._store.put_role_passwords, [row])
        return row.verifier

    async def remember(
        self,
        timeline: Timeline,
        *,
        role: str,
        is_bootstrap: bool,
        verifier: str,
        password: str | None,
        lsn: Lsn | None,
    ) -> None:
        """Before a verifier is set (without LSN) and after (with one). What was known of it stays known."""
        known = await asyncio.to_thread(self._store.list_role_passwords, timeline.tenant_id)
        key = (timeline.timeline_id, role, verifier)
        old = next((row for row in known if (row.timeline_id, row.role, row.verifier) == key), None)
        row = RolePassword(
            tenant_id=timeline.tenant_id,
            timeline_id=timeline.timeline_id,
            role=role,
            is_bootstrap=is_bootstrap,
            verifier=verifier,
            password=password or (old.password if old is not None else None),
            lsn=lsn if lsn is not None or old is None else old.lsn,
            created_at=self._clock.now(),
        )
        await asyncio.to_thread(self._store.put_role_passwords, [row])

    async def look_up(
        self, timeline: Timeline, *, role: str, is_bootstrap: bool, verifier: str, lsn: Lsn
    ) -> str | None:
        """The password of a verifier that was seen in a branch at an LSN; None: only its owner knows it."""
        known = await asyncio.to_thread(self._store.list_role_passwords, timeline.tenant_id)
        password = next(
            (row.password for row in known if row.verifier == verifier and row.password is not None), None
        )
        believed = await self.in_force(timeline.tenant_id, timeline.timeline_id, role, lsn)
        if believed is None or (believed.verifier, believed.is_bootstrap) != (verifier, is_bootstrap):
            await self.remember(
                timeline, role=role, is_bootstrap=is_bootstrap, verifier=verifier, password=password, lsn=lsn
            )
        return password

    async def in_force(
        self, tenant_id: TenantId, timeline_id: TimelineId, role: str | None, lsn: Lsn | None
    ) -> RolePassword | None:
        """See `password_in_force`."""
        known = await asyncio.to_thread(self._store.list_role_passwords, tenant_id)
        timelines = await asyncio.to_thread(self._store.list_timelines, tenant_id)
        return password_in_force(timelines, known, timeline_id, role, lsn)
