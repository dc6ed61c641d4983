"""What services share, made before they are forked: imports, apps, what libraries make at their first use.

Memory that nobody writes to is shared between forks, and Python writes to an object whenever it is used: it
counts references in the objects themselves, which lie scattered, so that each function that a service calls
costs it about two pages of its own. What is done here is not done, and not paid for, in each service
(docs/performance.md). What is made here must not be anybody's: no settings, no keys, no tokens; and no
threads, loops or connections may stay, for a fork has none of them.
"""

import contextlib
import functools
import gc
import importlib
import sys
import threading
from types import ModuleType
from typing import Final, cast

import msgspec

from excimer._native.heap_holes import fill_heap_holes, fill_object_holes
from excimer.base.errors import RefusedError
from excimer.io.processes import release_freed_memory
from excimer.io.program_pages import release_program_pages

MODULES: Final = (
    "excimer.broker.__main__",
    "excimer.safekeeper.__main__",
    "excimer.pageserver.__main__",
    "excimer.controller.__main__",
    "excimer.compute.__main__",
    "excimer.compute_node.__main__",
    "excimer.service.light_http",
    "anyio._backends._asyncio",  # imported by FastAPI's first route that is not async
    "asyncio.subprocess",
    "encodings.idna",  # by the first name that is resolved
    "sqlite3",
)

LEFT_OUT: Final = ("pydantic.v1",)
"""Not to be imported by anybody. FastAPI asks of each parameter and answer whether it is a model of pydantic
1, which is none where that cannot be imported: 2 MiB.
"""


class ThreadsLeftError(RefusedError):
    """A library began a thread when it was imported: a fork would lack it."""


@functools.cache
def preload() -> None:
    """Once: imports, warms up, and puts what there is out of the garbage collector's sight. Raises
    `ThreadsLeftError`, ImportError for a part of Excimer that is not built.
    """
    before = set(threading.enumerate())
    for module in LEFT_OUT:
        sys.modules.setdefault(module, cast(ModuleType, None))  # an ImportError to whoever asks for it
    for module in MODULES:
        importlib.import_module(module)
    _prepare_services()
    _warm_up_settings()
    _rehearse()
    if left := set(threading.enumerate()) - before:  # the log's own may come and go: `logs`
        raise ThreadsLeftError(f"threads would be lost in a fork: {left}")
    gc.collect()
    _settle_types()
    gc.freeze()
    _close_holes()
    release_program_pages()


def _settle_types() -> None:
    """A type that is asked for an attribute for the first time writes down a number of its own, and the cache
    of such questions holds on to the attribute's name, and lets go of another's.
    """
    for kind in [found for found in gc.get_objects() if isinstance(found, type)]:
        type.__getattribute__(kind, "__module__")
    sys._clear_type_cache()


def _close_holes() -> None:
    """What forks make is to lie in pages of their own. Whole free pages are given back, not taken."""
    release_freed_memory()
    fill_object_holes()
    fill_heap_holes()


def _rehearse() -> None:
    from excimer.supervisor.rehearsal import rehearse

    rehearse()


def _prepare_services() -> None:
    from excimer.broker.nats_config import NatsServerMissingError, find_nats_server
    from excimer.controller import process as controller
    from excimer.pageserver import shell as pageserver
    from excimer.safekeeper import shell as safekeeper
    from excimer.service.http import complete_routes

    for made in controller.make_registry, pageserver.make_registry, safekeeper.make_metrics:
        made.prepare()
    for app in controller.make_app, pageserver.make_app, safekeeper.make_app:
        complete_routes(app.prepare())
    with contextlib.suppress(NatsServerMissingError):
        find_nats_server()


def _warm_up_settings() -> None:
    """Makes what msgspec keeps for each kind of settings, by reading none."""
    from excimer.broker.settings import BrokerSettings
    from excimer.compute.settings import ComputeSettings
    from excimer.compute_node.settings import ComputeNodeSettings
    from excimer.controller.settings import ControllerSettings
    from excimer.pageserver.settings import PageserverSettings
    from excimer.safekeeper.settings import SafekeeperSettings

    for kind in (
        *(BrokerSettings, ComputeSettings, ComputeNodeSettings),
        *(ControllerSettings, PageserverSettings, SafekeeperSettings),
    ):
        with contextlib.suppress(msgspec.ValidationError):
            msgspec.convert({}, kind, dec_hook=lambda _kind, value: value)
