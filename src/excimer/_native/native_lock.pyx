"""A lock for Python's `with` that native code takes without the GIL. Not reentrant.

Not here: what it protects.
"""

from cpython.pythread cimport (
    WAIT_LOCK,
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_release_lock,
)


cdef class NativeLock:
    def __cinit__(self):
        self.lock = PyThread_allocate_lock()
        if self.lock == NULL:
            raise MemoryError("no memory for a lock")

    def __dealloc__(self):
        if self.lock != NULL:
            PyThread_free_lock(self.lock)

    def __enter__(self):
        with nogil:
            self.take()

    def __exit__(self, *_):
        self.release()

    cdef void take(self) noexcept nogil:
        PyThread_acquire_lock(self.lock, WAIT_LOCK)

    cdef void release(self) noexcept nogil:
        PyThread_release_lock(self.lock)
