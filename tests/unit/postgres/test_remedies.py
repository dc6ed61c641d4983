"""The command that is named to somebody who misses something in a build, thing by thing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from excimer.postgres import BuildFeatures, PostgresBuild, extension_hint, remedies, remedy

WHOLE = BuildFeatures(
    icu=True,
    tls=True,
    lz4=True,
    zstd=True,
    libxml=True,
    llvm=True,
    headers=True,
    regress=True,
    timezones=True,
    extensions=frozenset({"amcheck", "pgcrypto", "uuid-ossp", "vector"}),
    broken_extensions=(),
    missing_libraries=(),
)


def build_with(version: int = 18, **changes: Any) -> PostgresBuild:
    place = Path("/nowhere")
    return PostgresBuild(
        version=version,
        full_version=f"{version}.6",
        bin_dir=place,
        lib_dir=place,
        client_lib_dir=place,
        share_dir=place,
        include_server_dir=place,
        pgxs_dir=None,
        origin="wheel",
        features=replace(WHOLE, **changes),
    )


def without(extension: str) -> frozenset[str]:
    return WHOLE.extensions - {extension}


@pytest.fixture(params=[True, False], ids=["apt", "no apt"])
def has_apt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(
        remedies, "has_packages", lambda version: bool(request.param) and version in (15, 17, 18)
    )
    return bool(request.param)


@pytest.mark.parametrize(
    ("thing", "changes", "in_wheel"),
    [
        ("ICU", {"icu": False}, False),
        ("TLS", {"tls": False}, True),
        ("pgcrypto", {"extensions": without("pgcrypto")}, True),
        ("uuid-ossp", {"extensions": without("uuid-ossp")}, False),
    ],
)
def test_what_lacks_is_named_with_the_command_that_brings_it(
    has_apt: bool, thing: str, changes: dict[str, Any], in_wheel: bool
) -> None:
    build = build_with(**changes)
    assert thing in build.features.lacks()
    helps = remedy(build)
    if has_apt or in_wheel:
        assert helps == f"`excimer pg install 18` brings a build with {thing}"
    else:
        assert helps is None
    hint = extension_hint(build)
    assert f"lacks {thing}." in hint
    assert ("excimer pg install 18" if has_apt or in_wheel else "excimer pg add") in hint


def test_versions_that_debian_does_not_have_come_from_the_wheel(has_apt: bool) -> None:
    assert remedy(build_with(16, icu=False)) is None
    assert remedy(build_with(16, icu=False, tls=False)) == "`excimer pg install 16` brings a build with TLS"


def test_a_library_that_the_machine_lacks_is_named_with_its_package(has_apt: bool) -> None:
    build = build_with(
        extensions=without("uuid-ossp"), broken_extensions=(("uuid-ossp", "libossp-uuid.so.16"),)
    )
    helps = remedy(build) or ""
    assert ("excimer pg install 18" in helps) == has_apt
    assert ("apt-get install libossp-uuid16" in helps) == (not has_apt)


def test_a_whole_build_needs_no_remedy(has_apt: bool) -> None:
    assert remedy(build_with()) is None
    assert "lacks none of the usual" in extension_hint(build_with())
