/* The arena: one file, mapped by the compute manager and by every process of PostgreSQL, that says
 * which files and blocks live at the page server and which of them are here already.
 *
 *   +--------+-------+---------+--------+-----------------+
 *   | header | files | buckets | misses | presence map    |
 *   | 16 KiB | 128 B | 4 B     | 16 B   | 1 byte a block  |
 *   +--------+-------+---------+--------+-----------------+
 *
 * The manager builds it before PostgreSQL starts (excimer.compute.arena, which compiles this very
 * header) and later changes only `ready` and the settings. Buckets are an open-addressed hash table of
 * file numbers + 1 by path. A presence byte goes from absent to present once and never back.
 *
 * The arena lives as long as the data directory beside it; neither survives the machine.
 * Not here: who may change what, and when (claims.c, hydration.c, file_states.c).
 */
#ifndef EXCIMER_ARENA_H
#define EXCIMER_ARENA_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define ARENA_MAGIC 0x4e45524143584501ull
#define ARENA_VERSION 1u
#define ARENA_BLOCK_SIZE 8192u
#define ARENA_FILES_OFFSET 16384u
#define ARENA_PATH_SIZE 48u
#define ARENA_DATA_DIR_SIZE 1024u
#define ARENA_ADDRESS_SIZE 256u
#define ARENA_TOKEN_SIZE 4096u
#define ARENA_STREAMS 4u
#define ARENA_READ_AHEAD_MAX 128u

enum arena_presence { ARENA_ABSENT = 0, ARENA_PRESENT = 1 };

/* LISTED: only the arena knows the file. MADE: it is in the data directory. GONE: it was deleted or
 * replaced, and its path means nothing to the page server any more. */
enum arena_file_state { ARENA_LISTED = 0, ARENA_MADE = 1, ARENA_GONE = 2 };

enum arena_key_kind { ARENA_RELATION = 0x00, ARENA_SLRU = 0x20 };

struct arena_file {
    char path[ARENA_PATH_SIZE]; /* relative to the data directory, NUL-terminated */
    uint32_t blocks;            /* at the start LSN; blocks past these are local */
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
    uint32_t unused2;
    uint64_t streams[ARENA_STREAMS]; /* read-ahead: next block << 32 | window; racy on purpose */
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
};

_Static_assert(sizeof(struct arena_file) == 128, "an entry is two cache lines");
_Static_assert(sizeof(struct arena_header) <= ARENA_FILES_OFFSET, "the header fits its space");
_Static_assert(sizeof(struct arena_miss) == 16, "a miss is 16 bytes");

/* FNV-1a. */
static inline uint32_t arena_hash(const char *path, size_t size)
{
    uint32_t hash = 2166136261u;
    for (size_t index = 0; index < size; index++)
        hash = (hash ^ (uint8_t)path[index]) * 16777619u;
    return hash;
}

/* Copies the current settings. Two copies that alternate, instead of a lock: a manager that dies
 * while it writes leaves the old ones in force. */
static inline void arena_read_settings(const struct arena_header *header, struct arena_settings *settings)
{
    for (;;) {
        uint64_t generation = __atomic_load_n(&header->settings_generation, __ATOMIC_ACQUIRE);
        memcpy(settings, &header->settings[generation & 1], sizeof *settings);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&header->settings_generation, __ATOMIC_RELAXED) == generation)
            return;
    }
}

/* Makes `settings` the current ones. One writer: the manager. */
static inline void arena_publish_settings(struct arena_header *header, const struct arena_settings *settings)
{
    uint64_t generation = header->settings_generation + 1;
    __atomic_thread_fence(__ATOMIC_RELEASE); /* the last publication is seen before this one is written over it */
    memcpy(&header->settings[generation & 1], settings, sizeof *settings);
    __atomic_store_n(&header->settings_generation, generation, __ATOMIC_RELEASE);
}

static inline void arena_publish_ready(struct arena_header *header)
{
    __atomic_store_n(&header->ready, 1, __ATOMIC_RELEASE);
}

#endif
