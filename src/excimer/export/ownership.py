"""Whose an export is: PostgreSQL refuses to run as root, and to run on somebody else's directory.

Not root: ours. Root by way of sudo: the user's who called sudo. Any other root (a container): the user
as whom Excimer runs PostgreSQL itself (`io.processes.unprivileged_user`).
"""

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from excimer.io.processes import unprivileged_user

SUDO_UID_VARIABLE = "SUDO_UID"


@dataclass(frozen=True, slots=True)
class Owner:
    name: str
    uid: int
    gid: int

    @classmethod
    def of_uid(cls, uid: int) -> "Owner":
        """With the user's own group. A user that nobody knows keeps its number as its name."""
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            return cls(str(uid), uid, uid)
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid)

    def take(self, path: Path | int) -> None:
        """Makes it this user's, if we may and it is not."""
        if os.geteuid() == 0:
            os.chown(path, self.uid, self.gid)


def export_owner() -> Owner:
    """The user to whom the exported cluster belongs. Raises `NoUnprivilegedUserError`."""
    if os.geteuid() != 0:
        return Owner.of_uid(os.geteuid())
    caller = os.environ.get(SUDO_UID_VARIABLE, "")
    if caller.isdecimal() and int(caller) != 0:
        return Owner.of_uid(int(caller))
    user = unprivileged_user()
    assert user is not None, "we are root"
    return Owner(user.name, user.uid, user.gid)
