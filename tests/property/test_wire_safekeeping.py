"""The safekeeping protocol: messages round-trip in any split; any bytes give messages or one error."""

import struct
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.errors import RefusedError
from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.wire import safekeeping as wire
from excimer.wire import safekeeping_frames as framing

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
LSN = U64.map(Lsn)
TERM = U64.map(wire.Term)
PROPOSER_ID = st.binary(min_size=16, max_size=16).map(wire.ProposerId)
HEX = st.binary(min_size=16, max_size=16).map(bytes.hex)
WAL = st.binary(max_size=300)
HISTORY = st.tuples(
    st.lists(TERM, min_size=1, max_size=8, unique=True), st.lists(LSN, min_size=8, max_size=8)
).map(
    lambda lists: tuple(
        wire.TermStart(*pair) for pair in zip(sorted(lists[0]), sorted(lists[1]), strict=False)
    )
)
TOKEN = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=framing.TOKEN_SIZE_BYTES_MAX)


def identities(ids: st.SearchStrategy[str]) -> st.SearchStrategy[wire.TimelineIdentity]:
    return st.builds(
        wire.TimelineIdentity,
        tenant_id=ids.map(TenantId),
        timeline_id=ids.map(TimelineId),
        pg_version=U32,
        system_id=U64,
        wal_segment_size_bytes=U32,
    )


PROPOSER_GREETING = st.builds(
    wire.ProposerGreeting, version=U16, identity=identities(HEX), proposer_id=PROPOSER_ID, token=TOKEN
)
ACCEPTOR_GREETING = st.builds(
    wire.AcceptorGreeting,
    version=U16,
    node_id=U64.map(NodeId),
    identity=identities(st.just("")),
    term=TERM,
    timeline_start_lsn=LSN,
    flush_lsn=LSN,
    commit_lsn=LSN,
)
PROPOSER_MESSAGES = st.one_of(
    PROPOSER_GREETING,
    st.builds(wire.VoteRequest, TERM, PROPOSER_ID),
    st.builds(wire.ProposerElected, TERM, HISTORY),
    st.builds(wire.AppendRequest, TERM, LSN, LSN, LSN, WAL),
    st.builds(wire.CommitAnnounce, TERM, LSN, LSN),
    st.builds(wire.ReadWalRequest, TERM, LSN, LSN),
    st.builds(wire.SkipWal, TERM, LSN),
    st.builds(wire.TokenRenewal, TOKEN),
)
ACCEPTOR_MESSAGES = st.one_of(
    st.builds(wire.StandbysNeed, st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1)),
    ACCEPTOR_GREETING,
    st.builds(
        wire.VoteResponse,
        term=TERM,
        granted=st.booleans(),
        flush_lsn=LSN,
        last_record_end_lsn=LSN,
        wal_start_lsn=LSN,
        commit_lsn=LSN,
        history=HISTORY,
    ),
    st.builds(wire.ElectedResponse, TERM, LSN, LSN, LSN, LSN),
    st.builds(wire.AppendResponse, TERM, LSN, LSN),
    st.builds(wire.AppendRejected, TERM, LSN),
    st.builds(wire.WalChunk, TERM, LSN, WAL),
    st.builds(wire.ErrorResponse, U16, st.text(max_size=100)),
)
PARSERS = [wire.ProposerMessageParser, wire.AcceptorMessageParser]
GREETING = wire.encode_proposer_message(
    wire.ProposerGreeting(
        identity=wire.TimelineIdentity(
            tenant_id=TenantId("aa" * 16),
            timeline_id=TimelineId("bb" * 16),
            pg_version=18,
            system_id=1,
            wal_segment_size_bytes=1 << 24,
        ),
        proposer_id=wire.NO_PROPOSER,
        token="token",
    )
)


def feed_in_pieces(parser: Any, data: bytes, cuts: list[int]) -> list[Any]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [message for start, end in pairwise(edges) for message in parser.feed(data[start:end])]


@given(PROPOSER_GREETING, st.lists(PROPOSER_MESSAGES, max_size=4), st.lists(st.integers(0, 2000), max_size=6))
def test_proposer_messages_round_trip(
    greeting: wire.ProposerGreeting, messages: list[wire.ProposerFrame], cuts: list[int]
) -> None:
    data = b"".join(map(wire.encode_proposer_message, [greeting, *messages]))
    assert feed_in_pieces(wire.ProposerMessageParser(), data, cuts) == [greeting, *messages]


@given(ACCEPTOR_GREETING, st.lists(ACCEPTOR_MESSAGES, max_size=4), st.lists(st.integers(0, 2000), max_size=6))
def test_acceptor_messages_round_trip(
    greeting: wire.AcceptorGreeting, messages: list[wire.AcceptorFrame], cuts: list[int]
) -> None:
    data = b"".join(map(wire.encode_acceptor_message, [greeting, *messages]))
    assert feed_in_pieces(wire.AcceptorMessageParser(), data, cuts) == [greeting, *messages]


@given(ACCEPTOR_GREETING, st.lists(ACCEPTOR_MESSAGES, max_size=6))
def test_acceptor_messages_that_come_one_by_one(
    greeting: wire.AcceptorGreeting, messages: list[wire.AcceptorFrame]
) -> None:
    parser = wire.AcceptorMessageParser()
    parser.feed(wire.encode_acceptor_message(greeting))
    fed = [parser.feed(wire.encode_acceptor_message(message)) for message in messages]
    assert fed == [[message] for message in messages]


@pytest.mark.parametrize("parser_type", PARSERS)
@given(data=st.binary(max_size=200))
def test_any_bytes_give_messages_or_one_error(parser_type: Any, data: bytes) -> None:
    with suppress(framing.MalformedFrameError):
        parser_type().feed(data)


@given(st.sampled_from(sorted(b"GVEACRT")), st.binary(max_size=120))
def test_a_framed_body_of_any_bytes_gives_a_message_or_one_error(kind: int, body: bytes) -> None:
    parser = wire.ProposerMessageParser()
    parser.feed(GREETING)
    try:
        messages = parser.feed(struct.pack("<IB", 1 + len(body), kind) + body)
    except framing.MalformedFrameError:
        return
    assert len(messages) == 1


@given(st.sampled_from(sorted(b"gveajwx")), st.binary(max_size=120))
def test_a_framed_answer_of_any_bytes_gives_a_message_or_one_error(kind: int, body: bytes) -> None:
    parser = wire.AcceptorMessageParser()
    try:
        messages = parser.feed(struct.pack("<IB", 1 + len(body), kind) + body)
    except framing.MalformedFrameError:
        return
    assert len(messages) == 1


@given(PROPOSER_MESSAGES, st.data())
def test_a_flipped_bit_never_raises_anything_else(message: wire.ProposerMessage, data: st.DataObject) -> None:
    parser = wire.ProposerMessageParser()
    parser.feed(GREETING)
    frame = bytearray(wire.encode_proposer_message(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with suppress(framing.MalformedFrameError):
        parser.feed(bytes(frame))


def test_nothing_comes_before_the_greeting() -> None:
    vote = wire.encode_proposer_message(wire.VoteRequest(wire.Term(1), wire.NO_PROPOSER))
    with pytest.raises(framing.MalformedFrameError, match="before the greeting"):
        wire.ProposerMessageParser().feed(vote)


@pytest.mark.parametrize(
    ("greeted", "length"), [(False, 8192), (True, 2 << 20), (True, 0), (False, 2**32 - 1)]
)
def test_a_frame_of_a_bad_length_is_refused_before_it_is_buffered(greeted: bool, length: int) -> None:
    parser = wire.ProposerMessageParser()
    if greeted:
        parser.feed(GREETING)
    with pytest.raises(framing.MalformedFrameError, match="a frame of"):
        parser.feed(struct.pack("<IB", length, ord("A" if greeted else "G")))


def test_the_other_sides_frames_are_refused() -> None:
    with pytest.raises(framing.MalformedFrameError, match="not one that this side receives"):
        wire.AcceptorMessageParser().feed(GREETING)


def test_the_largest_messages_fit_in_a_frame() -> None:
    entries = wire.TERM_HISTORY_COUNT_MAX
    history = tuple(wire.TermStart(wire.Term(term), Lsn(term)) for term in range(entries))
    vote = wire.VoteResponse(
        term=wire.Term(entries),
        granted=True,
        flush_lsn=Lsn(1),
        last_record_end_lsn=Lsn(1),
        wal_start_lsn=Lsn(1),
        commit_lsn=Lsn(1),
        history=history,
    )
    elected = wire.ProposerElected(wire.Term(1), history)
    append = wire.AppendRequest(wire.Term(1), Lsn(1), Lsn(1), Lsn(1), bytes(wire.WAL_CHUNK_SIZE_BYTES_MAX))
    frames = [
        wire.encode_acceptor_message(vote),
        wire.encode_proposer_message(elected),
        wire.encode_proposer_message(append),
    ]
    assert max(map(len, frames)) <= 4 + framing.FRAME_SIZE_BYTES_MAX


def test_messages_beyond_the_bounds_are_not_sent() -> None:
    too_much = wire.AppendRequest(
        wire.Term(1), Lsn(1), Lsn(1), Lsn(1), bytes(wire.WAL_CHUNK_SIZE_BYTES_MAX + 1)
    )
    with pytest.raises(RefusedError, match="bytes of WAL in one frame"):
        wire.encode_proposer_message(too_much)
    with pytest.raises(RefusedError, match="a term history of 0 entries"):
        wire.encode_proposer_message(wire.ProposerElected(wire.Term(1), ()))
