"""What services share, made before they are forked: imports, and what libraries make at their first use.

Memory that nobody writes to is shared between forks, and Python writes to an object whenever it is used, so
that not all of it stays so. Of a service's 45 MiB about 30 do (docs/performance.md). What is made here must
not be anybody's: no settings, no keys, no tokens; and no threads, loops or connections may stay, for a fork
has none of them.
"""

import asyncio
import functools
import gc
import importlib
import threading
from typing import Final

from excimer.base.errors import RefusedError

MODULES: Final = (
    "excimer.broker.shell",
    "excimer.safekeeper.shell",
    "excimer.pageserver.shell",
    "excimer.controller.process",
    "excimer.compute.shell",
    "excimer.service.light_http",
    "runpy",
    "asyncio.subprocess",
    "sqlite3",
)


class ThreadsLeftError(RefusedError):
    """A library began a thread when it was imported: a fork would lack it."""


@functools.cache
def preload() -> None:
    """Once: imports, warms up, and puts what there is out of the garbage collector's sight. Raises
    `ThreadsLeftError`, ImportError for a part of Excimer that is not built.
    """
    before = set(threading.enumerate())
    for module in MODULES:
        importlib.import_module(module)
    from excimer.service import http

    http.warm_up()
    _warm_up_cryptography()
    asyncio.run(asyncio.sleep(0))
    if left := set(threading.enumerate()) - before:  # the log's own may come and go: `logs`
        raise ThreadsLeftError(f"threads would be lost in a fork: {left}")
    gc.collect()
    gc.freeze()


def _warm_up_cryptography() -> None:
    """Makes OpenSSL's tables, with a key that opens nothing."""
    from excimer.wire.auth import Claims, TokenVerifier, encode_token, generate_key_pair

    pair = generate_key_pair()
    TokenVerifier(pair.public_pem).verify(encode_token(pair.private_pem, Claims(holder="nobody")), 0.0)
