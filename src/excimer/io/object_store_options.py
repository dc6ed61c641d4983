"""What can be told of an object store's URL and options before a library gets them, and of its panics.

obstore is written in Rust, and some input that it does not expect ends in a *panic*: an exception that is
no `Exception`, so that nobody handles it, with a page of the library's own frames. What is known to lead
there is refused here, with the option's name; everything else passes through `panics_are`, which turns a
panic into an error of ours.

Not here: which options a store has (obstore says so itself).
"""

from collections.abc import Callable, Mapping
from types import TracebackType
from urllib.parse import urlsplit

from obstore.exceptions import BaseError

URL_OPTION_WORDS = ("endpoint", "url")
"""An option with one of these in its name is a URL."""


class OptionError(ValueError):
    """An option is not of its kind; the message is one line and names it."""


def check_options(options: Mapping[str, str]) -> None:
    """Raises `OptionError`."""
    for name, value in options.items():
        if not isinstance(name, str):
            raise OptionError(f"the option {name!r} is not a text")
        if not isinstance(value, str):
            raise OptionError(f"the option {name} is {_kind(value)}, not a text")
        if not value.isprintable():
            raise OptionError(f"the option {name} has a line break, or another character that does not print")
        if any(word in name.lower() for word in URL_OPTION_WORDS):
            check_endpoint(f"the option {name}", value)


def check_endpoint(what: str, value: str) -> None:
    """Raises `OptionError` unless `value` is a URL of a server."""
    try:
        parts = urlsplit(value)
        is_server = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        is_server = False
    if not is_server or " " in value or not value.isascii():
        raise OptionError(f"{what} is {value!r}, not a URL such as https://host:port")


def culprit(options: Mapping[str, str], opens: Callable[[dict[str, str]], object]) -> str:
    """The one option without which `opens` no longer fails, as the beginning of a message; "" if none is."""
    for name in options:
        try:
            with panics_are(OptionError):
                opens({other: value for other, value in options.items() if other != name})
        except (BaseError, OSError, ValueError, TypeError, AttributeError):
            continue
        return f"the option {name}: "
    return ""


class panics_are:
    """Around a call into a library that may panic: a panic is an error of the given kind.

    A panic derives from BaseException alone, and its class cannot be imported.
    """

    def __init__(self, kind: Callable[[str], BaseException]) -> None:
        self._kind = kind

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and kind.__name__ == "PanicException" and not issubclass(kind, Exception):
            first_line = str(error).partition("\n")[0] or "no reason given"
            raise self._kind(f"the library failed inside: {first_line}") from None


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")
