"""A blocking socket that one thread receives from and any thread sends to; with TLS or without.

What stands behind a channel does not know which of the two it is: `append_path` answers commits through it
without the interpreter either way. With TLS the lock is held while OpenSSL works on bytes and while they are
sent, never while the socket is waited for.

Not here: deadlines of the handshake (`service.connections`), the socket's own timeouts.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc

import os
import ssl

from excimer._native.openssl cimport TlsConnection

cdef extern from "<sys/socket.h>" nogil:
    enum: MSG_NOSIGNAL
    enum: SHUT_RDWR
    ssize_t recv(int fd, void* buffer, size_t size, int flags)
    ssize_t send_to_socket "send"(int fd, const void* buffer, size_t size, int flags)
    int shutdown(int fd, int how)

cdef enum:
    CLOSED = -1
    RAW_SIZE = 1 << 17
    SEND_SIZE = 1 << 14


cdef class Channel:
    """In clear. `close` it before its socket is closed: another one may get its descriptor's number."""

    def __cinit__(self, int fd, *_):
        self.fd = fd
        self.lock = NativeLock()

    def receive_into(self, uint8_t[::1] buffer not None):
        """How many bytes came, at least one; 0: the peer has closed. One thread's. Raises OSError."""
        cdef ssize_t size
        with nogil:
            size = self.receive(&buffer[0], buffer.shape[0])
        if size < 0:
            raise self.take_error()
        return size

    def send_all(self, bytes data not None):
        """Any thread's. A failure shuts the socket down, so that the receiving thread sees it; returns
        whether there was none."""
        cdef bint is_sent
        cdef const uint8_t* begin = <const uint8_t*> PyBytes_AS_STRING(data)
        cdef size_t size = len(data)
        with nogil:
            is_sent = self.send(begin, size)
        return is_sent

    def close(self):
        """From now on nothing is sent. The socket is its owner's to close."""
        with self.lock:
            self.fd = CLOSED

    cdef ssize_t receive(self, uint8_t* buffer, size_t size) noexcept nogil:
        """As `receive_into`; -1: see `take_error`."""
        return self.receive_raw(buffer, size)

    cdef bint send(self, const uint8_t* data, size_t size) noexcept nogil:
        """As `send_all`."""
        cdef bint is_sent
        self.lock.take()
        is_sent = self.send_raw(data, size)
        self.lock.release()
        return is_sent

    cdef object take_error(self):
        error, self.error = self.error, None
        return error

    cdef void remember(self, int error_number) noexcept nogil:
        with gil:
            self.error = OSError(error_number, os.strerror(error_number))

    cdef ssize_t receive_raw(self, uint8_t* buffer, size_t size) noexcept nogil:
        cdef ssize_t received
        while True:
            received = recv(self.fd, buffer, size, 0)
            if received >= 0:
                return received
            if errno != EINTR:
                self.remember(errno)
                return -1

    cdef bint send_raw(self, const uint8_t* data, size_t size) noexcept nogil:
        """With the lock held."""
        cdef size_t done = 0
        cdef ssize_t sent
        while done < size:
            sent = send_to_socket(self.fd, data + done, size - done, MSG_NOSIGNAL)
            if sent >= 0:
                done += sent
            elif errno != EINTR:
                shutdown(self.fd, SHUT_RDWR)
                return False
        return True


cdef class TlsChannel(Channel):
    """Encrypted by `tls`, a connection that nobody else uses; `handshake` comes first."""

    cdef TlsConnection tls
    cdef uint8_t* raw

    def __cinit__(self, int fd, TlsConnection tls not None):
        self.tls = tls
        self.raw = <uint8_t*> malloc(RAW_SIZE)
        if self.raw == NULL:
            raise MemoryError("no memory for what a socket receives")

    def __dealloc__(self):
        free(self.raw)

    def handshake(self):
        """Blocks. Raises OSError, of which ssl.SSLError is one."""
        cdef ssize_t size
        data = b""
        while True:
            try:
                is_done = self.tls.handshake(data)
            finally:
                self.send_all_raw(self.tls.take_output())  # of an error the alert that says why
            if is_done:
                return
            with nogil:
                size = self.receive_raw(self.raw, RAW_SIZE)
            if size < 0:
                raise self.take_error()
            if size == 0:
                raise ConnectionResetError("the peer closed the connection in the handshake")
            data = self.raw[:size]

    cdef bint send_all_raw(self, bytes data):
        cdef bint is_sent
        cdef const uint8_t* begin = <const uint8_t*> PyBytes_AS_STRING(data)
        cdef size_t size = len(data)
        with nogil:
            is_sent = Channel.send(self, begin, size)
        return is_sent

    cdef ssize_t receive(self, uint8_t* buffer, size_t size) noexcept nogil:
        cdef ssize_t received
        cdef bint is_empty, is_failed
        self.lock.take()
        is_empty = not self.tls.has_input()
        self.lock.release()
        while True:
            if is_empty:
                received = self.receive_raw(self.raw, RAW_SIZE)
                if received <= 0:
                    return received
            self.lock.take()
            if is_empty:
                self.tls.feed(self.raw, received)
            received = self.tls.read_some(buffer, size)
            self.flush()  # what TLS itself answers; a failure shows at the next receive
            is_failed = received < 0
            if is_failed:
                received = self.fail()
            self.lock.release()
            if received > 0 or is_failed:
                return received
            is_empty = True

    cdef bint send(self, const uint8_t* data, size_t size) noexcept nogil:
        cdef bint is_sent
        self.lock.take()
        is_sent = self.tls.write_all(data, size) and self.flush()
        if not is_sent:
            shutdown(self.fd, SHUT_RDWR)
        self.lock.release()
        return is_sent

    cdef bint flush(self) noexcept nogil:
        """With the lock held."""
        cdef uint8_t[SEND_SIZE] data
        cdef size_t size
        while True:
            size = self.tls.take_some_output(data, SEND_SIZE)
            if size and not self.send_raw(data, size):
                return False
            if size < SEND_SIZE:
                return True

    cdef ssize_t fail(self) noexcept nogil:
        """What `receive` returns after a failure of TLS: 0 if the peer has ended it in order."""
        with gil:
            error = self.tls.failure()
            if isinstance(error, ssl.SSLZeroReturnError):
                return 0
            self.error = error
            return -1
