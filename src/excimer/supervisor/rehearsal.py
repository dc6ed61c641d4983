"""One request to each of our two HTTP servers, before any service is forked.

What runs for the first time writes: instances give their class its table of attributes, bytecode is
specialised, expressions are compiled, modules are imported late. What has run here has written here, and what
it wrote is shared: half a MiB to one for each service, and a part of its start.

Not here: what runs for services alone, their ports and files.
"""

import asyncio
import contextlib
from typing import Final

from excimer.base.errors import ExcimerError
from excimer.service import metrics
from excimer.service.health import Health
from excimer.service.http import create_app, serving_http
from excimer.service.http_client import HttpClient
from excimer.service.light_http import serving_light_http

_LISTEN: Final = "127.0.0.1:0"
_LIMIT_S: Final = 5.0


def rehearse() -> None:
    """Leaves no thread, socket or loop behind. Where nothing can listen on 127.0.0.1, less is shared."""
    with contextlib.suppress(ExcimerError, OSError):
        asyncio.run(_rehearse())


async def _rehearse() -> None:
    health = Health("rehearsal")
    health.ready = True
    registry = metrics.new_registry("rehearsal", "0")
    app = create_app("Rehearsal", "0", health, registry, verifier=None)
    async with serving_http(app, _LISTEN, "rehearsal") as full:
        await HttpClient("the rehearsal", str(full), timeout_s=_LIMIT_S, is_plain=True).get("/healthz")
    async with serving_light_http(_LISTEN, health, lambda: b"") as light:
        await HttpClient("the rehearsal", str(light), timeout_s=_LIMIT_S, is_plain=True).get("/healthz")
    await asyncio.to_thread(metrics.render, registry)
