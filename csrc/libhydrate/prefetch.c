/* Fetching for nobody who waits: blocks that the endpoint's last compute used much come back in the background.
 *
 * A process of the manager's does it, which begins as `postgres` with EXCIMER_PREFETCH set and never comes to its main():
 * it needs this library in a process of its own, on the arena, under PostgreSQL's user, and nothing else.
 *
 *     stdin    path block count [block count ...]      within the data directory; one request at a time
 *     stdout   blocks that came, or -1: the page server did not answer
 *
 * It never waits for a claim, makes one attempt, and has a low priority. What it brings is marked as read-ahead, so where
 * the cache is bounded it goes before anything that PostgreSQL has read twice. When to go on and when to stop is the
 * manager's to say (excimer.compute.hot_prefetch).
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LINE_SIZE 4096
#define NICENESS 5 /* its share of a busy machine: a fetch for nobody is a tenth of the work of one for somebody, a block */

static struct {
    int fd; /* -1: none */
    struct arena_file *file;
} last = {-1, NULL};

static void close_last(void)
{
    if (last.fd >= 0) {
        forget_descriptor(last.fd);
        system_close(last.fd);
    }
    last.fd = -1;
}

/* A descriptor of the file, the last one if it is the same; -1: there is nothing to fetch. */
static int descriptor_of(const char *path)
{
    struct arena_file *file = find_file(path);
    if (file == NULL || file->kind != ARENA_RELATION) {
        close_last();
        return -1;
    }
    if (last.fd >= 0 && last.file == file)
        return last.fd;
    close_last();
    last.fd = open_tracked(file, file->path, O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0);
    last.file = file;
    if (last.fd >= 0 && open_file_of(last.fd) == NULL) { /* it went meanwhile, or has too high a number */
        system_close(last.fd);
        last.fd = -1;
    }
    return last.fd;
}

long prefetch_line(char *line)
{
    char *rest = line, *path = strsep(&rest, " ");
    struct run runs[RUNS_MAX];
    uint32_t count = 0;
    while (rest != NULL && count < RUNS_MAX) {
        const char *block = strsep(&rest, " "), *blocks = strsep(&rest, " ");
        if (blocks == NULL)
            break;
        runs[count++] = (struct run){(uint32_t)strtoul(block, NULL, 10), (uint32_t)strtoul(blocks, NULL, 10), false};
    }
    int fd = descriptor_of(path);
    return fd < 0 ? 0 : prefetch(fd, runs, count);
}

static bool answer(long fetched)
{
    char text[32];
    int size = snprintf(text, sizeof text, "%ld\n", fetched);
    return system_write(STDOUT_FILENO, text, (size_t)size) == size;
}

void serve_prefetch(void)
{
    static char line[LINE_SIZE];
    size_t held = 0;
    syscall(SYS_setpriority, PRIO_PROCESS, 0, NICENESS);
    for (;;) {
        char *end = memchr(line, '\n', held);
        if (end == NULL) {
            ssize_t got = held == sizeof line ? 0 : system_read(STDIN_FILENO, line + held, sizeof line - held);
            if (got < 0 && errno == EINTR)
                continue;
            if (got <= 0)
                _exit(0);
            held += (size_t)got;
            continue;
        }
        *end = '\0';
        if (!answer(prefetch_line(line)))
            _exit(0);
        held -= (size_t)(end + 1 - line);
        memmove(line, end + 1, held);
    }
}
