"""What a cluster uses against what a build has: what lacks is refused with the command that helps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from excimer.cli.import_needs import ClusterNeeds, check_needs, unmet
from excimer.cli.import_source import SourceRefusedError
from excimer.postgres import BuildFeatures, PostgresBuild, remedies

FEATURES = BuildFeatures(
    icu=True,
    tls=True,
    lz4=True,
    zstd=True,
    libxml=True,
    llvm=False,
    headers=True,
    regress=True,
    timezones=True,
    extensions=frozenset(),
    broken_extensions=(),
    missing_libraries=(),
)
EVERYTHING = ClusterNeeds(
    icu=("database app", "collation german in database b"),
    lz4=("column t.a in database app",),
    zstd=("wal_compression = zstd",),
    xml=("column t.x in database app",),
    libraries={"pgcrypto": "database app", "vector": "database app", "postgis-3": "database maps"},
)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PostgresBuild:
    """With all that `EVERYTHING` needs, on a machine with apt."""
    monkeypatch.setattr(remedies, "has_packages", lambda version: version == 18)
    for name in EVERYTHING.libraries:
        (tmp_path / f"{name}.so").touch()
    return PostgresBuild(
        version=18,
        full_version="18.6",
        bin_dir=tmp_path,
        lib_dir=tmp_path,
        client_lib_dir=tmp_path,
        share_dir=tmp_path,
        include_server_dir=None,
        pgxs_dir=None,
        origin="wheel",
        features=FEATURES,
    )


def lacking(build: PostgresBuild, **changes: Any) -> PostgresBuild:
    return replace(build, features=replace(build.features, **changes))


def test_a_build_that_has_all_is_good(build: PostgresBuild) -> None:
    check_needs(build, EVERYTHING)
    check_needs(lacking(build, icu=False, lz4=False, zstd=False, libxml=False), ClusterNeeds())


@pytest.mark.parametrize(
    ("changes", "thing", "where"),
    [
        ({"icu": False}, "ICU", "database app, collation german in database b"),
        ({"lz4": False}, "LZ4", "column t.a in database app"),
        ({"zstd": False}, "zstd", "wal_compression = zstd"),
        ({"libxml": False}, "XML", "column t.x in database app"),
        ({"broken_extensions": (("pgcrypto", "libcrypto.so.9"),)}, "pgcrypto", "database app"),
    ],
)
def test_each_thing_that_lacks_is_named_with_its_place_and_the_command(
    build: PostgresBuild, changes: dict[str, Any], thing: str, where: str
) -> None:
    assert unmet(lacking(build, **changes), EVERYTHING) == {thing: where}
    with pytest.raises(SourceRefusedError) as refused:
        check_needs(lacking(build, **changes), EVERYTHING)
    said = str(refused.value)
    assert f"the cluster uses {thing} ({where}), which PostgreSQL 18.6" in said
    assert f"`excimer pg install 18` brings a build with {thing}" in said
    assert "--allow-lacking" in said


def test_libraries_that_no_command_brings_ask_for_an_installation(build: PostgresBuild) -> None:
    for name in EVERYTHING.libraries:
        (build.lib_dir / f"{name}.so").unlink()
    with pytest.raises(SourceRefusedError) as refused:
        check_needs(build, EVERYTHING)
    said = str(refused.value)
    assert "`excimer pg install 18` brings a build with pgcrypto and pgvector" in said
    assert "`excimer pg add PG_CONFIG` names an installation that has postgis-3" in said
