"""What an operator may write for the broker."""

from pathlib import Path

from excimer.service.settings import Settings


class BrokerSettings(Settings, frozen=True):
    """`user` and `password` are those in the `broker_url` of the other services."""

    data_dir: Path
    listen: str
    http_listen: str
    user: str
    password: str
