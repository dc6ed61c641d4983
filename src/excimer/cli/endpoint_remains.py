"""What a compute leaves, seen from the command line.

Killed, it may leave a postgres, a data directory and a directory of sockets. The next start would find and
remove all of it; this is for endpoints that are stopped and stay so. What a clean stop has kept, stays.
"""

from pathlib import Path

from excimer.compute.places import leave_places, locate_places


def remove_remains(endpoint_dir: Path, *, kept_too: bool = False) -> None:
    """Of an endpoint whose manager does not run. `kept_too`: also what a clean stop has kept, for ever."""
    places = locate_places(endpoint_dir)
    is_kept = places.shutdown_record.exists() and not kept_too
    if places.data_dir.exists() and not is_kept:
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
