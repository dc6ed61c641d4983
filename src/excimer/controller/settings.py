"""What an operator may write for the controller."""

from pathlib import Path

from excimer.controller.model import Pageserver, Safekeeper
from excimer.service.settings import Settings


class ControllerSettings(Settings, frozen=True):
    """The nodes are those of the installation; one left out is forgotten if nothing is on it."""

    data_dir: Path
    http_listen: str
    auth_public_key_path: Path
    auth_private_key_path: Path
    pageservers: tuple[Pageserver, ...]
    safekeepers: tuple[Safekeeper, ...]
