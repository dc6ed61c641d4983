/* One process of a race test: does file calls through libhydrate, as told on stdin, one command a line, one answer
 * a line on stdout. tests/kit/hydrate_driver.py starts several of them on one arena.
 *
 * A block's content is one 64-bit tag, repeated; an answer lists the tags, or "torn" for a block that mixes several.
 */
#define _GNU_SOURCE
#include "calls.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 8192
#define BLOCKS_MAX 4096
#define TAGS (BLOCK / 8)

/* PostgreSQL's flags, which patience.c, throttle.c and wal_leaving.c read, and how much WAL it has made. */
volatile sig_atomic_t QueryCancelPending, ProcDiePending, InterruptPending;
volatile uint32_t CritSectionCount, InterruptHoldoffCount;
_Bool am_walsender, am_db_walsender;
void *MyReplicationSlot;
static uint64_t flush_lsn = UINT64_MAX;
uint64_t GetFlushRecPtr(void *timeline);
uint64_t GetFlushRecPtr(void *timeline)
{
    return timeline == NULL ? flush_lsn : 0;
}
struct {
    int64_t records, images;
    uint64_t bytes;
} pgWalUsage;

long prefetch_line(char *line);

static long pwrite_delay_ms;
static long pwrite_room = -1; /* bytes that the disk still has; -1: plenty */
static uint64_t *buffer;

ssize_t __real_system_pwrite(int fd, const void *bytes, size_t size, off_t offset);
ssize_t __wrap_system_pwrite(int fd, const void *bytes, size_t size, off_t offset);

/* Whether somebody has made a file of this name: then there is room again. */
static int exists(const char *path)
{
    return access(path, F_OK) == 0;
}

/* Stretches the moment between "look again" and the write, which is where races are lost. */
ssize_t __wrap_system_pwrite(int fd, const void *bytes, size_t size, off_t offset)
{
    if (pwrite_delay_ms > 0) {
        printf("writing\n");
        fflush(stdout);
        struct timespec delay = {pwrite_delay_ms / 1000, pwrite_delay_ms % 1000 * 1000000};
        while (nanosleep(&delay, &delay) < 0 && errno == EINTR)
            ;
    }
    if (pwrite_room >= 0) {
        if (pwrite_room == 0 && size > 0) {
            pwrite_room = exists("room") ? -1 : 0;
            errno = ENOSPC;
            return -1;
        }
        size = (long)size < pwrite_room ? size : (size_t)pwrite_room;
        pwrite_room -= (long)size;
    }
    return __real_system_pwrite(fd, bytes, size, offset);
}

static void on_signal(int number)
{
    if (number == SIGINT)
        QueryCancelPending = 1;
}

static const char *error_name(int error)
{
    static const struct {
        int number;
        const char *name;
    } names[] = {{EIO, "EIO"},       {ENOENT, "ENOENT"}, {EEXIST, "EEXIST"}, {EBADF, "EBADF"},
                 {ENOSPC, "ENOSPC"}, {EFBIG, "EFBIG"},   {EINTR, "EINTR"},   {EMFILE, "EMFILE"}};
    for (size_t index = 0; index < sizeof names / sizeof *names; index++)
        if (names[index].number == error)
            return names[index].name;
    return strerror(error);
}

static void answer(long result)
{
    if (result < 0)
        printf("error %s\n", error_name(errno));
    else
        printf("ok %ld\n", result);
}

static void print_tags(long size)
{
    if (size < 0) {
        answer(size);
        return;
    }
    printf("ok %ld", size);
    for (long block = 0; block < size / BLOCK; block++) {
        const uint64_t *tags = buffer + block * TAGS;
        int same = 1;
        for (int index = 1; index < TAGS; index++)
            same &= tags[index] == tags[0];
        if (same)
            printf(" %llu", (unsigned long long)tags[0]);
        else
            printf(" torn");
    }
    printf("\n");
}

static void fill(long count, unsigned long long tag)
{
    for (long index = 0; index < count * TAGS; index++)
        buffer[index] = tag;
}

static void list_directory(const char *path)
{
    DIR *directory = preloaded_opendir(path);
    int count = 0;
    if (directory == NULL) {
        answer(-1);
        return;
    }
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;)
        count += entry->d_name[0] != '.';
    closedir(directory);
    answer(count);
}

static void read_stream(const char *path)
{
    FILE *stream = preloaded_fopen(path, "rb");
    if (stream == NULL) {
        answer(-1);
        return;
    }
    long size = (long)fread(buffer, 1, (size_t)BLOCKS_MAX * BLOCK, stream);
    fclose(stream);
    print_tags(size);
}

static void make_by_stream(const char *path)
{
    FILE *stream = preloaded_fopen(path, "w");
    if (stream != NULL)
        fclose(stream);
    answer(stream == NULL ? -1 : 0);
}

static void show_size(const char *path)
{
    struct stat status;
    answer(preloaded_stat(path, &status) < 0 ? -1 : (long)status.st_size / BLOCK);
}

static void read_vector(int fd, long block, long count)
{
    struct iovec parts[2] = {{buffer, (size_t)BLOCK}, {buffer + TAGS, (size_t)(count - 1) * BLOCK}};
    print_tags(preloaded_preadv(fd, parts, 2, block * BLOCK));
}

/* Commands on descriptors: NAME FD A B TAG. */
static int on_descriptor(const char *name, int fd, long first, long second, unsigned long long tag)
{
    if (strcmp(name, "pread") == 0)
        print_tags(preloaded_pread(fd, buffer, (size_t)second * BLOCK, first * BLOCK));
    else if (strcmp(name, "preadv") == 0)
        read_vector(fd, first, second);
    else if (strcmp(name, "read") == 0)
        print_tags(preloaded_read(fd, buffer, (size_t)first * BLOCK));
    else if (strcmp(name, "pwrite") == 0) {
        fill(second, tag);
        answer(preloaded_pwrite(fd, buffer, (size_t)second * BLOCK, first * BLOCK));
    } else if (strcmp(name, "write_bytes") == 0) {
        fill(second / BLOCK + 1, tag);
        answer(preloaded_pwrite(fd, buffer, (size_t)second, first));
    } else if (strcmp(name, "ftruncate") == 0)
        answer(preloaded_ftruncate(fd, first * BLOCK));
    else if (strcmp(name, "allocate") == 0)
        answer(-(errno = preloaded_posix_fallocate(fd, first * BLOCK, second * BLOCK)));
    else if (strcmp(name, "advise") == 0)
        answer(-(errno = preloaded_posix_fadvise(fd, first * BLOCK, second * BLOCK, POSIX_FADV_WILLNEED)));
    else if (strcmp(name, "copy") == 0)
        answer(preloaded_copy_file_range(fd, NULL, (int)first, NULL, (size_t)second * BLOCK, 0));
    else if (strcmp(name, "dup") == 0)
        answer(preloaded_dup(fd));
    else if (strcmp(name, "close") == 0)
        answer(preloaded_close(fd));
    else if (strcmp(name, "close_behind") == 0) /* as glibc does inside fclose() */
        answer(close(fd));
    else
        return 0;
    return 1;
}

/* Runs are BLOCK,COUNT,... */
static void prefetch_runs(const char *path, const char *runs)
{
    char line[1024];
    snprintf(line, sizeof line, "%s %s", path, runs);
    for (char *comma = line; (comma = strchr(comma, ',')) != NULL;)
        *comma = ' ';
    answer(prefetch_line(line));
}

static int open_flags(const char *text)
{
    int flags = strchr(text, 'w') != NULL ? O_RDWR : O_RDONLY;
    flags |= strchr(text, 'c') != NULL ? O_CREAT : 0;
    flags |= strchr(text, 'x') != NULL ? O_EXCL : 0;
    return flags | (strchr(text, 't') != NULL ? O_TRUNC : 0);
}

/* Commands on paths and on this process: NAME TEXT TEXT. */
static void on_path(const char *name, const char *first, const char *second)
{
    if (strcmp(name, "open") == 0)
        answer(preloaded_open(first, open_flags(second), 0600));
    else if (strcmp(name, "open_behind") == 0)
        answer(open(first, O_RDWR | O_CREAT, 0600));
    else if (strcmp(name, "size") == 0)
        show_size(first);
    else if (strcmp(name, "access") == 0)
        answer(preloaded_access(first, F_OK));
    else if (strcmp(name, "list") == 0)
        list_directory(first);
    else if (strcmp(name, "stream") == 0)
        read_stream(first);
    else if (strcmp(name, "make") == 0)
        make_by_stream(first);
    else if (strcmp(name, "unlink") == 0)
        answer(preloaded_unlink(first));
    else if (strcmp(name, "rename") == 0)
        answer(preloaded_rename(first, second));
    else if (strcmp(name, "truncate") == 0)
        answer(preloaded_truncate(first, atol(second) * BLOCK));
    else if (strcmp(name, "prefetch") == 0)
        prefetch_runs(first, second);
    else if (strcmp(name, "slow_writes") == 0)
        answer(pwrite_delay_ms = atol(first));
    else if (strcmp(name, "critical") == 0)
        answer(CritSectionCount = (uint32_t)atol(first));
    else if (strcmp(name, "room") == 0)
        answer(pwrite_room = atol(first));
    else if (strcmp(name, "holds_lock") == 0)
        answer(InterruptHoldoffCount = (uint32_t)atol(first));
    else if (strcmp(name, "walsender") == 0) {
        am_walsender = atoi(first) != 0;
        am_db_walsender = atoi(second) != 0;
        answer(0);
    } else if (strcmp(name, "flushed") == 0) {
        flush_lsn = strtoull(first, NULL, 10);
        answer(0);
    } else if (strcmp(name, "slot") == 0) {
        MyReplicationSlot = atoi(first) != 0 ? &MyReplicationSlot : NULL;
        answer(0);
    } else if (strcmp(name, "interrupt") == 0)
        answer(InterruptPending = atoi(first));
    else if (strcmp(name, "made_wal") == 0)
        answer((long)(pgWalUsage.bytes += (uint64_t)atol(first)));
    else if (strcmp(name, "cancel_flag") == 0)
        answer(QueryCancelPending = atoi(first));
    else
        printf("error unknown command %s\n", name);
}

int main(void)
{
    char line[512];
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    buffer = calloc(BLOCKS_MAX, BLOCK);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
    printf("ready\n");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin) != NULL) {
        char name[32] = "", first[200] = "", second[200] = "";
        long fd = 0, a = 0, b = 0;
        unsigned long long tag = 0;
        sscanf(line, "%31s %199s %199s", name, first, second);
        sscanf(line, "%*s %ld %ld %ld %llu", &fd, &a, &b, &tag);
        if (!on_descriptor(name, (int)fd, a, b, tag))
            on_path(name, first, second);
        fflush(stdout);
    }
    free(buffer);
    return 0;
}
