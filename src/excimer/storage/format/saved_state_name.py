"""Names of saved states in object storage, beside a timeline's manifests and layers.

    tenants/TENANT/timelines/TIMELINE/states/state-LSN-GENERATION      both in hex

The name says all that is needed to find the one of an LSN and to tell which are superseded, so no manifest
names them. Not here: their bytes (`excimer.pgformat.saved_state`).
"""

import re
from typing import Final, NamedTuple

FOLDER: Final = "states"

_NAME = re.compile(r"state-([0-9a-f]{16})-([0-9a-f]{8})\Z")


class SavedStateName(NamedTuple):
    lsn: int
    generation: int

    def __str__(self) -> str:
        return f"state-{self.lsn:016x}-{self.generation:08x}"


def parse_saved_state_name(text: str) -> SavedStateName | None:
    """None for an object that is none."""
    match = _NAME.match(text)
    return SavedStateName(int(match[1], 16), int(match[2], 16)) if match else None
