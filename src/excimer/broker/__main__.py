"""`python -m excimer.broker SETTINGS.toml`."""

import sys

from excimer.broker.settings import BrokerSettings
from excimer.broker.shell import serve_broker
from excimer.service.process_main import run_service


def main() -> int:
    return run_service("broker", BrokerSettings, serve_broker)


if __name__ == "__main__":
    sys.exit(main())
