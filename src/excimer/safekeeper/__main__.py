"""`python -m excimer.safekeeper SETTINGS.toml`."""

import sys

from excimer.safekeeper.settings import SafekeeperSettings
from excimer.safekeeper.shell import serve_safekeeper
from excimer.service.process_main import run_service


def main() -> int:
    return run_service("safekeeper", SafekeeperSettings, serve_safekeeper)


if __name__ == "__main__":
    sys.exit(main())
