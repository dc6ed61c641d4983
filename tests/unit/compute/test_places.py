"""Where a compute keeps its files, and what it leaves there."""

import tempfile

import pytest

from excimer.compute.places import find_places, leave_places
from tests.kit.directories import reachable_directory


def test_nothing_stays_among_the_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    with reachable_directory() as endpoint, reachable_directory() as temporary:
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        places = find_places(endpoint)
        assert places.socket_dir.parent == temporary
        assert find_places(endpoint) == places
        (places.socket_dir / ".s.PGSQL.5432").touch()
        leave_places(places)
        assert not list(temporary.iterdir())
        leave_places(places)  # a cleaner of /tmp may have been faster
