"""Names of the objects with a timeline's replication slots, beside its manifests and layers.

    tenants/TENANT/timelines/TIMELINE/slots/slots-TERM-SEQUENCE-GENERATION      all in hex

The term is of the compute that saved them, the sequence its count: the highest of both is the newest,
whatever pageserver wrote it. Not here: their bytes (`excimer.pgformat.kept_slots`).
"""

import re
from typing import Final, NamedTuple

FOLDER: Final = "slots"

_NAME = re.compile(r"slots-([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{8})\Z")


class KeptSlotsName(NamedTuple):
    term: int
    sequence: int
    generation: int

    def __str__(self) -> str:
        return f"slots-{self.term:016x}-{self.sequence:016x}-{self.generation:08x}"


def parse_kept_slots_name(text: str) -> KeptSlotsName | None:
    """None for an object that is none."""
    match = _NAME.match(text)
    return KeptSlotsName(*(int(part, 16) for part in match.groups())) if match else None
