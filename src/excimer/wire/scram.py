"""Passwords as PostgreSQL keeps them: SCRAM-SHA-256 verifiers, so that no SQL holds a password.

::

    SCRAM-SHA-256$<iterations>:<salt, base64>$<StoredKey, base64>:<ServerKey, base64>

`ALTER ROLE … PASSWORD '<verifier>'` stores such a text as it is. The password itself then stands in no
statement, and so in no log and no WAL. Who has a verifier can check guesses, and cannot log in with it.

Sources: RFC 5802 (SCRAM), RFC 7677 (SHA-256), RFC 4013 (SASLprep); scram-common.c and saslprep.c of
PostgreSQL, which takes a password that SASLprep refuses as the bytes it is.

Not here: the exchange of a login, which is between drivers and PostgreSQL.
"""

import base64
import hashlib
import hmac
import re
import stringprep
import unicodedata
from typing import Final

ITERATIONS: Final = 4096
"""PostgreSQL's own default. A generated password of 144 random bits needs no more."""

SALT_SIZE_BYTES: Final = 16
PASSWORD_SIZE_BYTES: Final = 18
"""Of randomness in a generated password."""

VERIFIER: Final = re.compile(
    r"SCRAM-SHA-256\$(?P<iterations>[1-9][0-9]{0,9}):(?P<salt>[A-Za-z0-9+/]+=*)"
    r"\$(?P<stored_key>[A-Za-z0-9+/]{43}=):(?P<server_key>[A-Za-z0-9+/]{43}=)"
)

_PROHIBITED: Final = (
    stringprep.in_table_c12,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
    stringprep.in_table_a1,
)


def password_from(randomness: bytes) -> str:
    """A password that needs no quoting in a URL, a shell or a file: 24 characters of 18 random bytes."""
    if len(randomness) != PASSWORD_SIZE_BYTES:
        raise ValueError(f"a password is made of {PASSWORD_SIZE_BYTES} random bytes, not {len(randomness)}")
    return base64.urlsafe_b64encode(randomness).decode()


def make_verifier(password: str, salt: bytes, iterations: int = ITERATIONS) -> str:
    """What PostgreSQL stores for `password`. The salt is random, 16 bytes by custom."""
    salted = hashlib.pbkdf2_hmac("sha256", normalize_password(password), salt, iterations)
    stored_key = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    return f"SCRAM-SHA-256${iterations}:{_base64(salt)}${_base64(stored_key)}:{_base64(server_key)}"


def is_verifier(text: str) -> bool:
    return VERIFIER.fullmatch(text) is not None


def matches(password: str, verifier: str) -> bool:
    """Whether `verifier` was made from `password`; False for what is no SCRAM verifier."""
    parts = VERIFIER.fullmatch(verifier)
    if parts is None:
        return False
    salt = base64.b64decode(parts["salt"])
    return hmac.compare_digest(make_verifier(password, salt, int(parts["iterations"])), verifier)


def normalize_password(password: str) -> bytes:
    """SASLprep, as libpq and PostgreSQL do it: what cannot be prepared is taken as it is."""
    mapped = "".join(
        " " if stringprep.in_table_c12(character) else character
        for character in password
        if not stringprep.in_table_b1(character)
    )
    prepared = unicodedata.ucd_3_2_0.normalize("NFKC", mapped)
    if not prepared or not _is_allowed(prepared):
        return password.encode()
    return prepared.encode()


def _is_allowed(text: str) -> bool:
    if any(prohibits(character) for prohibits in _PROHIBITED for character in text):
        return False
    if not any(map(stringprep.in_table_d1, text)):
        return True
    is_framed = stringprep.in_table_d1(text[0]) and stringprep.in_table_d1(text[-1])
    return is_framed and not any(map(stringprep.in_table_d2, text))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
