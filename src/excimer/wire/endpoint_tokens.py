"""The tokens of one endpoint, as the controller gives them and the compute manager holds them.

::

    controller --answer of /spec--> command line --standard input--> manager --renewal--> controller ...
                                                                       | read_pages: arena, page service
                                                                       | write_wal:  proposer, in memory
                                                                       | read_wal:   a replica, slots

They live minutes. The manager shows the renewal token for new ones, of all three kinds, while it runs. That
token has no right: it only says which endpoint it is, and the controller looks whether that still exists.

Not here: making them (`excimer.controller.tokens`), renewing them (`excimer.compute.token_renewal`).
"""

from typing import Annotated

import msgspec

TokenText = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class EndpointTokens(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    read_pages: TokenText
    """Opens the pages of the endpoint's timeline, and nothing else: it may be where SQL can read it."""
    write_wal: TokenText | None
    """Opens the timeline's WAL for writing; None for an endpoint that does not write."""
    read_wal: TokenText | None = None
    """Opens the timeline's WAL for reading; None for an endpoint that does not follow it."""
    renewal: TokenText
    valid_for_s: Annotated[float, msgspec.Meta(gt=0)]
    """How long the first two live from now on; seconds, because clocks of two machines differ."""
