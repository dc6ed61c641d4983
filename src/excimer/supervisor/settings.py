"""What a supervisor is told at its start; everything else comes with requests (`protocol`)."""

from pathlib import Path

from excimer.service.settings import Settings


class SupervisorSettings(Settings, frozen=True, kw_only=True):
    run_dir: Path
    """Of the installation: records of processes, and the socket on which requests come."""
