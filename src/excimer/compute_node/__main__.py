"""`python -m excimer.compute_node SETTINGS.toml`: until SIGTERM, which leaves the managers running."""

import sys
from functools import partial
from pathlib import Path

from excimer.compute_node.process import serve_node
from excimer.compute_node.settings import ComputeNodeSettings
from excimer.io.processes import hide_memory
from excimer.service.process_main import run_service


def main() -> int:
    hide_memory()
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
    return run_service(
        "compute_node", ComputeNodeSettings, partial(serve_node, path), is_single_threaded=True
    )


if __name__ == "__main__":
    sys.exit(main())
