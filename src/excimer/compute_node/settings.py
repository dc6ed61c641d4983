"""What an operator (in practice the command line) writes for a compute node."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from excimer.base.ids import NodeId
from excimer.service.settings import Settings


class EndpointDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The same for all endpoints of this machine; `excimer.compute.settings` says what each is."""

    trusts_local: bool = False
    default_tls_certificate_path: Path | None = None
    default_tls_key_path: Path | None = None
    pageserver_lag_max_mib: int = 64
    saved_state_max_mib: int = 64
    saved_unlogged_max_mib: int = 16
    prefetch_max_mib: int = 2048
    stopped_directories_max_mib: int = 10240
    slot_wal_max_mib: int = 10240


class ComputeNodeSettings(Settings, frozen=True, kw_only=True):
    id: NodeId
    data_dir: Path
    """Of its instance lock."""
    run_dir: Path
    """Where the settings and the record of each manager lie, NAME.toml and NAME.pid."""
    logs_dir: Path
    endpoints_dir: Path
    """Each endpoint has a directory of its name there."""
    http_listen: str
    auth_public_key_path: Path
    auth_token_path: Path
    """By which the controller knows this node."""
    controller_address: str
    capacity: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """How many endpoints may be awake here; None: as many as the machine's memory holds."""
    cgroup_parent: Path | None = None
    """The group of cgroup v2 below which endpoints have theirs; None: it is found."""
    unenforced_limits: Literal["tell", "refuse"] = "tell"
    """What happens to an endpoint with limits of CPU or memory that this machine cannot keep to."""
    endpoint_defaults: EndpointDefaults = EndpointDefaults()
    """Read again, with this file, at each start of an endpoint."""
