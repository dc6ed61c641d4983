"""postgresql.conf: durability cannot be switched off, and the history's minimums are kept."""

import re
from collections.abc import Mapping

import msgspec
import pytest

from excimer.compute.postgres_settings import (
    FIXED,
    fixed_arguments,
    render_postgres_settings,
)
from excimer.pgformat.basebackup import origins_setting
from excimer.pgformat.control_file import ControlFile
from tests.kit.control_files import CONTROL


def render(
    *,
    is_standby: bool = False,
    pg_version: int = 18,
    control: ControlFile = CONTROL,
    origins: Mapping[str, int] | None = None,
) -> dict[str, str]:
    text = render_postgres_settings(
        pg_version=pg_version,
        control=control,
        origins=origins or {},
        is_standby=is_standby,
    )
    return dict(re.findall(r"^(\S+) = '(.*)'$", text, re.MULTILINE))


@pytest.mark.parametrize("is_standby", [False, True])
def test_endpoints_wait_for_the_proposer_even_a_static_one_that_was_promoted(is_standby: bool) -> None:
    options = fixed_arguments(CONTROL, {}, origins={}, is_standby=is_standby)
    assert "synchronous_standby_names=excimer_proposer" in options


def test_the_file_has_nothing_that_a_restored_backup_must_not_have() -> None:
    """Plain PostgreSQL starts on it: it must sync, and wait for nobody."""
    assert not render().keys() & (FIXED.keys() | {"listen_addresses", "port", "unix_socket_directories"})


def test_what_is_fixed_is_out_of_alter_systems_reach() -> None:
    options = fixed_arguments(CONTROL, {"fsync": "on", "work_mem": "9MB"}, origins={}, is_standby=False)
    assert {f"{name}={value}" for name, value in FIXED.items()} == set(options[1::2])
    assert set(options[::2]) == {"-c"}


@pytest.mark.parametrize("is_standby", [False, True])
def test_prepared_transactions_of_the_history_keep_their_slots(is_standby: bool) -> None:
    control = msgspec.structs.replace(CONTROL, max_prepared_xacts=7)
    assert render(is_standby=is_standby, control=control)["max_prepared_transactions"] == "7"
    for given, raised in (("3", True), ("0x7", False), ("9", False)):
        options = fixed_arguments(
            control, {"max_prepared_transactions": given}, origins={}, is_standby=is_standby
        )
        assert ("max_prepared_transactions=7" in options) == raised


def test_a_standby_offers_what_its_primary_had_whatever_its_own_list_says() -> None:
    control = msgspec.structs.replace(CONTROL, max_connections=300)
    assert render(is_standby=True, control=control)["max_connections"] == "300"
    assert render(control=control)["max_connections"] == "100"
    assert "max_connections=300" in fixed_arguments(
        control, {"max_connections": "50"}, origins={}, is_standby=True
    )
    assert "max_connections=300" not in fixed_arguments(
        control, {"max_connections": "50"}, origins={}, is_standby=False
    )


def test_io_method_exists_only_from_18_on() -> None:
    assert "io_method" in render()
    assert "io_method" not in render(pg_version=17)


@pytest.mark.parametrize("pg_version", [17, 18])
def test_there_is_room_for_every_replication_origin_of_the_history(pg_version: int) -> None:
    """With less, PostgreSQL does not start."""
    name = origins_setting(pg_version)
    assert render(pg_version=pg_version, origins={name: 12})[name] == "12"
    assert render(pg_version=pg_version, origins={name: 3})[name] == "10"
    for given, raised in (("5", True), ("40", False)):
        options = fixed_arguments(CONTROL, {name: given}, origins={name: 12}, is_standby=False)
        assert (f"{name}=12" in options) == raised
