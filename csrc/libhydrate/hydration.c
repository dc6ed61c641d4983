/* Hydration: absent blocks become present.
 *
 *   claim a run -> fetch it -> lock it -> look again -> write what is still absent -> mark present -> unlock
 *
 * The second look is what keeps H1: between claim and answer PostgreSQL may have written the block, cut it off or
 * deleted the file, and what is here then is newer than what was asked for. Hydration never makes a file longer.
 *
 * A read fails only when the page server refuses, the local disk is full, the deadline passes or the query is
 * cancelled; each says so in PostgreSQL's log.
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>

#define BACKOFF_NS_MIN 10000000ull
#define BACKOFF_NS_MAX 500000000ull
#define REPORT_AFTER_NS 1000000000ull
#define CLAIM_WAIT_MS 50
#define QUORUM_WAIT_NS 5000000ull

struct hydration {
    int fd;
    int write_fd;
    struct arena_file *file;
    struct patience patience;
    struct arena_settings settings; /* of the attempt under way */
    uint64_t needed_block;          /* the read waits for [needed_block, needed_end) */
    uint64_t needed_end;
    uint64_t own_lsn;     /* later changes are another's */
    uint64_t evicted_lsn; /* the file's, before the attempt under way */
    int store_error;
    bool reported;
    char reason[REASON_SIZE];
};

/* Descriptor to write the file through: PostgreSQL reads some files read-only (CREATE DATABASE copies that way). */
static int writable_descriptor(struct hydration *hydration)
{
    if ((open_files[hydration->fd].flags & O_ACCMODE) == O_RDWR)
        return hydration->fd;
    if (hydration->write_fd < 0) {
        char path[40];
        snprintf(path, sizeof path, "/proc/self/fd/%d", hydration->fd);
        hydration->write_fd = system_openat(AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    }
    return hydration->write_fd;
}

static bool write_fully(int fd, const char *bytes, size_t size, off_t offset)
{
    while (size > 0) {
        ssize_t written = system_pwrite(fd, bytes, size, offset);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return false;
        bytes += written;
        size -= (size_t)written;
        offset += written;
    }
    return true;
}

/* A primary is the only writer, and a block that it has never had cannot have changed since it started. One that has
 * is another primary's work: this one has been superseded and has not heard of it. Told by the blocks that a read
 * waits for only: what comes along may be in shared buffers, changed by ourselves.
 *
 * A block that was taken out may be there, too, for readers that pass by shared buffers (a base backup); but what we have
 * changed in it has come to the page server through the quorum. */
static bool is_anothers_work(const struct hydration *hydration, uint64_t block, const char *page)
{
    uint32_t lsn[2]; /* pd_lsn: the upper half first */
    if (hydration->settings.lsn != UINT64_MAX || hydration->settings.not_modified_since == 0 ||
        hydration->file->kind != ARENA_RELATION || block < hydration->needed_block || block >= hydration->needed_end)
        return false;
    memcpy(lsn, page, sizeof lsn);
    return ((uint64_t)lsn[0] << 32 | lsn[1]) > hydration->own_lsn;
}

/* Up to where changes may be our own. A page server may have what the manager has not told us of yet: waits for it
 * a little, as long as the read has patience. */
static void learn_own_lsn(struct hydration *hydration, const struct run *run, const char *pages)
{
    const struct arena_throttle *throttle = &arena.header->throttle;
    hydration->own_lsn = hydration->settings.not_modified_since;
    if (__atomic_load_n(&hydration->file->evicted_lsn, __ATOMIC_SEQ_CST) == 0)
        return;
    for (uint32_t index = 0; index < run->count; index++)
        while (is_anothers_work(hydration, run->block + index, pages + (size_t)index * BLOCK_SIZE)) {
            uint64_t quorum_lsn = __atomic_load_n(&throttle->quorum_lsn, __ATOMIC_ACQUIRE);
            if (quorum_lsn > hydration->own_lsn)
                hydration->own_lsn = quorum_lsn;
            else if (wait_ready(-1, 0, system_now_ns() + QUORUM_WAIT_NS, &hydration->patience,
                                hydration->settings.connection_generation) < 0 && hydration->patience.ended != NULL)
                return;
        }
}

/* Writes the still absent blocks of a fetched run, under its install lock. */
static bool write_absent(struct hydration *hydration, const struct run *run, uint64_t end, const char *pages)
{
    const struct arena_file *file = hydration->file;
    int fd = writable_descriptor(hydration);
    uint64_t block = run->block, installed = 0;
    if (fd < 0)
        return false;
    while ((block = first_absent(file, block, end)) < end) {
        uint64_t stop = block + 1;
        while (stop < end && !is_present(file, stop))
            stop++;
        for (uint64_t index = block; index < stop; index++)
            if (is_anothers_work(hydration, index, pages + (index - run->block) * BLOCK_SIZE)) {
                errno = ESTALE;
                return false;
            }
        if (!write_fully(fd, pages + (block - run->block) * BLOCK_SIZE, (stop - block) * BLOCK_SIZE,
                         (off_t)(block * BLOCK_SIZE)))
            return false;
        installed += stop - block;
        for (; block < stop; block++)
            set_fetched(file, block, block < hydration->needed_block || block >= hydration->needed_end);
    }
    COUNT(blocks, installed);
    COUNT(kept, run->count - installed);
    return true;
}

/* Always false. The reason is what PostgreSQL's log will say. */
static bool store_failed(struct hydration *hydration)
{
    int error = errno;
    hydration->store_error = error == ESTALE ? EIO : error;
    if (error == ESTALE)
        snprintf(hydration->reason, REASON_SIZE,
                 "it is newer than this compute: another one has taken over the timeline");
    else
        snprintf(hydration->reason, REASON_SIZE, "writing the local file: %s", strerror(error));
    return false;
}

/* The sink of request_pages(). */
static bool install(void *context, const struct run *run, const char *pages)
{
    struct hydration *hydration = context;
    struct stat status;
    COUNT(fetches, 1);
    COUNT(bytes, (uint64_t)run->count * BLOCK_SIZE);
    learn_own_lsn(hydration, run, pages);
    if (lock_install(hydration->file, run->block, run->count) < 0)
        return store_failed(hydration);
    bool stored = true;
    /* Present, written, evicted: all that since the question, so the answer may be older. It is asked for again. */
    if (__atomic_load_n(&hydration->file->evicted_lsn, __ATOMIC_SEQ_CST) != hydration->evicted_lsn)
        COUNT(kept, run->count);
    else if (is_same_file(hydration->fd, &status)) {
        uint64_t end = (uint64_t)run->block + run->count, file_blocks = (uint64_t)status.st_size / BLOCK_SIZE;
        stored = write_absent(hydration, run, end < file_blocks ? end : file_blocks, pages);
    }
    if (!stored)
        store_failed(hydration);
    unlock_install(hydration->file, run->block, run->count);
    return stored;
}

/* Waits for another process's fetch of one block to end. True: the claim is ours; false: see first_absent() and
 * patience. */
static bool wait_for_claim(struct hydration *hydration, uint64_t block)
{
    struct arena_file *file = hydration->file;
    bool claimed = false;
    COUNT(claim_waits, 1);
    __atomic_fetch_add(&file->waiters, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        uint32_t seen = __atomic_load_n(&file->wake, __ATOMIC_SEQ_CST);
        if (is_present(file, block) || (claimed = try_claim(file, block, 1)))
            break;
        if (patience_over(&hydration->patience)) {
            snprintf(hydration->reason, REASON_SIZE, "another process has been fetching it");
            break;
        }
        system_futex_wait(&file->wake, seen, CLAIM_WAIT_MS);
    }
    __atomic_fetch_sub(&file->waiters, 1, __ATOMIC_SEQ_CST);
    return claimed;
}

/* Claims about as much of [block, block + wanted) as is free. How many blocks; 0: the first may be present now, or
 * patience is over. */
static uint32_t claim_run(struct hydration *hydration, uint64_t block, uint32_t wanted)
{
    for (; wanted > 1; wanted /= 2)
        if (try_claim(hydration->file, block, wanted))
            return wanted;
    return try_claim(hydration->file, block, 1) || wait_for_claim(hydration, block) ? 1 : 0;
}

static uint32_t absent_count(const struct arena_file *file, uint64_t block, uint64_t end)
{
    uint64_t stop = block;
    while (stop < end && !is_present(file, stop))
        stop++;
    return (uint32_t)(stop - block);
}

static void report_trouble(struct hydration *hydration, const struct run *run, const char *outcome)
{
    report("fetching %s blocks %u..%u: %s; %s after %.1f s", hydration->file->path, run->block,
           run->block + run->count - 1, hydration->reason, outcome,
           (double)(system_now_ns() - hydration->patience.start_ns) / 1e9);
}

/* A primary has the newest there is, a standby what it has replayed. */
static void follow_replay(struct arena_settings *settings)
{
    uint64_t lsn = settings->lsn == UINT64_MAX ? 0 : replayed_lsn();
    if (lsn > settings->lsn)
        settings->lsn = lsn;
}

/* Repeats attempts until the first run is here. */
static bool fetch(struct hydration *hydration, struct page_request *request, uint32_t needed)
{
    const struct arena_settings *settings = &hydration->settings;
    struct run *first = &request->runs[0];
    uint64_t backoff_ns = BACKOFF_NS_MIN;
    hydration->needed_block = first->block;
    hydration->needed_end = (uint64_t)first->block + needed;
    for (;;) {
        arena_read_settings(arena.header, &hydration->settings);
        follow_replay(&hydration->settings); /* after the claim */
        hydration->evicted_lsn = __atomic_load_n(&hydration->file->evicted_lsn, __ATOMIC_SEQ_CST);
        enum page_result result = request_pages(request, settings, &hydration->patience, hydration->reason);
        if (first->done)
            return true;
        bool had_more = first->count > needed;
        request->run_count = 1; /* hints and read-ahead are not worth a second attempt: they may be what fails */
        if (had_more)
            first->count = needed;
        if (result == PAGES_REFUSED && had_more)
            continue;
        if (result != PAGES_RETRY) {
            hydration->patience.ended = result == PAGES_REFUSED ? "refused" : hydration->patience.ended;
            return false;
        }
        COUNT(retries, 1);
        uint64_t now = system_now_ns();
        if (!hydration->reported && now - hydration->patience.start_ns > REPORT_AFTER_NS) {
            hydration->reported = true;
            report_trouble(hydration, first, "still trying");
        }
        wait_ready(-1, 0, now + backoff_ns, &hydration->patience, settings->connection_generation);
        if (patience_over(&hydration->patience))
            return false;
        backoff_ns = 2 * backoff_ns < BACKOFF_NS_MAX ? 2 * backoff_ns : BACKOFF_NS_MAX;
    }
}

/* Adds hinted runs that nobody is fetching to a request. */
static void add_hints(struct page_request *request)
{
    struct run hinted[RUNS_MAX];
    uint32_t count = take_hints(request->file, &request->runs[0], hinted, RUNS_MAX - 1);
    for (uint32_t index = 0; index < count; index++)
        if (try_claim(request->file, hinted[index].block, hinted[index].count)) {
            COUNT(hints_fetched, hinted[index].count);
            request->runs[request->run_count++] = hinted[index];
        }
}

/* Fetches a claimed run and what may travel with it, then gives up the claims. */
static bool fetch_claimed(struct hydration *hydration, uint64_t block, uint32_t count, uint32_t needed)
{
    struct run runs[RUNS_MAX] = {{(uint32_t)block, count, false}}, claimed[RUNS_MAX];
    struct page_request request = {hydration->file, runs, 1, install, hydration};
    add_hints(&request);
    uint32_t claims = request.run_count;
    memcpy(claimed, runs, sizeof claimed);
    bool fetched = fetch(hydration, &request, needed < count ? needed : count);
    for (uint32_t index = 0; index < claims; index++)
        release_claim(hydration->file, claimed[index].block, claimed[index].count);
    if (fetched)
        record_miss(hydration->file, (uint32_t)block, runs[0].count, needed);
    else
        report_trouble(hydration, &runs[0],
                       hydration->store_error != 0 ? "the read fails" : hydration->patience.ended);
    return fetched;
}

/* One step of hydrate(): the run from an absent block on. `limit`: the file's blocks. */
static bool hydrate_run(struct hydration *hydration, uint64_t block, uint64_t end, uint64_t limit)
{
    struct arena_file *file = hydration->file;
    uint64_t generation = __atomic_load_n(&arena.header->settings_generation, __ATOMIC_ACQUIRE);
    uint32_t window_max = arena.header->settings[generation & 1].read_ahead_blocks;
    if (window_max < 1 || window_max > RUN_BLOCKS_MAX)
        window_max = window_max < 1 ? 1 : RUN_BLOCKS_MAX;
    if (end > block + RUN_BLOCKS_MAX)
        end = block + RUN_BLOCKS_MAX;
    uint32_t needed = absent_count(file, block, end);
    uint32_t window = read_ahead_window(file, (uint32_t)block, window_max);
    uint64_t wanted_end = block + window > end ? block + window : end;
    uint32_t wanted = absent_count(file, block, wanted_end < limit ? wanted_end : limit);
    uint32_t claimed = claim_run(hydration, block, wanted);
    if (claimed == 0) {
        if (hydration->patience.ended == NULL)
            return true;
        report_trouble(hydration, &(struct run){(uint32_t)block, 1, false}, hydration->patience.ended);
        return false;
    }
    uint32_t count = absent_count(file, block, block + claimed);
    bool ok = true;
    if (count > 0)
        ok = fetch_claimed(hydration, block, count, needed);
    if (count < claimed) /* fetch_claimed() gives up only what it fetched */
        release_claim(file, block + count, claimed - count);
    if (ok && count > 0)
        read_ahead_advance(file, (uint32_t)block, (uint32_t)block + count, count);
    return ok;
}

static void count_wait(uint64_t start_ns)
{
    uint64_t wait_ns = system_now_ns() - start_ns;
    COUNT(wait_ns, wait_ns);
    if (wait_ns > arena.header->statistics.wait_ns_max)
        arena.header->statistics.wait_ns_max = wait_ns;
}

int hydrate(int fd, uint64_t block, uint64_t end)
{
    int error = errno;
    struct stat status;
    struct hydration hydration = {.fd = fd, .write_fd = -1, .file = open_files[fd].file,
                                  .patience = patience_of(open_files[fd].file, system_now_ns())};
    bool ok = true;
    while (ok && (block = first_absent(hydration.file, block, end)) < end) {
        if (!is_same_file(fd, &status)) {
            COUNT(stale_descriptors, 1);
            forget_descriptor(fd);
            break;
        }
        uint64_t file_blocks = (uint64_t)status.st_size / BLOCK_SIZE;
        uint64_t mapped_end = arena_mapped_end(hydration.file);
        uint64_t limit = file_blocks < mapped_end ? file_blocks : mapped_end;
        if (block >= limit)
            break; /* past the end of the file, the read itself says so */
        ok = hydrate_run(&hydration, block, end < limit ? end : limit, limit);
        /* The deadline is for one run: a whole segment may take longer, as long as it comes. */
        hydration.patience.deadline_ns = patience_of(hydration.file, system_now_ns()).deadline_ns;
    }
    if (hydration.write_fd >= 0)
        system_close(hydration.write_fd);
    if (ok && hydration.reported)
        report("fetching %s has succeeded after %.1f s", hydration.file->path,
               (double)(system_now_ns() - hydration.patience.start_ns) / 1e9);
    count_wait(hydration.patience.start_ns);
    if (!ok)
        COUNT(errors, 1);
    errno = ok ? error : hydration.store_error != 0 ? hydration.store_error : EIO;
    return ok ? 0 : -1;
}

/* Claims an absent stretch that nobody is fetching, as a request's next run; how many blocks were looked at. */
static uint32_t claim_for_prefetch(struct page_request *request, struct run *claimed, uint64_t block, uint64_t end)
{
    uint32_t absent = absent_count(request->file, block, end < block + RUN_BLOCKS_MAX ? end : block + RUN_BLOCKS_MAX);
    if (!try_claim(request->file, block, absent))
        return absent;
    request->runs[request->run_count] = (struct run){(uint32_t)block, absent_count(request->file, block, block + absent), false};
    claimed[request->run_count++] = (struct run){(uint32_t)block, absent, false};
    return absent;
}

long prefetch(int fd, const struct run *wanted, uint32_t count)
{
    struct run runs[RUNS_MAX], claimed[RUNS_MAX];
    struct hydration hydration = {.fd = fd, .write_fd = -1, .file = open_files[fd].file,
                                  .patience = patience_of(open_files[fd].file, system_now_ns())};
    struct page_request request = {hydration.file, runs, 0, install, &hydration};
    struct stat status;
    long fetched = 0;
    if (!is_same_file(fd, &status)) {
        COUNT(stale_descriptors, 1);
        return 0;
    }
    uint64_t limit = (uint64_t)status.st_size / BLOCK_SIZE, mapped_end = arena_mapped_end(hydration.file);
    limit = limit < mapped_end ? limit : mapped_end;
    for (uint32_t index = 0; index < count; index++) {
        uint64_t end = (uint64_t)wanted[index].block + wanted[index].count, block = wanted[index].block;
        end = end < limit ? end : limit;
        while (request.run_count < RUNS_MAX && (block = first_absent(hydration.file, block, end)) < end)
            block += claim_for_prefetch(&request, claimed, block, end);
    }
    uint32_t claims = request.run_count;
    for (uint32_t index = 0; index < claims; index++)
        runs[index].done = runs[index].count == 0; /* it came between the look and the claim */
    enum page_result result = PAGES_DELIVERED;
    if (claims > 0) {
        arena_read_settings(arena.header, &hydration.settings);
        hydration.evicted_lsn = __atomic_load_n(&hydration.file->evicted_lsn, __ATOMIC_SEQ_CST);
        result = request_pages(&request, &hydration.settings, &hydration.patience, hydration.reason);
    }
    for (uint32_t index = 0; index < claims; index++) {
        release_claim(hydration.file, claimed[index].block, claimed[index].count);
        fetched += runs[index].done ? (long)runs[index].count : 0;
    }
    return result == PAGES_DELIVERED || result == PAGES_REFUSED ? fetched : -1;
}
