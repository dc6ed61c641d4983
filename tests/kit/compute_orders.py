"""Orders to a compute node, with what a test does not care about filled in."""

from typing import Any

from excimer.wire.compute_orders import StartOrder
from excimer.wire.endpoint_tokens import EndpointTokens

TOKENS = EndpointTokens(read_pages="r", write_wal="w", renewal="n", valid_for_s=600.0)


def start_order(endpoint: str, generation: int = 1, **fields: Any) -> StartOrder:
    defaults: dict[str, Any] = {
        "tenant_id": "aa" * 16,
        "timeline_id": "bb" * 16,
        "branch": "main",
        "mode": "primary",
        "lsn": None,
        "pg_version": 18,
        "listen_host": "127.0.0.1",
        "postgres_port": 5432,
        "http_port": 8080,
        "tls_certificate_path": None,
        "tls_key_path": None,
        "postgres_settings": {},
        "suspend_delay_s": 0,
        "pageserver_address": "127.0.0.1:1",
        "pageserver_http_address": "127.0.0.1:2",
        "lease_holder": f"endpoint:{endpoint}",
        "safekeepers": ("127.0.0.1:3",),
        "wal_sources": ("127.0.0.1:4",),
        "branch_start_lsn": "0/1500000",
        "quieting_id": "",
        "extension_workers": True,
        "tokens": TOKENS,
        "limit_s": 60.0,
    }
    return StartOrder(endpoint=endpoint, generation=generation, **(defaults | fields))
