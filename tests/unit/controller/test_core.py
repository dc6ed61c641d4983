"""The controller's decisions: names, suggestions, what may be deleted, in which order."""

import msgspec
import pytest

from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.controller import core
from excimer.controller.model import (
    BadRequestError,
    Endpoint,
    InUseError,
    NameTakenError,
    Pageserver,
    Tenant,
    Timeline,
    UnknownNameError,
)

TENANT = Tenant(
    tenant_id=TenantId("ab" * 16),
    name="shop",
    state="active",
    pageserver_id=NodeId(1),
    generation=1,
    created_at=1.0,
)


def timeline(digit: str, name: str, ancestor: str | None = None) -> Timeline:
    return Timeline(
        tenant_id=TENANT.tenant_id,
        timeline_id=TimelineId(digit * 32),
        name=name,
        state="active",
        pg_version=18,
        ancestor_timeline_id=TimelineId(ancestor * 32) if ancestor else None,
        ancestor_lsn=None,
        start_lsn=Lsn(0x1500000),
        system_id=1,
        wal_segment_size=1 << 24,
        created_at=1.0,
    )


MAIN, CHILD, GRANDCHILD = timeline("1", "main"), timeline("2", "child", "1"), timeline("3", "deep/er", "2")
TREE = [MAIN, CHILD, GRANDCHILD]


def endpoint(name: str, lsn: int | None = None, **changes: object) -> Endpoint:
    options: dict[str, object] = {
        "name": name,
        "mode": "static" if lsn is not None else "primary",
        "lsn": lsn,
        "pg_version": None,
        "ports": (5000, 5001),
        "postgres_settings": {},
        "now": 1.0,
    } | changes
    return core.plan_endpoint([], MAIN, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "a" * 64, "ä", "ab" * 16, "a\n"])
def test_bad_names(name: str) -> None:
    with pytest.raises(BadRequestError):
        core.check_name(name, "endpoint")


def test_wrong_names_get_suggestions() -> None:
    with pytest.raises(UnknownNameError, match="no branch 'chidl'; did you mean 'child'"):
        core.find_branch(TREE, "chidl")
    with pytest.raises(UnknownNameError, match="no branch 'zzz'; there are: child, deep/er, main"):
        core.find_branch(TREE, "zzz")
    with pytest.raises(UnknownNameError, match="there are none yet"):
        core.find_endpoint([], "main")


def test_names_ids_prefixes_and_the_default() -> None:
    for reference in ("shop", TENANT.tenant_id, "abab"):
        assert core.find_tenant([TENANT], reference, None) == TENANT
    assert core.find_tenant([TENANT], "", TENANT.tenant_id) == TENANT
    for reference in ("", "ab", "shopp", "cdcd"):
        with pytest.raises(UnknownNameError):
            core.find_tenant([TENANT], reference, None)
    assert core.find_branch(TREE, "2222") == CHILD
    gone = msgspec.structs.replace(TENANT, state="deleting")
    with pytest.raises(UnknownNameError):
        core.find_tenant([gone], "shop", gone.tenant_id)


def test_a_tenant_goes_to_the_emptiest_pageserver() -> None:
    nodes = [
        Pageserver(id=NodeId(n), http_address="127.0.0.1:1", page_service_address="127.0.0.1:2")
        for n in (1, 2)
    ]
    made = core.plan_tenant([TENANT], nodes, TenantId("c" * 32), "other", 2.0)
    assert made.pageserver_id == 2
    with pytest.raises(NameTakenError, match="already a tenant 'shop'"):
        core.plan_tenant([TENANT], nodes, TenantId("c" * 32), "shop", 2.0)
    with pytest.raises(core.NoNodesError):
        core.plan_tenant([], [], TenantId("c" * 32), "x", 2.0)


def test_what_is_in_use_is_not_deleted() -> None:
    with pytest.raises(InUseError, match="delete child first"):
        core.check_timeline_deletable(MAIN, TREE, [])
    with pytest.raises(InUseError, match="has endpoints: delete a, b first"):
        core.check_timeline_deletable(MAIN, [MAIN], [endpoint("b"), endpoint("a")])
    core.check_timeline_deletable(GRANDCHILD, TREE, [endpoint("a")])
    with pytest.raises(InUseError, match="tenant 'shop' has endpoints"):
        core.check_tenant_deletable(TENANT, [endpoint("a")])


def test_branches_are_deleted_before_their_ancestors() -> None:
    assert [row.name for row in core.deletion_order(TREE)] == ["deep/er", "child", "main"]


def test_endpoints() -> None:
    assert endpoint("main").mode == "primary"
    assert endpoint("past", 0x1600000).mode == "static"
    for problem, name, lsn, changes in (
        ("is of PostgreSQL 18", "x", None, {"pg_version": 17}),
        ("before branch 'main' begins at 0/1500000", "x", 5, {}),
        ("belongs to a static endpoint", "x", 5, {"mode": "primary"}),
        ("belongs to a static endpoint", "x", None, {"mode": "static"}),
        ("two different ports", "x", None, {"ports": (5, 5)}),
        ("two different ports", "x", None, {"ports": (0, 5)}),
        ("cannot be an endpoint name", "a/b", None, {}),
        (r"'x{80}' cannot be an endpoint name", "x" * 5000, None, {}),
    ):
        with pytest.raises(BadRequestError, match=problem):
            endpoint(name, lsn, **changes)


def test_beyond_loopback_an_endpoint_has_a_certificate_or_the_installation_has() -> None:
    wide, own = core.Listen("0.0.0.0"), core.Listen("0.0.0.0", "/own.crt", "/own.key")
    with pytest.raises(BadRequestError, match="only with TLS"):
        endpoint("wide", listen=wide)
    assert endpoint("wide", listen=wide, has_default_certificate=True).listen_host == "0.0.0.0"
    made = endpoint("wide", listen=own)
    forget: dict[str, object] = {"host": None, "port": None, "certificate": (None, None), "without_tls": True}
    with pytest.raises(BadRequestError, match="only with TLS"):
        core.plan_listen(made, **forget)  # type: ignore[arg-type]
    left = core.plan_listen(made, **forget, has_default_certificate=True)  # type: ignore[arg-type]
    assert (left.listen_host, left.tls_certificate_path) == ("0.0.0.0", None)


def test_a_branch_needs_a_complete_ancestor() -> None:
    creating = msgspec.structs.replace(MAIN, state="creating")
    with pytest.raises(core.IncompleteError):
        core.plan_timeline([creating], TENANT, TimelineId("9" * 32), "new", 18, creating, 1.0)
    with pytest.raises(NameTakenError, match="already a branch 'child' in tenant 'shop'"):
        core.plan_timeline(TREE, TENANT, TimelineId("9" * 32), "child", 18, MAIN, 1.0)
    with pytest.raises(BadRequestError, match="PostgreSQL 13 is not supported: use 14 to 18"):
        core.plan_timeline([], TENANT, TimelineId("9" * 32), "new", 13, None, 1.0)
