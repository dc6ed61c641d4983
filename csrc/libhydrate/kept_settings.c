/* ALTER SYSTEM is acknowledged only when the setting is kept.
 *
 * PostgreSQL writes postgresql.auto.conf.tmp and renames it. The directory is a cache, so the renaming asks the compute
 * manager, which stores the new list at the controller, puts the file in place itself, and answers on the socket
 * beside the data directory (excimer.compute.settings_keeper):
 *
 *   "kept"             the file is in place
 *   "refused: REASON"  the setting is unsafe here, or not understood: EPERM
 *   "failed: REASON"   it cannot be stored now: EIO
 *
 * No answer within the limit is EIO too: then the list may have been changed all the same. The client reads the reason.
 * The calling process holds PostgreSQL's lock on the file, so that one change follows the other.
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#define LIMIT_NS 10000000000ull
#define SETTINGS_SOCKET "../settings.sock" /* PostgreSQL's processes stay in the data directory */
#define SETTINGS_FILE "postgresql.auto.conf"
#define REQUEST "keep\n"
#define ANSWER_SIZE 512

bool is_settings_file(const char *path)
{
    const char *inside = arena.header == NULL ? NULL : path_in_data_dir(path);
    return inside != NULL && strcmp(inside, SETTINGS_FILE) == 0;
}

static int fail(int number, const char *why)
{
    report("ALTER SYSTEM changes nothing: %s", why);
    return fail_because(number, why);
}

static int connect_to_manager(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = SETTINGS_SOCKET};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        int error = errno;
        system_close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

/* Reads to the end of the stream; false: not within the limit. */
static bool read_answer(int fd, char *answer, size_t capacity)
{
    uint64_t deadline_ns = system_now_ns() + LIMIT_NS;
    size_t size = 0;
    for (;;) {
        uint64_t now = system_now_ns();
        struct pollfd entry = {.fd = fd, .events = POLLIN};
        if (now >= deadline_ns)
            return false;
        int ready = poll(&entry, 1, (int)((deadline_ns - now) / 1000000u) + 1);
        if (ready < 0 && errno != EINTR)
            return false;
        if (ready <= 0)
            continue;
        ssize_t got = system_read(fd, answer + size, capacity - 1 - size);
        if (got < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (got < 0)
            return false;
        size += (size_t)got;
        answer[size] = '\0';
        if (got == 0 || size == capacity - 1)
            return size > 0;
    }
}

int keep_settings(void)
{
    char answer[ANSWER_SIZE];
    forget_reason();
    int fd = connect_to_manager();
    if (fd < 0)
        return fail(EIO, "the endpoint's manager cannot be reached to keep the setting");
    bool is_answered = system_write(fd, REQUEST, sizeof REQUEST - 1) == (ssize_t)sizeof REQUEST - 1 &&
                       read_answer(fd, answer, sizeof answer);
    system_close(fd);
    if (!is_answered)
        return fail(EIO, "the endpoint's manager did not say in time whether the setting is kept");
    if (strcmp(answer, "kept") == 0)
        return 0;
    const char *why = strchr(answer, ':');
    why = why != NULL && why[1] == ' ' ? why + 2 : answer;
    return fail(strncmp(answer, "refused", 7) == 0 ? EPERM : EIO, why);
}
