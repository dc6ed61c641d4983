/* What leaves an endpoint through replication: never what its branch may turn out not to have.
 *
 * Below the LSN of the start, pg_wal holds what PostgreSQL needed to begin there, and nothing of the branch. A receiver
 * that goes on in a segment of an earlier start would put that into its archive without a word: a walsender's read there
 * fails. Base backups never come there, because each begins with a new segment.
 *
 * PostgreSQL waits for the quorum before it answers a commit, not before it ends a base backup. If the endpoint died
 * then, the backup would hold what the branch has lost, and an increment onto it would lack what the branch has
 * instead. So a backup ends once a majority of safekeepers has all WAL written so far. It ends by writing its
 * history file, "SEGMENT.OFFSET.backup" in pg_wal. Who is cancelled meanwhile has no backup.
 *
 * Nor does PostgreSQL wait before it decodes a commit: what is on its own disk goes to consumers of logical replication.
 * If the endpoint died then, they would have rows that the branch has lost and, worse, have confirmed an LSN below which
 * the branch comes to have other rows, which they are never sent. So whoever reads WAL for a slot waits until a majority
 * has it.
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <errno.h>
#include <signal.h>
#include <time.h>

#define NOT_OPEN (-1)
#define FIRST_LOOK_NS 200000l /* a quorum takes less than a millisecond */
#define LAST_LOOK_NS 10000000l
#define REPORT_AFTER_NS 1000000000ull
#define BACKUP_SUFFIX ".backup"

extern bool am_walsender __attribute__((weak));
extern bool am_db_walsender __attribute__((weak)); /* one that may decode, too: that reads single pages */
extern void *MyReplicationSlot __attribute__((weak)); /* of the process that decodes, or sends WAL for a slot */
extern uint64_t GetFlushRecPtr(void *timeline) __attribute__((weak)); /* 14 has no argument, and ignores it */
extern volatile sig_atomic_t QueryCancelPending __attribute__((weak));
extern volatile sig_atomic_t ProcDiePending __attribute__((weak));

static int reader_fd = NOT_OPEN;
static uint64_t reader_start_lsn;

void track_wal_reader(int fd, uint64_t start_lsn)
{
    reader_fd = fd;
    reader_start_lsn = start_lsn;
}

void forget_wal_reader(int fd)
{
    if (fd == reader_fd)
        reader_fd = NOT_OPEN;
}

static bool sends_wal_as_it_is(size_t size)
{
    if (&am_walsender == NULL || !am_walsender)
        return false;
    return &am_db_walsender == NULL || !am_db_walsender || size > BLOCK_SIZE;
}

static bool is_cancelled(void)
{
    return (&QueryCancelPending != NULL && QueryCancelPending != 0) ||
           (&ProcDiePending != NULL && ProcDiePending != 0);
}

/* `what` waits: a sentence's beginning. */
static int wait_for_quorum(uint64_t needed_lsn, const char *what)
{
    const struct arena_throttle *throttle = &arena.header->throttle;
    uint64_t start_ns = system_now_ns();
    struct timespec delay = {.tv_nsec = FIRST_LOOK_NS};
    bool is_reported = false;
    int error = errno;
    while (__atomic_load_n(&throttle->quorum_lsn, __ATOMIC_ACQUIRE) < needed_lsn) {
        if (is_cancelled())
            return fail_because(EINTR, "cancelled while a majority of safekeepers does not have its WAL");
        if (!is_reported && system_now_ns() - start_ns > REPORT_AFTER_NS) {
            is_reported = true;
            report("%s waits for a majority of safekeepers to have its WAL", what);
        }
        nanosleep(&delay, NULL);
        delay.tv_nsec = delay.tv_nsec < LAST_LOOK_NS / 2 ? 2 * delay.tv_nsec : LAST_LOOK_NS;
    }
    errno = error;
    return 0;
}

/* Physical walsenders do not: one of them brings the quorum its WAL. */
static bool reads_for_logical_slot(void)
{
    return &MyReplicationSlot != NULL && MyReplicationSlot != NULL &&
           (&am_walsender == NULL || !am_walsender || (&am_db_walsender != NULL && am_db_walsender));
}

/* What of WAL up to `end_lsn` is decoded now. Up to 16 whole pages are read, and written, whatever of them is WAL. */
static uint64_t flushed_up_to(uint64_t end_lsn)
{
    uint64_t flushed_lsn = GetFlushRecPtr == NULL ? UINT64_MAX : GetFlushRecPtr(NULL);
    return end_lsn < flushed_lsn ? end_lsn : flushed_lsn;
}

int check_wal_read(int fd, off_t offset, size_t size)
{
    if (fd != reader_fd || fd == NOT_OPEN || arena.header == NULL)
        return 0;
    uint64_t lsn = reader_start_lsn + (uint64_t)offset;
    if (sends_wal_as_it_is(size)) {
        if (lsn >= arena.header->throttle.start_lsn)
            return 0;
        report("a walsender was asked for WAL from before this endpoint's start");
        return fail_because(EIO, "it is of before this endpoint's start; the safekeepers have it (excimer wal receive)");
    }
    if (!reads_for_logical_slot())
        return 0;
    if (__atomic_load_n(&arena.header->throttle.quorum_lsn, __ATOMIC_ACQUIRE) >= lsn + size)
        return 0;
    return wait_for_quorum(flushed_up_to(lsn + size), "logical decoding");
}

static bool is_backup_history(const char *path)
{
    const char *name = name_in_pg_wal(path);
    size_t size = name == NULL ? 0 : strlen(name), suffix = sizeof BACKUP_SUFFIX - 1;
    return size > suffix && strchr(name, '/') == NULL && strcmp(name + size - suffix, BACKUP_SUFFIX) == 0;
}

int check_backup_end(const char *path)
{
    if (!is_backup_history(path))
        return 0;
    return wait_for_quorum(__atomic_load_n(&arena.header->throttle.written_lsn, __ATOMIC_RELAXED), "a base backup");
}
