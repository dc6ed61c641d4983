"""What the pageserver says at its start of what keeps redo workers from files that are not theirs."""

import pytest

from excimer.io import confinement as probing
from excimer.io.confinement import Confinement, landlock_version, probe_confinement
from excimer.pageserver import redo_pools
from excimer.pageserver.redo_pools import check_confinement
from excimer.service.health import Health
from excimer.storage.engine.redo_pool import UnconfinedRedoError


def probed(monkeypatch: pytest.MonkeyPatch, found: Confinement) -> Health:
    monkeypatch.setattr(redo_pools, "probe_confinement", lambda: found)
    return Health("pageserver")


@pytest.mark.parametrize("found", [Confinement.LANDLOCK, Confinement.OWN_ROOT])
@pytest.mark.parametrize("must_confine", [False, True])
def test_confined_workers_are_a_fact(
    monkeypatch: pytest.MonkeyPatch, found: Confinement, must_confine: bool
) -> None:
    health = probed(monkeypatch, found)
    assert check_confinement(health, must_confine=must_confine) is found
    assert health.facts["redo_confinement"] == found.value
    assert not health.warnings


def test_unconfined_workers_are_a_warning_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    health = probed(monkeypatch, Confinement.NONE)
    assert check_confinement(health, must_confine=False) is Confinement.NONE
    assert "Landlock" in health.warnings["redo"]
    assert health.facts["redo_confinement"] == "nothing"
    with pytest.raises(UnconfinedRedoError, match="redo_confinement_required"):
        check_confinement(health, must_confine=True)


@pytest.mark.parametrize("namespaces", [True, False])
def test_what_is_found_out(monkeypatch: pytest.MonkeyPatch, namespaces: bool) -> None:
    monkeypatch.setattr(probing, "landlock_version", lambda: 0)
    monkeypatch.setattr(probing, "_may_make_user_namespaces", lambda: namespaces)
    probe_confinement.cache_clear()
    try:
        assert probe_confinement() is (Confinement.OWN_ROOT if namespaces else Confinement.NONE)
    finally:
        probe_confinement.cache_clear()


def test_trying_harms_nobody() -> None:
    """Both probes answer here whatever the kernel allows; the process itself is as before."""
    assert landlock_version() >= 0
    assert probing._may_make_user_namespaces() in (True, False)
