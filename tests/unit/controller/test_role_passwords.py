"""Which password a role has where: along branches, at LSNs of the past, after a restore and a detachment."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from excimer.base.ids import TimelineId
from excimer.base.lsn import Lsn
from excimer.controller.model import RolePassword, Timeline
from excimer.controller.role_passwords import RolePasswords, inherited_passwords, password_in_force
from excimer.controller.sqlite_store import DATABASE_FILE_NAME
from excimer.service.tasks import SystemClock
from excimer.wire.scram import matches
from tests.unit.controller.test_sqlite_store import TENANT, TIMELINE, filled

MAIN, CHILD, GRANDCHILD = (TimelineId(letter * 32) for letter in "bcd")


def timeline(timeline_id: TimelineId, ancestor: TimelineId | None, at: int | None) -> Timeline:
    return msgspec.structs.replace(
        TIMELINE,
        timeline_id=timeline_id,
        name=timeline_id[:3],
        ancestor_timeline_id=ancestor,
        ancestor_lsn=None if at is None else Lsn(at),
    )


def password(where: TimelineId, lsn: int | None, word: str, role: str = "postgres") -> RolePassword:
    return RolePassword(
        tenant_id=TENANT.tenant_id,
        timeline_id=where,
        role=role,
        is_bootstrap=role == "postgres",
        verifier=f"v-{word}",
        password=word,
        lsn=None if lsn is None else Lsn(lsn),
        created_at=1.0,
    )


TREE = [timeline(MAIN, None, None), timeline(CHILD, MAIN, 100), timeline(GRANDCHILD, CHILD, 300)]
KNOWN = [
    password(MAIN, 0, "first"),
    password(MAIN, 50, "second"),
    password(MAIN, 200, "third"),
    password(CHILD, 400, "own"),
    password(MAIN, None, "never-set"),
    password(MAIN, 60, "apps", "app"),
]


@pytest.mark.parametrize(
    ("where", "role", "lsn", "expected"),
    [
        (MAIN, None, None, "third"),
        (MAIN, None, 199, "second"),
        (MAIN, None, 49, "first"),
        (CHILD, None, None, "own"),
        (CHILD, None, 399, "second"),
        (CHILD, None, 40, "first"),
        (GRANDCHILD, None, None, "second"),
        (GRANDCHILD, "app", None, "apps"),
        (MAIN, "app", 59, None),
        (MAIN, "nobody", None, None),
    ],
)
def test_the_newest_at_the_lsn_along_the_ancestors(
    where: TimelineId, role: str | None, lsn: int | None, expected: str | None
) -> None:
    found = password_in_force(TREE, KNOWN, where, role, None if lsn is None else Lsn(lsn))
    assert (found and found.password) == expected


def test_a_branch_that_is_parted_from_its_parent_keeps_what_it_had() -> None:
    kept = [*KNOWN, *inherited_passwords(TREE, KNOWN, TREE[1])]
    alone = [TREE[0], timeline(CHILD, None, None), TREE[2]]
    for role in (None, "app"):
        for where in (CHILD, GRANDCHILD):
            for lsn in (40, 90, 399, None):
                at = None if lsn is None else Lsn(lsn)
                before = password_in_force(TREE, KNOWN, where, role, at)
                after = password_in_force(alone, kept, where, role, at)
                assert (before and before.password) == (after and after.password), (role, where, lsn)


def test_a_fresh_clusters_password_is_made_once_and_kept_where_only_we_can_read_it(tmp_path: Path) -> None:
    store = filled(tmp_path)
    passwords = RolePasswords(store, SystemClock())
    fresh = msgspec.structs.replace(TIMELINE, state="creating", start_lsn=None)
    verifier = asyncio.run(passwords.initial_verifier(fresh))
    assert asyncio.run(passwords.initial_verifier(fresh)) == verifier, "creation was tried again"
    found = asyncio.run(passwords.in_force(TENANT.tenant_id, TIMELINE.timeline_id, None, None))
    assert found is not None
    assert found.role == "postgres"
    assert matches(found.password or "", verifier)
    files = list(tmp_path.glob(f"{DATABASE_FILE_NAME}*"))
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}, files
    store.close()


def test_a_verifier_that_is_seen_finds_its_password_and_is_believed_from_then_on(tmp_path: Path) -> None:
    store = filled(tmp_path)
    passwords = RolePasswords(store, SystemClock())
    tenant_id, timeline_id = TENANT.tenant_id, TIMELINE.timeline_id

    async def seen(verifier: str, lsn: int) -> str | None:
        return await passwords.look_up(
            TIMELINE, role="boss", is_bootstrap=True, verifier=verifier, lsn=Lsn(lsn)
        )

    async def believed() -> tuple[str, str | None] | None:
        row = await passwords.in_force(tenant_id, timeline_id, None, None)
        return None if row is None else (row.role, row.password)

    async def story() -> None:
        assert await believed() is None
        assert await seen("imported", 10) is None
        assert await believed() == ("boss", None)
        options: dict[str, Any] = {
            "role": "boss",
            "is_bootstrap": True,
            "verifier": "ours",
            "password": "word",
        }
        await passwords.remember(TIMELINE, **options, lsn=None)
        assert await believed() == ("boss", None), "it is not known to be set"
        assert await seen("ours", 30) == "word", "we died before the second remember"
        assert await believed() == ("boss", "word")
        await passwords.remember(TIMELINE, **options | {"password": None}, lsn=Lsn(20))
        assert await seen("ours", 40) == "word", "what was known stays known"
        assert await seen("", 50) is None
        assert await believed() == ("boss", None)

    asyncio.run(story())
    store.close()


def test_passwords_go_with_their_tenant(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.put_role_passwords([password(TIMELINE.timeline_id, 5, "word")])
    store.put_role_passwords([password(TIMELINE.timeline_id, 7, "word")])
    assert [row.lsn for row in store.list_role_passwords(TENANT.tenant_id)] == [7]
    store.remove_endpoint("ep")
    store.remove_timeline(TENANT.tenant_id, TIMELINE.timeline_id)
    assert store.list_role_passwords(TENANT.tenant_id), "branches that were made of it may still have it"
    store.remove_tenant(TENANT.tenant_id)
    assert store.list_role_passwords(TENANT.tenant_id) == []
    store.close()
