"""The controller's API from the command line: one call at a time, errors as sentences.

`http.client` of the standard library: no event loop, and nothing to import that help would wait for.
"""

import http.client
import json
from typing import Any, Final
from urllib.parse import quote, urlencode

from excimer.base.errors import ConflictError, NotFoundError, RefusedError, RetryableError
from excimer.cli.errors import NotRunningError
from excimer.cli.installation import Installation
from excimer.cli.service_silence import early_word
from excimer.service.blocking_http import http_connection

CALL_TIMEOUT_S: Final = 180.0
"""The first timeline of a PostgreSQL version takes an initdb, on a slow machine."""


class ControllerBusyError(RetryableError):
    """The controller, or a service behind it, cannot do it now."""


class ControllerClient:
    def __init__(self, installation: Installation, limit_s: float = CALL_TIMEOUT_S) -> None:
        self._installation = installation
        self._address = installation.controller_address
        self._token = installation.admin_token()
        self._limit_s = limit_s

    def get(self, *parts: str, query: dict[str, str] | None = None) -> Any:
        return self._call("GET", parts, None, query)

    def post(self, *parts: str, body: object) -> Any:
        return self._call("POST", parts, body)

    def put(self, *parts: str, body: object) -> Any:
        return self._call("PUT", parts, body)

    def patch(self, *parts: str, body: object) -> Any:
        return self._call("PATCH", parts, body)

    def delete(self, *parts: str) -> Any:
        return self._call("DELETE", parts, None)

    def _call(
        self, method: str, parts: tuple[str, ...], body: object, query: dict[str, str] | None = None
    ) -> Any:
        connection = http_connection(self._address, self._limit_s)
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        path = "/v1" + "".join("/" + quote(part, safe="/") for part in parts)
        if query:
            path += "?" + urlencode(query)
        try:
            with early_word(self._installation, "the controller"):
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                answer = connection.getresponse()
                status, content = answer.status, answer.read()
        except TimeoutError as error:
            raise ControllerBusyError(f"the controller did not answer within {self._limit_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise NotRunningError("the controller does not run: start it with `excimer start`") from error
        finally:
            connection.close()
        try:
            value = json.loads(content) if content else None
        except ValueError as error:
            raise ControllerBusyError(f"port {self._address} is not answered by a controller") from error
        if 200 <= status < 300:
            return value
        raise _error_of(status, str((value or {}).get("message", f"HTTP status {status}")))


def _error_of(status: int, message: str) -> Exception:
    kinds: dict[int, type[Exception]] = {404: NotFoundError, 409: ConflictError}
    if status >= 500:
        return ControllerBusyError(message)
    return kinds.get(status, RefusedError)(message)
