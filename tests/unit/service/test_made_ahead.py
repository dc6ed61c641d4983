"""Apps that are made before what their routes call."""

import asyncio
from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI

from excimer.controller.process import make_app as make_controller_app
from excimer.pageserver.shell import make_app as make_pageserver_app
from excimer.safekeeper.shell import make_app as make_safekeeper_app
from excimer.service.made_ahead import MadeAhead, NotThereYetError


class Rooms:
    def __init__(self, name: str) -> None:
        self.name = name


def _make(rooms: Rooms, _floor: int) -> FastAPI:
    app = FastAPI()

    @app.get("/name")
    async def name() -> str:
        return rooms.name

    return app


def _name(app: FastAPI) -> str:
    async def ask() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            answer: str = (await client.get("/name")).json()
        return answer

    return asyncio.run(ask())


def test_a_prepared_app_answers_from_what_it_is_given() -> None:
    make = MadeAhead(_make)
    make.prepare()
    make.prepare()
    assert _name(make(Rooms("first"), 1)) == "first"


def test_a_prepared_app_is_given_out_once() -> None:
    make = MadeAhead(_make)
    make.prepare()
    first, second = make(Rooms("first"), 1), make(Rooms("second"), 2)
    assert (_name(first), _name(second)) == ("first", "second")


def test_without_preparation_the_app_is_made_when_it_is_wanted() -> None:
    assert _name(MadeAhead(_make)(Rooms("only"), 1)) == "only"


def test_nothing_is_asked_of_a_component_before_it_is_there() -> None:
    def greedy(rooms: Rooms) -> FastAPI:
        return FastAPI(title=rooms.name)

    with pytest.raises(NotThereYetError, match=r"rooms\.name"):
        MadeAhead(greedy).prepare()


@pytest.mark.parametrize("make", [make_controller_app, make_pageserver_app, make_safekeeper_app])
def test_the_apps_of_all_services_can_be_prepared(make: "MadeAhead[..., FastAPI]") -> None:
    """As the supervisor does; a service that cannot would not start."""
    again: Callable[..., FastAPI] = make._make
    prepared = MadeAhead(again)
    prepared.prepare()
    components = [object() for _ in range(again.__code__.co_argcount)]
    app = prepared(*components)
    assert app.openapi()["paths"]
