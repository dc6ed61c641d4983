"""Compiles the endpoint module (`csrc/endpoint`) against a build's server headers, once per build.

It is preloaded into each compute's PostgreSQL and makes the few rules that no setting and no system call
can make: a subscriber's commits wait for the quorum, tablespaces are refused, a new branch does not act on
the outside. Why it is a module of its own: docs/rfcs/0002-endpoint-module.md.

Not here: the settings that it is given (`excimer.compute.outside_work`).
"""

from pathlib import Path
from typing import Final

from excimer.postgres.build import PostgresBuild
from excimer.postgres.redo_extension import cached_module, source_directory

MODULE_FILE_NAME: Final = "excimer_endpoint.so"


def endpoint_module(build: PostgresBuild) -> Path:
    """Path of the compiled module, readable by PostgreSQL's user. Blocks some seconds the first time.

    Raises `BuildUnusableError` when headers or a compiler are missing, or with the compiler's own words.
    """
    return cached_module(build, "endpoint", source_directory("endpoint"), MODULE_FILE_NAME)
