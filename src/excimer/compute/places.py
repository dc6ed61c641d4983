"""Where a compute keeps its files, all of them disposable.

PostgreSQL runs as an unprivileged user when we are root, and must reach its data directory. An
endpoint directory below /root, say, cannot be reached; its data directory then lies in the cache
directory, under a name derived from the endpoint's. Unix sockets have paths of at most 107 bytes,
so they get a short directory of their own.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from excimer.io.cache import cache_directory
from excimer.io.processes import is_passable, make_owned_dir, unprivileged_user

LOCAL_ACCESS_NAME: Final = "local_access.json"
SHUTDOWN_RECORD_NAME: Final = "shutdown.json"
NOT_KEPT_NAME: Final = "not_kept"
STOP_BEAT_NAME: Final = "stopping"
"""In the endpoint's directory: changes for as long as a stop gets on (`stop_progress`)."""


class ComputePlaces(NamedTuple):
    run_dir: Path
    """Belongs to PostgreSQL's user. Beside the data directory lies here what no base backup may have."""
    data_dir: Path
    arena: Path
    socket_dir: Path
    page_socket: Path
    """Where postgres asks for pages if services speak TLS (`page_relay`)."""
    settings_socket: Path
    """Beside the data directory, where libhydrate looks for it."""
    postgres_log: Path
    local_access: Path
    """Says, while PostgreSQL serves, how our own user connects to it (`local_access`)."""
    shutdown_record: Path
    """Says, while none does, that the data directory may be used again (`kept_directory`)."""
    hot_buffers: Path
    """Which blocks were in shared buffers when PostgreSQL was shut down (`hot_collection`)."""
    hot_blocks: Path
    """The endpoint's hot set as it was last known here (`hot_keeper`)."""
    not_kept: Path
    """Says why the last stop left no data directory, until the next start."""


def find_places(endpoint_dir: Path) -> ComputePlaces:
    """The places of an endpoint; the same at each start, so that leftovers are found.

    Makes the directories around them, not the data directory itself.
    """
    places = locate_places(endpoint_dir)
    make_owned_dir(places.run_dir)
    make_owned_dir(places.socket_dir)
    return places


def locate_places(endpoint_dir: Path) -> ComputePlaces:
    """The same without making anything."""
    endpoint_dir = endpoint_dir.resolve()
    name = hashlib.sha256(bytes(endpoint_dir)).hexdigest()[:16]
    if unprivileged_user() is None or is_passable(endpoint_dir):
        run_dir = endpoint_dir / "run"
    else:
        run_dir = cache_directory() / "computes" / name
    socket_dir = Path(tempfile.gettempdir()) / f"excimer-{name}"
    return ComputePlaces(
        run_dir=run_dir,
        data_dir=run_dir / "pgdata",
        arena=run_dir / "arena",
        socket_dir=socket_dir,
        page_socket=socket_dir / "pages",
        settings_socket=run_dir / "settings.sock",
        postgres_log=endpoint_dir / "postgres.log",
        local_access=endpoint_dir / LOCAL_ACCESS_NAME,
        shutdown_record=endpoint_dir / SHUTDOWN_RECORD_NAME,
        hot_buffers=run_dir / "hot_buffers",
        hot_blocks=endpoint_dir / "hot_blocks",
        not_kept=endpoint_dir / NOT_KEPT_NAME,
    )


def leave_places(places: ComputePlaces) -> None:
    """Once no postgres runs there any more: nothing is left in the directory for temporary files."""
    shutil.rmtree(places.socket_dir, ignore_errors=True)
