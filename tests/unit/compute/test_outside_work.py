"""The endpoint module's settings: it is loaded last, whatever list of libraries it joins."""

from pathlib import Path

import pytest

from excimer.compute.outside_work import PRELOAD, OutsideWork, module_arguments
from excimer.postgres.library_lists import split_libraries
from excimer.postgres.setting_rules import PostgresSettingError

MODULE = Path("/var/cache/excimer/endpoint/18-1/excimer_endpoint.so")


def arguments(
    preloaded: list[str], *, quieting_id: str | None = None, workers: bool = True, is_standby: bool = False
) -> dict[str, str]:
    work = OutsideWork(quieting_id, workers)
    made = module_arguments(
        MODULE,
        preloaded,
        work,
        is_standby=is_standby,
        extension_hint="try this",
        admission_file=Path("/door"),
        hot_buffers_file=Path("/hot"),
    )
    assert set(made[::2]) == {"-c"}
    return dict(text.split("=", 1) for text in made[1::2])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("  ", []),
        ("pg_cron", ["pg_cron"]),
        (" pg_cron , auto_explain", ["pg_cron", "auto_explain"]),
        ('"pg_cron","/opt/a b/x.so" , c', ["pg_cron", "/opt/a b/x.so", "c"]),
        ('"with ""quotes"", and a comma"', ['with "quotes", and a comma']),
    ],
)
def test_lists_of_libraries_are_read_as_postgresql_reads_them(text: str, names: list[str]) -> None:
    assert split_libraries(PRELOAD, text) == names
    joined = arguments(names)[PRELOAD]
    assert split_libraries(PRELOAD, joined) == [*names, str(MODULE)]


@pytest.mark.parametrize("text", ["a,", ",a", "a,,b", '"a', '"a" b', ",", '""'])
def test_lists_that_postgresql_would_not_load_at_all_are_refused(text: str) -> None:
    with pytest.raises(PostgresSettingError, match=PRELOAD):
        split_libraries(PRELOAD, text)


def test_only_a_quiet_branch_and_a_static_endpoint_wait() -> None:
    assert arguments([])["excimer.subscriptions_wait"] == "off"
    assert arguments([], quieting_id="ab")["excimer.subscriptions_wait"] == "on"
    assert arguments([], is_standby=True)["excimer.subscriptions_wait"] == "on"
    assert arguments([], workers=False)["excimer.extension_workers"] == "off"
