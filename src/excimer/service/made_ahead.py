"""Apps that are put together before the services that answer through them exist.

FastAPI makes a model of every parameter and answer of every route: 3 to 6 MiB for each of our services, and
most of a second. What is made in the process that services are forked from is shared by all of them, so that
an app is made there with stand-ins for what its routes call, and the service puts the real ones in::

    @MadeAhead
    def make_app(timelines: Timelines, clock: Clock) -> FastAPI: ...

    make_app.prepare()              # in the supervisor: nothing of a service exists yet
    app = make_app(timelines, clock)    # in the fork: the app that was prepared, now complete

Without `prepare` the call makes the app. A prepared app is given out once: the next call makes another.

Not here: which apps are prepared (`excimer.supervisor.preload`).
"""

import inspect
from collections.abc import Callable
from typing import Any, Final, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
A = TypeVar("A")

_NOTHING: Final = object()


class NotThereYetError(RuntimeError):
    """Something was asked of a component while an app was put together; only requests may do so."""


class StandIn:
    """Stands for a component that comes later: its attributes are those of that component."""

    __slots__ = ("_component", "_name")

    def __init__(self, name: str) -> None:
        self._name = name
        self._component: object = _NOTHING

    def __getattr__(self, attribute: str) -> Any:
        if self._component is _NOTHING:
            raise NotThereYetError(f"{self._name}.{attribute} is asked for before there is a {self._name}")
        return getattr(self._component, attribute)


class MadeAhead(Generic[P, A]):
    """Decorates a function whose parameters are all positional and given as such. It may keep them and pass
    them on, but ask nothing of them (`NotThereYetError`). No threads: one app is given to one caller.
    """

    def __init__(self, make: Callable[P, A]) -> None:
        self._make = make
        self._prepared: tuple[A, list[StandIn]] | None = None
        self.__doc__ = make.__doc__

    def prepare(self) -> A:
        """Makes an app for the next call, unless there is one already. Nothing may be asked of it yet."""
        if self._prepared is None:
            stand_ins = [StandIn(name) for name in inspect.signature(self._make).parameters]
            make: Callable[..., A] = self._make
            self._prepared = make(*stand_ins), stand_ins
        return self._prepared[0]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> A:
        if self._prepared is None or kwargs:
            return self._make(*args, **kwargs)
        (app, stand_ins), self._prepared = self._prepared, None
        for stand_in, component in zip(stand_ins, args, strict=True):
            stand_in._component = component
        return app
