"""A failed start is laid at a setting's door, by name, only when a setting is the reason."""

import pytest

from excimer.compute.start_failure import configuration_fault

STAMP = "2026-11-29 10:00:00.000 UTC [7] "
SETTINGS = {"work_mem": "abc", "shared_preload_libraries": "x", "max_connections": "9"}


def fault(*said: str, settings: dict[str, str] = SETTINGS) -> str | None:
    return configuration_fault([STAMP + line for line in said], settings)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (
            (
                'LOG:  invalid value for parameter "work_mem": "abc"',
                'FATAL:  configuration file "/x/postgresql.auto.conf" contains errors',
            ),
            "work_mem",
        ),
        (('FATAL:  could not access file "x": No such file or directory',), "shared_preload_libraries"),
        (('FATAL:  could not load library "/lib/x.so": undefined symbol: y',), "shared_preload_libraries"),
        (
            ("FATAL:  could not map anonymous shared memory: Cannot allocate memory", "HINT:  This error …"),
            "max_connections",
        ),
        (
            ("FATAL:  superuser_reserved_connections (3) must be less than max_connections (3)",),
            "max_connections",
        ),
        (("FATAL:  could not create any Unix-domain sockets",), "one of max_connections, shared_preload"),
    ],
)
def test_a_setting_is_named(said: tuple[str, ...], named: str) -> None:
    sentence = fault(*said)
    assert sentence is not None
    assert sentence.startswith(f"PostgreSQL does not start with the setting {named}")
    assert said[-1 if "HINT" not in said[-1] else 0].partition("FATAL:  ")[2] in sentence


@pytest.mark.parametrize(
    "said",
    [
        'FATAL:  could not read block 0 in file "global/1262": Input/output error',
        'FATAL:  could not access file "x": Input/output error',
        'FATAL:  could not write to file "pg_wal/xlogtemp.7": No space left on device',
        'FATAL:  lock file "postmaster.pid" already exists',
        "LOG:  shutting down",
    ],
)
def test_what_may_pass_is_no_settings_fault(said: str) -> None:
    assert fault(said) is None


def test_without_settings_of_its_own_no_setting_is_at_fault() -> None:
    assert fault("FATAL:  could not map anonymous shared memory: Cannot allocate memory", settings={}) is None
    assert configuration_fault([], SETTINGS) is None
