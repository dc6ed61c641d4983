"""What an operator may write for the controller."""

from pathlib import Path
from typing import Annotated

import msgspec

from excimer.controller.model import Pageserver, Safekeeper
from excimer.controller.tokens import ENDPOINT_TOKEN_LIFE_S, WAL_TOKEN_LIFE_S
from excimer.service.settings import Settings


class ControllerSettings(Settings, frozen=True):
    """The nodes are those of the installation; one left out is forgotten if nothing is on it."""

    data_dir: Path
    http_listen: str
    auth_public_key_path: Path
    auth_private_key_path: Path
    pageservers: tuple[Pageserver, ...]
    safekeepers: tuple[Safekeeper, ...]
    endpoint_token_life_s: Annotated[int, msgspec.Meta(ge=2)] = ENDPOINT_TOKEN_LIFE_S
    """How long computes go on when the controller is away, and a stolen token of theirs is of use."""
    wal_token_life_s: Annotated[int, msgspec.Meta(ge=2)] = WAL_TOKEN_LIFE_S
    """The same for pageservers that read WAL."""
