"""Tells the controller that this node is there, at its start and again and again.

The controller hears with each report how many endpoints may be awake here; what is placed where, it knows
itself.
"""

import asyncio
import os
from pathlib import Path
from typing import Final, Never

from excimer.base.errors import ExcimerError
from excimer.compute_node.settings import ComputeNodeSettings
from excimer.service.health import Health
from excimer.service.http_client import HttpClient, path_of
from excimer.service.logs import get_logger
from excimer.wire.compute_limits import ComputeSize
from excimer.wire.compute_orders import NodeReport

CALL_LIMIT_S: Final = 3.0
INTERVAL_S: Final = 5.0
RETRY_S: Final = 0.1
RETRY_S_MAX: Final = 2.0
ENDPOINT_BYTES: Final = 48 << 20
"""What an awake endpoint that does little takes of the machine's memory: PostgreSQL and its manager."""
_CHECK: Final = "registration"

log = get_logger(__name__)


def capacity_of(settings: ComputeNodeSettings) -> int:
    """How many endpoints may be awake here."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return settings.capacity or max(1, memory_bytes // ENDPOINT_BYTES)


def room() -> ComputeSize:
    """What endpoints' minimums may come to together: all that this machine has."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return ComputeSize(1000 * (os.cpu_count() or 1), memory_bytes >> 20)


async def keep_registered(settings: ComputeNodeSettings, health: Health) -> Never:
    """Until cancelled. The node is unwell until the controller has heard of it; later that is a warning."""
    report = NodeReport(http_address=settings.http_listen, capacity=capacity_of(settings), room=room())
    wait_s, is_known = RETRY_S, False
    health.report(_CHECK, "the controller has not heard of it yet")
    while True:
        try:
            await _client(settings).call("PUT", path_of("v1", "compute_nodes", str(settings.id)), report)
        except (ExcimerError, OSError) as error:
            said = f"the controller does not hear of it: {error}"
            if is_known:
                health.warn(_CHECK, said)
            else:
                health.report(_CHECK, said)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, RETRY_S_MAX)
            continue
        if not is_known:
            log.info("registered at the controller", capacity=report.capacity)
        is_known, wait_s = True, RETRY_S
        health.report(_CHECK, None)
        health.warn(_CHECK, None)
        await asyncio.sleep(INTERVAL_S)


def _client(settings: ComputeNodeSettings) -> HttpClient:
    token = Path(settings.auth_token_path).read_text().strip()
    return HttpClient("the controller", settings.controller_address, token, CALL_LIMIT_S)
