"""Which names branches may have: those that Git allows, so that a branch of code and its data have one name.

The rules are those of `git check-ref-format --branch`, and some of our own: a name is at most 200 bytes long,
does not look like an id, and has nothing that a terminal would not show.
"""

import re
from typing import Final

SIZE_MAX: Final = 200

_FORBIDDEN: Final = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]")
_ID_LIKE: Final = re.compile(r"[0-9a-f]{32}\Z")


def branch_name_fault(name: str) -> str | None:
    """Why `name` cannot be a branch's, as the end of "it …"; None: it can."""
    if not name:
        return "is empty"
    if len(name.encode(errors="surrogatepass")) > SIZE_MAX:
        return f"is longer than {SIZE_MAX} bytes"
    found = _FORBIDDEN.search(name)
    if found is not None:
        return f"contains {found[0]!r}"
    if not name.isprintable():
        return "contains what cannot be seen"
    if name.startswith("-"):
        return "begins with '-'"
    if name == "HEAD" or name == "@":
        return "has a meaning of its own in Git"
    if name.startswith("/") or name.endswith("/") or "//" in name:
        return "has an empty part beside a '/'"
    if any(part.startswith(".") or part.endswith(".lock") for part in name.split("/")):
        return "has a part that begins with '.' or ends with '.lock'"
    if name.endswith(".") or ".." in name or "@{" in name:
        return "ends with '.', or contains '..' or '@{'"
    if _ID_LIKE.match(name):
        return "looks like an id"
    return None
