"""Who is given access to WAL: the pageserver that has the tenant, for one timeline, and nobody else."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from excimer.base.ids import TenantId, TimelineId
from excimer.controller.core import IncompleteError
from excimer.controller.model import UnknownNameError
from excimer.controller.sqlite_store import SqliteStore
from excimer.wire.auth import Claims, Right, RightMissingError, TokenVerifier
from tests.kit.storage_fakes import KEYS, World, fake_world

TENANT = TenantId("ab" * 16)
MAIN = TimelineId("cd" * 16)
PAGESERVER = Claims(holder="pageserver:1")


def play(directory: Path, story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_world(directory) as world:
            await world.controller.create_tenant(TENANT, MAIN, "shop", 18, True)
            await story(world)

    asyncio.run(main())


def test_the_tenants_pageserver_gets_the_safekeepers_and_a_token_for_one_timeline(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        access = await world.controller.access.wal_access(TENANT, MAIN, PAGESERVER)
        assert [(member.safekeeper_id, member.address) for member in access.members] == [
            (1, "127.0.0.1:561"),
            (2, "127.0.0.1:562"),
            (3, "127.0.0.1:563"),
        ]
        claims = TokenVerifier(KEYS.public_pem).verify(access.token, 0)
        assert (claims.holder, list(claims.rights)) == ("pageserver:1", [Right.READ_WAL])
        assert (claims.tenant_id, claims.timeline_id) == (TENANT, MAIN)
        assert claims.exp is not None
        assert access.valid_for_s <= 3600

    play(tmp_path, story)


@pytest.mark.parametrize(
    "claims",
    [
        Claims(holder="pageserver:2"),
        Claims(holder="pageserver:11"),
        Claims(holder="endpoint:main", tenant_id=TENANT, timeline_id=MAIN),
        Claims(holder="cli", rights=frozenset({Right.MANAGE})),
        Claims(holder="pageserver:1", rights=frozenset({Right.READ_WAL}), tenant_id=TENANT, timeline_id=MAIN),
    ],
)
def test_nobody_else_gets_any(tmp_path: Path, claims: Claims) -> None:
    async def story(world: World) -> None:
        with pytest.raises(RightMissingError, match="is not of the pageserver that has tenant"):
            await world.controller.access.wal_access(TENANT, MAIN, claims)

    play(tmp_path, story)


def test_no_moment_of_a_branchs_making_shows_a_part_of_its_safekeepers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pageserver asks as soon as it has made the branch, and keeps the answer for half an hour."""
    seen: list[set[str]] = []
    transaction = SqliteStore._transaction

    @contextlib.contextmanager
    def watched(store: SqliteStore) -> Iterator[sqlite3.Connection]:
        with transaction(store) as connection:
            yield connection
        members: dict[str, set[str]] = {}
        for placement in store.list_placements():
            members.setdefault(placement.timeline_id, set()).add(str(placement.safekeeper_id))
        seen.extend(members.values())

    monkeypatch.setattr(SqliteStore, "_transaction", watched)

    async def story(world: World) -> None:
        assert len(seen) >= 3, "there were moments to look at"

    play(tmp_path, story)
    assert all(members == {"1", "2", "3"} for members in seen), seen


def test_only_what_is_there_and_complete(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        access = world.controller.access
        [timeline] = world.store.list_timelines(TENANT)
        for ids in ((TENANT, TimelineId("00" * 16)), (TenantId("00" * 16), MAIN)):
            with pytest.raises(UnknownNameError):
                await access.wal_access(*ids, PAGESERVER)
        made = msgspec.structs.replace(
            timeline, timeline_id=TimelineId("11" * 16), name="new", state="creating"
        )
        world.store.put_timeline(made)
        with pytest.raises(IncompleteError, match="no safekeepers yet"):
            await access.wal_access(TENANT, made.timeline_id, PAGESERVER)
        world.store.put_timeline(msgspec.structs.replace(timeline, state="deleting"))
        with pytest.raises(UnknownNameError, match="no timeline"):
            await access.wal_access(TENANT, MAIN, PAGESERVER)

    play(tmp_path, story)
