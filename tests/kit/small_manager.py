"""A manager that a compute node forks in place of the real one: no PostgreSQL, a moment until it is ready.

Its endpoint's settings say how it fares: ``ready_after_s``, ``exit_code`` in place of becoming ready,
``child``: a process that it starts, which dies with it (``sleeper``) or does not (``stray``).
"""

import asyncio
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from excimer.compute.settings import ComputeSettings
from excimer.io.processes import die_with_parent
from excimer.service.health import Health
from excimer.service.instance_lock import InstanceLock
from excimer.service.light_http import serving_light_http
from excimer.service.logs import configure_logging, get_logger
from excimer.service.settings import load_settings
from excimer.wire.endpoint_tokens import EndpointTokens

FAILED = "it has no mind to start"


def run_small_manager(
    settings_path: Path, _tokens: EndpointTokens, report_ready: Callable[[bool], None]
) -> int:
    """As `excimer.compute.__main__.run_manager`."""
    configure_logging("small manager", stream=os.fdopen(2, "w"))  # whatever a test has made of stderr
    settings = load_settings(settings_path, ComputeSettings)
    return asyncio.run(_serve(settings, report_ready))


async def _serve(settings: ComputeSettings, report_ready: Callable[[bool], None]) -> int:
    health = Health("small manager")
    wanted = settings.postgres_settings
    with InstanceLock(settings.endpoint_dir, "small manager", passable=True):
        async with serving_light_http(settings.http_listen, health, lambda: b""):
            if "child" in wanted:
                dies = partial(die_with_parent, signal.SIGKILL) if wanted["child"] == "sleeper" else None
                await asyncio.create_subprocess_exec("sleep", "100", preexec_fn=dies, start_new_session=True)
            await asyncio.sleep(float(wanted.get("ready_after_s", "0.05")))
            if "exit_code" in wanted:
                get_logger(__name__).error(FAILED)
                return int(wanted["exit_code"])
            health.ready = True
            report_ready(True)
            await asyncio.Event().wait()
    return 0
