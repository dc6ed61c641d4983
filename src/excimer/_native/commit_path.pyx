"""A commit's way through a compute's manager: walsender, safekeepers, confirmation, without the interpreter.

::

    wait -> WAL from postgres -> records checked (wal_scanner) -> append frames to safekeepers
         -> their answers -> commit LSN (led_wal, D1) -> status update to postgres

A commit passes here four times or more, in a process whose caches hold somebody else's data by then: the
interpreter's way over the same steps takes three times as long there as it does in a loop of its own.

It runs inside the event loop's wait (`service.native_loop`), on the loop's own thread: while it runs nothing
else does, so there is no lock, and between waits the interpreter finds everything as if it had done it
itself. What is not WAL in a row or an answer to an append it leaves to the protocols, with the bytes as they
came. So it decides nothing of its own, and leaving it costs no more than speed.

Not here: when it may run, and what has to follow (`compute.commit_relay`); how frames look
(`wire.safekeeping` and `wire.replication` draw them).
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove

from excimer._native.led_wal cimport LedWal, MemberWal, WalRange
from excimer._native.little_endian cimport put_u32, put_u64, u32, u64
from excimer._native.openssl cimport TlsConnection
from excimer._native.wal_scanner cimport WalScanner

cdef extern from "<sys/socket.h>" nogil:
    enum: MSG_NOSIGNAL
    enum: MSG_DONTWAIT
    ssize_t recv(int fd, void* buffer, size_t size, int flags)
    ssize_t send_to_socket "send"(int fd, const void* buffer, size_t size, int flags)

cdef extern from "<sys/epoll.h>" nogil:
    enum: EPOLLIN
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_wait(int epoll_fd, epoll_event* events, int count, int timeout_ms)

cdef extern from "<time.h>" nogil:
    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec
    enum: CLOCK_MONOTONIC
    enum: CLOCK_REALTIME
    int clock_gettime(int clock, timespec* now)

cdef extern from "<endian.h>" nogil:
    uint32_t htobe32(uint32_t value)
    uint32_t be32toh(uint32_t value)
    uint64_t htobe64(uint64_t value)
    uint64_t be64toh(uint64_t value)

cdef extern from "../../../csrc/libhydrate/arena.h" nogil:
    struct arena_header:
        pass
    void arena_publish_quorum(arena_header* header, uint64_t quorum_lsn)

cdef enum:
    EVENT_COUNT = 64
    WAL_HEAD_SIZE = 30  # of CopyData: kind 1, length 4; of WAL: kind 1, start 8, end 8, time 8
    STATUS_SIZE = 39  # kind 1, length 4, kind 1, written 8, flushed 8, applied 8, time 8, reply 1
    APPEND_HEAD_SIZE = 37  # length 4, type 1, term 8, begin 8, commit 8, horizon 8
    ANSWER_SIZE = 29  # length 4, type 1, term 8, flush 8, commit 8
    RECEIVE_SIZE = 256 << 10
    RAW_SIZE = 16 << 10
    WAL_CAPACITY = 1 << 20
    FRAME_CAPACITY = (1 << 20) + APPEND_HEAD_SIZE  # led_wal's chunks are shorter
    SEALED_SIZE = 64 << 10

cdef int64_t POSTGRES_EPOCH_S = 946684800


cdef class Link:
    """A socket to a member that appends are streamed to. With `tls`, its bytes are encrypted by that."""

    cdef int fd
    cdef MemberWal member
    cdef TlsConnection tls
    cdef bint is_encrypted
    cdef bint has_heard
    cdef bint is_left  # what comes next is the protocol's
    cdef bint is_blocked  # its socket takes no more for now
    cdef object left  # bytes for the protocol, decrypted
    cdef object unsent  # bytes for the socket, as they are

    def __cinit__(self, int fd, MemberWal member not None, TlsConnection tls=None):
        self.fd = fd
        self.member = member
        self.tls = tls
        self.is_encrypted = tls is not None

    def take_results(self):
        """Whether it was heard from; bytes that came for the protocol, None if that has nothing to do; bytes
        that its socket is to be sent."""
        results = bool(self.has_heard), (self.left or b"") if self.is_left else None, self.unsent or b""
        self.has_heard = self.is_left = self.is_blocked = False
        self.left = self.unsent = None
        return results


cdef class CommitPath:
    """One leader's: from the socket `source_fd` of its walsender, whose WAL continues at `led`'s window, to
    the members of `links`, by way of `scanner`.

    `start` gives it what it lacks for a wait; after `wait` see `take_results`, and those of each link.
    """

    cdef LedWal led
    cdef WalScanner scanner
    cdef readonly list links
    cdef void** link_pointers
    cdef int link_count
    cdef uint64_t term
    cdef int source_fd
    cdef readonly uint64_t server_end_lsn
    cdef readonly uint64_t confirmed_lsn
    cdef uint64_t confirm_limit_lsn
    cdef uint64_t window_size_max
    cdef uint8_t[::1] arena  # held within a wait only: its owner may close it at other times
    cdef arena_header* header
    cdef bint returns_at_commit
    cdef readonly bint has_committed
    cdef readonly bint is_failed  # the scanner says why
    cdef readonly bint is_left  # the interpreter has something to do
    cdef bint is_source_left
    cdef bint is_source_blocked
    cdef object source_unsent
    cdef uint8_t* wal  # [wal_start_lsn, the window's end)
    cdef uint64_t wal_start_lsn
    cdef uint64_t taken_lsn  # the interpreter has WAL below
    cdef uint8_t* received  # from the source, not parsed yet
    cdef size_t received_size
    cdef uint8_t* raw
    cdef uint8_t* frame

    def __cinit__(
        self, LedWal led not None, WalScanner scanner not None, links, *, int source_fd, uint64_t term
    ):
        self.led = led
        self.scanner = scanner
        self.links = list(links)
        self.link_count = len(self.links)
        self.source_fd = source_fd
        self.term = term
        self.link_pointers = <void**> malloc(sizeof(void*) * max(self.link_count, 1))
        self.wal = <uint8_t*> malloc(WAL_CAPACITY)
        self.received = <uint8_t*> malloc(RECEIVE_SIZE)
        self.raw = <uint8_t*> malloc(RAW_SIZE)
        self.frame = <uint8_t*> malloc(FRAME_CAPACITY)
        if (
            self.link_pointers == NULL
            or self.wal == NULL
            or self.received == NULL
            or self.raw == NULL
            or self.frame == NULL
        ):
            raise MemoryError("no memory for the way of commits")
        for index in range(self.link_count):
            self.link_pointers[index] = <void*> <Link?> self.links[index]

    def __dealloc__(self):
        free(self.link_pointers)
        free(self.wal)
        free(self.received)
        free(self.raw)
        free(self.frame)

    def start(
        self,
        bytes wal not None,
        *,
        uint64_t server_end_lsn,
        uint64_t confirmed_lsn,
        uint64_t confirm_limit_lsn,
        uint64_t window_size_max,
        bint returns_at_commit,
        uint8_t[::1] arena=None,
    ):
        """`wal` ends where the window does, and begins at or below what the least advanced link was sent.

        It waits no longer when the window has `window_size_max`; nor, with `returns_at_commit`, when the
        commit LSN has risen. What is above `confirm_limit_lsn` is not confirmed. The endpoint's open `arena`
        hears of each commit LSN. Raises ValueError for too much WAL.
        """
        cdef size_t size = PyBytes_GET_SIZE(wal)
        if size > WAL_CAPACITY // 2:
            raise ValueError(f"{size} bytes of WAL are not sent yet")
        memcpy(self.wal, PyBytes_AS_STRING(wal), size)
        self.taken_lsn = self.led.window_end_lsn
        self.wal_start_lsn = self.taken_lsn - size
        self.server_end_lsn = server_end_lsn
        self.confirmed_lsn = confirmed_lsn
        self.confirm_limit_lsn = confirm_limit_lsn
        self.window_size_max = window_size_max
        self.arena = arena
        self.header = NULL if arena is None else <arena_header*> &arena[0]
        self.returns_at_commit = returns_at_commit
        self.has_committed = self.is_failed = self.is_left = False
        self.is_source_left = self.is_source_blocked = False

    def wait(self, int epoll_fd, int timeout_ms):
        """Waits for `epoll_fd` as epoll does, -1 for ever, and carries commits meanwhile. The events that are
        not its own: pairs of a descriptor and a mask."""
        cdef epoll_event[EVENT_COUNT] events
        cdef int count, index
        with nogil:
            count = self.run(epoll_fd, timeout_ms, events)
        return [(events[index].data.fd, events[index].events) for index in range(count)]

    def take_results(self):
        """WAL that came, as one piece; bytes that came for the source's protocol; bytes that its socket is to
        be sent."""
        cdef size_t begin = self.taken_lsn - self.wal_start_lsn
        cdef size_t size = self.led.window_end_lsn - self.taken_lsn
        wal = PyBytes_FromStringAndSize(<const char*> self.wal + begin, size)
        left = PyBytes_FromStringAndSize(<const char*> self.received, self.received_size)
        self.taken_lsn = self.led.window_end_lsn
        self.received_size = 0
        unsent, self.source_unsent = self.source_unsent, None
        self.arena = None
        self.header = NULL
        return wal, left, unsent or b""

    cdef int run(self, int epoll_fd, int timeout_ms, epoll_event* events) noexcept nogil:
        """How many events are left, at the array's start."""
        cdef int64_t end_ms = now_ms() + timeout_ms
        cdef int count, index, left
        while True:
            count = epoll_wait(epoll_fd, events, EVENT_COUNT, timeout_ms)
            left = 0
            for index in range(count):
                if not self.take_event(&events[index]):
                    events[left] = events[index]
                    left += 1
            self.go_on()
            if count <= 0 or left or self.is_left:  # count < 0: a signal, whose handler is the interpreter's
                return left
            if timeout_ms >= 0:
                timeout_ms = end_ms - now_ms()
                if timeout_ms <= 0:  # timers are due, however much comes here
                    return 0

    cdef bint take_event(self, const epoll_event* event) noexcept nogil:
        """False for one that the interpreter shall see: of another socket, or of one that has ended."""
        cdef int index
        if event.events != EPOLLIN:
            return False
        if event.data.fd == self.source_fd:
            return not self.is_source_left and self.take_source()
        for index in range(self.link_count):
            if (<Link> self.link_pointers[index]).fd == event.data.fd:
                return self.take_link(<Link> self.link_pointers[index])
        return False

    cdef void go_on(self) noexcept nogil:
        """After what has come: sends what may be sent, confirms what may be confirmed."""
        cdef int index
        if self.is_failed:
            return
        if self.led.advance():
            self.has_committed = True
            if self.returns_at_commit:
                self.is_left = True
            self.confirm()
            if self.header != NULL:
                arena_publish_quorum(self.header, self.led.commit_lsn)
        for index in range(self.link_count):
            self.send_wal(<Link> self.link_pointers[index])
        if (
            self.led.window_end_lsn - self.wal_start_lsn > WAL_CAPACITY - RECEIVE_SIZE
            or self.led.window_end_lsn - self.led.window_start_lsn >= self.window_size_max
        ):
            self.is_left = True

    # From postgres

    cdef bint take_source(self) noexcept nogil:
        """False when the socket has ended."""
        cdef ssize_t size
        cdef size_t taken = 0
        size = receive(
            self.source_fd, self.received + self.received_size, RECEIVE_SIZE - self.received_size
        )
        if size <= 0:
            return False
        self.received_size += size
        while self.received_size - taken >= WAL_HEAD_SIZE:
            size = self.take_message(self.received + taken, self.received_size - taken)
            if size <= 0:
                break
            taken += size
        else:
            size = 0
        self.received_size -= taken
        memmove(self.received, self.received + taken, self.received_size)
        if size < 0 or self.received_size == RECEIVE_SIZE or self.is_other():
            self.is_source_left = self.is_left = True
        return True

    cdef bint is_other(self) noexcept nogil:
        """Whether what has come of a message already says that it is not WAL."""
        return (self.received_size > 0 and self.received[0] != b"d") or (
            self.received_size > 5 and self.received[5] != b"w"
        )

    cdef ssize_t take_message(self, const uint8_t* data, size_t size) noexcept nogil:
        """The length of the message with WAL at the start of `data`; 0 when it is not whole, -1 when it is
        the protocol's."""
        cdef size_t length = 1 + <size_t> be32(data + 1)
        cdef size_t wal_size
        if data[0] != b"d" or data[5] != b"w" or not WAL_HEAD_SIZE <= length <= RECEIVE_SIZE:
            return -1
        if be64(data + 6) != self.led.window_end_lsn:
            return -1
        if size < length:
            return 0
        wal_size = length - WAL_HEAD_SIZE
        if not self.scanner.take(data + WAL_HEAD_SIZE, wal_size):  # before anybody is sent what is not WAL
            self.is_failed = self.is_left = True
            return -1
        self.server_end_lsn = be64(data + 14)
        memcpy(self.wal + (self.led.window_end_lsn - self.wal_start_lsn), data + WAL_HEAD_SIZE, wal_size)
        if not self.led.append_wal(self.led.window_end_lsn + wal_size, self.scanner.last_record_end):
            self.is_failed = self.is_left = True
            return -1
        return length

    # To and from safekeepers

    cdef void send_wal(self, Link link) noexcept nogil:
        cdef WalRange range
        cdef size_t size
        while not link.is_blocked and self.led.begin_append(&link.member.progress, &range):
            size = range.end_lsn - range.begin_lsn
            put_u32(self.frame, APPEND_HEAD_SIZE - 4 + size)
            self.frame[4] = b"A"
            put_u64(self.frame + 5, self.term)
            put_u64(self.frame + 13, range.begin_lsn)
            put_u64(self.frame + 21, self.led.commit_lsn)
            put_u64(self.frame + 29, self.led.horizon_lsn)
            memcpy(self.frame + APPEND_HEAD_SIZE, self.wal + (range.begin_lsn - self.wal_start_lsn), size)
            self.send_frame(link, APPEND_HEAD_SIZE + size)

    cdef void send_frame(self, Link link, size_t size) noexcept nogil:
        cdef uint8_t[SEALED_SIZE] sealed
        cdef size_t sealed_size
        if not link.is_encrypted:
            self.send_raw(link, self.frame, size)
            return
        if not link.tls.write_all(self.frame, size):
            self.leave_link(link)  # whose protocol finds the failure again
            link.is_blocked = True
            return
        while True:
            sealed_size = link.tls.take_some_output(sealed, SEALED_SIZE)
            if sealed_size:
                self.send_raw(link, sealed, sealed_size)
            if sealed_size < SEALED_SIZE:
                return

    cdef void send_raw(self, Link link, const uint8_t* data, size_t size) noexcept nogil:
        cdef size_t done = 0 if link.is_blocked else send_some(link.fd, data, size)
        if done == size:
            return
        link.is_blocked = self.is_left = True
        with gil:
            link.unsent = (link.unsent or b"") + data[done:size]

    cdef bint take_link(self, Link link) noexcept nogil:
        """False when the socket has ended, or when what comes is the protocol's."""
        cdef ssize_t size
        if link.is_left:
            return False
        size = receive(link.fd, self.raw, RAW_SIZE)
        if size <= 0:
            return False
        link.has_heard = True
        if not link.is_encrypted:
            self.take_answers(link, self.raw, size)
            return True
        link.tls.feed(self.raw, size)
        while True:
            size = link.tls.read_some(self.raw, RAW_SIZE)
            if size < 0:
                self.leave_link(link)
            if size <= 0:
                return True
            self.take_answers(link, self.raw, size)

    cdef void take_answers(self, Link link, const uint8_t* data, size_t size) noexcept nogil:
        while size >= ANSWER_SIZE and not link.is_left and self.is_answer(link, data):
            self.led.take_answer(&link.member.progress, u64(data + 13), u64(data + 21))
            data += ANSWER_SIZE
            size -= ANSWER_SIZE
        if size:
            self.leave_link(link)
            with gil:
                link.left = (link.left or b"") + data[:size]

    cdef bint is_answer(self, Link link, const uint8_t* data) noexcept nogil:
        """Whether an append of this leader's was acknowledged, by a member that follows it."""
        return (
            u32(data) == ANSWER_SIZE - 4
            and data[4] == b"a"
            and u64(data + 5) == self.term
            and link.member.progress.has_adopted
        )

    cdef void leave_link(self, Link link) noexcept nogil:
        link.is_left = self.is_left = True

    # To postgres

    cdef void confirm(self) noexcept nogil:
        """Releases the commits that wait for this LSN."""
        cdef uint8_t[STATUS_SIZE] status
        cdef uint64_t lsn = min(self.led.commit_lsn, self.confirm_limit_lsn)
        cdef size_t done
        cdef int index
        if lsn <= self.confirmed_lsn:
            return
        self.confirmed_lsn = lsn
        status[0] = b"d"
        put_be32(status + 1, STATUS_SIZE - 1)
        status[5] = b"r"
        for index in range(3):
            put_be64(status + 6 + 8 * index, lsn)
        put_be64(status + 30, postgres_time_us())
        status[38] = 0
        done = 0 if self.is_source_blocked else send_some(self.source_fd, status, STATUS_SIZE)
        if done < STATUS_SIZE:
            self.is_source_blocked = self.is_left = True
            with gil:
                self.source_unsent = (self.source_unsent or b"") + status[done:STATUS_SIZE]


cdef size_t send_some(int fd, const uint8_t* data, size_t size) noexcept nogil:
    """How much the socket took. What is wrong with it shows again to whoever sends the rest."""
    cdef ssize_t sent
    while True:
        sent = send_to_socket(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT)
        if sent >= 0:
            return sent
        if errno != EINTR:
            return 0


cdef ssize_t receive(int fd, uint8_t* buffer, size_t size) noexcept nogil:
    cdef ssize_t received
    while True:
        received = recv(fd, buffer, size, MSG_DONTWAIT)
        if received >= 0 or errno != EINTR:
            return received


cdef uint32_t be32(const uint8_t* data) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, data, 4)
    return be32toh(value)


cdef uint64_t be64(const uint8_t* data) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, data, 8)
    return be64toh(value)


cdef void put_be32(uint8_t* data, uint32_t value) noexcept nogil:
    value = htobe32(value)
    memcpy(data, &value, 4)


cdef void put_be64(uint8_t* data, uint64_t value) noexcept nogil:
    value = htobe64(value)
    memcpy(data, &value, 8)


cdef int64_t now_ms() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec * 1000 + time.tv_nsec // 1000000


cdef int64_t postgres_time_us() noexcept nogil:
    """Now, since the year 2000."""
    cdef timespec time
    clock_gettime(CLOCK_REALTIME, &time)
    return (time.tv_sec - POSTGRES_EPOCH_S) * 1000000 + time.tv_nsec // 1000
