"""Tenant settings: what is refused, what survives, and who may write them."""

from pathlib import Path
from typing import Any

import pytest

from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore, ObjectStoreError
from excimer.storage.engine.context import StorageSettings
from excimer.storage.engine.manifest_store import OvertakenError
from excimer.storage.engine.settings_store import SettingsStore
from excimer.storage.format.tenant_settings import (
    DamagedSettingsError,
    TenantSettings,
    TenantSettingsError,
    apply_overrides,
    change_overrides,
    check_overrides,
    pack_overrides,
    unpack_overrides,
)
from tests.kit.storage_world import MAIN, TENANT, attach, in_event_loop, new_main, storage_context


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"pitr_intervals": 3}, "did you mean 'pitr_interval_s'"),
        ({"colour": "red"}, "there are: pitr_interval_s"),
        ({"pitr_interval_s": -1}, "pitr_interval_s"),
        ({"pitr_interval_s": "a week"}, "pitr_interval_s"),
        ({"gc_horizon_bytes": 1 << 60}, "gc_horizon_bytes"),
        ({"flush_size_bytes": 1}, "flush_size_bytes"),
        ({"compaction_threshold": 0}, "compaction_threshold"),
        ({"lsn_lease_length_s": float("nan")}, "lsn_lease_length_s"),
        ({"gc_period_s": float("inf")}, "gc_period_s"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(TenantSettingsError, match=said):
        check_overrides(overrides)


def test_overrides_lie_over_the_defaults() -> None:
    defaults = StorageSettings(flush_size_bytes=1).tenant_defaults()  # a host may go lower than a tenant
    assert defaults == TenantSettings(flush_size_bytes=1)
    changed = apply_overrides(defaults, {"pitr_interval_s": 60})
    assert (changed.flush_size_bytes, changed.pitr_interval_s) == (1, 60.0)


def test_a_change_sets_and_gives_back() -> None:
    overrides = change_overrides({"gc_period_s": 5.0, "gc_horizon_bytes": 1}, {"gc_period_s": None})
    assert overrides == {"gc_horizon_bytes": 1}
    assert change_overrides(overrides, {"pitr_interval_s": 1}) == {
        "gc_horizon_bytes": 1,
        "pitr_interval_s": 1.0,
    }
    with pytest.raises(TenantSettingsError):
        change_overrides({}, {"gc_periods": None})


def test_the_object_is_checked() -> None:
    packed = pack_overrides({"gc_period_s": 5.0})
    assert unpack_overrides(packed, "x") == {"gc_period_s": 5.0}
    for at in range(len(packed)):
        damaged = packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :]
        with pytest.raises(DamagedSettingsError):
            unpack_overrides(damaged, "x")


def test_the_newest_generation_owns_the_settings() -> None:
    store = MemoryObjectStore()
    old, new = SettingsStore(store, TENANT, 1), SettingsStore(store, TENANT, 2)
    assert old.read() == {}
    for number in range(6):
        old.write({"gc_horizon_bytes": number})
    assert new.read() == {"gc_horizon_bytes": 5}
    new.write({"gc_horizon_bytes": 7})
    assert len(store.objects) <= 4
    with pytest.raises(OvertakenError):
        old.write({"gc_horizon_bytes": 8})
    with pytest.raises(OvertakenError):
        old.read()
    assert SettingsStore(store, TENANT, 3).read() == {"gc_horizon_bytes": 7}


@pytest.mark.parametrize("lost_answer", [False, True])
def test_a_failed_write_can_be_repeated(lost_answer: bool) -> None:
    failing: list[str] = []

    def fault(operation: str, name: str) -> None:
        if operation in failing:
            raise ObjectStoreError(f"{operation} {name}")

    store = FaultyObjectStore(MemoryObjectStore(), fault, lose_answer=lost_answer)
    settings = SettingsStore(store, TENANT, 1)
    settings.write({"gc_horizon_bytes": 1})
    failing.append("put")
    with pytest.raises(ObjectStoreError):
        settings.write({"gc_horizon_bytes": 2})
    failing.clear()
    settings.write({"gc_horizon_bytes": 3})
    assert SettingsStore(store, TENANT, 1).read() == {"gc_horizon_bytes": 3}


@in_event_loop
async def test_settings_are_live_and_come_back(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        tenant = await attach(context)
        timeline = await tenant.create_timeline(new_main(), [])
        await tenant.set_settings({"flush_size_bytes": 100_000})
        assert timeline.settings.flush_size_bytes == 100_000
        with pytest.raises(TenantSettingsError):
            await tenant.set_settings({"flush_size_bytes": 1})
        assert timeline.settings.flush_size_bytes == 100_000
        await tenant.close()
        tenant = await attach(context, generation=2)
        assert tenant.timeline(MAIN).settings.flush_size_bytes == 100_000
        await tenant.set_settings({})
        assert tenant.timeline(MAIN).settings.flush_size_bytes == context.settings.flush_size_bytes
