"""Settings are refused with a reason by our rules, and tried out by the PostgreSQL that is to have them."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from excimer.compute.postgres_settings import FIXED
from excimer.postgres import PostgresBuild
from excimer.postgres.setting_check import at_start_only, check_settings
from excimer.postgres.setting_rules import REFUSED, SETTINGS_MAX, PostgresSettingError, check_rules
from tests.kit.builds import build_of

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


@pytest.fixture(scope="module", params=[14, 15, 18])
def build(request: pytest.FixtureRequest) -> PostgresBuild:
    return build_of(request.param)


@pytest.mark.parametrize("name", [*REFUSED, *FIXED, "FSYNC", "ssl_ca_file", "recovery_target_lsn"])
def test_what_is_unsafe_here_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(PostgresSettingError, match=f"^{name.lower()} belongs to Excimer .*: .{{20}}"):
        check_rules({name: "on"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("io_method", "IO_uring"),
        ("wal_level", "minimal"),
        ("a b", "1"),
        ("", "1"),
        ("work_mem.", "1"),
        ("work_mem", "1\nfsync = on"),
        ("max_wal_senders", "1"),
        ("max_wal_senders", "0x1"),
        ("max_replication_slots", "0"),
        ("max_wal_senders", "many"),
        ("transaction_timeout", "1"),
        ("transaction_timeout", "0x10"),
        ("transaction_timeout", "020000"),
        ("transaction_timeout", " 9.99 s "),
        ("transaction_timeout", "9e3"),
        ("transaction_timeout", "100us"),
        ("transaction_timeout", "soon"),
        ("transaction_timeout", "1 year"),
        ("post_auth_delay", "3"),
        ("search_path", "x" * 20_000),
    ],
)
def test_bad_names_and_values_are_refused(name: str, value: str) -> None:
    with pytest.raises(PostgresSettingError):
        check_rules({name: value})


@pytest.mark.parametrize("value", ["0", "0s", "10000", "10s", "1.5min", "1e4", "1h", "1d", "030000", "-1"])
def test_a_timeout_that_lets_sessions_begin_passes(value: str) -> None:
    assert check_rules({"transaction_timeout": value}) == {"transaction_timeout": value}


def test_a_list_has_each_name_once_and_is_bounded() -> None:
    with pytest.raises(PostgresSettingError, match="work_mem is set twice"):
        check_rules({"work_mem": "1MB", "Work_Mem": "2MB"})
    with pytest.raises(PostgresSettingError, match="at most 500"):
        check_rules({f"a.b{number}": "" for number in range(SETTINGS_MAX + 1)})


def test_good_settings_pass(build: PostgresBuild) -> None:
    given = {"Work_Mem": "9MB", "my.setting": "it's", "search_path": '"$user", x', "shared_buffers": "64MB"}
    assert check_settings(build, given) == {name.lower(): value for name, value in given.items()}
    assert check_settings(build, {"max_wal_senders": "0x0A", "wal_level": "logical"})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"work_mem": "abc"}, 'invalid value for parameter "work_mem": "abc"'),
        ({"work_mem": "-1"}, 'outside the valid range for parameter "work_mem"'),
        ({"work_memm": "9MB"}, "has no setting work_memm; did you mean work_mem?"),
        ({"log_min_messages": "loud"}, r"\(Available values: debug5, "),
        ({"datestyle": "foo"}, 'Unrecognized key word: "foo"'),
        ({"block_size": "8192"}, "block_size"),
        ({"work_mem": "9MB", "shared_buffers": "6000GB"}, "^shared_buffers: PostgreSQL would not start"),
        (
            {"shared_preload_libraries": "auto_explain, nosuch"},
            "^shared_preload_libraries: .* no library nosuch",
        ),
        ({"session_preload_libraries": "auto_explain,"}, "^session_preload_libraries ends with a comma"),
        ({"session_preload_libraries": "/nosuch/lib.so"}, "^session_preload_libraries: "),
        ({"max_connections": "3"}, "^max_connections: 3 connections are reserved"),
    ],
)
def test_what_postgres_would_not_start_with_is_named(
    build: PostgresBuild, settings: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "6000GB" in settings.values() and OVERCOMMIT.read_text().strip() == "1":
        pytest.skip("this machine promises any amount of memory")
    with TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        monkeypatch.setattr("tempfile.tempdir", place)
        with pytest.raises(PostgresSettingError, match=said) as caught:
            check_settings(build, settings)
        assert "\n" not in str(caught.value)
        assert list(Path(place).iterdir()) == []


def test_what_needs_a_new_start_is_known(build: PostgresBuild) -> None:
    names = ["work_mem", "shared_buffers", "my.setting", "max_connections", "log_connections"]
    assert at_start_only(build, names) == ["max_connections", "shared_buffers"]
