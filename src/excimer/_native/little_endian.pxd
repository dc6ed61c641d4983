"""Unaligned little-endian integers in memory, for native modules."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef inline uint16_t u16(const uint8_t* data) noexcept nogil:
    cdef uint16_t value
    memcpy(&value, data, 2)
    return value


cdef inline uint32_t u32(const uint8_t* data) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, data, 4)
    return value


cdef inline uint64_t u64(const uint8_t* data) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, data, 8)
    return value


cdef inline void put_u16(uint8_t* data, uint16_t value) noexcept nogil:
    memcpy(data, &value, 2)


cdef inline void put_u32(uint8_t* data, uint32_t value) noexcept nogil:
    memcpy(data, &value, 4)


cdef inline void put_u64(uint8_t* data, uint64_t value) noexcept nogil:
    memcpy(data, &value, 8)
