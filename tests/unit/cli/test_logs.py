"""Which logs there are: those of services and of endpoints that exist; others when they are asked for."""

from pathlib import Path

import pytest

from excimer.base.errors import NotFoundError
from excimer.cli.commands.logs import find_log
from excimer.cli.errors import NotRunningError, UsageError
from excimer.cli.installation import Installation, create_installation, logged_parts, new_config


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    made = create_installation(tmp_path / "state", new_config(18, 1))
    for part in ("broker", "endpoint-main", "endpoint-gone"):
        (made.logs_dir / f"{part}.log").touch()
    made.endpoint_dir("main").mkdir(parents=True)
    return made


def test_deleted_endpoints_are_not_among_the_logs(installation: Installation) -> None:
    assert logged_parts(installation) == ["broker", "endpoint-main"]
    assert logged_parts(installation, with_deleted=True) == ["broker", "endpoint-gone", "endpoint-main"]
    with pytest.raises(UsageError, match=r"there are: broker, endpoint-main$"):
        find_log(installation, None)
    with pytest.raises(NotFoundError, match=r"no part 'xyzzy'; there are: broker, endpoint-main$"):
        find_log(installation, "xyzzy")


def test_the_log_of_a_deleted_endpoint_is_shown_on_demand(installation: Installation) -> None:
    for name in ("gone", "endpoint-gone"):
        with pytest.raises(NotFoundError, match=r"was deleted: .* --deleted"):
            find_log(installation, name)
        found = find_log(installation, name, with_deleted=True)
        assert found == installation.logs_dir / "endpoint-gone.log"
    assert find_log(installation, "main") == installation.logs_dir / "endpoint-main.log"


def test_no_path_is_taken_for_a_part(installation: Installation) -> None:
    with pytest.raises(NotFoundError):
        find_log(installation, "../logs/broker")


def test_without_logs_the_way_to_some_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError, match="excimer start"):
        find_log(create_installation(tmp_path / "state", new_config(18, 1)), "broker")
