"""postgresql.conf: durability cannot be switched off, values are quoted, standbys get their minimums."""

import re

import pytest

from excimer.compute.postgres_settings import FIXED, PostgresSettingError, render_postgres_settings
from tests.kit.control_files import CONTROL


def render(user_settings: dict[str, str], *, is_static: bool = False, pg_version: int = 18) -> dict[str, str]:
    text = render_postgres_settings(
        pg_version=pg_version,
        host="127.0.0.1",
        port=5433,
        socket_dir="/tmp/x",
        control=CONTROL,
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
    [("io_method", "io_uring"), ("wal_level", "minimal"), ("a b", "1"), ("work_mem", "1\nfsync = on")],
)
def test_bad_settings_are_refused(name: str, value: str) -> None:
    with pytest.raises(PostgresSettingError):
        render({name: value})


def test_user_settings_are_quoted_and_win_over_defaults() -> None:
    settings = render({"Shared_Buffers": "64MB", "search_path": "it's\\"})
    assert settings["shared_buffers"] == "64MB"
    assert settings["search_path"] == "it''s\\\\"


def test_a_primary_waits_for_the_proposer_and_a_static_endpoint_for_nobody() -> None:
    assert render({})["synchronous_standby_names"] == "excimer_proposer"
    assert render({}, is_static=True)["synchronous_standby_names"] == ""


def test_io_method_exists_only_from_18_on() -> None:
    assert "io_method" in render({})
    assert "io_method" not in render({}, pg_version=17)
