"""SCRAM verifiers are those that PostgreSQL's own library makes."""

import base64

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.wire.scram import (
    PASSWORD_SIZE_BYTES,
    VERIFIER,
    is_verifier,
    make_verifier,
    matches,
    normalize_password,
    password_from,
)


def made_by_libpq(password: str) -> str:
    # libpq works on bytes; psycopg's own encoding of the arguments is UTF-8 in this call.
    connection = psycopg.pq.PGconn.connect_start(b"host=/nowhere")
    return connection.encrypt_password(password.encode(), b"app", b"scram-sha-256").decode()


@pytest.mark.parametrize(
    "password",
    [
        "simple",
        "with space and 'quotes' \"and\" $dollars$ \\ % @ : / ?",
        "pass\u00a0word",  # a space that is not one
        "\u00adsoft",  # mapped to nothing
        "\ufb01ne",  # NFKC: fi
        "Grüße",
        "\u2168",  # NFKC: IX
        "\u0007bell",  # prohibited: taken as it is
        "\u06271",  # bidirectional, wrongly framed: taken as it is
        "\u0627\u0628",  # bidirectional
        "\U0001f600 face",  # not assigned in Unicode 3.2: taken as it is
        "\u00ad",  # nothing is left: taken as it is
    ],
)
def test_verifiers_are_those_of_libpq(password: str) -> None:
    theirs = made_by_libpq(password)
    parts = VERIFIER.fullmatch(theirs)
    assert parts is not None
    assert make_verifier(password, base64.b64decode(parts["salt"]), int(parts["iterations"])) == theirs
    assert matches(password, theirs)
    assert not matches(password + "x", theirs)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_any_password_is_prepared_as_libpq_does(password: str) -> None:
    assert matches(password, made_by_libpq(password)), normalize_password(password)


def test_the_example_of_the_standard() -> None:
    """The password and salt of RFC 7677; its proof and server signature follow from these keys."""
    verifier = make_verifier("pencil", base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="))
    assert verifier == (
        "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:"
        "wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
    )


def test_what_is_no_verifier() -> None:
    for text in ("", "md5" + "0" * 32, "secret", "SCRAM-SHA-256$4096:x"):
        assert not is_verifier(text)
        assert not matches("secret", text)


def test_generated_passwords_need_no_quoting() -> None:
    password = password_from(bytes(range(200, 200 + PASSWORD_SIZE_BYTES)))
    assert len(password) == 24
    assert password.replace("-", "").replace("_", "").isalnum()
    with pytest.raises(ValueError, match="18 random bytes"):
        password_from(b"short")
