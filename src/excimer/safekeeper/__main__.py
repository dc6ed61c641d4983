"""`python -m excimer.safekeeper SETTINGS.toml`."""

import sys

from excimer.safekeeper.settings import SafekeeperSettings
from excimer.safekeeper.shell import serve_safekeeper
from excimer.service.process_main import run_service

if __name__ == "__main__":
    sys.exit(run_service("safekeeper", SafekeeperSettings, serve_safekeeper))
