"""Identifiers. Tenants and timelines are 16 random bytes, written as 32 lower-case hex digits."""

import re
from typing import NewType

from excimer.base.chance import Chance
from excimer.base.errors import RefusedError

TenantId = NewType("TenantId", str)
TimelineId = NewType("TimelineId", str)
NodeId = NewType("NodeId", int)
"""A safekeeper's or pageserver's number, unique in the installation."""

ID_SIZE_BYTES = 16

_HEX = re.compile(r"[0-9a-f]{32}\Z")


class InvalidIdError(RefusedError):
    """A text is not a tenant or timeline id."""


def parse_tenant_id(text: str) -> TenantId:
    """Checks and normalises to lower case. Raises `InvalidIdError`."""
    return TenantId(_parse(text, "tenant"))


def parse_timeline_id(text: str) -> TimelineId:
    """Checks and normalises to lower case. Raises `InvalidIdError`."""
    return TimelineId(_parse(text, "timeline"))


def new_tenant_id(chance: Chance) -> TenantId:
    return TenantId(chance.randbytes(ID_SIZE_BYTES).hex())


def new_timeline_id(chance: Chance) -> TimelineId:
    return TimelineId(chance.randbytes(ID_SIZE_BYTES).hex())


def _parse(text: str, what: str) -> str:
    lowered = text.lower()
    if _HEX.match(lowered) is None:
        raise InvalidIdError(f"{text!r} is not a {what} id: it must be 32 hex digits")
    return lowered
