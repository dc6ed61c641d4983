/* pg_wal: which descriptor writes which segment, and what happens when there is no room for it.
 *
 * PostgreSQL writes WAL in critical sections, where an error is a PANIC: a full disk would end it, and its directory
 * with it. Here that write waits, and so do all commits, until there is room; then they go on by themselves. The same
 * holds for whatever else is written in a critical section (pg_xact). Everything else fails as PostgreSQL's users
 * know it: the statement ends with 53100.
 *
 * Waiting processes are counted in the arena, so that the manager can tell. SIGQUIT ends a wait, as it ends everything.
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <errno.h>
#include <fcntl.h>
#include <time.h>

#define SEGMENT_NAME_SIZE 24
#define RETRY_MS 100
#define NOT_OPEN (-1)

/* PostgreSQL writes to one segment at a time, and prepares the next one under another name. */
static int segment_fd = NOT_OPEN;
static uint64_t segment_start_lsn;
static int new_segment_fd = NOT_OPEN;

/* A segment's number from "TTTTTTTTLLLLLLLLSSSSSSSS"; false: it is no such name. */
static bool parse_segment(const char *name, uint64_t segment_size, uint64_t *start_lsn)
{
    uint64_t part[3] = {0, 0, 0};
    for (int index = 0; index < SEGMENT_NAME_SIZE; index++) {
        char digit = name[index];
        uint64_t value;
        if (digit >= '0' && digit <= '9')
            value = (uint64_t)(digit - '0');
        else if (digit >= 'A' && digit <= 'F')
            value = (uint64_t)(digit - 'A') + 10;
        else
            return false;
        part[index / 8] = part[index / 8] << 4 | value;
    }
    *start_lsn = (part[1] << 32) + part[2] * segment_size;
    return name[SEGMENT_NAME_SIZE] == '\0';
}

const char *name_in_pg_wal(const char *path)
{
    if (arena.header == NULL || path == NULL || (path = path_in_data_dir(path)) == NULL ||
        strncmp(path, "pg_wal/", 7) != 0)
        return NULL;
    return path + 7;
}

bool is_wal_path(const char *path)
{
    return name_in_pg_wal(path) != NULL;
}

void track_wal_descriptor(int fd, const char *path, int flags)
{
    const char *name = name_in_pg_wal(path);
    uint64_t start_lsn;
    if (name == NULL)
        return;
    bool is_segment = parse_segment(name, arena.header->throttle.wal_segment_size, &start_lsn);
    if ((flags & O_ACCMODE) == O_RDONLY) {
        if (is_segment)
            track_wal_reader(fd, start_lsn);
    } else if (is_segment) {
        segment_fd = fd;
        segment_start_lsn = start_lsn;
    } else if (strncmp(name, "xlogtemp.", 9) == 0) {
        new_segment_fd = fd;
    }
}

void forget_wal_descriptor(int fd)
{
    if (fd == segment_fd)
        segment_fd = NOT_OPEN;
    if (fd == new_segment_fd)
        new_segment_fd = NOT_OPEN;
    forget_wal_reader(fd);
}

static bool is_wal_descriptor(int fd)
{
    return fd >= 0 && (fd == segment_fd || fd == new_segment_fd);
}

bool must_wait_for_room(bool is_wal, int error)
{
    return arena.header != NULL && (error == ENOSPC || error == EDQUOT) && (is_wal || in_critical_section());
}

void wait_for_room(struct room_wait *wait, const char *what)
{
    struct arena_throttle *throttle = &arena.header->throttle;
    struct timespec delay = {.tv_nsec = RETRY_MS * 1000000l};
    if (wait->start_ns == 0) {
        wait->start_ns = system_now_ns();
        report("no space left for %s in %s: its writers wait", what, arena.header->data_dir);
    }
    __atomic_fetch_add(&throttle->waiting_for_room, 1, __ATOMIC_RELAXED);
    nanosleep(&delay, NULL);
    __atomic_fetch_sub(&throttle->waiting_for_room, 1, __ATOMIC_RELAXED);
}

void room_found(const struct room_wait *wait, const char *what)
{
    if (wait->start_ns == 0)
        return;
    uint64_t waited_ns = system_now_ns() - wait->start_ns;
    COUNT(room_waits, 1);
    COUNT(room_wait_ns, waited_ns);
    report("there is space for %s again, after %llu ms", what, (unsigned long long)(waited_ns / 1000000));
}

ssize_t write_or_wait(int fd, const void *buffer, size_t size, off_t offset)
{
    struct room_wait wait = {0};
    size_t done = 0;
    bool is_wal = is_wal_descriptor(fd);
    const char *what = is_wal ? "WAL" : "what a commit needs";
    if (is_wal && fd == segment_fd)
        wait_wal_limit(segment_start_lsn + (uint64_t)offset + size);
    for (;;) {
        ssize_t written = system_pwrite(fd, (const char *)buffer + done, size - done, offset + (off_t)done);
        done += written > 0 ? (size_t)written : 0;
        if (done == size) {
            room_found(&wait, what);
            if (is_wal && fd == segment_fd) /* under WALWriteLock: one at a time, and rising */
                __atomic_store_n(&arena.header->throttle.written_lsn, segment_start_lsn + (uint64_t)offset + size,
                                 __ATOMIC_RELAXED);
            return (ssize_t)done;
        }
        /* PostgreSQL takes a short write for a full disk: the rest says whether it is one. */
        if (written > 0 && (is_wal || in_critical_section()))
            continue;
        if (written >= 0 || !must_wait_for_room(is_wal, errno))
            return done > 0 ? (ssize_t)done : written;
        wait_for_room(&wait, what);
    }
}
