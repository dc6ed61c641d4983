"""postgresql.conf: durability cannot be switched off, values are quoted, standbys get their minimums."""

import re

import msgspec
import pytest

from excimer.compute.postgres_settings import (
    FIXED,
    PostgresSettingError,
    fixed_arguments,
    render_postgres_settings,
)
from excimer.pgformat.control_file import ControlFile
from tests.kit.control_files import CONTROL


def render(
    user_settings: dict[str, str],
    *,
    is_static: bool = False,
    pg_version: int = 18,
    control: ControlFile = CONTROL,
) -> dict[str, str]:
    text = render_postgres_settings(
        pg_version=pg_version,
        host="127.0.0.1",
        port=5433,
        socket_dir="/tmp/x",
        control=control,
        user_settings=user_settings,
        is_static=is_static,
    )
    return dict(re.findall(r"^(\S+) = '(.*)'$", text, re.MULTILINE))


@pytest.mark.parametrize("name", [*FIXED, "FSYNC", "port", "data_directory"])
def test_settings_that_excimer_rests_upon_are_refused(name: str) -> None:
    with pytest.raises(PostgresSettingError, match="belongs to Excimer"):
        render({name: "on"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("io_method", "io_uring"),
        ("io_method", "IO_uring"),
        ("wal_level", "minimal"),
        ("a b", "1"),
        ("work_mem", "1\nfsync = on"),
        ("max_wal_senders", "1"),
        ("max_replication_slots", "0"),
        ("max_wal_senders", "many"),
        ("include", "/tmp/other.conf"),
        ("max_slot_wal_keep_size", "1MB"),
    ],
)
def test_bad_settings_are_refused(name: str, value: str) -> None:
    with pytest.raises(PostgresSettingError):
        render({name: value})


def test_user_settings_are_quoted_and_win_over_defaults() -> None:
    settings = render({"Shared_Buffers": "64MB", "search_path": "it's\\"})
    assert settings["shared_buffers"] == "64MB"
    assert settings["search_path"] == "it''s\\\\"


def test_endpoints_wait_for_the_proposer_even_a_static_one_that_was_promoted() -> None:
    assert render({})["synchronous_standby_names"] == "excimer_proposer"
    assert render({}, is_static=True)["synchronous_standby_names"] == "excimer_proposer"


def test_what_is_fixed_is_out_of_alter_systems_reach() -> None:
    options = fixed_arguments()
    assert {f"{name}={value}" for name, value in FIXED.items()} == set(options[1::2])
    assert set(options[::2]) == {"-c"}


@pytest.mark.parametrize("is_static", [False, True])
def test_prepared_transactions_of_the_history_keep_their_slots(is_static: bool) -> None:
    control = msgspec.structs.replace(CONTROL, max_prepared_xacts=7)
    for given, expected in (("3", "7"), ("9", "9")):
        settings = render({"max_prepared_transactions": given}, is_static=is_static, control=control)
        assert settings["max_prepared_transactions"] == expected


def test_io_method_exists_only_from_18_on() -> None:
    assert "io_method" in render({})
    assert "io_method" not in render({}, pg_version=17)
