"""Native records for SLRU pages, without the GIL: what commits, aborts and new multixacts write.

One value per page that the record touches; the touch knows which of the record's ids lie on it.
The bytes are defined in `excimer.pgformat.native_records`.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from excimer._native.batch_builder cimport StorageKey
from excimer._native.change_set cimport (
    SLRU_OFFSETS,
    SLRU_XACT,
    ChangeSet,
    Touch,
    slru_key,
    touched_page,
)
from excimer._native.little_endian cimport put_u16, put_u32, put_u64, u32
from excimer._native.xact_parts cimport XactParts

cdef enum:
    OP_CLOG_STATUS = 1
    OP_OFFSETS = 2
    OP_MEMBERS = 3
    OP_COMMIT_TIMES = 4
    COMMITTED = 1
    ABORTED = 2


cdef void put_xact_page(ChangeSet changes, const Touch* touch, const XactParts* xact) noexcept nogil:
    """Status or commit time of those of the record's xids that lie on one page."""
    cdef bint is_status = touch.key.spc == SLRU_XACT
    cdef uint32_t per_page = XACTS_PER_PAGE if is_status else COMMIT_TIMES_PER_PAGE
    cdef uint32_t head = 4 if is_status else 14
    cdef uint32_t page = touched_page(touch)
    cdef uint32_t count = 0
    cdef uint32_t index
    cdef StorageKey key = slru_key(touch)
    cdef uint8_t* place
    for index in range(touch.first_id, touch.last_id + 1):
        count += xact_id(xact, index) // per_page == page
    place = changes.put_native(&key, head + 2 * count)
    if place == NULL:
        return
    put_u16(place + 2, count)
    if is_status:
        place[0], place[1] = OP_CLOG_STATUS, COMMITTED if xact.is_commit else ABORTED
    else:
        place[0] = OP_COMMIT_TIMES
        put_u64(place + 4, <uint64_t> xact.commit_time)
        put_u16(place + 12, xact.origin)
    place += head
    for index in range(touch.first_id, touch.last_id + 1):
        if xact_id(xact, index) // per_page == page:
            put_u16(place, xact_id(xact, index) % per_page)
            place += 2


cdef void put_multixact(ChangeSet changes, const Touch* touch, const uint8_t* main_data) noexcept nogil:
    """`main_data`: u32 multixact, u32 first member's offset, u32 count, count x (u32 xid, u32 status)."""
    if touch.key.spc == SLRU_OFFSETS:
        put_offsets(changes, touch, main_data)
    else:
        put_members(changes, touch, main_data)


cdef void put_offsets(ChangeSet changes, const Touch* touch, const uint8_t* main_data) noexcept nogil:
    """Where the multixact's members begin, and where the next one's will, perhaps on another page."""
    cdef StorageKey key = slru_key(touch)
    cdef uint32_t count = touch.last_id - touch.first_id + 1
    cdef uint32_t multi, offset, index
    cdef uint8_t* place = changes.put_native(&key, 4 + 8 * count)
    if place == NULL:
        return
    place[0] = OP_OFFSETS
    put_u16(place + 2, count)
    place += 4
    for index in range(touch.first_id, touch.last_id + 1):
        multi, offset = u32(main_data), u32(main_data + 4)
        if index == 1:
            multi, offset = next_multi(multi), offset + u32(main_data + 8)
            if offset == 0:
                offset = 1  # as GetNewMultiXactId does: 0 means unset
        put_u16(place, multi % OFFSETS_PER_PAGE)
        put_u32(place + 4, offset)
        place += 8


cdef void put_members(ChangeSet changes, const Touch* touch, const uint8_t* main_data) noexcept nogil:
    cdef StorageKey key = slru_key(touch)
    cdef uint32_t count = touch.last_id - touch.first_id + 1
    cdef uint32_t index
    cdef uint8_t* place = changes.put_native(&key, 4 + 8 * count)
    if place == NULL:
        return
    place[0] = OP_MEMBERS
    put_u16(place + 2, count)
    place += 4
    for index in range(touch.first_id, touch.last_id + 1):
        put_u16(place, (u32(main_data + 4) + index) % MEMBERS_PER_PAGE)
        place[2] = main_data[16 + 8 * index]
        put_u32(place + 4, u32(main_data + 12 + 8 * index))
        place += 8
