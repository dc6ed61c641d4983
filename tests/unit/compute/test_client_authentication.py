"""pg_hba.conf and pg_ident.conf: who gets in, and who does not."""

from excimer.base.address import Address, parse_address
from excimer.compute.client_authentication import installation_users, render_hba, render_ident


def rules(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_only_the_socket_spares_the_superuser_a_password() -> None:
    assert rules(render_hba(["postgres"], trusts_local=False, is_remote=False)) == [
        'local all "postgres" peer map=excimer',
        'local replication "postgres" peer map=excimer',
        "local all all scram-sha-256",
        "local replication all scram-sha-256",
        "host all all 127.0.0.1/32 scram-sha-256",
        "host all all ::1/128 scram-sha-256",
        "host replication all 127.0.0.1/32 scram-sha-256",
        "host replication all ::1/128 scram-sha-256",
    ]


def test_from_elsewhere_only_with_tls_and_a_password_even_where_local_users_are_trusted() -> None:
    for trusts_local in (False, True):
        remote = rules(render_hba(["postgres"], trusts_local=trusts_local, is_remote=True))[-2:]
        assert remote == [
            "hostssl all all all scram-sha-256",
            "hostssl replication all all scram-sha-256",
        ]
    trusting = rules(render_hba(["postgres"], trusts_local=True, is_remote=True))
    assert {line.split()[-1] for line in trusting[:-2]} == {"trust"}
    assert {line.split()[-2] for line in trusting if line.startswith("host ")} == {"127.0.0.1/32", "::1/128"}


def test_names_are_only_names() -> None:
    """Unquoted, `all` would let the installation's user in as anybody, and `+staff` as a group's members."""
    assert (
        rules(render_hba(["all"], trusts_local=False, is_remote=False))[0]
        == 'local all "all" peer map=excimer'
    )
    assert rules(render_ident(["+staff", 'a "b" c'], ["o'neil"])) == [
        'excimer "o\'neil" "+staff"',
        'excimer "o\'neil" "a ""b"" c"',
    ]


def test_our_user_and_root_are_the_installations_users() -> None:
    users = installation_users()
    assert users[-1] == "root"
    assert len(users) == len(set(users)) <= 2


def test_what_is_loopback() -> None:
    for text in ("127.0.0.1:1", "127.8.9.1:1", "[::1]:1", "localhost:1", "/tmp/x:1"):
        assert parse_address(text).is_loopback, text
    for text in ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "db.example:1", "localhost.example:1"):
        assert not parse_address(text).is_loopback, text
    assert Address("", 1).is_loopback
