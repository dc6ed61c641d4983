"""What a compute may leave when its manager is killed: a postgres, a data directory, a directory of sockets.

The next start would find and remove all of it; this is for endpoints that are stopped and stay so.
"""

import shutil
from pathlib import Path

from excimer.compute.places import leave_places, locate_places


def remove_remains(endpoint_dir: Path) -> None:
    """Of an endpoint whose manager does not run. After a clean stop there is nothing to do."""
    places = locate_places(endpoint_dir)
    if places.data_dir.exists():
        import asyncio

        from excimer.compute.postgres_process import kill_left_behind

        asyncio.run(kill_left_behind(places.data_dir))
        shutil.rmtree(places.data_dir, ignore_errors=True)
        places.arena.unlink(missing_ok=True)
        places.settings_socket.unlink(missing_ok=True)
    leave_places(places)
