"""Where a pageserver may read a timeline's WAL, and with which token: the controller's answer, in JSON.

Not here: who asks (`excimer.pageserver.wal_access`), who is given it (`excimer.controller.access`).
"""

from typing import Annotated

import msgspec

from excimer.base.ids import NodeId


class WalMember(msgspec.Struct, frozen=True, kw_only=True):
    """One of the safekeepers that are to have the timeline."""

    safekeeper_id: NodeId
    address: str
    """Of its replication port: ``host:port``, or ``/directory:port``."""


class WalAccess(msgspec.Struct, frozen=True, kw_only=True):
    members: Annotated[tuple[WalMember, ...], msgspec.Meta(min_length=1)]
    """All of them: a majority of these is the quorum."""
    token: str
    """Opens the timeline's committed WAL, and nothing else."""
    valid_for_s: Annotated[float, msgspec.Meta(gt=0)]
