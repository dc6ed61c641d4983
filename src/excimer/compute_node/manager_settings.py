"""The settings of one endpoint's manager: what the controller ordered, and what belongs to this machine."""

from pathlib import Path
from typing import Final

import msgspec

from excimer.base.address import Address
from excimer.compute.settings import ComputeSettings
from excimer.compute_node.settings import ComputeNodeSettings
from excimer.wire.compute_orders import StartOrder

HOST: Final = "127.0.0.1"
"""Where managers serve health and metrics."""


def part_name(endpoint: str) -> str:
    """As in `excimer logs PART`, and of the files in ``run/``."""
    return f"endpoint-{endpoint}"


def manager_settings(
    order: StartOrder, node: ComputeNodeSettings, cgroup_dir: Path | None = None
) -> ComputeSettings:
    return ComputeSettings(
        log_level=node.log_level,
        tls=node.tls,
        log_path=node.logs_dir / f"{part_name(order.endpoint)}.log",
        endpoint_name=order.endpoint,
        endpoint_dir=node.endpoints_dir / order.endpoint,
        tenant_id=order.tenant_id,
        timeline_id=order.timeline_id,
        mode=order.mode,
        lsn=order.lsn,
        pg_version=order.pg_version,
        postgres_listen=str(Address(order.listen_host, order.postgres_port)),
        tls_certificate_path=_path(order.tls_certificate_path),
        tls_key_path=_path(order.tls_key_path),
        http_listen=f"{HOST}:{order.http_port}",
        pageserver_address=order.pageserver_address,
        pageserver_http_address=order.pageserver_http_address,
        lease_holder=order.lease_holder,
        safekeepers=list(order.safekeepers),
        wal_sources=list(order.wal_sources),
        branch_start_lsn=order.branch_start_lsn,
        controller_address=node.controller_address,
        postgres_settings=order.postgres_settings,
        quieting_id=order.quieting_id,
        extension_workers=order.extension_workers,
        suspend_delay_s=order.suspend_delay_s,
        cache_size_mib=order.cache_size_mib,
        limits=order.limits,
        cgroup_dir=cgroup_dir,
        generation=order.generation,
        **msgspec.structs.asdict(node.endpoint_defaults),
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
