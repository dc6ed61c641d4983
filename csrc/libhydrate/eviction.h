/* Eviction: present blocks become absent again, so that a compute's cache has a bound. The manager's part; what readers and
 * writers do about it is in interposed_transfer.c and local_changes.c (docs/rfcs/0010-elastic-cache.md).
 *
 *   lock a run -> look again -> raise the file's LSN -> mark absent -> count -> punch out -> unlock
 *
 * A reader looks at the map, reads, and looks whether `evictions` has grown: a hole cannot be taken for a page. A writer
 * holds the install lock, so no block is taken out under it.
 *
 * What may go. A block that came from the page server and was never written may go at any time. One that PostgreSQL has
 * written (LOCAL) may go when the page server has all WAL that it shows, which is more than its page LSN says: an all-visible
 * bit is set without raising that. So a file has *epochs*. When one begins, WRITTEN marks are cleared, and then the manager asks
 * PostgreSQL for the end of its WAL, which is the epoch's LSN. When the page server has ingested that, blocks without the
 * mark, which have not been written since, may go; the file's pages are asked for as of that LSN ever after.
 *
 * What must stay, although its WAL is ingested, is what no WAL says: see page_may_go(). Never considered at all are forks other
 * than main (free space, visibility: its page LSN says little; init), SLRUs, unlogged relations, shared catalogs, copied files.
 *
 * The clock: the hand goes round over all files; a block read since it came by (TOUCHED) stays this time.
 *
 * One evictor an arena. It may die anywhere: locks of an open file description go with it, and an absent block whose
 * bytes are still there is only space that is not free yet. Not here: how much is to go, and when (excimer.compute.cache_keeper).
 */
#ifndef EXCIMER_EVICTION_H
#define EXCIMER_EVICTION_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>

#include "arena.h"

#define EVICTION_RUN_MAX 128u
#define EVICTION_EPOCH_BEGUN UINT64_MAX /* marks are cleared; the LSN comes with the next answer of PostgreSQL */
#define EVICTION_WAL_LSN_MIN (1u << 20) /* below are no LSNs of WAL: 1 in an index that is being built, 1000 and up where there is no WAL */

/* Functions rather than the calls, so that the race tests can stop between steps. */
#ifndef EVICTION_STEP
#define EVICTION_STEP(name) ((void)0)
#endif

struct eviction {
    struct arena_header *header;
    int arena_fd; /* an own open file description of the arena: its locks are this evictor's */
    int data_dir_fd;
    uint64_t ingested_lsn; /* the page server has all WAL below */
    uint64_t oldest_xid;   /* all transactions below have ended; 0: not known, and nothing LOCAL goes */
    int clean_only;        /* nothing LOCAL ever goes: there is no WAL of it */
    int begins_epochs;     /* no question to PostgreSQL is out */
    /* results of a sweep */
    uint64_t evicted;
    uint64_t retained;   /* LOCAL blocks whose WAL is ingested, and which must stay (page_may_go) */
    uint64_t unsettled;  /* LOCAL blocks that wait for their epoch */
    uint64_t epochs;     /* that have begun */
    int punch_error;     /* errno of the last failure to free space; 0: none */
    /* where the hand is */
    uint32_t file;
    uint32_t block;
    unsigned char pages[EVICTION_RUN_MAX * ARENA_BLOCK_SIZE];
};

static inline uint16_t eviction_u16(const unsigned char *bytes)
{
    uint16_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static inline uint32_t eviction_u32(const unsigned char *bytes)
{
    uint32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

/* Of PostgreSQL's headers, the same in 14 to 18: bufpage.h, itemid.h, htup_details.h, nbtree.h, sequence.c. */
enum {
    PAGE_HEADER_SIZE = 24,
    PAGE_LOWER_AT = 12,
    PAGE_SPECIAL_AT = 16,
    TUPLE_XMAX_AT = 4,
    TUPLE_CID_AT = 8,
    TUPLE_POSITION_AT = 16,
    TUPLE_INFOMASK_AT = 20,
    TUPLE_HEADER_SIZE = 23,
    HEAP_COMBO_CID = 0x0020,
    HEAP_XMAX_LOCK_ONLY = 0x0080,
    HEAP_XMAX_IS_MULTI = 0x1000,
    HEAP_XMIN_KNOWN = 0x0300,
    HEAP_XMAX_KNOWN = 0x0c00,
    SPECULATIVE_POSITION = 0xfffe,
    SEQUENCE_MAGIC = 0x1717,
    BTREE_SPECIAL_SIZE = 16,
    BTREE_CYCLE_AT = 14,
    BTREE_CYCLE_MAX = 0xff7f,
    XID_FIRST_NORMAL = 3,
};

static inline int eviction_may_run(uint32_t xid, uint32_t oldest_xid)
{
    return xid >= XID_FIRST_NORMAL && (int32_t)(xid - oldest_xid) >= 0;
}

/* Whether a tuple says what WAL does not: a command's number within a transaction that may still run and would see
 * its own rows otherwise, or that a row is there only on trial (ON CONFLICT). */
static inline int eviction_tuple_must_stay(const unsigned char *tuple, uint32_t oldest_xid)
{
    uint16_t infomask = eviction_u16(tuple + TUPLE_INFOMASK_AT);
    int by_inserter = (infomask & HEAP_XMIN_KNOWN) == 0 && eviction_may_run(eviction_u32(tuple), oldest_xid);
    int by_deleter = (infomask & (HEAP_XMAX_KNOWN | HEAP_XMAX_LOCK_ONLY)) == 0 &&
                     ((infomask & HEAP_XMAX_IS_MULTI) != 0 ||
                      eviction_may_run(eviction_u32(tuple + TUPLE_XMAX_AT), oldest_xid));
    if (by_inserter && eviction_u16(tuple + TUPLE_POSITION_AT) == SPECULATIVE_POSITION)
        return 1;
    return (by_inserter || by_deleter) && (eviction_u32(tuple + TUPLE_CID_AT) != 0 || (infomask & HEAP_COMBO_CID) != 0);
}

static inline int eviction_heap_must_stay(const unsigned char *page, uint32_t oldest_xid)
{
    uint32_t lower = eviction_u16(page + PAGE_LOWER_AT);
    if (lower < PAGE_HEADER_SIZE || lower > ARENA_BLOCK_SIZE)
        return 1;
    for (uint32_t at = PAGE_HEADER_SIZE; at + 4 <= lower; at += 4) {
        uint32_t item = eviction_u32(page + at), offset = item & 0x7fff, kind = item >> 15 & 3;
        if (kind != 1 /* LP_NORMAL */)
            continue;
        if (offset + TUPLE_HEADER_SIZE > ARENA_BLOCK_SIZE ||
            eviction_tuple_must_stay(page + offset, oldest_xid))
            return 1;
    }
    return 0;
}

/* Whether the page server's version of a page that PostgreSQL has written is as good: all its WAL is ingested, and it holds
 * nothing that matters and no WAL says. `lsn_max`: of its epoch. */
static inline int page_may_go(const unsigned char *page, uint64_t lsn_max, uint64_t oldest_xid)
{
    uint64_t lsn = (uint64_t)eviction_u32(page) << 32 | eviction_u32(page + 4);
    uint32_t special = eviction_u16(page + PAGE_SPECIAL_AT), size = ARENA_BLOCK_SIZE - special;
    if (lsn < EVICTION_WAL_LSN_MIN || lsn > lsn_max || special < PAGE_HEADER_SIZE || special > ARENA_BLOCK_SIZE)
        return 0; /* new, built without WAL, or no page */
    if (size == 0)
        return !eviction_heap_must_stay(page, (uint32_t)oldest_xid);
    if (size == 8 && eviction_u32(page + special) == SEQUENCE_MAGIC)
        return 0; /* WAL is ahead of a sequence */
    if (size == BTREE_SPECIAL_SIZE) {
        uint32_t cycle = eviction_u16(page + special + BTREE_CYCLE_AT);
        if (cycle != 0 && cycle <= BTREE_CYCLE_MAX)
            return 0; /* split under a VACUUM, which must see that it was */
    }
    return 1;
}

static inline int eviction_lock(const struct eviction *eviction, short type, uint32_t file, uint64_t block, uint64_t count)
{
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET,
                         .l_start = (off_t)(ARENA_INSTALL_LOCKS + (int64_t)file * ARENA_SEGMENT_BLOCKS + (int64_t)block),
                         .l_len = (off_t)count};
    return fcntl(eviction->arena_fd, F_OFD_SETLK, &lock);
}

static inline uint8_t *eviction_map(const struct eviction *eviction)
{
    return (uint8_t *)eviction->header + eviction->header->map_offset;
}

static inline int eviction_is_settled(const struct eviction *eviction, const struct arena_file *file)
{
    uint64_t lsn = file->epoch_lsn;
    return !eviction->clean_only && eviction->oldest_xid != 0 && lsn != 0 && lsn != EVICTION_EPOCH_BEGUN &&
           lsn <= eviction->ingested_lsn;
}

/* A block that may go as far as its byte says. */
static inline int eviction_is_candidate(uint8_t value, int is_settled)
{
    return (value & (ARENA_PRESENT | ARENA_WRITTEN | ARENA_TOUCHED)) == ARENA_PRESENT &&
           ((value & ARENA_LOCAL) == 0 || is_settled);
}

/* Under the run's install lock: which blocks go. Number of them; `gone` has a bit each. */
static inline uint32_t eviction_choose(struct eviction *eviction, struct arena_file *file, int fd, uint64_t block,
                                       uint32_t count, uint8_t *gone, int *any_local)
{
    uint32_t chosen = 0;
    int is_settled = eviction_is_settled(eviction, file);
    for (uint32_t index = 0; index < count; index++) {
        uint8_t *byte = arena_presence_byte(eviction_map(eviction), file, block + index);
        uint8_t value = byte == NULL ? 0 : __atomic_load_n(byte, __ATOMIC_SEQ_CST);
        gone[index] = 0;
        if (!eviction_is_candidate(value, is_settled))
            continue;
        if ((value & ARENA_LOCAL) != 0) {
            unsigned char *page = eviction->pages;
            ssize_t got = pread(fd, page, ARENA_BLOCK_SIZE, (off_t)((block + index) * ARENA_BLOCK_SIZE));
            if (got != (ssize_t)ARENA_BLOCK_SIZE || !page_may_go(page, file->epoch_lsn, eviction->oldest_xid)) {
                eviction->retained++;
                continue;
            }
            *any_local = 1;
        }
        gone[index] = 1;
        chosen++;
    }
    return chosen;
}

static inline void eviction_punch(struct eviction *eviction, int fd, uint64_t block, uint32_t count, const uint8_t *gone)
{
    for (uint32_t index = 0, end; index < count; index = end + 1) {
        for (end = index; end < count && gone[end]; end++)
            ;
        if (end > index && fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                     (off_t)((block + index) * ARENA_BLOCK_SIZE),
                                     (off_t)(end - index) * ARENA_BLOCK_SIZE) < 0)
            eviction->punch_error = errno;
    }
}

/* Blocks that went. A run that somebody is writing or fetching is left for another time. */
static inline uint32_t evict_run(struct eviction *eviction, uint32_t number, int fd, uint64_t block, uint32_t count)
{
    struct arena_file *file = &arena_files(eviction->header)[number];
    uint8_t gone[EVICTION_RUN_MAX];
    struct stat status;
    uint32_t chosen = 0;
    int any_local = 0;
    if (eviction_lock(eviction, F_WRLCK, number, block, count) < 0)
        return 0;
    EVICTION_STEP("locked");
    if (__atomic_load_n(&file->state, __ATOMIC_ACQUIRE) == ARENA_MADE &&
        __atomic_load_n(&file->is_kept, __ATOMIC_SEQ_CST) == 0 && fstat(fd, &status) == 0 && status.st_nlink > 0) {
        uint64_t size = (uint64_t)status.st_size / ARENA_BLOCK_SIZE;
        uint32_t here = size <= block ? 0 : size - block < count ? (uint32_t)(size - block) : count;
        chosen = eviction_choose(eviction, file, fd, block, here, gone, &any_local);
        if (chosen > 0) {
            /* In this order: who finds a block absent asks for the right version, who has not sees that it was late. */
            if (any_local && file->epoch_lsn > file->evicted_lsn)
                __atomic_store_n(&file->evicted_lsn, file->epoch_lsn, __ATOMIC_SEQ_CST);
            for (uint32_t index = 0; index < here; index++)
                if (gone[index])
                    __atomic_store_n(arena_presence_byte(eviction_map(eviction), file, block + index), ARENA_ABSENT,
                                     __ATOMIC_SEQ_CST);
            EVICTION_STEP("absent");
            __atomic_fetch_add(&file->evictions, 1, __ATOMIC_SEQ_CST);
            eviction_punch(eviction, fd, block, here, gone);
            __atomic_fetch_add(&eviction->header->statistics.evicted, chosen, __ATOMIC_RELAXED);
        }
    }
    eviction_lock(eviction, F_UNLCK, number, block, count);
    return chosen;
}

/* Gives the blocks that a file has grown by presence bytes, as far as there is room. Where a writer did not see one
 * yet, the mark that it would have left is there from the beginning. */
static inline void eviction_extend_tail(struct eviction *eviction, struct arena_file *file, uint64_t blocks)
{
    struct arena_header *header = eviction->header;
    uint64_t end = arena_mapped_end(file);
    blocks = blocks < ARENA_SEGMENT_BLOCKS ? blocks : ARENA_SEGMENT_BLOCKS;
    if (blocks <= end)
        return;
    if (file->tail_end == 0) {
        if (header->tail_count == header->tail_capacity)
            return;
        file->tail_offset = header->tails_offset + (uint64_t)header->tail_count++ * ARENA_SEGMENT_BLOCKS;
    }
    memset(eviction_map(eviction) + file->tail_offset + (end - file->blocks), ARENA_CHANGED | ARENA_TOUCHED, blocks - end);
    __atomic_store_n(&file->tail_end, (uint32_t)blocks, __ATOMIC_SEQ_CST);
}

/* Its relation has an init fork, which is made before its main fork has any page that WAL has. */
static inline int eviction_is_unlogged(const struct eviction *eviction, const struct arena_file *file)
{
    char path[ARENA_PATH_SIZE];
    snprintf(path, sizeof path, "base/%u/%u_init", file->database, file->relation);
    return faccessat(eviction->data_dir_fd, path, F_OK, 0) == 0 || errno != ENOENT;
}

static inline int eviction_is_eligible(const struct eviction *eviction, const struct arena_file *file)
{
    return __atomic_load_n(&file->state, __ATOMIC_ACQUIRE) == ARENA_MADE && file->kind == ARENA_RELATION &&
           file->fork == ARENA_MAIN_FORK && file->database != 0 &&
           __atomic_load_n(&file->is_kept, __ATOMIC_SEQ_CST) == 0 && !eviction_is_unlogged(eviction, file);
}

/* Moves the hand over one open file, from where it is, until `wanted` blocks went. 1: it came to the end. */
static inline int eviction_pass_file(struct eviction *eviction, int fd, uint64_t end, uint64_t wanted)
{
    struct arena_file *file = &arena_files(eviction->header)[eviction->file];
    uint8_t *map = eviction_map(eviction);
    int is_settled = eviction_is_settled(eviction, file);
    while (eviction->block < end) {
        uint64_t block = eviction->block;
        uint32_t count = 0;
        while (block + count < end && count < EVICTION_RUN_MAX) {
            uint8_t *byte = arena_presence_byte(map, file, block + count);
            uint8_t value = __atomic_load_n(byte, __ATOMIC_SEQ_CST);
            if (!eviction_is_candidate(value, is_settled))
                break;
            count++;
        }
        if (count == 0) {
            uint8_t *byte = arena_presence_byte(map, file, block);
            uint8_t value = __atomic_fetch_and(byte, (uint8_t)~ARENA_TOUCHED, __ATOMIC_SEQ_CST);
            eviction->unsettled += (value & ARENA_LOCAL) != 0;
        }
        if (count > 0)
            eviction->evicted += evict_run(eviction, eviction->file, fd, block, count);
        eviction->block = (uint32_t)(block + count + (count == 0));
        if (eviction->evicted >= wanted)
            return 0;
    }
    return 1;
}

/* Only after a whole pass. The LSN comes after the marks are cleared: see eviction_settle(). */
static inline void eviction_begin_epoch(struct eviction *eviction, struct arena_file *file, uint64_t end)
{
    uint8_t *map = eviction_map(eviction);
    if (eviction->clean_only || !eviction->begins_epochs || (file->epoch_lsn != 0 && !eviction_is_settled(eviction, file)))
        return;
    uint64_t marked = 0;
    for (uint64_t block = 0; block < end; block++) {
        uint8_t *byte = arena_presence_byte(map, file, block);
        if ((__atomic_load_n(byte, __ATOMIC_SEQ_CST) & ARENA_WRITTEN) == 0)
            continue;
        __atomic_fetch_and(byte, (uint8_t)~ARENA_WRITTEN, __ATOMIC_SEQ_CST);
        marked++;
    }
    if (marked == 0 && file->epoch_lsn != 0)
        return; /* the one that is settled goes on */
    file->epoch_lsn = EVICTION_EPOCH_BEGUN;
    eviction->epochs++;
}

/* One file from where the hand is. 1: the hand is through with it. */
static inline int eviction_visit(struct eviction *eviction, uint64_t wanted)
{
    struct arena_file *file = &arena_files(eviction->header)[eviction->file];
    struct stat status;
    int is_through = 1;
    if (!eviction_is_eligible(eviction, file))
        return 1;
    int fd = openat(eviction->data_dir_fd, file->path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return 1;
    if (fstat(fd, &status) == 0) {
        uint64_t blocks = (uint64_t)status.st_size / ARENA_BLOCK_SIZE;
        if (!eviction->clean_only)
            eviction_extend_tail(eviction, file, blocks);
        uint64_t mapped_end = arena_mapped_end(file), end = blocks < mapped_end ? blocks : mapped_end;
        is_through = eviction_pass_file(eviction, fd, end, wanted);
        if (is_through)
            eviction_begin_epoch(eviction, file, end);
    }
    close(fd);
    return is_through;
}

/* Moves the hand until `wanted` blocks went or it has been everywhere: from the middle of a file round to its middle. Results
 * are in `eviction`. */
static inline void eviction_sweep(struct eviction *eviction, uint64_t wanted)
{
    uint32_t count = arena_file_count(eviction->header), visits_max = count + (eviction->block > 0);
    eviction->evicted = eviction->retained = eviction->unsettled = eviction->epochs = 0;
    eviction->punch_error = 0;
    for (uint32_t visits = 0; visits < visits_max && eviction->evicted < wanted; visits++) {
        if (eviction->file >= count)
            eviction->file = eviction->block = 0;
        if (!eviction_visit(eviction, wanted))
            return;
        eviction->file++;
        eviction->block = 0;
    }
}

/* PostgreSQL has been asked after the last sweep: `end_lsn` is where its WAL ended, all transactions below `oldest_xid` have
 * ended. */
static inline void eviction_settle(struct eviction *eviction, uint64_t end_lsn, uint64_t oldest_xid)
{
    uint32_t count = arena_file_count(eviction->header);
    uint64_t in_page = end_lsn % ARENA_BLOCK_SIZE;
    if (in_page == 24 || in_page == 40)
        end_lsn -= in_page; /* the header of a page of WAL that has no record yet, and may not come for long */
    eviction->oldest_xid = oldest_xid;
    for (uint32_t index = 0; index < count; index++) {
        struct arena_file *file = &arena_files(eviction->header)[index];
        if (file->epoch_lsn == EVICTION_EPOCH_BEGUN)
            file->epoch_lsn = end_lsn;
    }
}

/* Bytes on the disk of the files that the arena knows. */
static inline uint64_t eviction_used_bytes(const struct eviction *eviction)
{
    uint32_t count = arena_file_count(eviction->header);
    uint64_t used = 0;
    struct stat status;
    for (uint32_t index = 0; index < count; index++) {
        const struct arena_file *file = &arena_files(eviction->header)[index];
        if (__atomic_load_n(&file->state, __ATOMIC_ACQUIRE) == ARENA_MADE &&
            fstatat(eviction->data_dir_fd, file->path, &status, AT_SYMLINK_NOFOLLOW) == 0)
            used += (uint64_t)status.st_blocks * 512;
    }
    return used;
}

#endif
