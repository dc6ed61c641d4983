"""Shared declarations of `page_chains.pyx`, for the memory layer that feeds it."""

cdef struct Link:
    const unsigned char* payload
    unsigned long long lsn
    unsigned int length
    int newer
    unsigned char kind

cdef struct Slot:
    unsigned long long bound
    int oldest
    int cursor
    unsigned char closed
    unsigned char has_page

cdef class PageChains:
    cdef unsigned char first_key[18]
    cdef unsigned int first_block
    cdef readonly int count
    cdef readonly int open_count
    cdef readonly unsigned long long lsn
    cdef readonly unsigned long long value_count
    cdef Slot* slots
    cdef Link* links
    cdef int link_count
    cdef int link_capacity
    cdef list held
    cdef bytes output
    cdef unsigned char* pages

    cdef int offer(
        self, int slot, unsigned char kind, unsigned char flags, unsigned long long lsn,
        const unsigned char* payload, unsigned int length,
    ) except -1 nogil
    cdef bytes redo_request(self, int slot)
    cdef int restore_from(self, int* slot) except -2 nogil
    cdef int restore_base(self, int slot) except -2 nogil
    cdef void fill_page(self, int slot, Link* link, const unsigned char* plain) noexcept nogil
    cdef bint starts_itself(self, int slot)
