"""Applies native records to pages: the fast twin of `excimer.pgformat.native_records.apply_native`."""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from excimer._native.little_endian cimport put_u16, put_u32, u16, u32

from excimer.pgformat.native_records import InvalidNativeRecordError

cdef enum:
    PAGE_SIZE = 8192
    PAGE_HEADER_SIZE = 24
    LAYOUT_VERSION = 4
    XACTS_PER_PAGE = 32768
    OFFSETS_PER_PAGE = 2048
    MEMBERS_PER_PAGE = 1636
    MEMBERS_PER_GROUP = 4
    MEMBER_GROUP_SIZE = 20
    COMMIT_TIMES_PER_PAGE = 819
    COMMIT_TIME_SIZE = 10
    HEAP_BLOCKS_PER_VM_PAGE = 32672
    SUB_COMMITTED = 3
    COMMITTED = 1
    VM_BITS = 3
    XACT_SET_SIZE = 4096
    COMMIT_TIME_SET_SIZE = 103

cdef enum:
    OP_CLOG_STATUS = 1
    OP_OFFSETS = 2
    OP_MEMBERS = 3
    OP_COMMIT_TIMES = 4
    OP_VM_SET = 5
    OP_VM_CLEAR = 6
    OP_VM_TRUNCATE = 7
    OP_CLOG_STATUS_SET = 8
    OP_COMMIT_TIMES_SET = 9


def apply_native(bytearray page, bytes payload, uint64_t lsn):
    """Changes an 8192-byte page in place; `lsn` is the end of the record behind the payload.

    Raises `InvalidNativeRecordError`, and then leaves the page as it was, when the payload is damaged.
    """
    cdef const uint8_t* record = <const uint8_t*> PyBytes_AS_STRING(payload)
    cdef size_t size = PyBytes_GET_SIZE(payload)
    if size < 4 or PyByteArray_GET_SIZE(page) != PAGE_SIZE:
        raise InvalidNativeRecordError(f"native record of {size} bytes for a page of {len(page)}")
    if check(record, size) < 0:
        raise InvalidNativeRecordError(f"native record of operation {record[0]} is damaged")
    apply(<uint8_t*> PyByteArray_AS_STRING(page), record, lsn)


cdef int check(const uint8_t* record, size_t size) noexcept nogil:
    """-1 unless the length and every place in the page are right."""
    cdef uint32_t count = u16(record + 2)
    if record[0] == OP_CLOG_STATUS:
        return check_places(record + 4, count, 2, XACTS_PER_PAGE) if size == 4 + 2 * count else -1
    if record[0] == OP_OFFSETS:
        return check_places(record + 4, count, 8, OFFSETS_PER_PAGE) if size == 4 + 8 * count else -1
    if record[0] == OP_MEMBERS:
        return check_places(record + 4, count, 8, MEMBERS_PER_PAGE) if size == 4 + 8 * count else -1
    if record[0] == OP_COMMIT_TIMES:
        return check_places(record + 14, count, 2, COMMIT_TIMES_PER_PAGE) if size == 14 + 2 * count else -1
    if record[0] == OP_VM_SET:
        return 0 if size == 8 else -1
    if record[0] == OP_VM_CLEAR:
        return 0 if size == 4 + 8 * count else -1
    if record[0] == OP_VM_TRUNCATE:
        return 0 if size == 4 and count < PAGE_SIZE - PAGE_HEADER_SIZE and record[1] < 8 else -1
    if record[0] == OP_CLOG_STATUS_SET:
        return check_set(record + 4, count, XACTS_PER_PAGE) if size == 4 + XACT_SET_SIZE else -1
    if record[0] == OP_COMMIT_TIMES_SET and size == 14 + COMMIT_TIME_SET_SIZE:
        return check_set(record + 14, count, COMMIT_TIMES_PER_PAGE)
    return -1


cdef inline bint has_bit(const uint8_t* bits, uint32_t index) noexcept nogil:
    return bits[index // 8] >> index % 8 & 1


cdef int check_set(const uint8_t* bits, uint32_t count, uint32_t limit) noexcept nogil:
    """-1 unless `count` bits are set, all of them below `limit`."""
    cdef uint32_t index, found = 0
    for index in range((limit + 7) // 8 * 8):
        if has_bit(bits, index):
            if index >= limit:
                return -1
            found += 1
    return 0 if found == count else -1


cdef int check_places(
    const uint8_t* items, uint32_t count, uint32_t item_size, uint32_t limit
) noexcept nogil:
    cdef uint32_t index
    for index in range(count):
        if u16(items + index * item_size) >= limit:
            return -1
    return 0


cdef void apply(uint8_t* page, const uint8_t* record, uint64_t lsn) noexcept nogil:
    cdef uint32_t count = u16(record + 2)
    cdef const uint8_t* item = record + 4
    cdef uint32_t index, _index
    if record[0] == OP_VM_SET:
        vm_set(page, record[1], u32(item), lsn)
    elif record[0] == OP_VM_TRUNCATE:
        init_if_new(page)
        page += PAGE_HEADER_SIZE + count
        page[0] &= (1 << record[1]) - 1
        memset(page + 1, 0, PAGE_SIZE - PAGE_HEADER_SIZE - count - 1)
    elif record[0] == OP_COMMIT_TIMES:
        for index in range(count):
            memcpy(page + u16(record + 14 + 2 * index) * COMMIT_TIME_SIZE, item, COMMIT_TIME_SIZE)
    elif record[0] == OP_CLOG_STATUS:
        for index in range(count):
            clog_status(page, u16(item + 2 * index), record[1])
    elif record[0] == OP_CLOG_STATUS_SET:
        for index in range(XACTS_PER_PAGE):
            if has_bit(item, index):
                clog_status(page, index, record[1])
    elif record[0] == OP_COMMIT_TIMES_SET:
        for index in range(COMMIT_TIMES_PER_PAGE):
            if has_bit(record + 14, index):
                memcpy(page + index * COMMIT_TIME_SIZE, item, COMMIT_TIME_SIZE)
    else:
        for _index in range(count):
            if record[0] == OP_OFFSETS:
                put_u32(page + u16(item) * 4, u32(item + 4))
            elif record[0] == OP_MEMBERS:
                member(page, u16(item), item[2], u32(item + 4))
            else:
                vm_clear(page, u32(item), item[4])
            item += 8
        if record[0] == OP_VM_CLEAR and record[1]:
            set_lsn(page, lsn)


cdef inline void clog_status(uint8_t* page, uint32_t index, uint8_t status) noexcept nogil:
    cdef uint8_t* place = page + index // 4
    cdef int shift = index % 4 * 2
    if status == SUB_COMMITTED and place[0] >> shift & 3 == COMMITTED:
        return
    place[0] = (place[0] & ~(3 << shift)) | (status & 3) << shift


cdef inline void member(uint8_t* page, uint32_t index, uint8_t status, uint32_t xid) noexcept nogil:
    cdef uint8_t* group = page + index // MEMBERS_PER_GROUP * MEMBER_GROUP_SIZE
    cdef uint32_t slot = index % MEMBERS_PER_GROUP
    put_u32(group + MEMBERS_PER_GROUP + 4 * slot, xid)
    group[slot] = status


cdef inline void vm_set(uint8_t* page, uint8_t bits, uint32_t heap_block, uint64_t lsn) noexcept nogil:
    cdef uint32_t within = heap_block % HEAP_BLOCKS_PER_VM_PAGE
    cdef uint8_t* place = page + PAGE_HEADER_SIZE + within // 4
    cdef int shift = within % 4 * 2
    init_if_new(page)
    if place[0] >> shift & VM_BITS != bits:
        place[0] |= (bits & VM_BITS) << shift
        set_lsn(page, lsn)


cdef inline void vm_clear(uint8_t* page, uint32_t heap_block, uint8_t bits) noexcept nogil:
    cdef uint32_t within = heap_block % HEAP_BLOCKS_PER_VM_PAGE
    page[PAGE_HEADER_SIZE + within // 4] &= ~((bits & VM_BITS) << within % 4 * 2)


cdef inline void set_lsn(uint8_t* page, uint64_t lsn) noexcept nogil:
    put_u32(page, <uint32_t> (lsn >> 32))
    put_u32(page + 4, <uint32_t> lsn)


cdef void init_if_new(uint8_t* page) noexcept nogil:
    """PageInit, when pd_upper says that nobody has (PageIsNew)."""
    if u16(page + 14):
        return
    memset(page, 0, PAGE_SIZE)
    put_u16(page + 12, PAGE_HEADER_SIZE)
    put_u16(page + 14, PAGE_SIZE)
    put_u16(page + 16, PAGE_SIZE)
    put_u16(page + 18, PAGE_SIZE | LAYOUT_VERSION)
