"""Binding what is measured to one core, so that "on one core" means it."""

import contextlib
import os
from collections.abc import Iterator

CORES = frozenset(os.sched_getaffinity(0))
MEASURED_CORE = min(CORES)


@contextlib.contextmanager
def bound_to_one_core() -> Iterator[None]:
    """This program and processes started within, with all their threads; the latter stay there."""
    with _bound_to({MEASURED_CORE}):
        yield


@contextlib.contextmanager
def away_from_it() -> Iterator[None]:
    """This program on the other cores, if there are any."""
    with _bound_to(set(CORES - {MEASURED_CORE} or CORES)):
        yield


@contextlib.contextmanager
def _bound_to(cores: set[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
