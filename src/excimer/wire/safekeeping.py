"""The quorum-commit protocol between a proposer and a safekeeper: bytes <-> frozen messages.

One TCP connection carries one timeline. The proposer (beside PostgreSQL) speaks in upper-case
types, the acceptor (the consensus half of a safekeeper) answers in lower-case ones::

    proposer                                 acceptor
       | G  greeting: version, token, timeline  |
       |--------------------------------------->|
       |        greeting: node, promised term g |
       |<---------------------------------------|
       | V  vote request: term                  |
       |--------------------------------------->|
       |  vote: granted?, log end, history    v |
       |<---------------------------------------|
       | E  elected: term, history              |
       |--------------------------------------->|   cuts divergent WAL, adopts the history
       |          "stream from my flush_lsn"  e |
       |<---------------------------------------|
       | A  append: WAL bytes, commit LSN       |
       |--------------------------------------->|   write, fdatasync
       |              flush LSN, commit LSN   a |
       |<---------------------------------------|

    T       a newer token for a connection that outlives its first one, no answer
    R / w   reads WAL back from a donor, to bring up a safekeeper that lags
    C       announces a commit LSN, no answer
    S / a   skip: drop all WAL, and go on at a later LSN, below which all is in object storage
    f       what hot standbys that read here need of the primary's rows (transaction ids); no answer
    j       an append that leaves a gap: "send from here"
    x       an error; the safekeeper closes after it

A frame is ``u32 length of what follows, u8 type, body``; integers are little-endian; bodies are
drawn at their `struct.Struct` below. A term history is ``u32 count, count x (u64 term, u64 start
LSN)``. Sizes are bounded before anything is buffered, and more tightly before the greeting, so that
an unauthenticated peer cannot make a safekeeper hold memory.

Not here: what the messages mean (`excimer.consensus`), sockets (`excimer.safekeeper`,
`excimer.compute.proposer`), whether a token is good (`excimer.wire.auth`).
"""

import struct
from collections.abc import Callable
from itertools import pairwise
from typing import Final, NamedTuple, NewType

import msgspec

from excimer.base.errors import RefusedError
from excimer.base.ids import ID_SIZE_BYTES, NodeId, TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.wire.safekeeping_frames import (
    TOKEN_SIZE_BYTES_MAX,
    FrameParser,
    MalformedFrameError,
    encode_frame,
)

PROTOCOL_VERSION: Final = 2

WAL_CHUNK_SIZE_BYTES_MAX: Final = 1 << 20
"""Most WAL in one append or one chunk read back."""
TERM_HISTORY_COUNT_MAX: Final = 1 << 16
"""Most entries in a history; `TermHistory.trimmed` keeps real ones far below."""

Term = NewType("Term", int)
"""A proposer's reign. Numbers only grow; a majority elects at most one proposer per term."""

ProposerId = NewType("ProposerId", bytes)
"""16 random bytes, new for every start of a proposer."""

NO_PROPOSER: Final = ProposerId(bytes(ID_SIZE_BYTES))


class TermStart(NamedTuple):
    """WAL at and above `start_lsn` (up to the next entry's) was written in `term`."""

    term: Term
    start_lsn: Lsn


class ErrorCode:
    """Error families on the wire, as in the page service."""

    RETRYABLE: Final = 1
    REFUSED: Final = 2
    FENCED: Final = 3
    CORRUPTION: Final = 4
    NO_TIMELINE: Final = 5
    """Refused, because the safekeeper does not keep the timeline: it was deleted, or has not come yet."""


class TimelineIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What both ends must agree on. A zero in a greeting means "I do not know, tell me"."""

    tenant_id: TenantId
    timeline_id: TimelineId
    pg_version: int
    """Major version, 14 to 18."""
    system_id: int
    wal_segment_size_bytes: int


class ProposerGreeting(msgspec.Struct, frozen=True, kw_only=True):
    """First frame of a connection."""

    version: int = PROTOCOL_VERSION
    identity: TimelineIdentity
    proposer_id: ProposerId
    token: str
    """JWT; the shell checks it before the message reaches the acceptor."""


class AcceptorGreeting(msgspec.Struct, frozen=True, kw_only=True):
    version: int = PROTOCOL_VERSION
    node_id: NodeId
    identity: TimelineIdentity
    """With nothing left at zero. Tenant and timeline do not travel: the proposer named them."""
    term: Term
    """The promised term: the proposer campaigns above the highest it hears of."""
    timeline_start_lsn: Lsn
    flush_lsn: Lsn
    commit_lsn: Lsn


class VoteRequest(msgspec.Struct, frozen=True):
    term: Term
    proposer_id: ProposerId
    """Makes a repeated request of the same candidate harmless."""


class VoteResponse(msgspec.Struct, frozen=True, kw_only=True):
    term: Term
    """The acceptor's promised term after the request; above the request's: the candidate has lost."""
    granted: bool
    flush_lsn: Lsn
    last_record_end_lsn: Lsn
    """End of the last complete, CRC-valid record it holds; at most `flush_lsn`."""
    wal_start_lsn: Lsn
    """Oldest WAL it can serve to a lagging peer."""
    commit_lsn: Lsn
    history: tuple[TermStart, ...]
    """Of the WAL it holds: no entry starts above `flush_lsn`."""


class ProposerElected(msgspec.Struct, frozen=True):
    term: Term
    history: tuple[TermStart, ...]
    """Its last entry is (term, where this proposer's own WAL begins)."""


class ElectedResponse(msgspec.Struct, frozen=True):
    term: Term
    """Above the proposer's own: it is fenced. Equal: the acceptor has adopted the history."""
    flush_lsn: Lsn
    """Stream from here."""
    wal_start_lsn: Lsn
    commit_lsn: Lsn
    durable_lsn: Lsn
    """A pageserver has told it that all below is durable in object storage. A committed record's end."""


class AppendRequest(msgspec.Struct, frozen=True):
    term: Term
    begin_lsn: Lsn
    commit_lsn: Lsn
    horizon_lsn: Lsn
    """Committed, and every member has it: no peer will ever need WAL or history below it."""
    wal: bytes
    """Empty in a heartbeat; `begin_lsn` is then where the next WAL will begin."""


class AppendResponse(msgspec.Struct, frozen=True):
    term: Term
    """Above the proposer's own: it is fenced, and the rest must not be counted."""
    flush_lsn: Lsn
    commit_lsn: Lsn


class AppendRejected(msgspec.Struct, frozen=True):
    term: Term
    expected_lsn: Lsn
    """Where the acceptor's WAL ends; 0 when it has not adopted the term's history yet."""


class CommitAnnounce(msgspec.Struct, frozen=True):
    term: Term
    commit_lsn: Lsn
    horizon_lsn: Lsn


class SkipWal(msgspec.Struct, frozen=True):
    """No member can repair this one: its WAL is to begin at `start_lsn`, as if it had all below, which nobody
    needs any more. Answered like an append; not obeyed above what the acceptor knows as durable.
    """

    term: Term
    start_lsn: Lsn


class ReadWalRequest(msgspec.Struct, frozen=True):
    """Asks a donor for WAL [start_lsn, end_lsn), at most `WAL_CHUNK_SIZE_BYTES_MAX` of it."""

    term: Term
    start_lsn: Lsn
    end_lsn: Lsn


class TokenRenewal(msgspec.Struct, frozen=True):
    """From now on the connection is the token's, which must open what the greeting's did."""

    token: str


class WalChunk(msgspec.Struct, frozen=True):
    """Answer to `ReadWalRequest`, as much as was read; empty when the donor cannot serve it.

    An empty one whose `start_lsn` is not the one asked for says that the donor's WAL begins there.
    """

    term: Term
    start_lsn: Lsn
    wal: bytes


class StandbysNeed(msgspec.Struct, frozen=True):
    """Of the hot standbys that read from this safekeeper, together; said again while they say so."""

    xmin: int
    """64 bits, 0: nothing."""
    catalog_xmin: int


class ErrorResponse(msgspec.Struct, frozen=True):
    code: int
    """An `ErrorCode`."""
    text: str


ProposerMessage = (
    ProposerGreeting
    | VoteRequest
    | ProposerElected
    | AppendRequest
    | CommitAnnounce
    | ReadWalRequest
    | SkipWal
)
ProposerFrame = ProposerMessage | TokenRenewal
"""All that a proposer sends: what the acceptor is told, and what only the connection is."""
AcceptorMessage = (
    AcceptorGreeting
    | VoteResponse
    | ElectedResponse
    | AppendResponse
    | AppendRejected
    | WalChunk
    | ErrorResponse
)
AcceptorFrame = AcceptorMessage | StandbysNeed
"""All that a safekeeper sends: what the proposer's consensus is told, and what it only passes on."""

# version 2, token length 2, tenant 16, timeline 16, pg_version 4, segment size 4, system id 8,
# proposer id 16; then the token
_PROPOSER_GREETING = struct.Struct("<HH16s16sIIQ16s")
# version 2, zero 2, pg_version 4, segment size 4, system id 8, node id 8, term 8,
# timeline start 8, flush 8, commit 8
_ACCEPTOR_GREETING = struct.Struct("<HHIIQQQQQQ")
# xmin 8, catalog xmin 8
_STANDBYS_NEED = struct.Struct("<QQ")
# term 8, proposer id 16
_VOTE_REQUEST = struct.Struct("<Q16s")
# term 8, granted 1, flush 8, last record end 8, WAL start 8, commit 8; then the history
_VOTE_RESPONSE = struct.Struct("<QBQQQQ")
# term 8; then the history
_TERM = struct.Struct("<Q")
# term 8, flush 8, WAL start 8, commit 8, durable 8
_ELECTED_RESPONSE = struct.Struct("<QQQQQ")
# term 8, begin 8, commit 8, horizon 8; then WAL
_APPEND_REQUEST = struct.Struct("<QQQQ")
_WHOLE_APPEND_HEAD = struct.Struct("<IcQQQQ")
# term 8, two or one LSNs of 8
_TERM_LSN_LSN = struct.Struct("<QQQ")
_WHOLE_APPEND_RESPONSE = struct.Struct("<IcQQQ")
_TERM_LSN = struct.Struct("<QQ")
# code 2, zero 2; then UTF-8
_ERROR = struct.Struct("<HH")
_HISTORY_COUNT = struct.Struct("<I")
_HISTORY_ENTRY = struct.Struct("<QQ")


def encode_history(history: tuple[TermStart, ...]) -> bytes:
    """``u32 count, count x (u64 term, u64 start LSN)``; also how the control file keeps it."""
    if not 1 <= len(history) <= TERM_HISTORY_COUNT_MAX:
        raise RefusedError(
            f"a term history of {len(history)} entries; 1 to {TERM_HISTORY_COUNT_MAX} are possible"
        )
    return _HISTORY_COUNT.pack(len(history)) + b"".join(_HISTORY_ENTRY.pack(*entry) for entry in history)


def decode_history(data: bytes) -> tuple[TermStart, ...]:
    """Raises `MalformedFrameError` unless `data` is exactly one history: terms grow, starts never fall."""
    if len(data) < _HISTORY_COUNT.size:
        raise MalformedFrameError("a term history is cut short")
    (count,) = _HISTORY_COUNT.unpack_from(data)
    if (
        not 1 <= count <= TERM_HISTORY_COUNT_MAX
        or len(data) != _HISTORY_COUNT.size + count * _HISTORY_ENTRY.size
    ):
        raise MalformedFrameError(f"a term history of {count} entries does not fill {len(data)} bytes")
    entries = tuple(
        TermStart(Term(term), Lsn(start))
        for term, start in _HISTORY_ENTRY.iter_unpack(data[_HISTORY_COUNT.size :])
    )
    if any(a.term >= b.term or a.start_lsn > b.start_lsn for a, b in pairwise(entries)):
        raise MalformedFrameError("a term history's terms must grow and its starts must not fall")
    return entries


def _token_bytes(text: str) -> bytes:
    token = text.encode()
    if len(token) > TOKEN_SIZE_BYTES_MAX:
        raise RefusedError(f"the token has {len(token)} bytes; at most {TOKEN_SIZE_BYTES_MAX}")
    return token


def _pack_proposer_greeting(message: ProposerGreeting) -> bytes:
    token = _token_bytes(message.token)
    identity = message.identity
    fixed = _PROPOSER_GREETING.pack(
        message.version,
        len(token),
        bytes.fromhex(identity.tenant_id),
        bytes.fromhex(identity.timeline_id),
        identity.pg_version,
        identity.wal_segment_size_bytes,
        identity.system_id,
        message.proposer_id,
    )
    return fixed + token


def _unpack_proposer_greeting(body: memoryview) -> ProposerGreeting:
    version, token_length, tenant, timeline, pg_version, segment_size, system_id, proposer = (
        _PROPOSER_GREETING.unpack_from(body)
    )
    token = bytes(body[_PROPOSER_GREETING.size :])
    if len(token) != token_length:
        raise MalformedFrameError(f"the greeting's token has {len(token)} bytes instead of {token_length}")
    identity = TimelineIdentity(
        tenant_id=TenantId(tenant.hex()),
        timeline_id=TimelineId(timeline.hex()),
        pg_version=pg_version,
        system_id=system_id,
        wal_segment_size_bytes=segment_size,
    )
    return ProposerGreeting(
        version=version, identity=identity, proposer_id=ProposerId(proposer), token=token.decode("ascii")
    )


def _pack_acceptor_greeting(message: AcceptorGreeting) -> bytes:
    return _ACCEPTOR_GREETING.pack(
        message.version,
        0,
        message.identity.pg_version,
        message.identity.wal_segment_size_bytes,
        message.identity.system_id,
        message.node_id,
        message.term,
        message.timeline_start_lsn,
        message.flush_lsn,
        message.commit_lsn,
    )


def _unpack_acceptor_greeting(body: memoryview) -> AcceptorGreeting:
    version, _, pg_version, segment_size, system_id, node_id, term, start, flush, commit = (
        _ACCEPTOR_GREETING.unpack(body)
    )
    identity = TimelineIdentity(
        tenant_id=TenantId(""),
        timeline_id=TimelineId(""),
        pg_version=pg_version,
        system_id=system_id,
        wal_segment_size_bytes=segment_size,
    )
    return AcceptorGreeting(
        version=version,
        node_id=NodeId(node_id),
        identity=identity,
        term=Term(term),
        timeline_start_lsn=Lsn(start),
        flush_lsn=Lsn(flush),
        commit_lsn=Lsn(commit),
    )


def _pack_vote_response(message: VoteResponse) -> bytes:
    fixed = _VOTE_RESPONSE.pack(
        message.term,
        message.granted,
        message.flush_lsn,
        message.last_record_end_lsn,
        message.wal_start_lsn,
        message.commit_lsn,
    )
    return fixed + encode_history(message.history)


def _unpack_vote_response(body: memoryview) -> VoteResponse:
    term, granted, flush, record_end, wal_start, commit = _VOTE_RESPONSE.unpack_from(body)
    if granted > 1:
        raise MalformedFrameError(f"a vote is granted (1) or not (0), not {granted}")
    return VoteResponse(
        term=Term(term),
        granted=bool(granted),
        flush_lsn=Lsn(flush),
        last_record_end_lsn=Lsn(record_end),
        wal_start_lsn=Lsn(wal_start),
        commit_lsn=Lsn(commit),
        history=decode_history(bytes(body[_VOTE_RESPONSE.size :])),
    )


def _unpack_elected(body: memoryview) -> ProposerElected:
    (term,) = _TERM.unpack_from(body)
    return ProposerElected(term, decode_history(bytes(body[_TERM.size :])))


def _unpack_append_request(body: memoryview) -> AppendRequest:
    wal = bytes(body[_APPEND_REQUEST.size :])
    _check_wal_size(len(wal))
    term, begin, commit, horizon = _APPEND_REQUEST.unpack_from(body)
    return AppendRequest(Term(term), Lsn(begin), Lsn(commit), Lsn(horizon), wal)


def _unpack_token_renewal(body: memoryview) -> TokenRenewal:
    if len(body) > TOKEN_SIZE_BYTES_MAX:
        raise MalformedFrameError(f"a token of {len(body)} bytes; at most {TOKEN_SIZE_BYTES_MAX}")
    return TokenRenewal(bytes(body).decode("ascii"))


def _unpack_wal_chunk(body: memoryview) -> WalChunk:
    wal = bytes(body[_TERM_LSN.size :])
    _check_wal_size(len(wal))
    term, start = _TERM_LSN.unpack_from(body)
    return WalChunk(Term(term), Lsn(start), wal)


def _unpack_error(body: memoryview) -> ErrorResponse:
    code, _ = _ERROR.unpack_from(body)
    return ErrorResponse(code, bytes(body[_ERROR.size :]).decode())


def _check_wal_size(size_bytes: int) -> None:
    if size_bytes > WAL_CHUNK_SIZE_BYTES_MAX:
        raise MalformedFrameError(
            f"{size_bytes} bytes of WAL in one frame; at most {WAL_CHUNK_SIZE_BYTES_MAX}"
        )


_PROPOSER_DECODERS: Final[dict[int, Callable[[memoryview], ProposerFrame]]] = {
    ord("G"): _unpack_proposer_greeting,
    ord("V"): lambda body: VoteRequest(*_VOTE_REQUEST.unpack(body)),
    ord("E"): _unpack_elected,
    ord("A"): _unpack_append_request,
    ord("C"): lambda body: CommitAnnounce(*_TERM_LSN_LSN.unpack(body)),
    ord("R"): lambda body: ReadWalRequest(*_TERM_LSN_LSN.unpack(body)),
    ord("S"): lambda body: SkipWal(*_TERM_LSN.unpack(body)),
    ord("T"): _unpack_token_renewal,
}
_ACCEPTOR_DECODERS: Final[dict[int, Callable[[memoryview], AcceptorFrame]]] = {
    ord("g"): _unpack_acceptor_greeting,
    ord("v"): _unpack_vote_response,
    ord("e"): lambda body: ElectedResponse(*_ELECTED_RESPONSE.unpack(body)),
    ord("a"): lambda body: AppendResponse(*_TERM_LSN_LSN.unpack(body)),
    ord("j"): lambda body: AppendRejected(*_TERM_LSN.unpack(body)),
    ord("w"): _unpack_wal_chunk,
    ord("f"): lambda body: StandbysNeed(*_STANDBYS_NEED.unpack(body)),
    ord("x"): _unpack_error,
}


def encode_proposer_message(message: ProposerFrame) -> bytes:
    """One frame. Raises a `RefusedError` for a message beyond the bounds above."""
    match message:
        case AppendRequest(term, begin_lsn, commit_lsn, horizon_lsn, wal):
            _check_wal_size(len(wal))
            length = 1 + _APPEND_REQUEST.size + len(wal)
            return _WHOLE_APPEND_HEAD.pack(length, b"A", term, begin_lsn, commit_lsn, horizon_lsn) + wal
        case CommitAnnounce(term, commit_lsn, horizon_lsn):
            return encode_frame(b"C", _TERM_LSN_LSN.pack(term, commit_lsn, horizon_lsn))
        case ReadWalRequest(term, start_lsn, end_lsn):
            return encode_frame(b"R", _TERM_LSN_LSN.pack(term, start_lsn, end_lsn))
        case SkipWal(term, start_lsn):
            return encode_frame(b"S", _TERM_LSN.pack(term, start_lsn))
        case VoteRequest(term, proposer_id):
            return encode_frame(b"V", _VOTE_REQUEST.pack(term, proposer_id))
        case ProposerElected(term, history):
            return encode_frame(b"E", _TERM.pack(term) + encode_history(history))
        case ProposerGreeting():
            return encode_frame(b"G", _pack_proposer_greeting(message))
        case TokenRenewal(token):
            return encode_frame(b"T", _token_bytes(token))


def encode_acceptor_message(message: AcceptorFrame) -> bytes:
    """One frame. Raises a `RefusedError` for a message beyond the bounds above."""
    match message:
        case AppendResponse(term, flush_lsn, commit_lsn):
            return encode_frame(b"a", _TERM_LSN_LSN.pack(term, flush_lsn, commit_lsn))
        case AppendRejected(term, expected_lsn):
            return encode_frame(b"j", _TERM_LSN.pack(term, expected_lsn))
        case ElectedResponse(term, flush_lsn, wal_start_lsn, commit_lsn, durable_lsn):
            packed = _ELECTED_RESPONSE.pack(term, flush_lsn, wal_start_lsn, commit_lsn, durable_lsn)
            return encode_frame(b"e", packed)
        case WalChunk(term, start_lsn, wal):
            _check_wal_size(len(wal))
            return encode_frame(b"w", _TERM_LSN.pack(term, start_lsn), wal)
        case VoteResponse():
            return encode_frame(b"v", _pack_vote_response(message))
        case AcceptorGreeting():
            return encode_frame(b"g", _pack_acceptor_greeting(message))
        case StandbysNeed(xmin, catalog_xmin):
            return encode_frame(b"f", _STANDBYS_NEED.pack(xmin, catalog_xmin))
        case ErrorResponse(code, text):
            return encode_frame(b"x", _ERROR.pack(code, 0) + text.encode()[:4096])


class ProposerMessageParser(FrameParser[ProposerFrame]):
    """A safekeeper's receiving side: bytes from a proposer in, messages out."""

    def __init__(self) -> None:
        super().__init__(_PROPOSER_DECODERS, ord("G"))


class AcceptorMessageParser(FrameParser[AcceptorFrame]):
    """A proposer's receiving side: bytes from a safekeeper in, messages out."""

    def __init__(self) -> None:
        super().__init__(_ACCEPTOR_DECODERS, ord("g"))

    def feed(self, data: bytes | bytearray | memoryview) -> list[AcceptorFrame]:
        """An answer to an append, which comes alone as a rule, takes a shorter way: commits wait for it."""
        if len(data) == _WHOLE_APPEND_RESPONSE.size and self.is_greeted and not self._buffer:
            length, kind, term, flush_lsn, commit_lsn = _WHOLE_APPEND_RESPONSE.unpack(data)
            if kind == b"a" and length == 1 + _TERM_LSN_LSN.size:
                return [AppendResponse(term, flush_lsn, commit_lsn)]
        return super().feed(data)
