/* What the parts of libhydrate offer each other.
 *
 *   interposed_*.c   libc's names: what PostgreSQL calls
 *     file_table.c     which descriptor is which arena file
 *     file_states.c    files made on first use; deletion, renaming
 *     adoption.c       files that PostgreSQL makes, where the cache is bounded
 *     local_changes.c  writes, truncation, allocation beside hydration and eviction
 *     kept_settings.c  ALTER SYSTEM asks the manager
 *     throttle.c       who makes much WAL waits; wal_files.c writes to pg_wal, and waits for room
 *     wal_leaving.c    what walsenders and base backups may take away
 *     reasons.c        an error number with a sentence
 *     reads.c          which blocks are read, and how many of them were here
 *     hydration.c      absent -> present; read_ahead.c and hints.c say what else to fetch
 *     prefetch.c       the same for nobody who waits, in a process of the manager's
 *       claims.c         who fetches, who may change a block (H1)
 *       page_client.c    the page service's protocol; patience.c how long to wait
 *   replay.c         how far a standby is
 *   eviction.h       the other way: present -> absent; the manager's part
 *   arena.c, system.c, report.c   below them all
 *
 * PostgreSQL's processes have one thread each; nothing here is safe for two.
 */
#ifndef HYDRATE_H
#define HYDRATE_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"
#include "system.h"

#define BLOCK_SIZE ARENA_BLOCK_SIZE
#define RUN_BLOCKS_MAX ARENA_READ_AHEAD_MAX
#define RUNS_MAX 32u

/* --- arena.c --- */

struct arena {
    struct arena_header *header; /* NULL: the library does nothing in this process */
    struct arena_file *files;
    uint32_t *buckets;
    struct arena_miss *misses;
    uint8_t *map;
    size_t data_dir_size;
    int fd;
};
extern struct arena arena;

/* Adds to a statistic; its old value. */
#define COUNT(field, amount) __atomic_fetch_add(&arena.header->statistics.field, (amount), __ATOMIC_RELAXED)

/* NULL, or why the arena cannot be used. */
const char *arena_open(const char *path);

/* The path relative to the data directory; NULL if it lies elsewhere. */
const char *path_in_data_dir(const char *path);

/* The live arena file of a path, or NULL. */
struct arena_file *find_file(const char *path);

/* The entry of a path relative to the data directory, whatever has become of the file; or NULL. */
struct arena_file *find_entry(const char *path);

void record_miss(const struct arena_file *file, uint32_t block, uint32_t count, uint32_t needed);

static inline uint32_t file_state(const struct arena_file *file)
{
    return __atomic_load_n(&file->state, __ATOMIC_ACQUIRE);
}

static inline uint8_t *presence_of(const struct arena_file *file, uint64_t block)
{
    return arena_presence_byte(arena.map, file, block);
}

static inline bool is_present(const struct arena_file *file, uint64_t block)
{
    const uint8_t *byte = presence_of(file, block);
    return byte == NULL || (__atomic_load_n(byte, __ATOMIC_ACQUIRE) & ARENA_PRESENT) != 0;
}

/* Only under an install lock, and after the block's bytes are in the file: what the page server has. */
static inline void set_fetched(const struct arena_file *file, uint64_t block, bool is_ahead)
{
    uint8_t *byte = presence_of(file, block);
    if (byte != NULL)
        __atomic_store_n(byte, ARENA_PRESENT | (is_ahead ? ARENA_AHEAD : 0), __ATOMIC_RELEASE);
}

/* The same: what PostgreSQL wrote. */
static inline void set_changed(const struct arena_file *file, uint64_t block)
{
    uint8_t *byte = presence_of(file, block);
    if (byte != NULL)
        __atomic_fetch_or(byte, ARENA_CHANGED, __ATOMIC_SEQ_CST);
}

/* Whether blocks of the file may be taken out: then changes take install locks, and reads look twice. */
static inline bool is_evictable(const struct arena_file *file)
{
    return arena.header->evicts != 0 && file->kind == ARENA_RELATION && file->fork == ARENA_MAIN_FORK;
}

static inline uint32_t evictions_of(const struct arena_file *file)
{
    return __atomic_load_n(&file->evictions, __ATOMIC_SEQ_CST);
}

/* First absent block of [block, end), or end. */
static inline uint64_t first_absent(const struct arena_file *file, uint64_t block, uint64_t end)
{
    while (block < end && is_present(file, block))
        block++;
    return block;
}

/* --- claims.c --- */

/* A claim says "I am fetching these": readers only, held over the network. An install lock says "I am
 * changing these": everyone, held for the time of a local system call. */
bool try_claim(const struct arena_file *file, uint64_t block, uint64_t count);
void release_claim(struct arena_file *file, uint64_t block, uint64_t count);
int lock_install(const struct arena_file *file, uint64_t block, uint64_t count);
void unlock_install(const struct arena_file *file, uint64_t block, uint64_t count);
int lock_state(const struct arena_file *file);
void unlock_state(const struct arena_file *file);
int lock_adoption(void);
void unlock_adoption(void);

/* --- adoption.c --- */

/* Enters a file that PostgreSQL has opened and the arena does not know, where the cache is bounded; the entry, or NULL. */
struct arena_file *adopt_file(const char *path);

/* From now on no block of the file is taken out. */
void keep_file(struct arena_file *file);

/* --- patience.c --- */

struct patience {
    uint64_t start_ns;
    uint64_t deadline_ns;
    uint64_t cancelled_ns; /* when the query's cancellation was first seen; 0: not */
    const char *ended;     /* NULL, or why waiting is over */
    bool reads_relation;
};

struct patience patience_of(const struct arena_file *file, uint64_t start_ns);

/* Whether to give up: the deadline has passed, or the query was cancelled a moment ago. */
bool patience_over(struct patience *patience);

/* Most milliseconds to sleep before asking patience_over() again. */
#define PATIENCE_SLICE_MS 100

/* Waits until fd is ready for `events` or at most `limit_ns` (on the clock). 1 ready, 0 not; -1 patience is over
 * or the manager changed the connection's settings. fd -1 only sleeps. */
int wait_ready(int fd, short events, uint64_t limit_ns, struct patience *patience, uint32_t generation);

/* --- replay.c --- */

/* The end of the last record that recovery has applied; 0 before the first, and where nobody knows. */
uint64_t replayed_lsn(void);

/* Whether this process is the one that replays WAL. */
bool replays_wal(void);

/* --- page_client.c --- */

struct run {
    uint32_t block; /* within the file */
    uint32_t count;
    bool done;
};

enum page_result { PAGES_DELIVERED, PAGES_RETRY, PAGES_REFUSED, PAGES_GIVEN_UP };

/* Takes a run's pages; false: they could not be stored, and the reason says why. */
typedef bool (*page_sink)(void *context, const struct run *run, const char *pages);

struct page_request {
    const struct arena_file *file;
    struct run *runs; /* the first one is needed, the others are welcome */
    uint32_t run_count;
    page_sink sink;
    void *context;
};

/* One attempt: asks for all runs that are not done and hands over what comes. `reason` (>= 256 bytes) says why
 * it is not PAGES_DELIVERED. GIVEN_UP is the sink's or the patience's doing. */
enum page_result request_pages(const struct page_request *request, const struct arena_settings *settings,
                               struct patience *patience, char *reason);

#define REASON_SIZE 256

/* --- read_ahead.c --- */

/* How many blocks to fetch from a missing `block` on. */
uint32_t read_ahead_window(const struct arena_file *file, uint32_t block, uint32_t blocks_max);
void read_ahead_advance(struct arena_file *file, uint32_t block, uint32_t next, uint32_t window);

/* --- hints.c --- */

void remember_hint(const struct arena_file *file, uint64_t block, uint64_t end);

/* Up to `capacity` announced runs of the file that are still absent and outside `needed`; forgets them. */
uint32_t take_hints(const struct arena_file *file, const struct run *needed, struct run *runs, uint32_t capacity);

/* --- hydration.c --- */

/* Makes [block, end) of a tracked descriptor's file present, as far as the file reaches; 0, or -1 and errno. */
int hydrate(int fd, uint64_t block, uint64_t end);

/* One attempt to fetch what is absent of the wanted runs of a tracked descriptor's file and nobody is fetching. Blocks that
 * came; -1: the page server cannot be reached, or the local file not written. */
long prefetch(int fd, const struct run *wanted, uint32_t count);

/* The same for the bytes [offset, offset + size). The warm path of every read: looks at the presence bytes only. */
static inline int hydrate_bytes(int fd, off_t offset, size_t size);

/* --- prefetch.c --- */

/* One line of its stdin, which it changes; what it answers. */
long prefetch_line(char *line);

/* Does what stdin says until it ends, and then ends the process. */
_Noreturn void serve_prefetch(void);

/* --- reads.c --- */

/* hydrate_bytes() for bytes that are read now: leaves the marks of a read. Where blocks may be taken out, what was read holds
 * only if file_evictions() is afterwards what it was before. */
int hydrate_for_read(int fd, off_t offset, size_t size);
static inline uint32_t file_evictions(int fd);

/* --- file_table.c --- */

struct open_file {
    struct arena_file *file;
    uint64_t inode;
    int flags;
};

#define DESCRIPTORS_MAX 65536
extern struct open_file open_files[DESCRIPTORS_MAX];

static inline struct open_file *open_file_of(int fd)
{
    if ((unsigned)fd >= DESCRIPTORS_MAX || open_files[fd].file == NULL)
        return NULL;
    return &open_files[fd];
}

/* The tracked blocks that [offset, offset + size) touches; empty for a negative offset. */
struct block_range {
    uint64_t block;
    uint64_t end;
};

static inline struct block_range blocks_of(const struct arena_file *file, off_t offset, size_t size)
{
    struct block_range range = {0, 0};
    if (offset < 0 || size == 0)
        return range;
    range.block = (uint64_t)offset / BLOCK_SIZE;
    range.end = ((uint64_t)offset + size + BLOCK_SIZE - 1) / BLOCK_SIZE;
    uint64_t mapped_end = arena_mapped_end(file);
    if (range.end > mapped_end)
        range.end = mapped_end;
    if (range.block > range.end)
        range.block = range.end;
    return range;
}

static inline int hydrate_bytes(int fd, off_t offset, size_t size)
{
    const struct open_file *open_file = open_file_of(fd);
    if (open_file == NULL)
        return 0;
    struct block_range range = blocks_of(open_file->file, offset, size);
    uint64_t block = first_absent(open_file->file, range.block, range.end);
    return block == range.end ? 0 : hydrate(fd, block, range.end);
}

static inline uint32_t file_evictions(int fd)
{
    const struct open_file *open_file = open_file_of(fd);
    return open_file == NULL ? 0 : evictions_of(open_file->file);
}

void track_descriptor(int fd, struct arena_file *file, int flags);
void forget_descriptor(int fd);
void copy_descriptor(int from, int to);

/* Still the file that was opened? Descriptors closed inside glibc leave their entry behind. */
bool is_same_file(int fd, struct stat *status);

/* --- file_states.c --- */

/* Makes the file if only the arena knows it yet. 0, or -1 and errno. */
int make_file(struct arena_file *file);

/* make_file() for every listed file directly in the directory, once PostgreSQL has started. */
void complete_directory(const char *path);

int open_tracked(struct arena_file *file, const char *path, int flags, mode_t mode);
int remove_file(const char *path);
int rename_file(const char *from, const char *to);

/* Makes the whole file present, for readers inside glibc. 0, or -1 and errno; 0 for an untracked path. */
int hydrate_path(const char *path);

/* The arena's own path, absolute. */
#define FULL_PATH_SIZE (ARENA_DATA_DIR_SIZE + ARENA_PATH_SIZE + 2)
void full_path(const struct arena_file *file, char *buffer);

/* --- local_changes.c --- */

struct write_guard {
    const struct arena_file *file; /* NULL: nothing absent is touched */
    uint64_t block;
    uint64_t end;
    off_t offset;
};

/* Before a write of [offset, offset + size): 0, or -1 and errno. */
int begin_write(int fd, off_t offset, size_t size, struct write_guard *guard);

/* Before a write that is none of a relation's pages: a file is being copied. */
void begin_copy(int fd);
void end_write(const struct write_guard *guard, ssize_t written);

int truncate_open_file(int fd, off_t size);
int truncate_path(const char *path, off_t size);
int allocate(int fd, int mode, off_t offset, off_t size);

/* --- kept_settings.c --- */

/* Whether a path is the file that ALTER SYSTEM replaces. */
bool is_settings_file(const char *path);

/* In place of that renaming: 0 when the manager has kept the list and put the file in place, else -1 and errno, with a
 * reason for strerror_r(). */
int keep_settings(void);

/* --- kept_slots.c --- */

/* Before a renaming: 0 when it changes no replication slot, or the manager has kept the change; else -1 and errno, with a
 * reason for strerror_r(). */
int keep_slot(const char *from, const char *to);

/* --- manager_client.c --- */

#define MANAGER_ANSWER_SIZE 512

/* Asks the manager by one line: 0 when it answers "kept", else -1, errno and a reason; `what` begins the log's line. */
int ask_manager(const char *request, const char *what);

/* --- throttle.c --- */

/* Whether an error now would be a PANIC. */
bool in_critical_section(void);

/* At the beginning of a system call: a process that makes much WAL waits here, if it holds nothing. Keeps errno. */
void throttle_bulk(void);

/* Until WAL may be written up to `end_lsn`. Keeps errno. */
void wait_wal_limit(uint64_t end_lsn);

/* --- wal_files.c --- */

bool is_wal_path(const char *path);

/* The part of a path below pg_wal; NULL: it lies elsewhere. */
const char *name_in_pg_wal(const char *path);
void track_wal_descriptor(int fd, const char *path, int flags);
void forget_wal_descriptor(int fd);

/* One wait for room, from the first failure on; begins as {0}. */
struct room_wait {
    uint64_t start_ns;
};

/* Whether what failed with `error` is tried again when there is room, because it must not fail. */
bool must_wait_for_room(bool is_wal, int error);
void wait_for_room(struct room_wait *wait, const char *what);
void room_found(const struct room_wait *wait, const char *what);

/* pwrite() that waits for the limit of WAL, and for room where it must not fail. */
ssize_t write_or_wait(int fd, const void *buffer, size_t size, off_t offset);

/* --- wal_leaving.c --- */

/* A descriptor that reads the segment which begins at `start_lsn`. */
void track_wal_reader(int fd, uint64_t start_lsn);
void forget_wal_reader(int fd);

/* Whether a read is one that must not be answered: -1 and errno, else 0. */
int check_wal_read(int fd, off_t offset, size_t size);

/* Before a file is made: 0, or -1 and errno if it ends a base backup and that may not end. */
int check_backup_end(const char *path);

/* --- reasons.c --- */

/* Sets errno, and what strerror_r() says of it next; -1. */
int fail_because(int number, const char *why);
void forget_reason(void);

/* --- report.c --- */

/* One line to stderr, which is PostgreSQL's log. */
void report(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
