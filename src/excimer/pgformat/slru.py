"""Arithmetic of SLRU files: commit status, multixacts, commit timestamps.

Each is an array of small entries over the whole 32-bit range of ids, cut into 8 KiB pages without
headers, 32 pages to a file. Ids wrap around, so "older" is decided modulo 2^32, and a file goes only
when all of it is older than the cutoff.
Source: clog.c, multixact.c, commit_ts.c, slru.c of PostgreSQL 14 to 18.

Not here: changing entries (`native_records`), when pages come and go (`excimer.pageserver`).
"""

from excimer.base.keys import BLOCK_SIZE_BYTES, SLRU_SEGMENT_BLOCKS, Slru, slru_block_key

XACTS_PER_PAGE = BLOCK_SIZE_BYTES * 4
"""Two bits of commit status each."""
OFFSETS_PER_PAGE = BLOCK_SIZE_BYTES // 4
MEMBERS_PER_GROUP = 4
MEMBER_GROUP_SIZE_BYTES = 20
"""Four flag bytes, then four xids."""
MEMBERS_PER_PAGE = BLOCK_SIZE_BYTES // MEMBER_GROUP_SIZE_BYTES * MEMBERS_PER_GROUP
COMMIT_TIME_SIZE_BYTES = 10
"""i64 timestamp, u16 replication origin."""
COMMIT_TIMES_PER_PAGE = BLOCK_SIZE_BYTES // COMMIT_TIME_SIZE_BYTES

ENTRIES_PER_PAGE = {
    Slru.XACT: XACTS_PER_PAGE,
    Slru.MULTIXACT_OFFSETS: OFFSETS_PER_PAGE,
    Slru.MULTIXACT_MEMBERS: MEMBERS_PER_PAGE,
    Slru.COMMIT_TS: COMMIT_TIMES_PER_PAGE,
}
SEGMENT_MAX = tuple(((1 << 32) - 1) // ENTRIES_PER_PAGE[slru] // SLRU_SEGMENT_BLOCKS for slru in Slru)
"""The number of the last segment that ids of 32 bits reach, by SLRU."""
_FIRST_ID = {Slru.XACT: 3, Slru.MULTIXACT_OFFSETS: 1, Slru.MULTIXACT_MEMBERS: 0, Slru.COMMIT_TS: 3}
FIRST_NORMAL_XID = 3
FIRST_MULTIXACT = 1

_IDS = 1 << 32
_HALF = 1 << 31


def id_precedes(left: int, right: int) -> bool:
    """Whether `left` is older than `right`, both 32-bit and counted modulo 2^32."""
    return (left - right) % _IDS >= _HALF


def xid_precedes(left: int, right: int) -> bool:
    """Like `id_precedes`, but the permanent xids 0 to 2 are older than all others."""
    if left < FIRST_NORMAL_XID or right < FIRST_NORMAL_XID:
        return left < right
    return id_precedes(left, right)


def page_key(slru: Slru, page: int) -> bytes:
    """Storage key of the `page`-th page of an SLRU."""
    return slru_block_key(slru, *divmod(page, SLRU_SEGMENT_BLOCKS))


def page_precedes(slru: Slru, left: int, right: int) -> bool:
    """Whether all entries of page `left` are older than those of page `right`."""
    per_page = ENTRIES_PER_PAGE[slru]
    first = _FIRST_ID[slru] + 1
    left_id = (left * per_page + first) % _IDS
    right_id = (right * per_page + first) % _IDS
    return id_precedes(left_id, right_id) and id_precedes(left_id, (right_id + per_page - 1) % _IDS)


def is_segment_obsolete(slru: Slru, segment: int, cutoff_page: int) -> bool:
    """Whether truncation at `cutoff_page` removes the file: all its pages are older."""
    first = segment * SLRU_SEGMENT_BLOCKS
    return page_precedes(slru, first, cutoff_page) and page_precedes(
        slru, first + SLRU_SEGMENT_BLOCKS - 1, cutoff_page
    )


def member_segments(start_offset: int, end_offset: int) -> list[int]:
    """Files of multixact members that become unused when the oldest offset moves from start to end."""
    per_segment = MEMBERS_PER_PAGE * SLRU_SEGMENT_BLOCKS
    last = (_IDS - 1) // per_segment
    segments = []
    segment, end = start_offset // per_segment, end_offset // per_segment
    while segment != end:
        segments.append(segment)
        segment = 0 if segment >= last else segment + 1
    return segments
