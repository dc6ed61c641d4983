"""The metadata database: durable, unique, migrated, and clear about damage."""

import sqlite3
from pathlib import Path

import msgspec
import pytest

from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import MAX_LSN
from excimer.controller.model import (
    Endpoint,
    InUseError,
    NameTakenError,
    Pageserver,
    Placement,
    Safekeeper,
    Tenant,
    Timeline,
)
from excimer.controller.sqlite_store import (
    DATABASE_FILE_NAME,
    MIGRATIONS,
    SqliteStore,
    StoreDamagedError,
    StoreTooNewError,
)

PAGESERVER = Pageserver(id=NodeId(1), http_address="h:1", page_service_address="h:2")
SAFEKEEPER = Safekeeper(id=NodeId(1), http_address="h:3", proposer_address="h:4", replication_address="h:5")
TENANT = Tenant(
    tenant_id=TenantId("a" * 32),
    name="shop",
    state="creating",
    pageserver_id=NodeId(1),
    generation=1,
    created_at=1.5,
)
TIMELINE = Timeline(
    tenant_id=TENANT.tenant_id,
    timeline_id=TimelineId("b" * 32),
    name="main",
    state="active",
    pg_version=18,
    ancestor_timeline_id=None,
    ancestor_lsn=None,
    start_lsn=MAX_LSN,
    system_id=2**64 - 1,
    wal_segment_size=1 << 24,
    created_at=2.5,
)
PLACEMENT = Placement(
    tenant_id=TENANT.tenant_id, timeline_id=TIMELINE.timeline_id, safekeeper_id=NodeId(1), ready=False
)
ENDPOINT = Endpoint(
    name="ep",
    tenant_id=TENANT.tenant_id,
    timeline_id=TIMELINE.timeline_id,
    mode="static",
    lsn=MAX_LSN,
    pg_version=18,
    postgres_port=5000,
    http_port=5001,
    postgres_settings={"work_mem": "'1GB'"},
    created_at=3.5,
)


def filled(tmp_path: Path) -> SqliteStore:
    store = SqliteStore(tmp_path)
    store.put_nodes([PAGESERVER], [SAFEKEEPER])
    store.put_tenant(TENANT)
    store.put_timeline(TIMELINE)
    store.put_placements([PLACEMENT])
    store.add_endpoint(ENDPOINT)
    store.set_default_tenant(TENANT.tenant_id)
    return store


def test_everything_survives_reopening(tmp_path: Path) -> None:
    filled(tmp_path).close()
    store = SqliteStore(tmp_path)
    assert store.list_pageservers() == [PAGESERVER]
    assert store.list_safekeepers() == [SAFEKEEPER]
    assert store.list_tenants() == [TENANT]
    assert store.list_timelines() == store.list_timelines(TENANT.tenant_id) == [TIMELINE]
    assert store.list_timelines(TenantId("f" * 32)) == []
    assert store.list_placements() == store.list_placements(TIMELINE.timeline_id) == [PLACEMENT]
    assert store.list_endpoints() == [ENDPOINT]
    assert store.read_default_tenant() == TENANT.tenant_id
    store.close()


def test_rows_are_replaced_by_id(tmp_path: Path) -> None:
    store = filled(tmp_path)
    active = msgspec.structs.replace(TENANT, state="active", generation=2)
    ready = msgspec.structs.replace(PLACEMENT, ready=True)
    store.put_tenant(active)
    store.put_placements([ready])
    assert store.list_tenants() == [active]
    assert store.list_placements() == [ready]
    store.close()


def test_names_and_ports_are_unique(tmp_path: Path) -> None:
    store = filled(tmp_path)
    twin = msgspec.structs.replace(TENANT, tenant_id=TenantId("c" * 32))
    with pytest.raises(NameTakenError, match="name is taken"):
        store.put_tenant(twin)
    with pytest.raises(NameTakenError):
        store.put_timeline(msgspec.structs.replace(TIMELINE, timeline_id=TimelineId("d" * 32)))
    with pytest.raises(NameTakenError, match="PostgreSQL port belongs to another endpoint"):
        store.add_endpoint(msgspec.structs.replace(ENDPOINT, name="other", http_port=5002))
    with pytest.raises(NameTakenError):
        store.add_endpoint(msgspec.structs.replace(ENDPOINT, postgres_port=5003, http_port=5002))
    store.put_tenant(msgspec.structs.replace(TENANT, state="deleting"))
    store.put_tenant(twin)
    store.close()


def test_what_is_referred_to_stays(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with pytest.raises(InUseError):
        store.remove_timeline(TENANT.tenant_id, TIMELINE.timeline_id)
    with pytest.raises(InUseError):
        store.remove_tenant(TENANT.tenant_id)
    with pytest.raises(InUseError, match="the settings no longer name"):
        store.put_nodes([], [SAFEKEEPER])
    assert store.list_pageservers() == [PAGESERVER]
    assert store.read_default_tenant() == TENANT.tenant_id
    store.remove_endpoint("ep")
    store.remove_timeline(TENANT.tenant_id, TIMELINE.timeline_id)
    store.remove_tenant(TENANT.tenant_id)
    assert store.list_placements() == []
    assert store.read_default_tenant() is None
    store.put_nodes([], [])
    store.close()


def test_damage_and_newer_versions_are_named(tmp_path: Path) -> None:
    filled(tmp_path).close()
    path = tmp_path / DATABASE_FILE_NAME
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(StoreTooNewError, match="upgrade it"):
        SqliteStore(tmp_path)
    path.write_bytes(b"not a database at all" * 1000)
    with pytest.raises(StoreDamagedError, match=rf"{path} is damaged"):
        SqliteStore(tmp_path)


def test_an_interrupted_migration_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path).close()
    broken = (*MIGRATIONS, "CREATE TABLE extra (x INTEGER); INSERT INTO nowhere VALUES (1)")
    monkeypatch.setattr("excimer.controller.sqlite_store.MIGRATIONS", broken)
    with pytest.raises(Exception, match="nowhere"):
        SqliteStore(tmp_path)
    monkeypatch.setattr("excimer.controller.sqlite_store.MIGRATIONS", MIGRATIONS)
    store = SqliteStore(tmp_path)
    assert store.list_tenants() == [TENANT]
    store.close()
