"""What a cluster needs of a PostgreSQL build, compared with what the build has that would run it.

Not here: finding out what a running server (`import_server_needs`) or a directory (`import_directory_needs`)
uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from excimer.cli.import_source import SourceRefusedError
from excimer.postgres import PostgresBuild, remedy_for

EXTENSIONS = {"vector": "pgvector"}
"""Libraries that lists of what a build lacks call by another name."""


@dataclass(frozen=True, slots=True)
class ClusterNeeds:
    """What is used, and where, as a person would say it: ``database app``."""

    icu: tuple[str, ...] = ()
    lz4: tuple[str, ...] = ()
    zstd: tuple[str, ...] = ()
    xml: tuple[str, ...] = ()
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Names of files in the build's library directory, without ``.so``."""
    unseen: tuple[str, ...] = ()
    """What could not be looked at, each with the reason."""


def check_needs(build: PostgresBuild, needs: ClusterNeeds) -> None:
    """Raises `SourceRefusedError` that names all that `build` lacks, where it is used, and what helps."""
    lacking = unmet(build, needs)
    if not lacking:
        return
    uses = "; ".join(f"{thing} ({where})" for thing, where in lacking.items())
    raise SourceRefusedError(
        f"the cluster uses {uses}, which PostgreSQL {build.full_version} in {build.bin_dir} lacks: "
        f"{remedy_for(build, list(lacking))}; or remove it from the cluster; "
        "--allow-lacking imports it all the same"
    )


def unmet(build: PostgresBuild, needs: ClusterNeeds) -> dict[str, str]:
    """What is used and not there -> where it is used."""
    features = build.features
    wanted = (
        ("ICU", features.icu, needs.icu),
        ("LZ4", features.lz4, needs.lz4),
        ("zstd", features.zstd, needs.zstd),
        ("XML", features.libxml, needs.xml),
    )
    lacking = {thing: ", ".join(where) for thing, is_there, where in wanted if where and not is_there}
    broken = {name for name, _ in features.broken_extensions}
    for name, where in sorted(needs.libraries.items()):
        if name in broken or not (build.lib_dir / f"{name}.so").exists():
            lacking[EXTENSIONS.get(name, name)] = where
    return lacking
