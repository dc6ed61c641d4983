"""Ports for servers that a test starts.

Below the range from which Linux takes the ports of outgoing connections, and each worker of a parallel
run draws from its own: a port that was free when it was drawn is so when the server listens on it.
"""

import os
import random
import socket

_WORKERS = 8
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
_PORTS = range(10_000 + _WORKER, 15_000, _WORKERS)
_chance = random.SystemRandom()
_drawn: set[int] = set()


def free_port() -> int:
    """A port of the loopback address that nobody listens on, never the same twice."""
    while True:
        port = _chance.choice(_PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if port not in _drawn and not _is_taken(probe, port):
                _drawn.add(port)
                return port


def _is_taken(probe: socket.socket, port: int) -> bool:
    try:
        probe.bind(("127.0.0.1", port))
    except OSError:
        return True
    return False
