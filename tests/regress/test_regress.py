"""PostgreSQL's core and isolation suites against an endpoint: nothing differs but what is known to.

`make regress` is the same for contrib too and for every version, and docs/architecture/regress.md says what
differs. Build and suites are Debian's newest: without a mirror of Debian there is nothing to compare
with, and these tests end with an error.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.io.processes import make_owned_dir
from tests.kit.builds import debian_build
from tests.kit.directories import reachable_directory
from tests.regress.places import Verify, endpoint_place
from tests.regress.sources import source_tree
from tests.regress.suites import KNOWN, Place, SuiteResult, core, isolation, scheduled


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Place, Verify]]:
    with (
        debian_build(tmp_path_factory.mktemp("config")) as build,
        reachable_directory() as root,
        endpoint_place(build, source_tree(build), make_owned_dir(root / "suites", 0o755)) as made,
    ):
        yield made


def check(place: Place, result: SuiteResult) -> None:
    """All were run, and none differs that is not known to."""
    unknown = [test for test in result.failed if f"{result.name}/{test}" not in KNOWN]
    diffs = place.work_dir / result.name / "regression.diffs"
    assert not unknown, f"{unknown}\n{result.output}\n{read_tail(diffs)}"
    assert result.passed + len(result.failed) == scheduled(place, result.name), result.output


def read_tail(path: Path) -> str:
    return path.read_text(errors="replace")[-20_000:] if path.exists() else ""


def test_core(places: tuple[Place, Verify]) -> None:
    place, _ = places
    check(place, core(place))


def test_isolation(places: tuple[Place, Verify]) -> None:
    place, _ = places
    check(place, isolation(place))


def test_every_page_that_they_left_is_what_the_pageserver_has(places: tuple[Place, Verify]) -> None:
    _, differences = places
    assert differences() == 0
