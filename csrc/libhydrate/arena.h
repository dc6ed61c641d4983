/* The arena: one file, mapped by the compute manager and by every process of PostgreSQL, that says
 * which files and blocks live at the page server and which of them are here already.
 *
 *   +--------+-------+---------+--------+-----------------+----------------+
 *   | header | files | buckets | misses | presence map    | tails          |
 *   | 16 KiB | 160 B | 4 B     | 16 B   | 1 byte a block  | 128 KiB a file |
 *   +--------+-------+---------+--------+-----------------+----------------+
 *
 * The manager builds it before PostgreSQL starts (excimer.compute.arena, which compiles this very
 * header) and later changes only `ready`, the settings, what of WAL is allowed, and what it evicts. Buckets are an
 * open-addressed hash table of file numbers + 1 by path.
 *
 * Where the cache is bounded (`evicts`), there is room for more files and for the presence of more blocks: files that
 * PostgreSQL makes are entered when it opens them (adoption.c), and the manager gives blocks past those of the start a
 * presence byte, in the file's *tail*, before it may evict them (eviction.h). A block without a byte is present. All of that
 * room is a hole in the file until it is used.
 *
 * The arena lives as long as the data directory beside it, through clean stops; neither survives the machine.
 * Not here: who may change what, and when (claims.c, hydration.c, file_states.c).
 */
#ifndef EXCIMER_ARENA_H
#define EXCIMER_ARENA_H

#include <limits.h>
#include <linux/futex.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ARENA_MAGIC 0x4e45524143584501ull
#define ARENA_VERSION 6u
#define ARENA_BLOCK_SIZE 8192u
#define ARENA_FILES_OFFSET 16384u
#define ARENA_PATH_SIZE 48u
#define ARENA_DATA_DIR_SIZE 1024u
#define ARENA_IDENTITY_SIZE 16u
#define ARENA_ADDRESS_SIZE 256u
#define ARENA_TOKEN_SIZE 4096u
#define ARENA_STREAMS 4u
#define ARENA_READ_AHEAD_MAX 128u
#define ARENA_SEGMENT_BLOCKS 131072u

/* Bits of a presence byte. Without PRESENT the others mean nothing. PRESENT and LOCAL change only under the block's
 * install lock (claims.c); the others are set by whoever reads or writes and cleared by the evictor. */
enum arena_presence {
    ARENA_ABSENT = 0,
    ARENA_PRESENT = 1,
    ARENA_TOUCHED = 2, /* read since the evictor came by: it has a second chance */
    ARENA_WRITTEN = 4, /* written since the evictor began the file's epoch */
    ARENA_AHEAD = 8,   /* fetched as read-ahead and not read yet: its first read does not count */
    ARENA_LOCAL = 16,  /* written by PostgreSQL since it was fetched */
};
/* Where the install locks of blocks lie, in the order of files, ARENA_SEGMENT_BLOCKS a file. */
#define ARENA_INSTALL_LOCKS (1ll << 44)
#define ARENA_CHANGED (ARENA_PRESENT | ARENA_LOCAL | ARENA_WRITTEN)

/* LISTED: only the arena knows the file. MADE: it is in the data directory. GONE: it was deleted or
 * replaced, and its path means nothing to the page server any more. */
enum arena_file_state { ARENA_LISTED = 0, ARENA_MADE = 1, ARENA_GONE = 2 };

enum arena_key_kind { ARENA_RELATION = 0x00, ARENA_SLRU = 0x20 };

enum { ARENA_MAIN_FORK = 0 };

struct arena_file {
    char path[ARENA_PATH_SIZE]; /* relative to the data directory, NUL-terminated */
    uint32_t blocks;            /* at the start LSN; blocks past these are local until they are evicted */
    uint32_t first_block;       /* number in the relation of this segment's block 0 */
    uint32_t space;             /* or the SLRU's number */
    uint32_t database;
    uint32_t relation; /* or the SLRU's segment */
    uint8_t kind;
    uint8_t fork;
    uint16_t unused;
    uint64_t map_offset; /* of its first presence byte, within the map */
    uint32_t state;
    uint32_t wake; /* futex: grows whenever a claim on the file ends */
    uint32_t waiters;
    uint32_t evictions;              /* grows before blocks are punched out: a read that saw it grow is repeated */
    uint64_t streams[ARENA_STREAMS]; /* read-ahead: next block << 32 | window; racy on purpose */
    uint64_t tail_offset;            /* of the presence byte of block `blocks`, within the map */
    uint32_t tail_end;               /* blocks from here on have no presence byte; 0: there is no tail */
    uint32_t is_kept;                /* never evicted: how its bytes came here is not in WAL, or not yet */
    uint64_t epoch_lsn;   /* all WAL below covers what was written before the epoch; 0: none began, see eviction.h */
    uint64_t evicted_lsn; /* pages of the file are asked for as of this LSN at least */
};

/* What the manager may change under a running PostgreSQL. */
struct arena_settings {
    uint64_t lsn; /* UINT64_MAX: the newest there is, a primary */
    uint64_t not_modified_since;
    uint32_t connection_generation; /* grows when what a connection is made of changes */
    uint32_t deadline_ms;           /* a fetch that takes longer is an I/O error */
    uint32_t read_ahead_blocks;
    uint32_t token_size;
    uint8_t tenant[16];
    uint8_t timeline[16];
    char address[ARENA_ADDRESS_SIZE]; /* "1.2.3.4:5", "[::1]:5" or "/path/of/a/socket" */
    char token[ARENA_TOKEN_SIZE];
};

struct arena_statistics {
    uint64_t fetches; /* answered requests */
    uint64_t blocks;  /* installed by hydration */
    uint64_t bytes;
    uint64_t wait_ns; /* spent in reads that had to fetch, all processes together */
    uint64_t wait_ns_max;
    uint64_t connections;
    uint64_t retries;
    uint64_t errors;       /* reads that failed */
    uint64_t cancelled;    /* of those, given up because the query was cancelled */
    uint64_t claim_waits;  /* a block that another process was fetching already */
    uint64_t kept;         /* fetched blocks thrown away: present by the time they came */
    uint64_t write_guards; /* writes over absent blocks */
    uint64_t truncations;
    uint64_t files_made;
    uint64_t hints;        /* blocks that PostgreSQL announced */
    uint64_t hints_fetched; /* of those, fetched together with a miss */
    uint64_t stale_descriptors;
    uint64_t misses; /* entries written to the ring of misses, ever */
    uint64_t bulk_waits;   /* of processes that make much WAL (throttle.c) */
    uint64_t bulk_wait_ns;
    uint64_t wal_waits; /* writes that would have passed the limit of WAL */
    uint64_t wal_wait_ns;
    uint64_t room_waits; /* writes that found a full disk and must not fail (wal_files.c) */
    uint64_t room_wait_ns;
    uint64_t reads;       /* blocks that PostgreSQL read, of files that the arena knows */
    uint64_t read_misses; /* of those, blocks that were absent */
    uint64_t evicted;     /* blocks that were punched out */
    uint64_t reads_again; /* reads that an eviction overtook */
    uint64_t adopted;     /* files of PostgreSQL's own that were entered */
};

/* The bound of the cache: what the manager keeps to, and what it found. For whoever looks. */
struct arena_cache {
    uint64_t limit_bytes; /* 0: none */
    uint64_t used_bytes;  /* allocated on the disk for relations' files, at the last look */
};

/* How much WAL may be made: the manager allows, processes take. */
struct arena_throttle {
    uint64_t allowed;       /* tickets for bulk WAL, a byte each, ever; UINT64_MAX: as many as one likes */
    uint64_t wal_limit_lsn; /* pg_wal is not written beyond; UINT64_MAX: no limit */
    uint64_t taken;         /* tickets that processes have taken, ever */
    uint32_t tick;          /* futex: grows whenever `allowed` or the limit does */
    uint32_t waiting_for_room;
    uint64_t wal_segment_size;
    uint64_t written_lsn; /* how far pg_wal is written */
    uint64_t start_lsn;   /* where PostgreSQL's own WAL begins: below, pg_wal holds what a start needs, not the branch's */
    uint64_t quorum_lsn;  /* a majority of safekeepers has all WAL below; UINT64_MAX: nobody asks them */
};

struct arena_miss {
    uint32_t file;
    uint32_t block;  /* within the file */
    uint32_t count;  /* blocks fetched */
    uint32_t needed; /* blocks asked for; the others are read-ahead */
};

struct arena_header {
    uint64_t magic;
    uint32_t version;
    uint32_t file_count;
    uint32_t bucket_count; /* a power of two */
    uint32_t miss_capacity;
    uint64_t buckets_offset;
    uint64_t misses_offset;
    uint64_t map_offset;
    uint64_t total_size;
    uint32_t ready;  /* the scans of PostgreSQL's start-up are over: directories must be complete */
    uint32_t listed; /* files still LISTED */
    uint64_t settings_generation; /* the current settings are settings[generation & 1] */
    char data_dir[ARENA_DATA_DIR_SIZE];
    struct arena_settings settings[2];
    struct arena_statistics statistics;
    struct arena_throttle throttle;
    uint8_t directory_id[ARENA_IDENTITY_SIZE]; /* of the data directory whose files it describes */
    struct arena_cache cache;
    uint32_t evicts;        /* the cache is bounded; fixed while PostgreSQL runs */
    uint32_t file_capacity; /* of the table of files */
    uint64_t tails_offset;  /* within the map */
    uint32_t tail_capacity; /* tails of ARENA_SEGMENT_BLOCKS bytes */
    uint32_t tail_count;
};

_Static_assert(sizeof(struct arena_file) == 160, "an entry is 160 bytes");
_Static_assert(sizeof(struct arena_header) <= ARENA_FILES_OFFSET, "the header fits its space");
_Static_assert(sizeof(struct arena_miss) == 16, "a miss is 16 bytes");
_Static_assert(sizeof(struct arena_settings) % sizeof(uint64_t) == 0, "settings are whole words");

static inline struct arena_file *arena_files(struct arena_header *header)
{
    return (struct arena_file *)((char *)header + ARENA_FILES_OFFSET);
}

static inline uint32_t arena_file_count(const struct arena_header *header)
{
    return __atomic_load_n(&header->file_count, __ATOMIC_ACQUIRE);
}

/* Where presence bytes end: blocks from here on are present. */
static inline uint64_t arena_mapped_end(const struct arena_file *file)
{
    uint32_t tail_end = __atomic_load_n(&file->tail_end, __ATOMIC_SEQ_CST);
    return tail_end > file->blocks ? tail_end : file->blocks;
}

/* A block's presence byte; NULL: it has none, and is present. */
static inline uint8_t *arena_presence_byte(uint8_t *map, const struct arena_file *file, uint64_t block)
{
    if (block < file->blocks)
        return map + file->map_offset + block;
    if (block < __atomic_load_n(&file->tail_end, __ATOMIC_SEQ_CST))
        return map + file->tail_offset + (block - file->blocks);
    return NULL;
}

/* Nobody has followed what was written: all that is here counts as changed. While no PostgreSQL runs. */
static inline void arena_distrust(struct arena_header *header)
{
    uint8_t *map = (uint8_t *)header + header->map_offset;
    for (uint32_t index = 0; index < header->file_count; index++) {
        struct arena_file *file = &arena_files(header)[index];
        uint64_t end = arena_mapped_end(file);
        for (uint64_t block = 0; block < end; block++) {
            uint8_t *byte = arena_presence_byte(map, file, block);
            if ((*byte & ARENA_PRESENT) != 0)
                *byte |= ARENA_CHANGED;
        }
    }
}

/* For a new PostgreSQL on the directory of one that has been shut down: which files and blocks are here stays, all
 * that belongs to the processes that are gone becomes as at the beginning. */
static inline void arena_renew(struct arena_header *header, int evicts)
{
    struct arena_file *files = arena_files(header);
    if (evicts && !header->evicts)
        arena_distrust(header);
    header->evicts = evicts != 0;
    memset(&header->cache, 0, sizeof header->cache);
    struct arena_throttle before = header->throttle;
    header->ready = 0;
    memset(&header->statistics, 0, sizeof header->statistics);
    memset((char *)header + header->misses_offset, 0, header->miss_capacity * sizeof(struct arena_miss));
    header->throttle = (struct arena_throttle){.allowed = UINT64_MAX,
                                               .wal_limit_lsn = UINT64_MAX,
                                               .wal_segment_size = before.wal_segment_size,
                                               .start_lsn = before.start_lsn,
                                               .quorum_lsn = UINT64_MAX};
    for (uint32_t index = 0; index < header->file_count; index++) {
        files[index].waiters = 0;
        memset(files[index].streams, 0, sizeof files[index].streams);
        files[index].epoch_lsn = 0;
        files[index].is_kept = 0; /* its WAL is there now: PostgreSQL was shut down, and a quorum has all */
    }
}

/* Whether `count` items from `offset` on, which is aligned for them, end at or before `end`. */
static inline int arena_has_room(uint64_t offset, uint64_t count, uint64_t item_size, uint64_t end)
{
    return offset % sizeof(uint64_t) == 0 && offset <= end && count <= (end - offset) / item_size;
}

static inline int arena_tail_fault(const struct arena_file *file, uint64_t map_size)
{
    return file->tail_end != 0 &&
           (file->tail_end < file->blocks || file->tail_end > ARENA_SEGMENT_BLOCKS || file->tail_offset > map_size ||
            file->tail_end - file->blocks > map_size - file->tail_offset);
}

/* Every file lies within the map, and every bucket names a file; one at least is empty, or a search for a
 * path that is not there would not end. */
static inline const char *arena_contents_fault(const struct arena_header *header)
{
    const char *start = (const char *)header;
    const struct arena_file *files = (const struct arena_file *)(start + ARENA_FILES_OFFSET);
    const uint32_t *buckets = (const uint32_t *)(start + header->buckets_offset);
    uint64_t map_size = header->total_size - header->map_offset;
    uint32_t used = 0;
    for (uint32_t index = 0; index < header->file_count; index++)
        if (files[index].map_offset > map_size || files[index].blocks > map_size - files[index].map_offset ||
            memchr(files[index].path, 0, sizeof files[index].path) == NULL || arena_tail_fault(&files[index], map_size))
            return "one of its files is damaged";
    for (uint32_t index = 0; index < header->bucket_count; index++) {
        if (buckets[index] > header->file_count)
            return "its table of paths is damaged";
        used += buckets[index] != 0;
    }
    return used < header->bucket_count ? NULL : "its table of paths is full";
}

/* NULL, or what is wrong. Checked as bytes from disk: a wrong arena must stop PostgreSQL, not corrupt it. */
static inline const char *arena_fault(const struct arena_header *header, uint64_t size)
{
    if (size < ARENA_FILES_OFFSET || header->magic != ARENA_MAGIC)
        return "it is not an arena";
    if (header->version != ARENA_VERSION)
        return "it is of another version";
    if (header->total_size != size || header->file_count > header->file_capacity ||
        header->bucket_count <= header->file_capacity ||
        (header->bucket_count & (header->bucket_count - 1)) != 0 ||
        !arena_has_room(ARENA_FILES_OFFSET, header->file_capacity, sizeof(struct arena_file), header->buckets_offset) ||
        !arena_has_room(header->buckets_offset, header->bucket_count, sizeof(uint32_t), header->misses_offset) ||
        !arena_has_room(header->misses_offset, header->miss_capacity, sizeof(struct arena_miss), header->map_offset) ||
        header->map_offset > size || header->tails_offset > size - header->map_offset ||
        header->tail_capacity > (size - header->map_offset - header->tails_offset) / ARENA_SEGMENT_BLOCKS ||
        header->tail_count > header->tail_capacity || memchr(header->data_dir, 0, sizeof header->data_dir) == NULL)
        return "its sizes disagree";
    return arena_contents_fault(header);
}

/* FNV-1a. */
static inline uint32_t arena_hash(const char *path, size_t size)
{
    uint32_t hash = 2166136261u;
    for (size_t index = 0; index < size; index++)
        hash = (hash ^ (uint8_t)path[index]) * 16777619u;
    return hash;
}

/* Copies word by word, so that a copy that a writer overtakes is a mixture and not undefined. */
static inline void arena_copy_settings(struct arena_settings *target, const struct arena_settings *source)
{
    const uint64_t *from = (const uint64_t *)source;
    uint64_t *to = (uint64_t *)target;
    for (size_t word = 0; word < sizeof *source / sizeof *from; word++)
        __atomic_store_n(&to[word], __atomic_load_n(&from[word], __ATOMIC_RELAXED), __ATOMIC_RELAXED);
}

/* Copies the current settings. Two copies that alternate, instead of a lock: a manager that dies
 * while it writes leaves the old ones in force. */
static inline void arena_read_settings(const struct arena_header *header, struct arena_settings *settings)
{
    for (;;) {
        uint64_t generation = __atomic_load_n(&header->settings_generation, __ATOMIC_ACQUIRE);
        arena_copy_settings(settings, &header->settings[generation & 1]);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&header->settings_generation, __ATOMIC_RELAXED) == generation)
            return;
    }
}

/* Makes `settings` the current ones. One writer: the manager. */
static inline void arena_publish_settings(struct arena_header *header, const struct arena_settings *settings)
{
    uint64_t generation = __atomic_load_n(&header->settings_generation, __ATOMIC_RELAXED) + 1;
    /* Whoever reads a word of what follows, in the copy that was current before the last one, also finds
     * that the generation has changed since. The store of it below orders what is before it only. */
    __atomic_thread_fence(__ATOMIC_RELEASE);
    arena_copy_settings(&header->settings[generation & 1], settings);
    __atomic_store_n(&header->settings_generation, generation, __ATOMIC_RELEASE);
}

/* The manager's: what was waited for is looked at again by the caller, who wakes `tick`. */
static inline void arena_publish_throttle(struct arena_header *header, uint64_t allowed, uint64_t wal_limit_lsn)
{
    __atomic_store_n(&header->throttle.allowed, allowed, __ATOMIC_RELEASE);
    __atomic_store_n(&header->throttle.wal_limit_lsn, wal_limit_lsn, __ATOMIC_RELEASE);
    __atomic_fetch_add(&header->throttle.tick, 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &header->throttle.tick, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static inline void arena_publish_quorum(struct arena_header *header, uint64_t quorum_lsn)
{
    __atomic_store_n(&header->throttle.quorum_lsn, quorum_lsn, __ATOMIC_RELEASE);
}

static inline uint64_t arena_taken(const struct arena_header *header)
{
    return __atomic_load_n(&header->throttle.taken, __ATOMIC_RELAXED);
}

static inline uint64_t arena_written_lsn(const struct arena_header *header)
{
    return __atomic_load_n(&header->throttle.written_lsn, __ATOMIC_RELAXED);
}

static inline uint32_t arena_waiting_for_room(const struct arena_header *header)
{
    return __atomic_load_n(&header->throttle.waiting_for_room, __ATOMIC_RELAXED);
}

static inline void arena_publish_ready(struct arena_header *header)
{
    __atomic_store_n(&header->ready, 1, __ATOMIC_RELEASE);
}

#endif
