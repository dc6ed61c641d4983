"""`python -m excimer.pageserver SETTINGS.toml` runs a pageserver until SIGTERM."""

import sys

from excimer.pageserver.settings import PageserverSettings
from excimer.pageserver.shell import serve
from excimer.service.process_main import run_service


def main() -> int:
    return run_service("pageserver", PageserverSettings, serve)


if __name__ == "__main__":
    sys.exit(main())
