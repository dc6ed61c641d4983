"""The open layer in memory: every value ingested since the last flush, found by key.

Batches are kept as they came (no copy); a hash table leads from a key to the chain of its values,
newest first. One writer and any number of readers, in any threads: a mutex guards the tables and
is held for at most PUT_STRIDE values at a time, without the GIL. What a reader may see is decided
by the LSN it asks for, never by when it asks.

A frozen layer takes no more values; its keys are sorted once, and `next_block` cuts them into the
blocks of a layer file, by key, then from the newest value to the oldest.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from libc.string cimport memcmp, memcpy

from excimer._native.page_chains cimport PageChains

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t* mutex, void* attributes)
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_trylock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)
    int pthread_mutex_destroy(pthread_mutex_t* mutex)

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    static inline uint32_t hash_key(const unsigned char *key) {
        uint64_t first, second; uint16_t third;
        memcpy(&first, key, 8); memcpy(&second, key + 8, 8); memcpy(&third, key + 16, 2);
        uint64_t mixed = first * 0x9E3779B97F4A7C15ull;
        mixed ^= (second + third * 0x10001ull) * 0xC2B2AE3D27D4EB4Full;
        mixed ^= mixed >> 29; mixed *= 0xBF58476D1CE4E5B9ull;
        mixed ^= (uint64_t)third * 0x94D049BB133111EBull; mixed ^= mixed >> 32;
        return (uint32_t)(mixed * 0x9E3779B97F4A7C15ull >> 32);
    }
    static inline void prefetch_bytes(const unsigned char *start, uint32_t length) {
        /* What is longer than this the processor fetches ahead by itself. */
        __builtin_prefetch(start);
        if (length > 64) __builtin_prefetch(start + 64);
        if (length > 128) __builtin_prefetch(start + 128);
    }
    static inline void advance_key(unsigned char *key) {
        for (int at = 17; at >= 14 && ++key[at] == 0; at--) ;
    }
    """
    unsigned int hash_key(const unsigned char* key) nogil
    void advance_key(unsigned char* key) nogil
    void prefetch_bytes(const unsigned char* start, unsigned int length) nogil

cdef enum:
    KEY_SIZE = 18
    ENTRY_SIZE = 40
    VALUE_HEAD_SIZE = 32
    RELATION_BLOCK = 0x00
    SLRU_BLOCK = 0x20
    PUT_STRIDE = 4096

cdef const unsigned char* slru_blocks = b"\x20" + b"\0" * 17

cdef struct Node:
    const unsigned char* payload
    unsigned long long lsn
    unsigned int length
    int older
    int head
    unsigned char kind
    unsigned char flags

cdef struct KeyHead:
    unsigned char key[KEY_SIZE]
    int newest


cdef int compare_heads(const void* left, const void* right) noexcept nogil:
    return memcmp((<const KeyHead*> left).key, (<const KeyHead*> right).key, KEY_SIZE)


cdef class MemoryLayer:
    """Values with start_lsn < LSN; see the module."""
    cdef pthread_mutex_t mutex
    cdef Node* nodes
    cdef int node_count
    cdef int node_capacity
    cdef KeyHead* heads
    cdef int head_count
    cdef int head_capacity
    cdef int* table
    cdef unsigned int table_mask
    cdef int* metadata
    cdef int metadata_count
    cdef int metadata_capacity
    cdef list buffers
    cdef readonly unsigned long long start_lsn
    cdef readonly unsigned long long newest_lsn
    cdef readonly unsigned long long data_size_bytes
    cdef readonly bint frozen

    def __cinit__(self, unsigned long long start_lsn):
        pthread_mutex_init(&self.mutex, NULL)
        self.start_lsn = start_lsn
        self.newest_lsn = start_lsn
        self.buffers = []
        self.table_mask = 1023
        self.table = <int*> calloc(self.table_mask + 1, sizeof(int))
        if self.table is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.nodes)
        free(self.heads)
        free(self.table)
        free(self.metadata)
        pthread_mutex_destroy(&self.mutex)

    @property
    def value_count(self) -> int:
        return self.node_count

    @property
    def key_count(self) -> int:
        return self.head_count

    @property
    def size_bytes(self) -> int:
        """Memory held: the batches' data and the tables over it."""
        return (
            self.data_size_bytes + self.node_capacity * sizeof(Node) + self.head_capacity * sizeof(KeyHead)
            + (self.table_mask + 1) * sizeof(int)
        )

    def put_batch(
        self, bytes entries, bytes data, unsigned long long after_lsn, unsigned long long end_lsn
    ) -> None:
        """Adds a packed batch of values with after_lsn < LSN <= end_lsn.

        Raises ValueError, and adds nothing, if the batch is malformed or an LSN goes back.
        """
        cdef const unsigned char* entry = <const unsigned char*> PyBytes_AS_STRING(entries)
        cdef const unsigned char* base = <const unsigned char*> PyBytes_AS_STRING(data)
        cdef Py_ssize_t count = len(entries) // ENTRY_SIZE, data_size = len(data)
        cdef Py_ssize_t at = 0, stop
        cdef int outcome
        if self.frozen:
            raise ValueError("a frozen layer takes no values")
        if len(entries) % ENTRY_SIZE:
            raise ValueError("entries are 40 bytes each")
        with nogil:
            outcome = self.check(entry, count, data_size, after_lsn, end_lsn)
        if outcome:
            raise ValueError("an entry points outside the data, or its LSN is out of order or out of range")
        self.buffers.append(data)
        with nogil:
            while at < count:
                stop = at + PUT_STRIDE if at + PUT_STRIDE < count else count
                pthread_mutex_lock(&self.mutex)
                try:
                    while at < stop:
                        self.put(entry + at * ENTRY_SIZE, base)
                        at += 1
                finally:
                    pthread_mutex_unlock(&self.mutex)
        self.data_size_bytes += data_size

    cdef int check(
        self, const unsigned char* entry, Py_ssize_t count, Py_ssize_t data_size,
        unsigned long long after_lsn, unsigned long long end_lsn,
    ) noexcept nogil:
        cdef unsigned long long lsn, offset, previous
        previous = (after_lsn if after_lsn > self.newest_lsn else self.newest_lsn) + 1
        cdef unsigned int length
        cdef Py_ssize_t _at
        for _at in range(count):
            memcpy(&length, entry + 20, 4)
            memcpy(&lsn, entry + 24, 8)
            memcpy(&offset, entry + 32, 8)
            if lsn < previous or lsn > end_lsn:
                return 1
            if offset > <unsigned long long> data_size or length > data_size - offset:
                return 1
            previous = lsn
            entry += ENTRY_SIZE
        return 0

    cdef int put(self, const unsigned char* entry, const unsigned char* base) except -1 nogil:
        cdef int number = self.head_for(entry)
        cdef KeyHead* head = &self.heads[number]
        cdef unsigned long long lsn, offset
        cdef unsigned int length
        cdef Node* node
        cdef Node* grown
        memcpy(&length, entry + 20, 4)
        memcpy(&lsn, entry + 24, 8)
        memcpy(&offset, entry + 32, 8)
        if head.newest >= 0 and self.nodes[head.newest].lsn == lsn:
            node = &self.nodes[head.newest]
        else:
            if self.node_count == self.node_capacity:
                self.node_capacity = self.node_capacity * 2 if self.node_capacity else 1024
                grown = <Node*> realloc(self.nodes, self.node_capacity * sizeof(Node))
                if grown is NULL:
                    raise MemoryError
                self.nodes = grown
            node = &self.nodes[self.node_count]
            node.older = head.newest
            node.head = number
            head.newest = self.node_count
            self.node_count += 1
        node.lsn = lsn
        node.length = length
        node.payload = base + offset
        node.kind = entry[18]
        node.flags = entry[19]
        self.newest_lsn = lsn
        return 0

    cdef KeyHead* find(self, const unsigned char* key) noexcept nogil:
        cdef unsigned int at = hash_key(key) & self.table_mask
        cdef int number
        while True:
            number = self.table[at]
            if number == 0:
                return NULL
            if memcmp(self.heads[number - 1].key, key, KEY_SIZE) == 0:
                return &self.heads[number - 1]
            at = (at + 1) & self.table_mask

    cdef int head_for(self, const unsigned char* key) except -1 nogil:
        """The number of the key's head, which is made if it is new."""
        cdef KeyHead* head = self.find(key)
        cdef KeyHead* grown
        cdef int* grown_list
        if head is not NULL:
            return <int> (head - self.heads)
        if <unsigned int> self.head_count * 2 >= self.table_mask:
            self.grow_table()
        if self.head_count == self.head_capacity:
            self.head_capacity = self.head_capacity * 2 if self.head_capacity else 512
            grown = <KeyHead*> realloc(self.heads, self.head_capacity * sizeof(KeyHead))
            if grown is NULL:
                raise MemoryError
            self.heads = grown
        if key[0] != RELATION_BLOCK and key[0] != SLRU_BLOCK:
            if self.metadata_count == self.metadata_capacity:
                self.metadata_capacity = self.metadata_capacity * 2 if self.metadata_capacity else 64
                grown_list = <int*> realloc(self.metadata, self.metadata_capacity * sizeof(int))
                if grown_list is NULL:
                    raise MemoryError
                self.metadata = grown_list
            self.metadata[self.metadata_count] = self.head_count
            self.metadata_count += 1
        head = &self.heads[self.head_count]
        memcpy(head.key, key, KEY_SIZE)
        head.newest = -1
        self.head_count += 1
        self.link_head(self.head_count)
        return self.head_count - 1

    cdef void link_head(self, int number) noexcept nogil:
        cdef unsigned int at = hash_key(self.heads[number - 1].key) & self.table_mask
        while self.table[at]:
            at = (at + 1) & self.table_mask
        self.table[at] = number

    cdef int grow_table(self) except -1 nogil:
        cdef unsigned int mask = self.table_mask * 2 + 1
        cdef int* table = <int*> calloc(<size_t> mask + 1, sizeof(int))
        cdef int number
        if table is NULL:
            raise MemoryError
        free(self.table)
        self.table = table
        self.table_mask = mask
        for number in range(1, self.head_count + 1):
            self.link_head(number)
        return 0

    def collect(self, PageChains chains, unsigned long long high_lsn) -> None:
        """Offers the values of the chains' keys at or below `high_lsn`, newest first."""
        with nogil:
            pthread_mutex_lock(&self.mutex)
            try:
                self.offer_all(chains, high_lsn, <long long> 1 << 62)
            finally:
                pthread_mutex_unlock(&self.mutex)
        chains.hold(self)

    def try_collect(self, PageChains chains, unsigned long long high_lsn, int values_max) -> bool:
        """`collect` without waiting for anybody, nor for the GIL.

        False if a writer is at work just now or more than `values_max` values lie in the way; the chains
        are then of no further use.
        """
        cdef bint whole
        if pthread_mutex_trylock(&self.mutex):
            return False
        try:
            whole = self.offer_all(chains, high_lsn, values_max)
        finally:
            pthread_mutex_unlock(&self.mutex)
        chains.hold(self)
        return whole

    cdef int offer_all(
        self, PageChains chains, unsigned long long high_lsn, long long values_max
    ) except -1 nogil:
        """Whether `values_max` was enough. The mutex is held."""
        cdef unsigned char key[KEY_SIZE]
        cdef KeyHead* head
        cdef Node* node
        cdef int slot, at
        memcpy(key, chains.first_key, KEY_SIZE)
        for slot in range(chains.count):
            if not chains.slots[slot].closed:
                head = self.find(key)
                at = head.newest if head is not NULL else -1
                while at >= 0 and not chains.slots[slot].closed:
                    node = &self.nodes[at]
                    if node.lsn <= high_lsn:
                        chains.offer(slot, node.kind, node.flags, node.lsn, node.payload, node.length)
                    values_max -= 1
                    if values_max < 0:
                        return 0
                    at = node.older
            advance_key(key)
        return 1

    def scan(
        self, bytes start, bytes end, unsigned long long low_lsn, unsigned long long high_lsn, dict found
    ) -> None:
        """Adds to `found` the newest (LSN, kind, payload) with low_lsn < LSN <= high_lsn of each key in
        [start, end) that is not yet in it. Fast when the range holds no block keys.
        """
        cdef const unsigned char* start_key
        cdef const unsigned char* end_key
        cdef bint all_keys
        cdef list hits = []
        cdef KeyHead* head
        cdef Node* node
        cdef int number, at, total
        if len(start) != KEY_SIZE or len(end) != KEY_SIZE:
            raise ValueError("keys have 18 bytes")
        start_key = <const unsigned char*> PyBytes_AS_STRING(start)
        end_key = <const unsigned char*> PyBytes_AS_STRING(end)
        all_keys = start_key[0] in (RELATION_BLOCK, SLRU_BLOCK) or (
            start_key[0] < SLRU_BLOCK and memcmp(end_key, slru_blocks, KEY_SIZE) > 0
        )
        with nogil:
            pthread_mutex_lock(&self.mutex)
        try:
            total = self.head_count if all_keys else self.metadata_count
            for number in range(total):
                head = &self.heads[number if all_keys else self.metadata[number]]
                if memcmp(head.key, start_key, KEY_SIZE) < 0 or memcmp(head.key, end_key, KEY_SIZE) >= 0:
                    continue
                at = head.newest
                while at >= 0 and self.nodes[at].lsn > high_lsn:
                    at = self.nodes[at].older
                if at >= 0 and self.nodes[at].lsn > low_lsn:
                    node = &self.nodes[at]
                    value = (node.lsn, node.kind, <bytes> node.payload[:node.length])
                    hits.append((<bytes> head.key[:KEY_SIZE], value))
        finally:
            pthread_mutex_unlock(&self.mutex)
        for key, value in hits:
            found.setdefault(key, value)

    def keys(self, bytes start, bytes end, unsigned long long high_lsn) -> list:
        """Keys in [start, end) with a value at or below `high_lsn`, in order."""
        cdef const unsigned char* start_key
        cdef const unsigned char* end_key
        cdef KeyHead* head
        cdef int number, at
        cdef list found = []
        if len(start) != KEY_SIZE or len(end) != KEY_SIZE:
            raise ValueError("keys have 18 bytes")
        start_key = <const unsigned char*> PyBytes_AS_STRING(start)
        end_key = <const unsigned char*> PyBytes_AS_STRING(end)
        with nogil:
            pthread_mutex_lock(&self.mutex)
        try:
            for number in range(self.head_count):
                head = &self.heads[number]
                if memcmp(head.key, start_key, KEY_SIZE) < 0 or memcmp(head.key, end_key, KEY_SIZE) >= 0:
                    continue
                at = head.newest
                while at >= 0 and self.nodes[at].lsn > high_lsn:
                    at = self.nodes[at].older
                if at >= 0:
                    found.append(<bytes> head.key[:KEY_SIZE])
        finally:
            pthread_mutex_unlock(&self.mutex)
        found.sort()
        return found

    def find_value(self, bytes key, unsigned long long low_lsn, unsigned long long high_lsn) -> tuple | None:
        """The newest (LSN, kind, payload) of one key with low_lsn < LSN <= high_lsn."""
        cdef const unsigned char* wanted = <const unsigned char*> PyBytes_AS_STRING(key)
        cdef Node node
        cdef bint found
        if len(key) != KEY_SIZE:
            raise ValueError("keys have 18 bytes")
        with nogil:
            pthread_mutex_lock(&self.mutex)
            found = self.find_newest(wanted, low_lsn, high_lsn, &node)
            pthread_mutex_unlock(&self.mutex)
        return (node.lsn, node.kind, <bytes> node.payload[:node.length]) if found else None

    def try_find_value(
        self, bytes key, unsigned long long low_lsn, unsigned long long high_lsn
    ) -> tuple | None:
        """`find_value` as (value or None,) without waiting; None if a writer is at work just now."""
        cdef const unsigned char* wanted = <const unsigned char*> PyBytes_AS_STRING(key)
        cdef Node node
        cdef bint found
        if len(key) != KEY_SIZE:
            raise ValueError("keys have 18 bytes")
        if pthread_mutex_trylock(&self.mutex):
            return None
        found = self.find_newest(wanted, low_lsn, high_lsn, &node)
        pthread_mutex_unlock(&self.mutex)
        return ((node.lsn, node.kind, <bytes> node.payload[:node.length]) if found else None,)

    cdef bint find_newest(
        self, const unsigned char* key, unsigned long long low_lsn, unsigned long long high_lsn, Node* node
    ) noexcept nogil:
        """The mutex is held; payloads stay where they are as long as the layer lives."""
        cdef KeyHead* head = self.find(key)
        cdef int at = head.newest if head is not NULL else -1
        while at >= 0 and self.nodes[at].lsn > high_lsn:
            at = self.nodes[at].older
        if at < 0 or self.nodes[at].lsn <= low_lsn:
            return False
        node[0] = self.nodes[at]
        return True

    def freeze(self) -> None:
        """No more values from here on. Cheap; the sorting waits for `sorted_copy`."""
        self.frozen = True

    def sorted_copy(self) -> SortedValues:
        """The keys of a frozen layer in order, to be cut into blocks. Takes a while, without the GIL."""
        if not self.frozen:
            raise ValueError("only a frozen layer is sorted")
        return SortedValues(self)


cdef class SortedValues:
    """A frozen layer's values by key, newest first; cuts them into blocks.

    The values are laid out in their order first, in one pass over the nodes as they came: to follow each
    key's chain would wait for memory at every step. So whoever cuts blocks can ask for payloads ahead.
    """
    cdef MemoryLayer layer
    cdef KeyHead* heads
    cdef Node* nodes
    cdef int* ends
    """Of each head's nodes."""
    cdef int position
    cdef int node

    def __cinit__(self, MemoryLayer layer):
        cdef size_t count = layer.head_count
        self.layer = layer
        self.heads = <KeyHead*> malloc(count * sizeof(KeyHead) + 1)
        self.ends = <int*> calloc(count + 1, sizeof(int))
        self.nodes = <Node*> malloc(layer.node_count * sizeof(Node) + 1)
        if self.heads is NULL or self.ends is NULL or self.nodes is NULL:
            raise MemoryError
        with nogil:
            memcpy(self.heads, layer.heads, count * sizeof(KeyHead))
            qsort(self.heads, count, sizeof(KeyHead), compare_heads)
            self.lay_out(layer.nodes, layer.node_count, layer.head_count)

    cdef int lay_out(self, const Node* nodes, int node_count, int head_count) except -1 nogil:
        cdef int* places = <int*> malloc(head_count * sizeof(int) + 1)
        cdef int at, position, start = 0
        if places is NULL:
            raise MemoryError
        for position in range(head_count):
            places[nodes[self.heads[position].newest].head] = position
        for at in range(node_count):
            self.ends[places[nodes[at].head]] += 1
        for position in range(head_count):  # from counts to starts, which the nodes then move to ends
            start += self.ends[position]
            self.ends[position] = start - self.ends[position]
        for at in range(node_count - 1, -1, -1):
            position = places[nodes[at].head]
            self.nodes[self.ends[position]] = nodes[at]
            self.ends[position] += 1
        free(places)
        return 0

    def __dealloc__(self):
        free(self.heads)
        free(self.ends)
        free(self.nodes)

    @property
    def key_range(self) -> tuple:
        """The first and the last key."""
        if not self.layer.head_count:
            raise ValueError("the layer is empty")
        return (
            <bytes> self.heads[0].key[:KEY_SIZE],
            <bytes> self.heads[self.layer.head_count - 1].key[:KEY_SIZE],
        )

    def next_block(self, size_t target_size_bytes) -> tuple | None:
        """(raw block, first key, last key, lowest LSN, highest LSN, value count), or None at the end.

        A block holds at least one value and stops before the value that would take it past the target.
        """
        cdef int node = self.node, last_position = self.position, node_count = self.layer.node_count
        cdef size_t size = 0, step
        cdef unsigned long long low = <unsigned long long> -1, high = 0
        cdef unsigned int count = 0
        cdef unsigned char* out
        cdef Node* value
        if node >= node_count:
            return None
        while node < node_count:
            step = VALUE_HEAD_SIZE + self.nodes[node].length
            if size and size + step > target_size_bytes:
                break
            prefetch_bytes(self.nodes[node].payload, self.nodes[node].length)
            size += step
            node += 1
        block = PyBytes_FromStringAndSize(NULL, size)
        out = <unsigned char*> PyBytes_AS_STRING(block)
        first_key = <bytes> self.heads[self.position].key[:KEY_SIZE]
        with nogil:
            while self.node < node:
                value = &self.nodes[self.node]
                last_position = self.position
                memcpy(out, self.heads[self.position].key, KEY_SIZE)
                out[18] = value.kind
                out[19] = value.flags
                memcpy(out + 20, &value.length, 4)
                memcpy(out + 24, &value.lsn, 8)
                memcpy(out + VALUE_HEAD_SIZE, value.payload, value.length)
                out += VALUE_HEAD_SIZE + value.length
                count += 1
                low = value.lsn if value.lsn < low else low
                high = value.lsn if value.lsn > high else high
                self.node += 1
                if self.node == self.ends[self.position]:
                    self.position += 1
        return block, first_key, <bytes> self.heads[last_position].key[:KEY_SIZE], low, high, count
