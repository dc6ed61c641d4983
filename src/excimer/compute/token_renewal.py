"""The manager's tokens: taken over at its start, renewed while it runs, in its memory alone.

Whoever starts a manager writes its first tokens to its standard input, as one JSON object: not to a file,
the environment or the command line, which others can read. Half of their life later the manager asks the
controller for the next ones. Without an answer it asks again and again, and says when the tokens run out.

Not here: who uses a token (`attempt`); what SQL can read of it (docs/architecture/rights.md).
"""

import asyncio
import os
from collections.abc import Callable
from typing import Final, Never

import msgspec

from excimer.base.chance import Chance
from excimer.base.clock import Clock, Monotonic
from excimer.base.errors import ExcimerError, NotFoundError, RefusedError
from excimer.service.health import Health
from excimer.service.http_client import HttpClient, path_of
from excimer.service.logs import get_logger
from excimer.wire.endpoint_tokens import EndpointTokens

CALL_TIMEOUT_S: Final = 5.0
RENEW_AFTER: Final = 0.5
"""Part of their life."""
WARN_BELOW: Final = 0.25
"""Part of their life that is left when an operator should look."""
INPUT_SIZE_BYTES_MAX: Final = 64 * 1024
RETRY_S_MAX: Final = 5.0
_CHECK = "tokens"

log = get_logger(__name__)


class TokensMissingError(RefusedError):
    """Whoever started the manager gave it no tokens."""


class EndpointGoneError(RefusedError):
    """The controller no longer knows the endpoint on this branch."""


def take_tokens(descriptor: int = 0) -> EndpointTokens:
    """Reads the first tokens to the end of the standard input, and leaves nothing to read there.

    Blocks until whoever starts the manager has written them. Raises `TokensMissingError`.
    """
    if os.isatty(descriptor):
        raise TokensMissingError("a manager gets its tokens from who starts it: use `excimer endpoint start`")
    content = bytearray()
    while chunk := os.read(descriptor, INPUT_SIZE_BYTES_MAX):
        content += chunk
        if len(content) > INPUT_SIZE_BYTES_MAX:
            raise TokensMissingError("too much was written to the manager's standard input")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)
    try:
        return msgspec.json.decode(bytes(content), type=EndpointTokens)
    except msgspec.DecodeError as error:
        raise TokensMissingError(f"no tokens came on the manager's standard input: {error}") from error


class TokenRenewal:
    """`current` is always the newest; `run` renews it and tells `on_renewed`."""

    def __init__(
        self,
        first: EndpointTokens,
        *,
        controller_address: str,
        endpoint_name: str,
        clock: Clock,
        chance: Chance,
        health: Health,
        on_renewed: Callable[[EndpointTokens], None],
    ) -> None:
        self.current = first
        self._controller_address = controller_address
        self._path = path_of("v1", "endpoints", endpoint_name, "tokens")
        self._clock = clock
        self._chance = chance
        self._health = health
        self._on_renewed = on_renewed
        self._received: Monotonic = clock.monotonic()
        self._complaint = ""

    @property
    def left_s(self) -> float:
        """How long the current tokens live; negative when they have run out."""
        return self._received + self.current.valid_for_s - self._clock.monotonic()

    async def run(self) -> Never:
        """Until cancelled. Raises `EndpointGoneError`."""
        while True:
            await asyncio.sleep(max(0.0, self.left_s - (1 - RENEW_AFTER) * self.current.valid_for_s))
            failures = 0
            while not await self._try_to_renew(failures):
                failures += 1
                await asyncio.sleep(self._wait_s())

    def _wait_s(self) -> float:
        """Until the next try: often enough that several fall into what is left; with jitter."""
        wait_s = max(self.left_s, self.current.valid_for_s / 8) / 8
        return min(wait_s, RETRY_S_MAX) * (0.5 + self._chance.random() / 2)

    async def _try_to_renew(self, failures: int) -> bool:
        asked = self._clock.monotonic()
        client = HttpClient(
            "the controller", self._controller_address, self.current.renewal, timeout_s=CALL_TIMEOUT_S
        )
        try:
            tokens = msgspec.convert(await client.post(self._path), EndpointTokens)
        except NotFoundError as error:
            raise EndpointGoneError(f"{error}: the compute ends") from error
        except (ExcimerError, msgspec.ValidationError) as error:
            self._complain(error)
            return False
        self.current, self._received = tokens, asked  # which is before they were made
        self._on_renewed(tokens)
        if self._complaint:
            self._complaint = ""
            self._health.warn(_CHECK, None)
            log.info("the tokens are renewed again", failures=failures)
        return True

    def _complain(self, error: Exception) -> None:
        """Said once for each state that it comes to; health has the newest."""
        left_s = self.left_s
        if left_s <= 0:
            complaint = "the tokens have run out: commits, and reads of absent blocks, wait"
        elif left_s < WARN_BELOW * self.current.valid_for_s:
            complaint = "the tokens are about to run out: then commits, and reads of absent blocks, will wait"
        else:
            complaint = "the tokens are not renewed yet"
        if complaint != self._complaint:
            self._complaint = complaint
            write = log.error if left_s < WARN_BELOW * self.current.valid_for_s else log.warning
            write(complaint, left_s=round(left_s, 1), error=error)
        self._health.warn(_CHECK, f"not renewed: {complaint} ({error})")
