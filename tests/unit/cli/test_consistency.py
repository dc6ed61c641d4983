"""One way to say each thing on the command line: the options of all commands, looked at as a whole."""

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from excimer.cli.app import COMMANDS, app
from excimer.cli.branch_options import new_branch_name
from excimer.cli.commands.endpoint_access import is_address
from excimer.cli.commands.endpoint_config import Action, parse_words
from excimer.cli.controller_client import ControllerClient
from excimer.cli.endpoint_choice import choose_endpoint, choose_name
from excimer.cli.errors import UsageError
from excimer.cli.session import FORMER, common_options_first

METAVARS = {
    "--tenant": "TENANT",
    "--branch": "BRANCH",
    "--ancestor": "BRANCH",
    "--preserve-under-name": "BRANCH",
    "--endpoint": "ENDPOINT",
    "--role": "ROLE",
    "--in-role": "ROLE",
    "--database": "DATABASE",
    "--pg-version": "VERSION",
    "--pg-port": "PORT",
    "--at": "LSN|TIME",
    "--set": "NAME=VALUE",
    "--safekeepers": "COUNT",
    "--lines": "COUNT",
    "--seconds": "SECONDS",
    "--rate": "MIB",
    "--listen": "ADDR[:PORT]",
    "--suspend-after": "DELAY",
    "--after": "DELAY",
    "--cache-size": "SIZE",
    "--cpu": "MIN..MAX",
    "--memory": "MIN..MAX",
    "--broker-url": "URL",
    "--object-store": "URL",
    "--object-store-option": "KEY=VALUE",
    "--tls-cert": "FILE",
    "--tls-key": "FILE",
    "--tls-ca": "FILE",
    "--svg": "FILE",
    "--out": "FILE",
}
"""What each option that takes a value calls it, in whichever command it stands."""

SHORT = {"--branch": "-b", "--endpoint": "-e", "--database": "-d", "--role": "-U", "--follow": "-f"}
SHORT |= {"--lines": "-n", "--seconds": "-s", "--out": "-o"}

UPPERCASE_ARGUMENTS = {"TENANT", "BRANCH", "ENDPOINT", "ROLE", "PART", "VERSION", "LSN", "TIME", "OUT"}
UPPERCASE_ARGUMENTS |= {"DIR|URL", "[ADDR[:PORT]]", "[FORK] BLOCK", "[VERSION] PROGRAM", "RELATION"}
UPPERCASE_ARGUMENTS |= {"[list | set NAME=VALUE... | unset NAME...]", "ARGUMENTS", "PG_CONFIG", "SIZE"}


def commands(of: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    group: Any = of or typer.main.get_command(app)
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if hasattr(command, "list_commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


ALL = dict(commands())


def visible(command: Any) -> list[Any]:
    return [each for each in command.params if not getattr(each, "hidden", False)]


def test_the_walk_sees_every_command() -> None:
    assert {path.split()[0] for path in ALL} == set(COMMANDS)
    assert len(ALL) > 50


@pytest.mark.parametrize("path", ALL)
def test_options_and_arguments_are_called_alike_everywhere(path: str) -> None:
    for each in visible(ALL[path]):
        long, *more = sorted(each.opts, key=len, reverse=True)
        if each.param_type_name == "argument":
            assert each.metavar in UPPERCASE_ARGUMENTS, (path, each.name, each.metavar)
            continue
        assert each.help, (path, long)
        assert more == ([SHORT[long]] if long in SHORT else []), (path, each.opts)
        assert not each.secondary_opts, f"{path}: {long} has a form that says no"
        if long == "--to":
            assert each.metavar in ("LSN|TIME", "LSN")
        elif not each.is_flag:
            assert each.metavar == METAVARS[long], (path, long, each.metavar)


def test_former_names_stand_in_no_help_and_are_understood() -> None:
    shown = {option for command in ALL.values() for each in visible(command) for option in each.opts}
    assert not shown & {*FORMER, "--lsn"}
    given = ["endpoint", "create", "e", "--branch-name", "b", "--branch-name=--at"]
    assert common_options_first(given) == ["endpoint", "create", "e", "--branch", "b", "--branch=--at"]
    assert common_options_first(["psql", "--", "--branch-name"]) == ["psql", "--", "--branch-name"]


def test_the_name_of_a_new_branch_is_given_once() -> None:
    assert new_branch_name("b", None) == new_branch_name(None, "b") == "b"
    for wrong in ((None, None), ("b", "b")):
        with pytest.raises(UsageError):
            new_branch_name(*wrong)


class FakeController(ControllerClient):
    def __init__(self, *names: str) -> None:
        self.names = names

    def get(self, *parts: str, query: dict[str, str] | None = None) -> Any:
        if len(parts) == 2:
            return {"name": parts[1]}
        return {"endpoints": [{"name": name} for name in self.names]}


def test_a_command_without_a_name_means_the_only_endpoint() -> None:
    assert choose_endpoint(FakeController("dev"), None) == {"name": "dev"}
    assert choose_endpoint(FakeController("dev", "main"), "main") == {"name": "main"}
    assert choose_name(FakeController("dev"), None) == "dev"
    with pytest.raises(UsageError, match="several endpoints, name one: dev, main"):
        choose_endpoint(FakeController("dev", "main"), None)
    with pytest.raises(Exception, match="no endpoint yet: excimer endpoint create"):
        choose_endpoint(FakeController(), None)


def test_every_command_on_an_endpoint_may_do_without_its_name_but_some_that_change_what_is_there() -> None:
    named = {
        path: each.required
        for path, command in ALL.items()
        for each in command.params
        if each.metavar == "ENDPOINT"
    }
    assert {path for path, required in named.items() if required} == {
        "endpoint create",
        "endpoint delete",
        "endpoint promote",
    }
    assert {"psql", "role list", "endpoint url", "endpoint start", "endpoint config"} <= set(named)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (None, Action.LIST, [])),
        (["main"], ("main", Action.LIST, [])),
        (["list"], (None, Action.LIST, [])),
        (["set", "a=1"], (None, Action.SET, ["a=1"])),
        (["main", "set", "a=1", "b=2"], ("main", Action.SET, ["a=1", "b=2"])),
        (["unset", "a"], (None, Action.UNSET, ["a"])),
        (["set", "set", "a=1"], ("set", Action.SET, ["a=1"])),
    ],
)
def test_settings_of_the_only_endpoint_or_of_one_that_is_named(words: list[str], expected: Any) -> None:
    assert parse_words(words[0] if words else None, words[1:]) == expected


def test_an_unknown_action_on_settings_is_named() -> None:
    with pytest.raises(UsageError, match="'work_mem' is neither list, nor set, nor unset"):
        parse_words("main", ["work_mem"])


def test_an_address_is_told_from_the_name_of_an_endpoint() -> None:
    assert all(map(is_address, ("0.0.0.0", "127.0.0.1:5432", "::1", "[::1]:5432")))
    assert not any(map(is_address, ("main", "a.b", "dev:5432", "")))
