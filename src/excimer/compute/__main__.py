"""`python -m excimer.compute SETTINGS.toml`: runs one endpoint until it is told to stop."""

import sys

from excimer.base.errors import FencedError, RefusedError
from excimer.compute.core import EXIT_CLEAN, EXIT_FENCED
from excimer.compute.metrics import read_metrics
from excimer.compute.settings import ComputeSettings
from excimer.compute.shell import Manager, make_keeper, make_spec
from excimer.service.health import Health
from excimer.service.instance_lock import InstanceLock
from excimer.service.light_http import serving_light_http
from excimer.service.process_main import run_service


async def serve(settings: ComputeSettings) -> None:
    """Raises `FencedError` or `RefusedError` when the endpoint is over for good."""
    with InstanceLock(settings.endpoint_dir, "compute"):
        health = Health("compute")
        spec = make_spec(settings)
        manager = Manager(spec, health, make_keeper(settings, spec, health))
        async with serving_light_http(settings.http_listen, health, lambda: read_metrics(manager)):
            end = await manager.run()
    if end.code == EXIT_FENCED:
        raise FencedError(end.reason)
    if end.code != EXIT_CLEAN:
        raise RefusedError(end.reason)


if __name__ == "__main__":
    sys.exit(run_service("compute", ComputeSettings, serve))
