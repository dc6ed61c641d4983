"""What `excimer doctor` calls a problem of an installation."""

import os
from pathlib import Path

import pytest

from excimer.cli.commands import doctor
from excimer.cli.commands.doctor import Finding, _check_services
from excimer.cli.installation import Installation, create_installation, new_config
from excimer.cli.local_processes import Probed
from excimer.service.process_records import ProcessRecord

ME = ProcessRecord(pid=os.getpid(), start_ticks=0, boot_id="")


def verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: frozenset[str]) -> dict[str, Finding]:
    def find_process(_: Installation, part: str, __: Path) -> ProcessRecord | None:
        return ME if part in running else None

    monkeypatch.setattr(doctor, "find_process", find_process)
    monkeypatch.setattr(doctor, "probe_health", lambda *_: Probed(200, [], {}))
    installation = create_installation(tmp_path / "state", new_config(18, 1))
    return {finding.check: finding for finding in _check_services(installation)}


def test_an_installation_that_is_stopped_as_a_whole_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = verdicts(tmp_path, monkeypatch, frozenset())
    assert {finding.verdict for finding in found.values()} == {"ok"}


def test_a_service_that_is_missing_among_others_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = verdicts(
        tmp_path, monkeypatch, frozenset({"broker", "controller", "safekeeper-1", "compute-node"})
    )
    assert [check for check, finding in found.items() if finding.verdict != "ok"] == ["pageserver"]
    assert "excimer start" in found["pageserver"].detail
