"""Settings files: TOML into a frozen Struct, with one-line errors that name the file and the field.

A service declares what an operator may write as a subclass of `Settings`, and nothing else::

    class BrokerSettings(Settings, frozen=True):
        data_dir: Path
        listen: str = "127.0.0.1:4222"

Not here: defaults that depend on the machine, and components, which are passed in, never configured.
"""

import re
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from excimer.base.errors import RefusedError
from excimer.io.private_files import write_private

LogLevel = Literal["debug", "info", "warning", "error"]


class SettingsError(RefusedError):
    """A settings file is missing, unreadable, or has a wrong field."""


class TlsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The block ``tls``: with it all ports speak TLS, and so do all calls to other services. PEM files."""

    certificate: Path
    """Shown by all ports, with those between it and the CA. Replaced files are loaded while running."""
    key: Path
    ca: Path
    """Of this CA must be the certificates of the services that are called."""
    client_ca: Path | None = None
    """Of this CA must be a certificate of whoever connects; our services show theirs when they call. None: no
    certificate is asked for."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all settings. Unknown fields are errors, so that a misspelt one is not silently ignored."""

    log_level: LogLevel = "info"
    tls: TlsSettings | None = None
    log_path: Path | None = None
    """The file that standard output and error go to, which the process then keeps short; None: that is the
    business of whoever starts it."""


T = TypeVar("T", bound=msgspec.Struct)

_AT = re.compile(r"^(?P<problem>.*?)(?: - at `\$\.?(?P<field>.*)`)?$", re.DOTALL)


def load_settings(path: Path, kind: type[T]) -> T:
    """Reads `path` as a `kind`. Raises `SettingsError`, one line: file, field, problem."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"cannot read settings {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error
    try:
        return msgspec.convert(values, kind, dec_hook=_decode_path)
    except msgspec.ValidationError as error:
        match = _AT.match(str(error))
        field = match["field"] if match else None
        problem = (match["problem"] if match else str(error)).replace("`", "")
        raise SettingsError(f"{path}: {field + ': ' if field else ''}{_lower_first(problem)}") from error


def save_settings(path: Path, settings: msgspec.Struct, comment: str = "") -> None:
    """Writes `settings` as TOML that only we may read; the old file stays until the new one is whole."""
    text = "".join(f"# {line}\n" for line in comment.splitlines()) + format_settings(settings)
    write_private(path, text.encode())


def format_settings(settings: msgspec.Struct) -> str:
    """TOML of a Struct of scalars, lists, tables and nested Structs. None fields are left out."""
    values = msgspec.to_builtins(settings, enc_hook=str)
    return "".join(f"{_key(key)} = {_toml(value)}\n" for key, value in values.items() if value is not None)


def _decode_path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"expected {'str' if kind is Path else kind.__name__}, got {type(value).__name__}")


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _text(key)


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return _text(value)
        case dict():
            return (
                "{ " + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items() if v is not None) + " }"
            )
        case list() | tuple():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
        case _:
            raise TypeError(f"{type(value).__name__} has no TOML form")


def _text(text: str) -> str:
    """A basic TOML string; JSON's escapes are a subset of TOML's, but for DEL."""
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")
