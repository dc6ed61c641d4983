/* What PostgreSQL's processes ask the compute manager, on the socket beside the data directory: one line, and an answer
 * that ends with the stream.
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#define LIMIT_NS 10000000000ull
#define MANAGER_SOCKET "../settings.sock" /* PostgreSQL's processes stay in the data directory */

static int connect_to_manager(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = MANAGER_SOCKET};
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

static int fail(int number, const char *what, const char *why)
{
    report("%s: %s", what, why);
    return fail_because(number, why);
}

int ask_manager(const char *request, const char *what)
{
    char answer[MANAGER_ANSWER_SIZE];
    size_t size = strlen(request);
    forget_reason();
    int fd = connect_to_manager();
    if (fd < 0)
        return fail(EIO, what, "the endpoint's manager cannot be reached to keep this");
    bool is_answered = system_write(fd, request, size) == (ssize_t)size && read_answer(fd, answer, sizeof answer);
    system_close(fd);
    if (!is_answered)
        return fail(EIO, what, "the endpoint's manager did not say in time whether this is kept");
    if (strcmp(answer, "kept") == 0)
        return 0;
    const char *why = strchr(answer, ':');
    why = why != NULL && why[1] == ' ' ? why + 2 : answer;
    return fail(strncmp(answer, "refused", 7) == 0 ? EPERM : EIO, what, why);
}
