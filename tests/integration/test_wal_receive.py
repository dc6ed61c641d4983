"""`excimer wal receive`: an archive without gaps over stops and crashes, from which any moment comes back."""

import os
import signal
import subprocess
from pathlib import Path

from excimer.base.lsn import parse_lsn
from excimer.io.processes import give_to_user, make_owned_dir, run
from excimer.postgres import PostgresBuild
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.directories import reachable_directory
from tests.kit.stack import Stack, running_stack
from tests.kit.stock_server import stock_server

SEGMENT = 16 << 20


def here(stack: Stack) -> str:
    (lsn,) = stack.query("select pg_current_wal_flush_lsn()::text")[0]
    return str(lsn)


def test_any_moment_comes_back_from_a_backup_and_the_received_wal() -> None:
    build = build_of(NEWEST_VERSION)
    with running_stack(NEWEST_VERSION) as stack, reachable_directory() as root:
        stack.create_main()
        archive = root / "archive"
        receiver = subprocess.Popen(
            stack.command("wal", "receive", "main", str(archive)), stderr=subprocess.PIPE, text=True
        )
        try:
            stack.wait_until((archive / "excimer-branch").exists, "the beginning of the archive")
            stack.query("create table t (n int)")
            backup = make_owned_dir(root / "backups") / "base"
            endpoint = stack.endpoint("main")
            place = ["-h", endpoint["host"], "-p", str(endpoint["port"]), "-U", "postgres", "-w"]
            run(
                [build.program("pg_basebackup"), *place, "-c", "fast", "-X", "none", "-D", backup],
                environment=build.whole_environment({"PGPASSWORD": endpoint["password"]}),
                timeout_s=60,
            )
            stack.query("insert into t select generate_series(1, 1000)")
            stack.text("endpoint", "restart", "main")
            stack.query("insert into t select generate_series(1001, 2000); select pg_switch_wal()")
            stack.kill("safekeeper-1")
            os.kill(stack.postmaster_pid(), signal.SIGKILL)
            stack.wait_until(stack.accepts, "a fresh start")
            stack.query("insert into t select generate_series(2001, 3000)")
            moment = here(stack)
            stack.query("insert into t select generate_series(3001, 4000)")
            stack.query("select pg_switch_wal()")
            stack.query("insert into t values (0)")
            end = here(stack)
            stack.wait_until(
                lambda: covers(archive, parse_lsn(end)),
                "the WAL so far",
                report=lambda: str(list_segments(archive)),
            )
        finally:
            receiver.send_signal(signal.SIGINT)
            _, told = receiver.communicate(timeout=30)
        assert (receiver.returncode, "goes on where this one was" in told) == (0, True), told
        stack.text("endpoint", "stop", "main")
        assert "up to" in stack.text("wal", "receive", "main", str(archive), "--once")
        stack.text("timeline", "branch", "other")
        refused = stack.run("wal", "receive", "other", str(archive), "--once")
        assert refused.returncode != 0
        assert "has WAL of another branch" in refused.stderr
        assert recovered(build, backup, archive, moment) == [["3000", "3000"]]


def recovered(build: PostgresBuild, backup: Path, archive: Path, moment: str) -> list[list[str]]:
    """What plain PostgreSQL has in the table after its own recovery up to `moment`."""
    hba = archive.with_name("hba.conf")
    hba.write_text("local all all trust\n")
    hba.chmod(0o644)
    (backup / "recovery.signal").touch()
    give_to_user(backup / "recovery.signal")
    settings = {
        "hba_file": str(hba),
        "restore_command": f"cp {archive}/%f %p || cp {archive}/%f.partial %p",
        "recovery_target_lsn": moment,
        "recovery_target_action": "promote",
        "hot_standby": "off",
    }
    with stock_server(build, backup, settings) as server:
        return server.sql("select count(*), max(n) from t")


def list_segments(archive: Path) -> list[str]:
    return sorted(path.name for path in archive.iterdir() if len(path.name) == 24)


def covers(archive: Path, lsn: int) -> bool:
    """Whether the segment before the one of `lsn` is there, whole."""
    number = lsn // SEGMENT - 1
    return f"{1:08X}{number >> 8:08X}{number & 0xFF:08X}" in list_segments(archive)
