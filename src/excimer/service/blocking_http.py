"""A connection of the standard library's `http.client` to one of our services, with TLS where there is TLS.

For the command line, which has no event loop; `http_client` is for services.
"""

import http.client

from excimer.service.tls import client_tls


def http_connection(address: str, timeout_s: float) -> http.client.HTTPConnection:
    """Not connected yet."""
    context = client_tls()
    if context is None:
        return http.client.HTTPConnection(address, timeout=timeout_s)
    return http.client.HTTPSConnection(address, timeout=timeout_s, context=context)
