"""Chance as an object, so that a simulation can seed it and production can use the system's."""

from typing import Protocol


class Chance(Protocol):
    """The part of `random.Random` that Excimer uses; `random.SystemRandom` is the real one."""

    def random(self) -> float: ...
    def randbytes(self, n: int, /) -> bytes: ...
    def randrange(self, start: int, stop: int, /) -> int: ...
