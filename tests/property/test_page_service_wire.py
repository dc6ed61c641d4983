"""The page service's frames: round trips under any cutting, and strict refusal of anything else."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.errors import CorruptionError, ExcimerError, FencedError, RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import KeyKind, parse_key
from excimer.wire.page_service import (
    FRAME_SIZE_BYTES_MAX,
    BasebackupAnswer,
    ClientMessage,
    ClientMessageParser,
    ErrorAnswer,
    ErrorCode,
    GetBasebackup,
    GetPages,
    GetPosition,
    Hello,
    HelloOk,
    PageProtocolError,
    Pages,
    PositionAnswer,
    ServerMessage,
    ServerMessageParser,
    basebackup_head,
    encode_client_message,
    encode_server_message,
    error_code,
    error_from_answer,
)

FRAME_HEAD_SIZE = 5
"""Length and type."""
GET_PAGES_RESERVED = range(FRAME_HEAD_SIZE + 26, FRAME_HEAD_SIZE + 28)
"""Two bytes that a later version may give a meaning; this one does not look at them."""

U8, U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
IDS = st.binary(min_size=16, max_size=16).map(bytes.hex)
ASCII = st.text(st.characters(codec="ascii"), max_size=300)

HELLOS = st.builds(Hello, IDS.map(TenantId), IDS.map(TimelineId), ASCII, U16)
KINDS = st.sampled_from([KeyKind.RELATION_BLOCK, KeyKind.SLRU_BLOCK])
GET_PAGES = st.builds(GetPages, U64, U64, U64, KINDS, U8, U32, U32, U32, U32, U32)
CLIENT = st.one_of(HELLOS, GET_PAGES, st.builds(GetBasebackup, U64, U64), st.builds(GetPosition, U64))
PAGES = st.builds(Pages, U64, st.integers(0, 3).map(lambda count: bytes([count]) * 8192 * count))
SERVER = st.one_of(
    st.builds(HelloOk, U32, U16),
    PAGES,
    st.builds(PositionAnswer, U64, U64),
    st.builds(BasebackupAnswer, U64, st.binary(max_size=100)),
    st.builds(
        ErrorAnswer, U64, st.sampled_from(ErrorCode), st.text(st.characters(codec="utf-8"), max_size=200)
    ),
)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(st.lists(CLIENT, max_size=5), st.lists(U16, max_size=8))
def test_client_messages_round_trip(messages: list[ClientMessage], cuts: list[int]) -> None:
    parser = ClientMessageParser()
    data = b"".join(map(encode_client_message, messages))
    assert [message for part in cut(data, cuts) for message in parser.feed(part)] == messages
    assert parser.buffered_bytes == 0


@given(st.lists(CLIENT, min_size=1, max_size=5), st.integers(1, 200))
def test_what_was_fed_may_be_overwritten_at_once(messages: list[ClientMessage], step: int) -> None:
    parser, buffer = ClientMessageParser(), bytearray(step)
    found: list[ClientMessage] = []
    data = b"".join(map(encode_client_message, messages))
    for start in range(0, len(data), step):
        part = data[start : start + step]
        buffer[: len(part)] = part
        found += parser.feed(memoryview(buffer)[: len(part)])
    assert found == messages


@given(st.lists(SERVER, max_size=5), st.lists(U16, max_size=8))
def test_server_messages_round_trip(messages: list[ServerMessage], cuts: list[int]) -> None:
    parser = ServerMessageParser()
    data = b"".join(map(encode_server_message, messages))
    assert [message for part in cut(data, cuts) for message in parser.feed(part)] == messages


RANDOM = st.binary(max_size=400)
CUTS = st.lists(U16, max_size=4)


@given(RANDOM, CUTS)
def test_random_bytes_from_a_client_are_understood_awaited_or_refused(data: bytes, cuts: list[int]) -> None:
    parser = ClientMessageParser()
    try:
        found = [message for part in cut(data, cuts) for message in parser.feed(part)]
    except PageProtocolError:
        return
    assert_begins_a_frame(data[sum(len(encode_client_message(message)) for message in found) :])


@given(RANDOM, CUTS)
def test_random_bytes_from_a_server_are_understood_awaited_or_refused(data: bytes, cuts: list[int]) -> None:
    parser = ServerMessageParser()
    try:
        found = [message for part in cut(data, cuts) for message in parser.feed(part)]
    except PageProtocolError:
        return
    assert_begins_a_frame(data[sum(len(encode_server_message(message)) for message in found) :])


def assert_begins_a_frame(rest: bytes) -> None:
    """What was neither refused nor understood may still become a frame."""
    assert len(rest) < FRAME_HEAD_SIZE or struct.unpack_from("<I", rest)[0] > len(rest) - FRAME_HEAD_SIZE


@given(CLIENT, U16, st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_means_another_message(
    message: ClientMessage, position: int, value: int
) -> None:
    """What is understood says all that was sent; what is not complete waits, and only for a longer length."""
    data = bytearray(encode_client_message(message))
    data[position % len(data)] ^= value
    parser = ClientMessageParser()
    try:
        found = parser.feed(bytes(data))
    except PageProtocolError:
        return
    if isinstance(message, GetPages) and position % len(data) in GET_PAGES_RESERVED:
        assert found == [message]
        return
    assert b"".join(map(encode_client_message, found)) + data[len(data) - parser.buffered_bytes :] == data
    assert found != [message]
    if not found:
        assert struct.unpack_from("<I", data)[0] > len(encode_client_message(message)) - FRAME_HEAD_SIZE


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack("<IB", FRAME_SIZE_BYTES_MAX + 1, ord("H")),
        struct.pack("<IB", 49 + 1, ord("G")),
        struct.pack("<IB", 0, ord("B")),
        struct.pack("<IB", 17, ord("Q")),
        struct.pack("<IB", 17, ord("g")),
    ],
)
def test_a_bad_length_or_type_is_refused_before_its_body_arrives(frame: bytes) -> None:
    with pytest.raises(PageProtocolError):
        ClientMessageParser().feed(frame)


def test_a_partial_frame_waits() -> None:
    parser = ClientMessageParser()
    whole = encode_client_message(GetBasebackup(1, 2))
    assert parser.feed(whole[:-1]) == []
    assert parser.buffered_bytes == len(whole) - 1
    assert parser.feed(whole[-1:]) == [GetBasebackup(1, 2)]


def test_get_pages_bytes_are_as_documented() -> None:
    message = GetPages(1, 2, 3, KeyKind.SLRU_BLOCK, 0, 4, 5, 6, 7, 8)
    body = struct.pack("<QQQBBHIIIII", 1, 2, 3, 0x20, 0, 0, 4, 5, 6, 7, 8)
    assert encode_client_message(message) == struct.pack("<IB", 49, ord("G")) + body
    assert parse_key(message.key()) == (0x20, 4, 5, 6, 0, 7)


def test_an_oversized_basebackup_is_not_sent() -> None:
    with pytest.raises(PageProtocolError, match="does not fit"):
        basebackup_head(1, FRAME_SIZE_BYTES_MAX)


def test_a_long_error_text_is_cut_at_a_character() -> None:
    (answer,) = ServerMessageParser().feed(
        encode_server_message(ErrorAnswer(1, ErrorCode.REFUSED, "€" * 10_000))
    )
    assert isinstance(answer, ErrorAnswer)
    assert set(answer.text) == {"€"}


@pytest.mark.parametrize("family", [RetryableError, RefusedError, FencedError, CorruptionError])
def test_families_cross_the_wire(family: type[ExcimerError]) -> None:
    error = error_from_answer(ErrorAnswer(1, error_code(family("text")), "text"))
    assert type(error) is family
    assert str(error) == "text"
