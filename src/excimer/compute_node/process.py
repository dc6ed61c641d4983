"""The node's process: lock, port, who runs already, registration. One thread from its start to its end.

`preload` is for the process that the node is forked from, or for the node itself where there is none.
"""

import asyncio
import gc
import os
from pathlib import Path
from typing import Final

from excimer.base.errors import RefusedError
from excimer.compute_node.autoscaling import keep_scaling
from excimer.compute_node.cgroups import look_at_machine, prepare_cgroups
from excimer.compute_node.endpoints.api import make_api
from excimer.compute_node.metrics import read_metrics
from excimer.compute_node.registration import capacity_of, keep_registered
from excimer.compute_node.resources import Resources
from excimer.compute_node.settings import ComputeNodeSettings
from excimer.compute_node.shell import ComputeNode
from excimer.service.health import Health
from excimer.service.instance_lock import InstanceLock
from excimer.service.light_http import serving_light_http
from excimer.service.log_files import rotate
from excimer.service.logs import get_logger
from excimer.service.tasks import SystemClock, TaskScope
from excimer.wire.auth import TokenVerifier

ROTATION_INTERVAL_S: Final = 2.0

log = get_logger(__name__)


class KeyFileError(RefusedError):
    """A key file cannot be read."""


def starts_at_once() -> int:
    """Starts that are let in together: one uses a core for most of its time, and waits in between."""
    return 2 * (os.cpu_count() or 1)


async def serve_node(settings_file: Path, settings: ComputeNodeSettings) -> None:
    """The node's life, until cancelled. Managers go on."""
    health = Health("compute-node")
    capacity = capacity_of(settings)
    with InstanceLock(settings.data_dir, "compute node"):
        try:
            verifier = TokenVerifier(settings.auth_public_key_path.read_bytes())
        except OSError as error:
            raise KeyFileError(
                f"cannot read key {settings.auth_public_key_path}: {error.strerror}"
            ) from error
        async with TaskScope() as scope:
            cgroups = prepare_cgroups(settings.endpoints_dir, settings.cgroup_parent, look_at_machine())
            resources = Resources(cgroups, settings.unenforced_limits, health.warn)
            health.facts["resource_limits"] = cgroups.described()
            node = ComputeNode(settings, settings_file, scope, starts_at_once(), resources)
            node.adopt()
            gc.collect()
            gc.freeze()
            api = make_api(node, verifier, SystemClock())
            metrics = lambda: read_metrics(node, capacity)  # noqa: E731
            async with serving_light_http(settings.http_listen, health, metrics, routes=api):
                health.ready = True
                scope.supervise("sizes", lambda: keep_scaling(resources, settings.endpoints_dir))
                scope.supervise("registration", lambda: keep_registered(settings, health))
                try:
                    await _keep_log_short(settings.log_path)
                finally:
                    resources.close()


async def _keep_log_short(path: Path | None) -> None:
    """On the event loop: the thread that others have for it would be in the way of forks."""
    while True:
        await asyncio.sleep(ROTATION_INTERVAL_S)
        if path is not None:
            try:
                rotate(path)
            except OSError as error:
                log.warning("log not rotated", path=str(path), error=error)
