"""The arena's bytes: compiled from libhydrate's own header, so that both sides agree by construction.

Not here: files, addresses, what a manager may want (`excimer.compute.arena`).
"""

from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

cdef extern from "../../../csrc/libhydrate/arena.h" nogil:
    uint64_t ARENA_MAGIC
    uint32_t ARENA_VERSION
    uint32_t ARENA_FILES_OFFSET
    uint32_t ARENA_PATH_SIZE
    uint32_t ARENA_DATA_DIR_SIZE
    uint32_t ARENA_IDENTITY_SIZE
    uint32_t ARENA_ADDRESS_SIZE
    uint32_t ARENA_TOKEN_SIZE
    uint32_t ARENA_SEGMENT_BLOCKS
    int ARENA_ABSENT
    int ARENA_PRESENT
    int ARENA_LISTED
    int ARENA_MADE
    int ARENA_RELATION
    int ARENA_SLRU

    struct arena_file:
        char path[48]
        uint32_t blocks
        uint32_t first_block
        uint32_t space
        uint32_t database
        uint32_t relation
        uint8_t kind
        uint8_t fork
        uint64_t map_offset
        uint32_t state
        uint32_t tail_end

    struct arena_settings:
        uint64_t lsn
        uint64_t not_modified_since
        uint32_t connection_generation
        uint32_t deadline_ms
        uint32_t read_ahead_blocks
        uint32_t token_size
        uint8_t tenant[16]
        uint8_t timeline[16]
        char address[256]
        char token[4096]

    struct arena_statistics:
        uint64_t fetches
        uint64_t blocks
        uint64_t bytes
        uint64_t wait_ns
        uint64_t wait_ns_max
        uint64_t connections
        uint64_t retries
        uint64_t errors
        uint64_t cancelled
        uint64_t claim_waits
        uint64_t kept
        uint64_t write_guards
        uint64_t truncations
        uint64_t files_made
        uint64_t hints
        uint64_t hints_fetched
        uint64_t stale_descriptors
        uint64_t misses
        uint64_t bulk_waits
        uint64_t bulk_wait_ns
        uint64_t wal_waits
        uint64_t wal_wait_ns
        uint64_t room_waits
        uint64_t room_wait_ns
        uint64_t reads
        uint64_t read_misses
        uint64_t evicted
        uint64_t reads_again
        uint64_t adopted

    struct arena_cache:
        uint64_t limit_bytes
        uint64_t used_bytes

    struct arena_throttle:
        uint64_t allowed
        uint64_t wal_limit_lsn
        uint64_t wal_segment_size
        uint64_t start_lsn
        uint64_t quorum_lsn

    struct arena_miss:
        uint32_t file
        uint32_t block
        uint32_t count
        uint32_t needed

    struct arena_header:
        uint64_t magic
        uint32_t version
        uint32_t file_count
        uint32_t bucket_count
        uint32_t miss_capacity
        uint64_t buckets_offset
        uint64_t misses_offset
        uint64_t map_offset
        uint64_t total_size
        uint32_t ready
        uint32_t listed
        char data_dir[1024]
        arena_statistics statistics
        arena_throttle throttle
        uint8_t directory_id[16]
        arena_cache cache
        uint32_t evicts
        uint32_t file_capacity
        uint64_t tails_offset
        uint32_t tail_capacity

    const char *arena_fault(const arena_header *header, uint64_t size)
    uint32_t arena_hash(const char *path, size_t size)
    void arena_read_settings(const arena_header *header, arena_settings *settings)
    void arena_publish_settings(arena_header *header, const arena_settings *settings)
    void arena_publish_ready(arena_header *header)
    void arena_renew(arena_header *header, int evicts)
    uint64_t arena_mapped_end(const arena_file *file)
    uint8_t *arena_presence_byte(uint8_t *map, const arena_file *file, uint64_t block)
    void arena_publish_throttle(arena_header *header, uint64_t allowed, uint64_t wal_limit_lsn)
    void arena_publish_quorum(arena_header *header, uint64_t quorum_lsn)
    uint64_t arena_taken(const arena_header *header)
    uint64_t arena_written_lsn(const arena_header *header)
    uint32_t arena_waiting_for_room(const arena_header *header)

cdef uint64_t UINT32_MAX = 0xFFFFFFFF
cdef uint64_t UINT64_MAX = 0xFFFFFFFFFFFFFFFF

cdef enum:
    SEGMENT_BLOCKS = 131072
    DEFAULT_TABLESPACE = 1663
    GLOBAL_TABLESPACE = 1664
    PAGE = 4096

cdef const char *SLRU_PREFIXES[4]
SLRU_PREFIXES[0] = b"pg_xact/"
SLRU_PREFIXES[1] = b"pg_multixact/offsets/"
SLRU_PREFIXES[2] = b"pg_multixact/members/"
SLRU_PREFIXES[3] = b"pg_commit_ts/"
cdef size_t[4] SLRU_PREFIX_SIZES = [8, 21, 21, 13]

cdef const char *FORK_SUFFIXES[3]
FORK_SUFFIXES[0] = b"_fsm"
FORK_SUFFIXES[1] = b"_vm"
FORK_SUFFIXES[2] = b"_init"
cdef size_t[3] FORK_SUFFIX_SIZES = [4, 3, 5]


cdef bint take_number(const char **text, const char *end, uint32_t *number) noexcept nogil:
    """Decimal digits at *text; moves it past them."""
    cdef uint64_t value = 0
    cdef const char *start = text[0]
    while text[0] < end and c'0' <= text[0][0] <= c'9' and value <= UINT32_MAX:
        value = value * 10 + <uint64_t>(text[0][0] - c'0')
        text[0] += 1
    number[0] = <uint32_t>value
    return text[0] > start and value <= UINT32_MAX


cdef bint take_text(const char **text, const char *end, const char *expected, size_t size) noexcept nogil:
    if <size_t>(end - text[0]) < size or memcmp(text[0], expected, size) != 0:
        return False
    text[0] += size
    return True


cdef bint parse_relation(const char *text, const char *end, arena_file *file) noexcept nogil:
    """base/DB/REL[_fork][.segment] or global/REL[_fork][.segment]"""
    cdef uint32_t segment = 0
    cdef int fork
    if take_text(&text, end, b"base/", 5):
        file.space = DEFAULT_TABLESPACE
        if not take_number(&text, end, &file.database) or not take_text(&text, end, b"/", 1):
            return False
    elif take_text(&text, end, b"global/", 7):
        file.space = GLOBAL_TABLESPACE
    else:
        return False
    if not take_number(&text, end, &file.relation):
        return False
    for fork in range(3):
        if take_text(&text, end, FORK_SUFFIXES[fork], FORK_SUFFIX_SIZES[fork]):
            file.fork = <uint8_t>(fork + 1)
            break
    if take_text(&text, end, b".", 1) and not take_number(&text, end, &segment):
        return False
    file.kind = <uint8_t>ARENA_RELATION
    file.first_block = segment * SEGMENT_BLOCKS
    return text == end and segment < 32768


cdef bint parse_slru(const char *text, const char *end, arena_file *file) noexcept nogil:
    """DIRECTORY/XXXX, four to eight upper-case hexadecimal digits"""
    cdef int slru
    cdef uint64_t segment = 0
    for slru in range(4):
        if take_text(&text, end, SLRU_PREFIXES[slru], SLRU_PREFIX_SIZES[slru]):
            break
    else:
        return False
    if not 4 <= end - text <= 8:
        return False
    while text < end:
        if c'0' <= text[0] <= c'9':
            segment = segment * 16 + <uint64_t>(text[0] - c'0')
        elif c'A' <= text[0] <= c'F':
            segment = segment * 16 + <uint64_t>(text[0] - c'A' + 10)
        else:
            return False
        text += 1
    file.kind = <uint8_t>ARENA_SLRU
    file.space = <uint32_t>slru
    file.relation = <uint32_t>segment
    return True


cdef uint32_t bucket_count_for(uint64_t file_count) noexcept nogil:
    cdef uint32_t count = 16
    while count < 2 * file_count:
        count *= 2
    return count


cdef arena_header *header_of(unsigned char[::1] arena) except NULL:
    if arena.shape[0] < ARENA_FILES_OFFSET:
        raise ValueError("too short for an arena")
    return <arena_header *>&arena[0]


cdef arena_file *files_of(arena_header *header) noexcept nogil:
    return <arena_file *>(<char *>header + ARENA_FILES_OFFSET)


cdef uint32_t *buckets_of(arena_header *header) noexcept nogil:
    return <uint32_t *>(<char *>header + header.buckets_offset)


cdef uint8_t *map_of(arena_header *header) noexcept nogil:
    return <uint8_t *>header + header.map_offset


cdef uint64_t tails_offset_for(uint64_t block_count) noexcept nogil:
    return (block_count + PAGE - 1) // PAGE * PAGE


def arena_size(
    uint64_t file_capacity, uint64_t block_count, uint64_t miss_capacity, uint64_t tail_capacity
) -> int:
    cdef uint64_t size = ARENA_FILES_OFFSET + file_capacity * sizeof(arena_file)
    size += bucket_count_for(file_capacity) * sizeof(uint32_t)
    size = (size + 63) // 64 * 64 + miss_capacity * sizeof(arena_miss)
    size = (size + PAGE - 1) // PAGE * PAGE + tails_offset_for(block_count)
    return size + tail_capacity * ARENA_SEGMENT_BLOCKS


cdef bint insert(arena_header *header, uint32_t index, const char *path, size_t size) noexcept nogil:
    """False when the path is there already."""
    cdef uint32_t mask = header.bucket_count - 1
    cdef uint32_t bucket = arena_hash(path, size) & mask
    cdef uint32_t *buckets = buckets_of(header)
    cdef arena_file *files = files_of(header)
    while buckets[bucket] != 0:
        if memcmp(files[buckets[bucket] - 1].path, path, size + 1) == 0:
            return False
        bucket = (bucket + 1) & mask
    buckets[bucket] = index + 1
    return True


def build(
    unsigned char[::1] arena, list files, uint32_t miss_capacity, bytes data_dir, uint64_t wal_segment_size,
    uint64_t wal_start_lsn, bytes directory_id, uint32_t file_capacity, uint32_t tail_capacity, bint evicts
) -> None:
    """Fills a zeroed buffer of `arena_size` bytes, all blocks absent, no limits. `files`: (path, blocks, …).

    Raises ValueError for a path that is no relation or SLRU segment, or comes twice.
    """
    cdef arena_header *header = header_of(arena)
    cdef arena_file *file
    cdef uint32_t index = 0
    cdef uint64_t map_offset = 0
    cdef Py_ssize_t size
    cdef const char *path
    if len(data_dir) >= ARENA_DATA_DIR_SIZE:
        raise ValueError("the data directory's path is too long")
    if <uint32_t>len(directory_id) != ARENA_IDENTITY_SIZE:
        raise ValueError("a directory's identity has 16 bytes")
    header.version = ARENA_VERSION
    header.file_count = <uint32_t>len(files)
    header.listed = header.file_count
    if file_capacity < header.file_count:
        raise ValueError("there must be room for the files")
    header.file_capacity = file_capacity
    header.bucket_count = bucket_count_for(file_capacity)
    header.miss_capacity = miss_capacity
    header.evicts = evicts
    header.buckets_offset = ARENA_FILES_OFFSET + header.file_capacity * sizeof(arena_file)
    header.misses_offset = (header.buckets_offset + header.bucket_count * sizeof(uint32_t) + 63) // 64 * 64
    header.map_offset = (
        header.misses_offset + miss_capacity * sizeof(arena_miss) + PAGE - 1
    ) // PAGE * PAGE
    header.total_size = <uint64_t>arena.shape[0]
    header.throttle.allowed = UINT64_MAX
    header.throttle.wal_limit_lsn = UINT64_MAX
    header.throttle.wal_segment_size = wal_segment_size
    header.throttle.start_lsn = wal_start_lsn
    header.throttle.quorum_lsn = UINT64_MAX
    memcpy(header.data_dir, <const char *>data_dir, <size_t>len(data_dir))
    memcpy(header.directory_id, <const char *>directory_id, <size_t>len(directory_id))
    for item in files:
        file = files_of(header) + index
        path = PyUnicode_AsUTF8AndSize(item[0], &size)
        if size >= <Py_ssize_t>ARENA_PATH_SIZE:
            raise ValueError(f"{item[0]!r} is not a relation's or an SLRU's file")
        memcpy(file.path, path, <size_t>size)
        file.blocks = item[1]
        file.map_offset = map_offset
        map_offset += file.blocks
        if not parse_relation(path, path + size, file) and not parse_slru(path, path + size, file):
            raise ValueError(f"{item[0]!r} is not a relation's or an SLRU's file")
        if file.blocks > SEGMENT_BLOCKS:
            raise ValueError(f"{item[0]!r} cannot have {file.blocks} blocks: a segment has {SEGMENT_BLOCKS}")
        if not insert(header, index, file.path, <size_t>size):
            raise ValueError(f"{item[0]!r} is listed twice")
        index += 1
    header.tails_offset = tails_offset_for(map_offset)
    header.tail_capacity = tail_capacity
    if header.map_offset + header.tails_offset + tail_capacity * ARENA_SEGMENT_BLOCKS > header.total_size:
        raise ValueError("the buffer is too short")
    header.magic = ARENA_MAGIC


def check(unsigned char[::1] arena) -> None:
    """Raises ValueError when the bytes are not an arena of this version."""
    cdef const char *fault = arena_fault(header_of(arena), <uint64_t>arena.shape[0])
    if fault != NULL:
        raise ValueError(fault.decode())


def find(unsigned char[::1] arena, str path) -> int:
    """The file's number, or -1."""
    cdef arena_header *header = header_of(arena)
    cdef bytes encoded = path.encode()
    cdef const char *text = encoded
    cdef size_t size = <size_t>len(encoded)
    cdef uint32_t mask = header.bucket_count - 1
    cdef uint32_t bucket = arena_hash(text, size) & mask
    cdef uint32_t *buckets = buckets_of(header)
    if size >= ARENA_PATH_SIZE:
        return -1
    while buckets[bucket] != 0:
        if memcmp(files_of(header)[buckets[bucket] - 1].path, text, size + 1) == 0:
            return buckets[bucket] - 1
        bucket = (bucket + 1) & mask
    return -1


cdef arena_file *file_at(arena_header *header, uint32_t index) except NULL:
    if index >= header.file_count:
        raise IndexError(index)
    return files_of(header) + index


def file_count(unsigned char[::1] arena) -> int:
    return header_of(arena).file_count


def file_info(unsigned char[::1] arena, uint32_t index) -> tuple[str, int, int]:
    """Path, blocks and state."""
    cdef arena_file *file = file_at(header_of(arena), index)
    return file.path.decode(), file.blocks, file.state


def mark_made(unsigned char[::1] arena, uint32_t index) -> None:
    """The file is in the data directory. Only before PostgreSQL starts."""
    cdef arena_header *header = header_of(arena)
    cdef arena_file *file = file_at(header, index)
    if file.state == <uint32_t>ARENA_LISTED:
        file.state = <uint32_t>ARENA_MADE
        header.listed -= 1


def mark_present(unsigned char[::1] arena, uint32_t index, uint32_t block, uint32_t count) -> None:
    """The blocks' bytes are in the file. Only before PostgreSQL starts."""
    cdef arena_header *header = header_of(arena)
    cdef arena_file *file = file_at(header, index)
    if <uint64_t>block + count > file.blocks:
        raise ValueError(f"block {block + count - 1} lies past the end of {file.path.decode()}")
    memset(map_of(header) + file.map_offset + block, ARENA_PRESENT, count)


def presence(unsigned char[::1] arena, uint32_t index) -> bytes:
    """One byte a block, 0 for absent, else 1; blocks past these are present."""
    cdef arena_header *header = header_of(arena)
    cdef arena_file *file = file_at(header, index)
    cdef uint64_t end = arena_mapped_end(file), block
    cdef bytearray found = bytearray(end)
    cdef unsigned char[::1] target = found
    for block in range(end):
        target[block] = arena_presence_byte(map_of(header), file, block)[0] & ARENA_PRESENT
    return bytes(found)


def marks(unsigned char[::1] arena, uint32_t index) -> bytes:
    """The presence byte of each block, with what reads and writes left there; blocks past these have none."""
    cdef arena_header *header = header_of(arena)
    cdef arena_file *file = file_at(header, index)
    cdef uint64_t end = arena_mapped_end(file), block
    cdef bytearray found = bytearray(end)
    cdef unsigned char[::1] target = found
    with nogil:
        for block in range(end):
            target[block] = arena_presence_byte(map_of(header), file, block)[0]
    return bytes(found)


def set_cache(unsigned char[::1] arena, uint64_t limit_bytes, uint64_t used_bytes) -> None:
    """What readers see of the cache's bound and use."""
    cdef arena_header *header = header_of(arena)
    header.cache.limit_bytes = limit_bytes
    header.cache.used_bytes = used_bytes


def cache(unsigned char[::1] arena) -> tuple[int, int]:
    """Bound and use in bytes, as `set_cache` had them last."""
    cdef arena_header *header = header_of(arena)
    return header.cache.limit_bytes, header.cache.used_bytes


def evicts(unsigned char[::1] arena) -> bool:
    """Whether blocks may be evicted while this PostgreSQL runs."""
    return header_of(arena).evicts != 0


def publish_ready(unsigned char[::1] arena) -> None:
    arena_publish_ready(header_of(arena))


def publish_throttle(unsigned char[::1] arena, uint64_t allowed, uint64_t wal_limit_lsn) -> None:
    """How many bytes of bulk WAL may have been taken, ever, and where WAL ends for now. Wakes who waits."""
    arena_publish_throttle(header_of(arena), allowed, wal_limit_lsn)


def publish_quorum(unsigned char[::1] arena, uint64_t quorum_lsn) -> None:
    """A majority of safekeepers has all WAL below."""
    arena_publish_quorum(header_of(arena), quorum_lsn)


def taken(unsigned char[::1] arena) -> int:
    """Bytes of bulk WAL that processes have made or wait to be allowed, ever."""
    return arena_taken(header_of(arena))


def written_lsn(unsigned char[::1] arena) -> int:
    """How far pg_wal is written; 0 before the first write."""
    return arena_written_lsn(header_of(arena))


def waiting_for_room(unsigned char[::1] arena) -> int:
    """Processes that wait now for space on the disk."""
    return arena_waiting_for_room(header_of(arena))


def publish_settings(
    unsigned char[::1] arena, uint64_t lsn, uint64_t not_modified_since, uint32_t connection_generation,
    uint32_t deadline_ms, uint32_t read_ahead_blocks, bytes tenant, bytes timeline, bytes address, bytes token
) -> None:
    """Makes all settings current at once. Raises ValueError when a text does not fit."""
    cdef arena_settings settings
    memset(&settings, 0, sizeof(settings))
    if len(tenant) != 16 or len(timeline) != 16:
        raise ValueError("tenant and timeline ids have 16 bytes")
    if len(address) >= ARENA_ADDRESS_SIZE or len(token) > ARENA_TOKEN_SIZE:
        raise ValueError("the page server's address or the token is too long")
    settings.lsn = lsn
    settings.not_modified_since = not_modified_since
    settings.connection_generation = connection_generation
    settings.deadline_ms = deadline_ms
    settings.read_ahead_blocks = read_ahead_blocks
    settings.token_size = <uint32_t>len(token)
    memcpy(settings.tenant, <const char *>tenant, 16)
    memcpy(settings.timeline, <const char *>timeline, 16)
    memcpy(settings.address, <const char *>address, <size_t>len(address))
    memcpy(settings.token, <const char *>token, <size_t>len(token))
    arena_publish_settings(header_of(arena), &settings)


def read_settings(unsigned char[::1] arena) -> tuple[int, int, int, int, int, bytes, bytes, bytes, bytes]:
    """In the order of `publish_settings`."""
    cdef arena_settings settings
    arena_read_settings(header_of(arena), &settings)
    return (
        settings.lsn,
        settings.not_modified_since,
        settings.connection_generation,
        settings.deadline_ms,
        settings.read_ahead_blocks,
        <bytes>(<char *>settings.tenant)[:16],
        <bytes>(<char *>settings.timeline)[:16],
        <bytes>settings.address,
        <bytes>settings.token[:settings.token_size],
    )


def renew(unsigned char[::1] arena, bint evicts) -> None:
    """Keeps which files and blocks are here; the rest becomes as at the beginning. While none runs."""
    arena_renew(header_of(arena), evicts)


def data_dir(unsigned char[::1] arena) -> bytes:
    return <bytes>header_of(arena).data_dir


def directory_id(unsigned char[::1] arena) -> bytes:
    """Of the data directory that it describes, 16 bytes."""
    return <bytes>(<char *>header_of(arena).directory_id)[:ARENA_IDENTITY_SIZE]


def statistics(unsigned char[::1] arena) -> dict[str, int]:
    """The counters by the names of struct arena_statistics."""
    return header_of(arena).statistics


def misses(unsigned char[::1] arena) -> list[tuple[str, int, int, int]]:
    """The first misses since the start: path, block, blocks fetched, blocks needed."""
    cdef arena_header *header = header_of(arena)
    cdef arena_miss *miss = <arena_miss *>(<char *>header + header.misses_offset)
    cdef uint64_t count = min(header.statistics.misses, <uint64_t>header.miss_capacity)
    cdef list found = []
    for _ in range(count):
        if miss.count and miss.file < header.file_count:
            found.append((files_of(header)[miss.file].path.decode(), miss.block, miss.count, miss.needed))
        miss += 1
    return found
