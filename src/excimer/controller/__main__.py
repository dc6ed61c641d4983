"""`python -m excimer.controller SETTINGS.toml`."""

import sys

from excimer.controller.process import serve_controller
from excimer.controller.settings import ControllerSettings
from excimer.service.process_main import run_service


def main() -> int:
    return run_service("controller", ControllerSettings, serve_controller)


if __name__ == "__main__":
    sys.exit(main())
