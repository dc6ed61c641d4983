"""Requests to each of our two HTTP servers, before any service is forked.

What runs for the first time writes: instances give their class its table of attributes, bytecode is
specialised, expressions are compiled, modules are imported late. What has run here has written here, and what
it wrote is shared: half a MiB to one for each service, and a part of its start.

Not here: what runs for services alone, their ports and files.
"""

import asyncio
import contextlib
from typing import Annotated, Final

from fastapi import Depends, FastAPI
from prometheus_client import CollectorRegistry
from pydantic import BaseModel

from excimer.base.errors import ExcimerError
from excimer.service import metrics
from excimer.service.health import Health
from excimer.service.http import bearer_auth, complete_routes, create_app, serving_http
from excimer.service.http_client import HttpClient
from excimer.service.light_http import serving_light_http
from excimer.service.tasks import SystemClock
from excimer.wire.auth import Claims, TokenVerifier, encode_token, generate_key_pair

_LISTEN: Final = "127.0.0.1:0"
_LIMIT_S: Final = 5.0


class _Body(BaseModel):
    text: str


class _Answer(BaseModel):
    text: str


def rehearse() -> None:
    """Leaves no thread, socket or loop behind. Where nothing can listen on 127.0.0.1, less is shared."""
    with contextlib.suppress(ExcimerError, OSError):
        asyncio.run(_rehearse())


async def _rehearse() -> None:
    pair = generate_key_pair()  # opens nothing
    token = encode_token(pair.private_pem, Claims(holder="nobody"))
    health = Health("rehearsal")
    health.ready = True
    registry = metrics.new_registry("rehearsal", "0")
    app = _make_app(health, registry, TokenVerifier(pair.public_pem))
    complete_routes(app)
    async with serving_http(app, _LISTEN, "rehearsal") as full:
        client = HttpClient("the rehearsal", str(full), token, _LIMIT_S, is_plain=True)
        await client.get("/healthz")
        await client.get_bytes("/metrics")
        await client.call("PUT", "/v1/rehearsals/1", {"text": "a"})
    async with serving_light_http(_LISTEN, health, lambda: b"") as light:
        await HttpClient("the rehearsal", str(light), timeout_s=_LIMIT_S, is_plain=True).get("/healthz")
    await asyncio.to_thread(metrics.render, registry)


def _make_app(health: Health, registry: CollectorRegistry, verifier: TokenVerifier) -> FastAPI:
    """With a route as services have them."""
    app = create_app("Rehearsal", "0", health, registry, verifier=verifier)
    authenticated = Depends(bearer_auth(verifier, SystemClock()))

    @app.put("/v1/rehearsals/{number}")
    async def answer(number: int, body: _Body, claims: Annotated[Claims, authenticated]) -> _Answer:
        return _Answer(text=f"{body.text} {number} {claims.holder}")

    return app
