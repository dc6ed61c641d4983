"""A freshly made, cleanly stopped cluster as the content a timeline begins with.

It all holds at the end of the shutdown checkpoint's record. Clusters of users come in another way
(`cluster_import`), through the same reading of files.

Not here: running initdb, storing the images (`TimelineCommits.import_images`).
"""

from pathlib import Path
from typing import NamedTuple

from excimer.base.errors import RefusedError
from excimer.base.lsn import Lsn
from excimer.io.cluster_directory import checkpoint_end, cluster_paths, read_parts
from excimer.pageserver.cluster_images import ClusterImages
from excimer.pgformat.cluster_files import identify_file
from excimer.pgformat.control_file import ClusterState, ControlFile

Image = tuple[bytes, bytes]


class ClusterNotStoppedError(RefusedError):
    """The cluster was not shut down cleanly: its files are not the whole truth."""


class ImportedCluster(NamedTuple):
    control_file: ControlFile
    end_lsn: Lsn
    """Where the images hold and WAL goes on: the end of the shutdown checkpoint's record."""
    prev_record_lsn: Lsn
    """That record's start."""
    images: list[Image]
    """Key and whole value, keys in order."""


def import_initdb(directory: Path, pg_version: int) -> ImportedCluster:
    """Reads the data directory of a stopped cluster without user tablespaces.

    Raises `ClusterNotStoppedError`, `ControlFileError`, `InvalidWalError`, OSError.
    """
    control = ControlFile.unpack((directory / "global/pg_control").read_bytes(), pg_version)
    if control.state != ClusterState.SHUTDOWNED:
        raise ClusterNotStoppedError(f"the cluster in {directory} is not shut down cleanly")
    collected: list[Image] = []
    images = ClusterImages(pg_version, lambda key, data: collected.append((key, data)))
    for path in cluster_paths(directory):
        file = identify_file(path)
        if file is not None:
            images.begin_file(file)
            for part in read_parts(directory / path):
                images.feed(part)
            images.end_file()
    images.finish()
    end_lsn = checkpoint_end(directory, control, pg_version)
    return ImportedCluster(control, end_lsn, Lsn(control.checkpoint_lsn), sorted(collected))
