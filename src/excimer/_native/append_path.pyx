"""A commit's way through a safekeeper: channel, check, disk, acknowledgement, without the interpreter.

::

    receive -> whole append frames -> check (accepted_wal, C1) -> records checked (wal_scanner)
         -> pwrite -> one fdatasync for all (D1) -> answer

A commit waits for this, at a process whose caches hold somebody else's data by then: the interpreter's way
over the same steps took four times as long there as it does in a loop of its own.

The path is open to one connection at a time, for as long as appends only overwrite prepared bytes of one
segment. Everything else it leaves to the caller: other messages, WAL that is here already, the end of the
segment, a term that changed. `SafekeeperTimeline` opens it and takes it back, under the lock that both hold
while they work. So the append path decides nothing of its own, and closing it costs no more than speed.

Not here: what may be accepted (`accepted_wal`), segments (`safekeeper.wal_storage`), how frames look
(`wire.safekeeping` draws them).
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove

import os

from excimer._native.accepted_wal cimport NEW_WAL, AcceptedWal
from excimer._native.channel cimport Channel
from excimer._native.little_endian cimport put_u32, put_u64, u32, u64
from excimer._native.native_lock cimport NativeLock
from excimer._native.wal_scanner cimport WalScanner

from excimer.pgformat.wal_segment import InvalidWalError
from excimer.wire.safekeeping import WAL_CHUNK_SIZE_BYTES_MAX

cdef extern from "<unistd.h>" nogil:
    ssize_t pwrite(int fd, const void* buffer, size_t size, int64_t offset)
    int fdatasync(int fd)

cdef extern from "<time.h>" nogil:
    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec
    enum: CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec* now)

cdef extern from * nogil:
    """
    #define memory_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    """
    void memory_fence()

cdef enum:
    KIND_POSITION = 4
    BODY_POSITION = 5
    WAL_POSITION = 37  # length 4, type 1, term 8, begin 8, commit 8, horizon 8
    ANSWER_SIZE = 29  # length 4, type 1, term 8, flush 8, commit 8
    FLUSHES_MAX = 64
    NOBODY = -1

cdef uint32_t LENGTH_MAX = WAL_CHUNK_SIZE_BYTES_MAX + WAL_POSITION - KIND_POSITION

cdef struct Batch:  # what became of the bytes of one `receive`
    size_t taken
    bint is_left  # what follows is the caller's
    bint is_failed
    bint tells
    bint has_risen
    int flush_count
    uint64_t flushed_size_bytes
    double[FLUSHES_MAX] flush_seconds
    uint8_t[ANSWER_SIZE] answer


cdef class CommitMark:
    """A commit LSN that one thread raises, and whether another waits for that."""

    cdef readonly uint64_t commit_lsn
    cdef bint is_awaited

    def __cinit__(self, uint64_t commit_lsn):
        self.commit_lsn = commit_lsn

    def wait_next(self):
        """The next rise is to be told. Look at `commit_lsn` after this: it may have risen just before."""
        self.is_awaited = True
        memory_fence()

    def advance(self, uint64_t commit_lsn):
        """Whether the rise is to be told now."""
        return self.rise(commit_lsn)

    cdef bint rise(self, uint64_t commit_lsn) noexcept nogil:
        cdef bint was_awaited
        if commit_lsn <= self.commit_lsn:
            return False
        self.commit_lsn = commit_lsn
        memory_fence()
        was_awaited = self.is_awaited
        self.is_awaited = False
        return was_awaited


cdef class AppendPath:
    """One timeline's. All but `serve` is called with `lock` held, which `serve` takes for each batch.

    `failed(error)` is called with the lock held when the disk or the WAL fails, undoes what is not durable
    and returns the error that `serve` raises. `notify(flush_seconds, size_bytes, has_risen)` is called
    without the lock, after an answer, when a reader waits for the commit LSN or times of fdatasync have
    gathered.
    `disk` has Python's `pwrite(fd, data, offset)` and `fdatasync(fd)` to use in place of the system's.
    """

    cdef readonly NativeLock lock
    cdef CommitMark mark
    cdef object failed
    cdef object notify
    cdef object disk
    cdef AcceptedWal accepted
    cdef WalScanner scanner
    cdef int64_t connection
    cdef int fd
    cdef uint64_t segment_start_lsn
    cdef uint64_t end_lsn
    cdef uint64_t commit_end_lsn
    cdef double[FLUSHES_MAX] flush_seconds
    cdef int flush_count
    cdef uint64_t flushed_size_bytes
    cdef object error

    def __cinit__(self, CommitMark mark, *, failed, notify, disk=None):
        self.lock = NativeLock()
        self.mark = mark
        self.failed = failed
        self.notify = notify
        self.disk = disk
        self.connection = NOBODY

    def open(
        self,
        connection: int,
        AcceptedWal accepted,
        WalScanner scanner,
        *,
        fd: int,
        segment_start_lsn: int,
        end_lsn: int,
        commit_end_lsn: int,
    ):
        """Lets `connection` append up to `end_lsn` to the file `fd`, in which all is flushed, while the
        announced commit LSN is below `commit_end_lsn`."""
        self.accepted = accepted
        self.scanner = scanner
        self.fd = fd
        self.segment_start_lsn = segment_start_lsn
        self.end_lsn = end_lsn
        self.commit_end_lsn = commit_end_lsn
        self.connection = connection

    def close(self):
        """From now on `serve` leaves everything to its caller."""
        self.connection = NOBODY

    def take_flushes(self):
        """What `notify` has not got yet: the times of fdatasync, and how many bytes became durable."""
        seconds = [self.flush_seconds[index] for index in range(self.flush_count)]
        size_bytes = self.flushed_size_bytes
        self.flush_count = 0
        self.flushed_size_bytes = 0
        return seconds, size_bytes

    @property
    def open_to(self):
        """The connection that it is open to, or None."""
        return None if self.connection == NOBODY else self.connection

    def serve(self, int64_t connection, Channel channel not None, uint8_t[::1] buffer, size_t size_bytes):
        """Receives into `buffer`, behind `size_bytes` that are there, and carries out appends until other
        things have come.

        Returns how many bytes at the buffer's start are left to the caller, who parses them and what
        follows; 0 when the peer has closed. Raises OSError for the socket, or what `failed` returned.
        """
        cdef ssize_t left
        with nogil:
            left = self.run(connection, channel, &buffer[0], buffer.shape[0], size_bytes)
        if left >= 0:
            return left
        error, self.error = self.error, None
        raise error

    cdef ssize_t run(
        self, int64_t connection, Channel channel, uint8_t* data, size_t capacity, size_t fill
    ) noexcept nogil:
        """As `serve`; negative with `error` set."""
        cdef ssize_t received
        cdef Batch batch
        while True:
            received = channel.receive(data + fill, capacity - fill)
            if received < 0:
                self.take_error(channel)
                return -1
            if received == 0:
                return 0
            fill += received
            self.take_batch(connection, data, fill, &batch)
            if batch.is_failed:
                return -1
            if batch.taken:
                channel.send(batch.answer, ANSWER_SIZE)  # persisted, so spoken
                if batch.tells:
                    self.tell_batch(&batch)
                fill -= batch.taken
                memmove(data, data + batch.taken, fill)
            if batch.is_left or fill == capacity:
                return fill

    cdef void take_batch(
        self, int64_t connection, const uint8_t* data, size_t size, Batch* batch
    ) noexcept nogil:
        batch.taken = 0
        batch.tells = batch.has_risen = batch.is_left = batch.is_failed = False
        self.lock.take()
        self.store(connection, data, size, batch)
        self.lock.release()

    cdef void store(self, int64_t connection, const uint8_t* data, size_t size, Batch* batch) noexcept nogil:
        """Takes the whole frames that are the append path's; they are durable when it returns."""
        cdef const uint8_t* frame
        cdef uint32_t length
        if self.connection != connection:
            batch.is_left = True
            return
        while size - batch.taken > KIND_POSITION:
            frame = data + batch.taken
            length = u32(frame)
            if frame[KIND_POSITION] != b"A" or not WAL_POSITION - KIND_POSITION < length <= LENGTH_MAX:
                batch.is_left = True
                break
            if size - batch.taken < KIND_POSITION + length:
                break
            if not self.is_plain(frame, length + KIND_POSITION - WAL_POSITION):
                batch.is_left = True
                break
            if not self.write(frame + WAL_POSITION, length + KIND_POSITION - WAL_POSITION):
                batch.is_failed = True
                return
            self.accepted.commit_append(
                self.connection,
                self.accepted.write_lsn + length + KIND_POSITION - WAL_POSITION,
                u64(frame + BODY_POSITION + 16),
                u64(frame + BODY_POSITION + 24),
            )
            batch.taken += KIND_POSITION + length
        if batch.taken and not self.flush(batch):
            batch.is_failed = True

    cdef bint is_plain(self, const uint8_t* frame, uint64_t size) noexcept nogil:
        """Whether the append is the append path's, and may be stored. Changes nothing."""
        cdef uint64_t term = u64(frame + BODY_POSITION)
        cdef uint64_t begin_lsn = u64(frame + BODY_POSITION + 8)
        cdef uint64_t commit_lsn = u64(frame + BODY_POSITION + 16)
        if (
            term != self.accepted.promised_term
            or begin_lsn != self.accepted.write_lsn
            or size > self.end_lsn - begin_lsn
            or commit_lsn >= self.commit_end_lsn
            or self.accepted.announced_commit_lsn >= self.commit_end_lsn
        ):
            return False
        return self.accepted.check_append(term, begin_lsn, begin_lsn + size) == NEW_WAL

    cdef bint write(self, const uint8_t* wal, size_t size) noexcept nogil:
        """Checks WAL that begins at `write_lsn` and hands it to the system."""
        cdef uint64_t offset = self.accepted.write_lsn - self.segment_start_lsn
        cdef size_t done = 0
        cdef ssize_t written
        if not self.scanner.take(wal, size):  # before it is stored: what is not WAL never is
            self.fail_scan()
            return False
        if self.disk is not None:
            return self.write_by_disk(wal, size, offset)
        while done < size:
            written = pwrite(self.fd, wal + done, size - done, offset + done)
            if written > 0:
                done += written
            elif written == 0 or errno != EINTR:
                self.fail(errno if written else EIO)
                return False
        return True

    cdef bint flush(self, Batch* batch) noexcept nogil:
        """Makes durable what is written, and makes the answer that says so (D1)."""
        cdef double started = now()
        if not self.sync():
            return False
        self.flush_seconds[self.flush_count] = now() - started
        self.flush_count += 1
        self.flushed_size_bytes += self.accepted.write_lsn - self.accepted.flush_lsn
        if not self.accepted.take_flush(self.accepted.write_lsn, self.scanner.last_record_end):
            self.fail(EIO)
            return False
        put_u32(batch.answer, ANSWER_SIZE - KIND_POSITION)
        batch.answer[KIND_POSITION] = b"a"
        put_u64(batch.answer + BODY_POSITION, self.accepted.promised_term)
        put_u64(batch.answer + BODY_POSITION + 8, self.accepted.flush_lsn)
        put_u64(batch.answer + BODY_POSITION + 16, self.accepted.commit_lsn)
        batch.has_risen = self.mark.rise(self.accepted.commit_lsn)
        batch.tells = batch.has_risen or self.flush_count == FLUSHES_MAX
        if batch.tells:
            memcpy(batch.flush_seconds, self.flush_seconds, sizeof(double) * self.flush_count)
            batch.flush_count = self.flush_count
            batch.flushed_size_bytes = self.flushed_size_bytes
            self.flush_count = 0
            self.flushed_size_bytes = 0
        return True

    cdef bint sync(self) noexcept nogil:
        if self.disk is not None:
            return self.sync_by_disk()
        while fdatasync(self.fd) != 0:
            if errno != EINTR:
                self.fail(errno)
                return False
        return True

    cdef void tell_batch(self, Batch* batch) noexcept with gil:
        seconds = [batch.flush_seconds[index] for index in range(batch.flush_count)]
        self.notify(seconds, batch.flushed_size_bytes, bool(batch.has_risen))

    cdef bint write_by_disk(self, const uint8_t* wal, size_t size, uint64_t offset) noexcept with gil:
        try:
            self.disk.pwrite(self.fd, PyBytes_FromStringAndSize(<const char*> wal, size), offset)
        except OSError as error:
            self.give_up(error)
            return False
        return True

    cdef bint sync_by_disk(self) noexcept with gil:
        try:
            self.disk.fdatasync(self.fd)
        except OSError as error:
            self.give_up(error)
            return False
        return True

    cdef void fail_scan(self) noexcept with gil:
        try:
            self.scanner.feed(b"")  # raises again what was found
        except (InvalidWalError, MemoryError) as error:
            self.give_up(error)

    cdef void fail(self, int error_number) noexcept with gil:
        self.give_up(OSError(error_number, os.strerror(error_number)))

    cdef void give_up(self, object error) noexcept with gil:
        """With the lock held: nobody may see an acceptor that is ahead of its disk."""
        self.connection = NOBODY
        self.error = error
        self.error = self.failed(error)

    cdef void take_error(self, Channel channel) noexcept with gil:
        self.error = channel.take_error()


cdef double now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec + time.tv_nsec * 1e-9
