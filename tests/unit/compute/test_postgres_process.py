"""Processes that were left behind in a data directory are found, whatever happened to its name."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from excimer.compute import postgres_process
from excimer.compute.postgres_process import ReservedPortError, check_port, kill_left_behind


@pytest.mark.parametrize("is_removed", [False, True])
def test_what_was_left_behind_is_killed_also_behind_a_link_or_in_a_removed_directory(
    tmp_path: Path, is_removed: bool
) -> None:
    data_dir = tmp_path / "real" / "pgdata"
    data_dir.mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    with (
        subprocess.Popen(["sleep", "60"], cwd=data_dir) as inside,
        subprocess.Popen(["sleep", "60"]) as other,
    ):
        if is_removed:
            data_dir.rmdir()
        reaper = asyncio.to_thread(inside.wait, 10)

        async def kill() -> int:
            waiting = asyncio.ensure_future(reaper)
            await kill_left_behind(tmp_path / "link" / "pgdata")
            return await waiting

        try:
            assert asyncio.run(kill()) == -9
            assert other.poll() is None
        finally:
            inside.kill()
            other.kill()


@pytest.mark.parametrize(
    ("said", "first_free"), [("1024\n", 1024), ("500\n", 500), ("nonsense", 1024), (None, 1024)]
)
def test_a_port_that_is_reserved_for_root_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, first_free: int
) -> None:
    """We may be root and could listen there; PostgreSQL never is."""
    source = tmp_path / "ip_unprivileged_port_start"
    if said is not None:
        source.write_text(said)
    monkeypatch.setattr(postgres_process, "FIRST_UNPRIVILEGED_PORT", source)
    check_port(first_free)
    with pytest.raises(ReservedPortError, match=f"port {first_free - 1}, .* from {first_free} on"):
        check_port(first_free - 1)
