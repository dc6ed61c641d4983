"""Who may connect to an endpoint's PostgreSQL, and how: its pg_hba.conf and pg_ident.conf.

=====================  ==================================================  =======================
connection             as                                                  proof
=====================  ==================================================  =======================
Unix socket            the bootstrap superuser                             being the installation's user
Unix socket            any other role                                      password (SCRAM-SHA-256)
TCP, loopback          any role                                            password (SCRAM-SHA-256)
TCP, from elsewhere    any role; only with TLS, only where it listens      password (SCRAM-SHA-256)
either, for backups    any role that has REPLICATION                       the same
=====================  ==================================================  =======================

The bootstrap superuser's row is what our own connections and `excimer psql` rest upon: it holds whatever
passwords the branch's data has. The socket's directory can be entered by nobody else in the first place.
With `trusts_local` every local connection is believed, as who it says it is.

The first matching line decides. Physical replication, which is how base backups are taken, has lines of its
own: `all` does not mean it.

Not here: roles and their passwords, which are data of the branch.
"""

import os
import pwd
from collections.abc import Sequence
from typing import Final

MAP: Final = "excimer"
ROOT: Final = "root"
LOOPBACK_NETWORKS: Final = ("127.0.0.1/32", "::1/128")
HEADER: Final = "# Written by Excimer at each start; changes are lost. See docs/operating/passwords.md.\n"


def installation_users() -> list[str]:
    """Names of the operating system's users who own this installation: ours, and root, who may become us."""
    ours = pwd.getpwuid(os.geteuid()).pw_name
    return [ours] if ours == ROOT else [ours, ROOT]


def render_hba(superusers: Sequence[str], *, trusts_local: bool, is_remote: bool) -> str:
    """pg_hba.conf. `superusers`: what the bootstrap superuser may be called; `is_remote`: listens beyond
    loopback.
    """
    lines: list[tuple[str, ...]] = []
    if trusts_local:
        lines += [("local", "all", "all", "trust"), ("local", "replication", "all", "trust")]
    else:
        for name in map(_quote, superusers):
            lines += [
                ("local", "all", name, "peer", f"map={MAP}"),
                ("local", "replication", name, "peer", f"map={MAP}"),
            ]
        lines.append(("local", "all", "all", "scram-sha-256"))
        lines.append(("local", "replication", "all", "scram-sha-256"))
    method = "trust" if trusts_local else "scram-sha-256"
    for database in ("all", "replication"):
        lines += [("host", database, "all", network, method) for network in LOOPBACK_NETWORKS]
    if is_remote:
        lines += [("hostssl", database, "all", "all", "scram-sha-256") for database in ("all", "replication")]
    return HEADER + "".join(" ".join(line) + "\n" for line in lines)


def render_ident(superusers: Sequence[str], users: Sequence[str]) -> str:
    """pg_ident.conf: which users of the operating system may be the bootstrap superuser."""
    pairs = [(user, superuser) for user in users for superuser in superusers]
    return HEADER + "".join(f"{MAP} {_quote(user)} {_quote(superuser)}\n" for user, superuser in pairs)


def _quote(name: str) -> str:
    """Quoted, a name is only a name: `all` and `+group` lose their meanings."""
    return '"' + name.replace('"', '""') + '"'
