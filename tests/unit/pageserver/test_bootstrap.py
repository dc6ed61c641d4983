"""What a new cluster refuses before anything is written."""

from dataclasses import replace
from random import Random

import pytest

from excimer.base.clock import UnixTime
from excimer.pageserver import bootstrap
from excimer.postgres import BuildUnusableError
from tests.kit.builds import NEWEST_VERSION, build_of


def test_a_build_whose_wal_cannot_be_replayed_gets_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's PostgreSQL without its -dev package: what was committed on it could not be read again."""
    build = replace(build_of(NEWEST_VERSION), include_server_dir=None)
    monkeypatch.setattr(bootstrap, "find_build", lambda _: build)
    with pytest.raises(BuildUnusableError, match=f"no server headers.* excimer pg install {NEWEST_VERSION}"):
        bootstrap.new_cluster(NEWEST_VERSION, Random(1), UnixTime(0))
