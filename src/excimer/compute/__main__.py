"""`python -m excimer.compute SETTINGS.toml < TOKENS`: runs one endpoint until it is told to stop.

A compute node forks it instead (`run_manager`).
"""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from excimer.base.errors import FencedError, RefusedError
from excimer.compute.core import EXIT_CLEAN, EXIT_FENCED, EXIT_SUSPENDED
from excimer.compute.directory_lock import directory_lock
from excimer.compute.kept_space import keep_within
from excimer.compute.last_end import forget_end, record_end
from excimer.compute.metrics import read_metrics
from excimer.compute.places import STOP_BEAT_NAME
from excimer.compute.settings import ComputeSettings
from excimer.compute.shell import Manager, make_spec
from excimer.compute.state_keeper import SAVE_LIMIT_S
from excimer.compute.stop_progress import STILL_S, StopBeat
from excimer.compute.token_renewal import take_tokens
from excimer.io.processes import hide_memory
from excimer.service.health import Health
from excimer.service.instance_lock import InstanceLock
from excimer.service.light_http import serving_light_http
from excimer.service.native_loop import NativeEventLoop
from excimer.service.process_main import EXIT_USAGE, rotating_logs, run_service
from excimer.wire.endpoint_tokens import EndpointTokens

STOP_LIMIT_S: Final = STILL_S + SAVE_LIMIT_S + 2.0
"""Since the shutdown of PostgreSQL has last got on: patience with it, then saving what WAL does not carry,
then cleaning up; each has its own bound."""

AS_WANTED: Final = (EXIT_CLEAN, EXIT_SUSPENDED)
"""For whoever watches the process they are one: it has ended well. The controller knows which."""


async def serve(
    tokens: EndpointTokens, beat: StopBeat, report_ready: Callable[[bool], None], settings: ComputeSettings
) -> None:
    """Raises `FencedError` or `RefusedError` when the endpoint is over for good."""
    with InstanceLock(settings.endpoint_dir, "compute", passable=True):
        forget_end(settings.endpoint_dir)
        health = Health("compute")
        spec = make_spec(settings)
        beat.path = settings.endpoint_dir / STOP_BEAT_NAME
        manager = Manager(spec, settings, tokens, health, beat, report_ready)
        try:
            with directory_lock(spec.places.run_dir), rotating_logs([spec.places.postgres_log]):
                async with serving_light_http(settings.http_listen, health, lambda: read_metrics(manager)):
                    end = await manager.run()
        finally:
            beat.end()
            with contextlib.suppress(OSError):
                keep_within(settings.endpoint_dir.parent, settings.stopped_directories_max_mib << 20)
        if end.code not in AS_WANTED:
            record_end(settings.endpoint_dir, end.reason)
    if end.code == EXIT_FENCED:
        raise FencedError(end.reason)
    if end.code not in AS_WANTED:
        raise RefusedError(end.reason)


def run_manager(settings_path: Path, tokens: EndpointTokens, report_ready: Callable[[bool], None]) -> int:
    """The manager's whole life; its exit code. `report_ready` hears whenever PostgreSQL begins or ceases to
    accept connections.
    """
    beat = StopBeat()
    return run_service(
        "compute",
        ComputeSettings,
        partial(serve, tokens, beat, report_ready),
        arguments=[str(settings_path)],
        stop_limit_s=STOP_LIMIT_S,
        moved_s=lambda: beat.moved_s,
        make_loop=NativeEventLoop,
    )


def main() -> int:
    hide_memory()
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m excimer.compute SETTINGS.toml", file=sys.stderr)
        return EXIT_USAGE
    try:
        tokens = take_tokens()
    except RefusedError as error:
        print(f"excimer compute: {error}", file=sys.stderr)
        return EXIT_USAGE
    return run_manager(Path(sys.argv[1]), tokens, lambda _: None)


if __name__ == "__main__":
    sys.exit(main())
