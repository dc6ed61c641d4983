"""What an operator may write for a safekeeper."""

from pathlib import Path

from excimer.base.ids import NodeId
from excimer.service.settings import Settings


class SafekeeperSettings(Settings, frozen=True):
    id: NodeId
    """Unique in the installation and never reused: a safekeeper that lost its disk gets a new one."""
    data_dir: Path
    proposer_listen: str
    replication_listen: str
    http_listen: str
    broker_url: str
    auth_public_key_path: Path
    lagging_safekeeper_wal_max_mib: int = 1024
    """WAL that is kept for safekeepers that lack it although it is durable in object storage; one that lacks
    more skips what is gone.
    """
    reader_wal_max_mib: int = 1024
    """WAL that is kept for readers although it is durable in object storage; a slower one loses its place."""
