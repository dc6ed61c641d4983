"""Records of TLS after the handshake: a twin agrees, OpenSSL understands, and what may not come ends it."""

import contextlib
import itertools
import random
import ssl
import struct
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given, settings
from hypothesis import strategies as st

from excimer._native.openssl import TlsConnection, TlsContext, load_openssl
from excimer._native.tls_records import TlsRecords
from excimer.service.settings import TlsSettings
from excimer.service.tls import Tls
from tests.kit.openssl_peer import (
    FRAGMENTS_OF_512,
    KEY_UPDATE_NOT_REQUESTED,
    KEY_UPDATE_REQUESTED,
    OpenSslClient,
)
from tests.kit.tls import new_tls

SUITES: dict[int, tuple[type[AESGCM | ChaCha20Poly1305], int, hashes.HashAlgorithm]] = {
    0x1301: (AESGCM, 16, hashes.SHA256()),
    0x1302: (AESGCM, 32, hashes.SHA384()),
    0x1303: (ChaCha20Poly1305, 32, hashes.SHA256()),
}
ALERT, HANDSHAKE, DATA = 21, 22, 23
CLOSE_NOTIFY, USER_CANCELED, CERTIFICATE_REQUIRED = 0, 90, 116
UNEXPECTED_MESSAGE, BAD_RECORD_MAC, RECORD_OVERFLOW, ILLEGAL_PARAMETER, DECODE_ERROR = 10, 20, 22, 47, 50
TICKET = bytes([4, 0, 0, 8]) + b"a ticket"
NEW_KEY = bytes([24, 0, 0, 1, 0])
NEW_KEY_OF_BOTH = bytes([24, 0, 0, 1, 1])


class Twin:
    """One direction as RFC 8446 defines it, by another library's ciphers and derivation."""

    def __init__(self, suite: int, secret: bytes) -> None:
        self._cipher, self._key_size, self._digest = SUITES[suite]
        self._use(secret)

    def seal(self, kind: int, content: bytes, padding: int = 0) -> bytes:
        inner = content + bytes([kind]) + bytes(padding)
        header = struct.pack(">BHH", DATA, 0x0303, len(inner) + 16)
        return header + self._keys.encrypt(self._nonce(), inner, header)

    def open(self, stream: bytes) -> list[tuple[int, bytes]]:
        """Kinds and contents; the key changes where the stream says so."""
        opened = []
        while stream:
            end = 5 + int.from_bytes(stream[3:5], "big")
            inner = self._keys.decrypt(self._nonce(), stream[5:end], stream[:5]).rstrip(b"\0")
            opened.append((inner[-1], inner[:-1]))
            if opened[-1] == (HANDSHAKE, NEW_KEY):
                self.renew()
            stream = stream[end:]
        return opened

    def renew(self) -> None:
        self._use(self._expand(b"traffic upd", len(self._secret)))

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._keys = self._cipher(self._expand(b"key", self._key_size))
        self._iv = self._expand(b"iv", 12)
        self._count = 0

    def _expand(self, label: bytes, size: int) -> bytes:
        info = struct.pack(">HB", size, 6 + len(label)) + b"tls13 " + label + b"\0"
        return HKDFExpand(self._digest, size, info).derive(self._secret)

    def _nonce(self) -> bytes:
        nonce = int.from_bytes(self._iv, "big") ^ self._count
        self._count += 1
        return nonce.to_bytes(12, "big")


def pair(
    suite: int = 0x1301, *, is_client: bool = True, records_per_key: int = 1 << 24
) -> tuple[TlsRecords, Twin, Twin]:
    """Ours; what writes to it, and what reads from it."""
    load_openssl()
    size = SUITES[suite][2].digest_size
    incoming, outgoing = (bytes([number]) * size for number in (1, 2))
    records = TlsRecords(
        suite,
        read_secret=incoming,
        write_secret=outgoing,
        is_client=is_client,
        records_per_key=records_per_key,
    )
    return records, Twin(suite, incoming), Twin(suite, outgoing)


def connected(client: TlsConnection | OpenSslClient, server: TlsConnection) -> None:
    """Shakes hands without a socket."""
    is_done = client.handshake()
    while not is_done:
        server.handshake(client.take_output())
        is_done = client.handshake(server.take_output())
    assert server.handshake(client.take_output())


def test_a_suite_that_it_does_not_know_is_refused() -> None:
    load_openssl()
    with pytest.raises(ValueError, match="no suite 0x1304"):
        TlsRecords(0x1304, read_secret=bytes(32), write_secret=bytes(32), is_client=True)


@settings(deadline=None, max_examples=100)
@given(
    suite=st.sampled_from(sorted(SUITES)),
    sizes=st.lists(st.sampled_from([0, 1, 29, 16_383, 16_384]) | st.integers(0, 16_384), max_size=6),
    padding=st.integers(0, 255),
    cuts=st.lists(st.integers(0, 1 << 17), max_size=6),
)
def test_it_reads_and_writes_what_a_twin_does(
    suite: int, sizes: list[int], padding: int, cuts: list[int]
) -> None:
    ours, writer, reader = pair(suite)
    contents = [random.Random(size).randbytes(size) for size in sizes]
    stream = b"".join(
        writer.seal(DATA, content, min(padding, 16_640 - 17 - len(content))) for content in contents
    )
    ends = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    pieces = [stream[begin:end] for begin, end in itertools.pairwise(ends)]
    whole = b"".join(contents)
    assert b"".join(ours.decrypt(piece) for piece in pieces) == whole
    opened = reader.open(ours.encrypt(whole))
    assert b"".join(content for _, content in opened) == whole
    assert all(kind == DATA and len(content) <= 16_384 for kind, content in opened)
    assert ours.take_output() == b""


def long_record(writer: Twin) -> bytes:
    return writer.seal(DATA, b"x" * 16_385)


def damaged(writer: Twin) -> bytes:
    record = bytearray(writer.seal(DATA, b"pay 1"))
    record[-20] ^= 1
    return bytes(record)


def with_another_header(writer: Twin) -> bytes:
    """Its version says nothing, but is protected like all of the header."""
    return DATA.to_bytes(1) + b"\3\4" + writer.seal(DATA, b"pay 1")[3:]


def repeated(writer: Twin) -> bytes:
    return 2 * writer.seal(DATA, b"")


BAD: dict[str, tuple[Callable[[Twin], bytes], int, str]] = {
    "not encrypted": (lambda _: b"\x17\3\3\0\1x", BAD_RECORD_MAC, "bad record mac"),
    "an alert in clear": (lambda _: b"\x15\3\3\0\2\1\0", UNEXPECTED_MESSAGE, "not encrypted"),
    "a change of cipher": (lambda _: b"\x14\3\3\0\1\1", UNEXPECTED_MESSAGE, "not encrypted"),
    "too long": (lambda _: b"\x17\3\3\x41\1", RECORD_OVERFLOW, "too long"),
    "too much in it": (long_record, RECORD_OVERFLOW, "content is too long"),
    "damaged": (damaged, BAD_RECORD_MAC, "bad record mac"),
    "another header": (with_another_header, BAD_RECORD_MAC, "bad record mac"),
    "repeated": (repeated, BAD_RECORD_MAC, "bad record mac"),
    "zeros only": (lambda writer: writer.seal(0, b"", 9), UNEXPECTED_MESSAGE, "of no kind"),
    "another kind": (lambda writer: writer.seal(24, b"heartbeat"), UNEXPECTED_MESSAGE, "may not come"),
    "an empty message": (lambda writer: writer.seal(HANDSHAKE, b""), UNEXPECTED_MESSAGE, "may not come"),
    "half an alert": (lambda writer: writer.seal(ALERT, b"\1"), UNEXPECTED_MESSAGE, "may not come"),
    "hello again": (lambda writer: writer.seal(HANDSHAKE, b"\1\0\0\0"), UNEXPECTED_MESSAGE, "may not come"),
    "data in a message": (
        lambda writer: writer.seal(HANDSHAKE, TICKET[:5]) + writer.seal(DATA, b"pay 1"),
        UNEXPECTED_MESSAGE,
        "within a message",
    ),
    "a message without an end": (
        lambda writer: writer.seal(HANDSHAKE, b"\4\xff\xff\xff"),
        UNEXPECTED_MESSAGE,
        "message of the handshake is too long",
    ),
    "a long new key": (
        lambda writer: writer.seal(HANDSHAKE, b"\x18\0\0\2\0\0"),
        DECODE_ERROR,
        "is not whole",
    ),
    "a new key that asks for more": (
        lambda writer: writer.seal(HANDSHAKE, b"\x18\0\0\1\2"),
        ILLEGAL_PARAMETER,
        "what there is not",
    ),
    "a message after a new key": (
        lambda writer: writer.seal(HANDSHAKE, NEW_KEY + TICKET),
        UNEXPECTED_MESSAGE,
        "after a new key",
    ),
}


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("case", BAD)
def test_what_may_not_come_ends_it_and_the_peer_is_told(suite: int, case: str) -> None:
    make, alert, problem = BAD[case]
    ours, writer, reader = pair(suite)
    assert ours.decrypt(writer.seal(DATA, b"before")) == b"before"
    with pytest.raises(ssl.SSLError, match=problem):
        ours.decrypt(make(writer))
    assert reader.open(ours.take_output()) == [(ALERT, bytes([2, alert]))], "once"
    with pytest.raises(ssl.SSLError, match=problem):
        ours.decrypt(writer.seal(DATA, b"pay 2"))
    with pytest.raises(ssl.SSLError, match=problem):
        ours.encrypt(b"pay 2")
    assert ours.take_output() == ours.shutdown() == b""


def test_what_came_before_a_damaged_record_is_given_out_first() -> None:
    ours, writer, _ = pair()
    assert ours.decrypt(writer.seal(DATA, b"pay 1") + damaged(writer)) == b"pay 1"
    with pytest.raises(ssl.SSLError, match="bad record mac"):
        ours.decrypt(b"")


def test_the_ends_that_a_peer_may_make() -> None:
    ours, writer, reader = pair()
    parts = (DATA, b"last"), (ALERT, bytes([1, USER_CANCELED])), (ALERT, bytes([1, CLOSE_NOTIFY]))
    assert ours.decrypt(b"".join(writer.seal(*part) for part in parts)) == b"last"
    for data in (b"", writer.seal(DATA, b"more")):
        with pytest.raises(ssl.SSLZeroReturnError):
            ours.decrypt(data)
    assert reader.open(ours.encrypt(b"still")) == [(DATA, b"still")], "its end is not ours"
    assert reader.open(ours.shutdown()) == [(ALERT, bytes([1, CLOSE_NOTIFY]))]
    ours, writer, _ = pair()
    with pytest.raises(ssl.SSLError, match="the peer gave up TLS: certificate required"):
        ours.decrypt(writer.seal(ALERT, bytes([2, CERTIFICATE_REQUIRED])))
    assert ours.take_output() == b""


def test_a_client_passes_over_tickets_and_a_server_gets_none() -> None:
    ours, writer, _ = pair()
    stream = writer.seal(HANDSHAKE, TICKET + TICKET[:6]) + writer.seal(HANDSHAKE, TICKET[6:])
    assert ours.decrypt(stream + writer.seal(DATA, b"pay 1")) == b"pay 1"
    ours, writer, _ = pair(is_client=False)
    with pytest.raises(ssl.SSLError, match="may not come"):
        ours.decrypt(writer.seal(HANDSHAKE, TICKET))


@pytest.mark.parametrize("suite", SUITES)
def test_keys_change_when_the_peer_says_so_and_when_they_are_used_up(suite: int) -> None:
    ours, writer, reader = pair(suite, records_per_key=3)
    announcement = writer.seal(HANDSHAKE, NEW_KEY)
    writer.renew()
    assert ours.decrypt(announcement + writer.seal(DATA, b"pay 1")) == b"pay 1"
    assert ours.take_output() == b"", "not asked for"
    announcement = writer.seal(HANDSHAKE, NEW_KEY_OF_BOTH)
    writer.renew()
    assert ours.decrypt(announcement + writer.seal(DATA, b"pay 2")) == b"pay 2"
    told = reader.open(ours.take_output())
    assert told == [(HANDSHAKE, NEW_KEY)]
    for _ in range(7):
        told += reader.open(ours.encrypt(b"paid"))
    paid, new_key = (DATA, b"paid"), (HANDSHAKE, NEW_KEY)
    assert told == [new_key, paid, paid, paid, new_key, paid, paid, paid, new_key, paid]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsSettings:
    return new_tls(tmp_path_factory.mktemp("tls-records"))


@pytest.mark.parametrize(
    "suite", ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"]
)
def test_openssl_understands_it(files: TlsSettings, suite: str) -> None:
    """Each suite, records of all lengths, and new keys of both sides."""
    context = TlsContext(is_server=True, certificate=files.certificate, key=files.key, records_per_key=5)
    server = TlsConnection(context)
    with contextlib.closing(OpenSslClient(files.ca, suite=suite)) as client:
        connected(client, server)
        for number, size in enumerate([1, 15, 16, 29, 500, 16_384, 16_385, 50_000] * 3):
            sent = random.Random(number).randbytes(size)
            assert server.decrypt(client.encrypt(sent)) == sent
            if number % 5 == 2:
                client.update_key(KEY_UPDATE_REQUESTED if number % 2 else KEY_UPDATE_NOT_REQUESTED)
            assert client.decrypt(server.encrypt(sent)) == sent
        assert client.decrypt(server.shutdown()) == b""


def test_a_client_that_wants_short_records_gets_them(files: TlsSettings) -> None:
    server = TlsConnection(Tls(files).native_server())
    with contextlib.closing(OpenSslClient(files.ca, fragments=FRAGMENTS_OF_512)) as client:
        connected(client, server)
        stream = server.encrypt(b"x" * 2000)
        lengths = []
        rest = stream
        while rest:
            lengths.append(int.from_bytes(rest[3:5], "big") - 17)
            rest = rest[5 + int.from_bytes(rest[3:5], "big") :]
        assert lengths == [512, 512, 512, 464]
        assert client.decrypt(stream) == b"x" * 2000


def test_tickets_of_a_server_that_is_not_ours_do_no_harm(files: TlsSettings) -> None:
    contexts = Tls(files)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = contexts.server()
    context.num_tickets = 2
    server = context.wrap_bio(incoming, outgoing, server_side=True)
    client = TlsConnection(contexts.native_client(), "localhost")
    for act in (client.encrypt, client.decrypt):
        with pytest.raises(ssl.SSLError, match="is not done"):
            act(b"pay 1")
    is_done = client.handshake()
    while not is_done:
        incoming.write(client.take_output())
        with contextlib.suppress(ssl.SSLWantReadError):
            server.do_handshake()
        is_done = client.handshake(outgoing.read())
    incoming.write(client.take_output())
    server.do_handshake()
    server.write(b"pay 1")
    assert client.decrypt(outgoing.read()) == b"pay 1"
    incoming.write(client.encrypt(b"paid"))
    assert server.read() == b"paid"


def test_our_own_services_agree_on_the_shortest_key(files: TlsSettings) -> None:
    contexts = Tls(files)
    server = TlsConnection(contexts.native_server())
    client = TlsConnection(contexts.native_client(), "localhost")
    client.handshake()
    server.handshake(client.take_output())
    answer = server.take_output()
    suite_at = 44 + answer[43]  # record 5, message 4, version 2, random 32, session's length 1, session
    assert answer[suite_at : suite_at + 2] == b"\x13\x01"


def test_what_comes_with_the_handshakes_end_is_not_lost(files: TlsSettings) -> None:
    """A client's first words may come with its last words of the handshake."""
    contexts = Tls(files)
    server = TlsConnection(contexts.native_server())
    client = TlsConnection(contexts.native_client(), "localhost")
    assert not client.handshake()
    assert not server.handshake(client.take_output())
    assert client.handshake(server.take_output())
    stream = client.take_output() + client.encrypt(b"pay 1") + client.encrypt(b"pay 2")
    assert server.handshake(stream[:-3])
    assert server.decrypt(b"") == b"pay 1"
    assert server.decrypt(stream[-3:]) == b"pay 2"
