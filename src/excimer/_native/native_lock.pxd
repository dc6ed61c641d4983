"""A lock that native code takes without the GIL."""

from cpython.pythread cimport PyThread_type_lock


cdef class NativeLock:
    cdef PyThread_type_lock lock

    cdef void take(self) noexcept nogil
    cdef void release(self) noexcept nogil
