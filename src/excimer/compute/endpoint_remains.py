"""What a compute leaves.

Killed, it may leave a postgres, a data directory and a directory of sockets. The next start would find and
remove all of it; this is for endpoints that are stopped and stay so. What a clean stop has kept, stays.
"""

from pathlib import Path

from excimer.compute.places import leave_places, locate_places


def has_remains(endpoint_dir: Path, *, kept_too: bool = False) -> bool:
    """Whether `remove_remains` has more to do than a moment's work."""
    places = locate_places(endpoint_dir)
    return places.data_dir.exists() and (kept_too or not places.shutdown_record.exists())


def remove_remains(endpoint_dir: Path, *, kept_too: bool = False) -> None:
    """Of an endpoint whose manager does not run; may block for seconds.

    `kept_too`: also what a clean stop has kept, for ever.
    """
    places = locate_places(endpoint_dir)
    if has_remains(endpoint_dir, kept_too=kept_too):
        import asyncio

        from excimer.compute.directory_lock import directory_lock
        from excimer.compute.kept_directory import discard
        from excimer.compute.postgres_process import kill_left_behind
        from excimer.compute.warm_start import NOT_CLEAN

        asyncio.run(kill_left_behind(places.data_dir))
        with directory_lock(places.run_dir):
            discard(places, NOT_CLEAN)
        places.settings_socket.unlink(missing_ok=True)
    leave_places(places)
