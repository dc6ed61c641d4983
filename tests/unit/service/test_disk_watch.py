"""What a service says of a full disk. That writers wait is tested where they write."""

import asyncio
import errno
import json
import os
from pathlib import Path

import pytest

from excimer.service.disk_watch import DiskWatch, find_trouble
from excimer.service.health import Health
from excimer.service.metrics import add_disks, new_registry, render


def refuse(monkeypatch: pytest.MonkeyPatch, error: int | None) -> None:
    def allocate(_descriptor: int, _offset: int, _size: int) -> None:
        if error is not None:
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "posix_fallocate", allocate)


@pytest.mark.parametrize(
    ("error", "why"),
    [(errno.ENOSPC, "full ("), (errno.EDQUOT, "full ("), (errno.EIO, "not writable: Input/output error")],
)
def test_trouble_is_found_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, why: str
) -> None:
    assert find_trouble(tmp_path) is None
    refuse(monkeypatch, error)
    found = find_trouble(tmp_path)
    assert found is not None
    assert found.startswith(why)
    assert list(tmp_path.iterdir()) == []
    assert find_trouble(tmp_path / "not made yet") is None


def test_a_service_is_degraded_while_its_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    health = Health("safekeeper", ready=True)
    watch = DiskWatch(health, [tmp_path])
    registry = new_registry("safekeeper", "1")
    add_disks(registry, watch)

    def look() -> tuple[int, str, dict[str, str]]:
        asyncio.run(watch.look())
        status, body = health.answer()
        answer = json.loads(body)
        return status, answer["status"], answer["warnings"]

    assert look() == (200, "ok", {})
    refuse(monkeypatch, errno.ENOSPC)
    status, state, warnings = look()
    assert (status, state, list(warnings)) == (200, "degraded", [f"the disk of {tmp_path}"])
    assert f'excimer_disk_full{{path="{tmp_path}"}} 1.0' in render(registry).decode()
    assert f'excimer_disk_free_bytes{{path="{tmp_path}"}}' in render(registry).decode()
    refuse(monkeypatch, None)
    assert look() == (200, "ok", {})
    assert f'excimer_disk_full{{path="{tmp_path}"}} 0.0' in render(registry).decode()


def test_writers_know_better_than_a_look(tmp_path: Path) -> None:
    """They may be another user, with another quota."""
    health = Health("compute", ready=True)
    waiting = "full: 1 of postgres's processes waits"
    asyncio.run(DiskWatch(health, [tmp_path], lambda: waiting).look())
    assert health.warnings == {f"the disk of {tmp_path}": waiting}
