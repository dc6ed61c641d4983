"""A layer's index, searched as it lies in the file: 72 bytes per block, no object for any of them.

The entry is drawn in `storage/format/layer_file.py`. Blocks are in key order; a long chain may span several.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.string cimport memcmp, memcpy

cdef enum:
    KEY_SIZE = 18
    ENTRY_SIZE = 72
    LAST_KEY = 18
    LOWEST_LSN = 48
    HIGHEST_LSN = 56


cdef class BlockIndex:
    def __cinit__(self, bytes raw not None):
        if len(raw) % ENTRY_SIZE:
            raise ValueError("an index has 72 bytes per block")
        self.raw = raw
        self.count = <int> (len(raw) // ENTRY_SIZE)
        self.entries = <const unsigned char*> PyBytes_AS_STRING(raw)

    def find_blocks(
        self, bytes first_key, bytes last_key, unsigned long long low_lsn, unsigned long long high_lsn
    ) -> list:
        """Numbers of the blocks that may hold values of keys in [first, last] with low < LSN <= high."""
        cdef const unsigned char* first = <const unsigned char*> PyBytes_AS_STRING(first_key)
        cdef const unsigned char* last = <const unsigned char*> PyBytes_AS_STRING(last_key)
        cdef list found = []
        cdef int number
        if len(first_key) != KEY_SIZE or len(last_key) != KEY_SIZE:
            raise ValueError("keys have 18 bytes")
        for number in range(self.first_at_or_above(first), self.count):
            if memcmp(self.entries + <Py_ssize_t> number * ENTRY_SIZE, last, KEY_SIZE) > 0:
                break
            if self.offers(number, low_lsn, high_lsn):
                found.append(number)
        return found

    cdef int first_at_or_above(self, const unsigned char* key) noexcept nogil:
        """The first block whose last key is not below `key`."""
        cdef int low = 0, high = self.count, middle
        while low < high:
            middle = (low + high) >> 1
            if memcmp(self.entries + <Py_ssize_t> middle * ENTRY_SIZE + LAST_KEY, key, KEY_SIZE) < 0:
                low = middle + 1
            else:
                high = middle
        return low

    cdef bint offers(
        self, int number, unsigned long long low_lsn, unsigned long long high_lsn
    ) noexcept nogil:
        """Whether a block may have values with low < LSN <= high."""
        cdef const unsigned char* entry = self.entries + <Py_ssize_t> number * ENTRY_SIZE
        cdef unsigned long long lowest, highest
        memcpy(&lowest, entry + LOWEST_LSN, 8)
        memcpy(&highest, entry + HIGHEST_LSN, 8)
        return lowest <= high_lsn and highest > low_lsn
