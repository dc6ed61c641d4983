"""A service of a few lines for tests of starting, watching and stopping; its settings say how it behaves."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.cli.installation import Installation, Part, create_installation, free_ports, new_config
from excimer.cli.local_processes import stop_supervisor
from excimer.service.settings import Settings

SERVICE = """
import asyncio, os, signal, sys
from pathlib import Path
from excimer.base.errors import RefusedError
from excimer.service.health import Health
from excimer.service.instance_lock import InstanceLock
from excimer.service.light_http import serving_light_http
from excimer.service.process_main import run_service
from excimer.service.settings import Settings
from excimer.service.process_records import ProcessRecord, boot_id, start_ticks

class S(Settings, frozen=True):
    data_dir: Path
    http_listen: str
    how: str = ""

async def serve(settings):
    if settings.how == "refuse":
        raise RefusedError("port 5 of 127.0.0.1 is taken by another program")
    if settings.how == "stopped":
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    with InstanceLock(settings.data_dir, "service"):
        variables = [f"{name}={value}" for name, value in os.environ.items()]
        (settings.data_dir / "environment").write_text("\\n".join(variables), errors="surrogateescape")
        health = Health("service", ready=settings.how != "never ready")
        if settings.how == "unwell":
            health.report("disk", "it is on fire")
        async with serving_light_http(settings.http_listen, health, lambda: b""):
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    if settings.how != "stubborn":
                        raise

sys.exit(run_service("service", S, serve, stop_limit_s=60))
"""


class ServiceSettings(Settings, frozen=True):
    data_dir: Path
    http_listen: str
    how: str = ""


def small_installation(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    """An installation whose parts may be made by `part_of`; its supervisor is stopped at the end."""
    (root / "modules").mkdir()
    (root / "modules" / "small_service.py").write_text(SERVICE)
    monkeypatch.setenv("PYTHONPATH", f"{root / 'modules'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    made = create_installation(root / "state", new_config(18, 1))
    try:
        yield made
    finally:
        stop_supervisor(made, immediate=True)


def part_of(installation: Installation, how: str = "", name: str = "small") -> Part:
    listen = f"127.0.0.1:{free_ports(1)[0]}"
    data_dir = installation.directory / name
    settings = ServiceSettings(data_dir=data_dir, http_listen=listen, how=how)
    return Part(name, "small_service", settings, listen, data_dir)
