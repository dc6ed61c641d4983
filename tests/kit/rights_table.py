"""Who holds which token, and which door asks for what: the one table.

`tests/unit/test_doors.py` tries every right at every door of it, and compares docs/architecture/rights.md
with it. A route that is not here fails that test.
"""

from typing import Literal, NamedTuple

from excimer.wire.auth import Right

Extent = Literal["everything", "tenant", "timeline"]


class Held(NamedTuple):
    """A token that exists in an installation."""

    holder: str
    right: Right | None
    """None: it proves who its holder is, and opens nothing else."""
    on: str
    lives: str
    where: str


RENEWED = "10 minutes, renewed at half"
HELD = (
    Held("cli", Right.MANAGE, "everything", "for ever", "`keys/admin.token`"),
    Held("cli", Right.READ_PAGES, "one timeline", "a day, renewed at half", "memory of an export"),
    Held(
        "cli", Right.READ_WAL, "one timeline", "an hour, renewed at half", "memory of `excimer wal receive`"
    ),
    Held("controller", Right.MANAGE, "what the call names", "5 minutes", "memory, for one call"),
    Held("pageserver:N", None, "-", "for ever", "`keys/pageserver-N.token`"),
    Held("pageserver:N", Right.READ_WAL, "one timeline", "an hour, renewed at half", "memory, `wal_access/`"),
    Held(
        "endpoint:NAME",
        Right.READ_PAGES,
        "its timeline",
        RENEWED,
        "the manager's memory, and the arena: **SQL can read it**",
    ),
    Held(
        "endpoint:NAME",
        Right.WRITE_WAL,
        "its timeline",
        RENEWED,
        "the manager's memory",
    ),
    Held("compute_node:N", None, "-", "for ever", "`keys/compute_node-N.token`"),
    Held(
        "endpoint:NAME",
        Right.READ_WAL,
        "its timeline",
        RENEWED,
        "memory of a replica's manager, or of a primary's, which reads the WAL that replication slots need",
    ),
    Held("endpoint:NAME", None, "its timeline", "7 days, renewed with the others", "the manager's memory"),
    Held("safekeeper:N", Right.READ_WAL, "one timeline", "-", "reserved for copying: nobody has one yet"),
)


class Door(NamedTuple):
    service: Literal["pageserver", "safekeeper", "controller", "compute node"]
    entrance: str
    """Of HTTP doors ``METHODS PATH``, or ``other routes`` for what no other row of the service names."""
    asks: Right | None
    """None: that the bearer is `holder`."""
    on: Extent = "everything"
    holder: str = ""
    """Whose own door it is, with a token without rights; `asks` then opens it for others."""


OTHER_ROUTES = "other routes"
PAGE_SERVICE = "page service: Hello, and each request after it"
PROPOSER_PORT = "proposer port: greeting, and as long as the connection lives"
REPLICATION_PORT = "replication port: password, and as long as the connection lives"
LEASE = "POST /v1/tenant/{tenant_id}/timeline/{timeline_id}/lsn_lease"
RELEASE = "DELETE /v1/tenant/{tenant_id}/timeline/{timeline_id}/lsn_lease/{holder}"
SAVED_STATE = "/v1/tenant/{tenant_id}/timeline/{timeline_id}/saved_state/{lsn}"
KEPT_SLOTS = "/v1/tenant/{tenant_id}/timeline/{timeline_id}/replication_slots/{term}"
IN_OWN_NAME = ", in the name of the token's holder"
IN_ANY_NAME = ", in any name"
SETTINGS = "GET, PATCH /v1/endpoints/{name}/settings"
CACHE_SIZE = "GET, PATCH /v1/endpoints/{name}/cache_size"
SUSPENSION = "GET, PATCH /v1/endpoints/{name}/suspension"
RENEWAL = "POST /v1/endpoints/{name}/tokens"
REGISTRATION = "PUT /v1/compute_nodes/{node_id}"
WAL_ACCESS = "POST /v1/tenants/{tenant_id}/timelines/{timeline_id}/wal_access"

DOORS = (
    Door("pageserver", PAGE_SERVICE, Right.READ_PAGES, "timeline"),
    Door("pageserver", LEASE + IN_OWN_NAME, Right.READ_PAGES, "timeline"),
    Door("pageserver", LEASE + IN_ANY_NAME, Right.MANAGE, "timeline"),
    Door("pageserver", RELEASE + IN_OWN_NAME, Right.READ_PAGES, "timeline"),
    Door("pageserver", RELEASE + IN_ANY_NAME, Right.MANAGE, "timeline"),
    Door("pageserver", f"PUT {SAVED_STATE}", Right.WRITE_WAL, "timeline"),
    Door("pageserver", f"GET {SAVED_STATE}", Right.READ_PAGES, "timeline"),
    Door("pageserver", f"PUT {KEPT_SLOTS}/{{sequence}}", Right.WRITE_WAL, "timeline"),
    Door("pageserver", f"POST {KEPT_SLOTS}", Right.WRITE_WAL, "timeline"),
    Door("pageserver", f"{OTHER_ROUTES} of a timeline", Right.MANAGE, "timeline"),
    Door("pageserver", f"{OTHER_ROUTES} of a tenant", Right.MANAGE, "tenant"),
    Door("pageserver", OTHER_ROUTES, Right.MANAGE, "everything"),
    Door("safekeeper", PROPOSER_PORT, Right.WRITE_WAL, "timeline"),
    Door("safekeeper", REPLICATION_PORT, Right.READ_WAL, "timeline"),
    Door("safekeeper", f"{OTHER_ROUTES} of a timeline", Right.MANAGE, "timeline"),
    Door("safekeeper", f"{OTHER_ROUTES} of a tenant", Right.MANAGE, "tenant"),
    Door("controller", SETTINGS, Right.MANAGE, "everything", "endpoint:NAME"),
    Door("controller", CACHE_SIZE, Right.MANAGE, "everything", "endpoint:NAME"),
    Door("controller", SUSPENSION, Right.MANAGE, "everything", "endpoint:NAME"),
    Door("controller", RENEWAL, None, "timeline", "endpoint:NAME"),
    Door("controller", WAL_ACCESS, None, "timeline", "pageserver:N that has the tenant"),
    Door("controller", REGISTRATION, None, "everything", "compute_node:N"),
    Door("controller", OTHER_ROUTES, Right.MANAGE, "everything"),
    Door("compute node", OTHER_ROUTES, Right.MANAGE, "everything"),
)


def held_rows() -> list[str]:
    """The table of tokens, as Markdown."""
    rows = ["| holder | right | on | lives | where it is |", "|---|---|---|---|---|"]
    for held in HELD:
        right = "none: it only proves who it is" if held.right is None else f"`{held.right.value}`"
        rows.append(f"| `{held.holder}` | {right} | {held.on} | {held.lives} | {held.where} |")
    return rows


def door_rows() -> list[str]:
    """The table of doors, as Markdown."""
    rows = ["| service | door | asks for |", "|---|---|---|"]
    for door in DOORS:
        extent = {"everything": "everything", "tenant": "the tenant", "timeline": "the timeline"}[door.on]
        asks = "" if door.asks is None else f"`{door.asks.value}` on {extent}"
        own = f"to be `{door.holder}`" if door.holder else ""
        rows.append(f"| {door.service} | {door.entrance} | {' or '.join(filter(None, (own, asks)))} |")
    return rows
