"""Lists of libraries in PostgreSQL's settings, such as shared_preload_libraries.

A server whose list cannot be read says so in its log, loads nothing of it, and starts.
"""

from excimer.postgres.setting_rules import PostgresSettingError


def split_libraries(setting: str, text: str) -> list[str]:
    """The names in a list of libraries, read as PostgreSQL reads it (SplitDirectoriesString).

    Raises `PostgresSettingError`: PostgreSQL would load none of them, and start.
    """
    names: list[str] = []
    rest = text.strip()
    while rest:
        if rest.startswith('"'):
            name, rest = _take_quoted(setting, rest, text)
        else:
            name, comma, rest = rest.partition(",")
            name, rest = name.rstrip(), comma + rest
        if not name or (rest and not rest.startswith(",")):
            raise PostgresSettingError(f"{setting} is not a list of libraries: {text}")
        names.append(name)
        following = rest[1:].strip()
        if rest and not following:
            raise PostgresSettingError(f"{setting} ends with a comma: {text}")
        rest = following
    return names


def _take_quoted(setting: str, rest: str, text: str) -> tuple[str, str]:
    name = ""
    while True:
        part, quote, rest = rest[1:].partition('"')
        if not quote:
            raise PostgresSettingError(f"{setting} has a quotation that does not end: {text}")
        name += part
        if not rest.startswith('"'):
            return name, rest.lstrip()
        name += '"'
