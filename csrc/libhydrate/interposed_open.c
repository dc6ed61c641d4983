/* libc's names that make and end descriptors: open*, creat, fopen, opendir, dup*, fcntl, close. */
#define _GNU_SOURCE
#include "hydrate.h"
#include "interposed.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#ifndef __O_TMPFILE
#define __O_TMPFILE 020000000
#endif

static int hydrated_openat_path(int directory, const char *path, int flags, mode_t mode)
{
    bool is_plain = directory == AT_FDCWD || (path != NULL && path[0] == '/');
    struct arena_file *file = is_plain ? find_file(path) : NULL;
    if (file != NULL)
        return open_tracked(file, path, flags, mode);
    struct room_wait wait = {0};
    bool is_wal = is_plain && is_wal_path(path);
    int fd = system_openat(directory, path, flags, mode);
    while (fd < 0 && must_wait_for_room(is_wal, errno)) {
        wait_for_room(&wait, "WAL");
        fd = system_openat(directory, path, flags, mode);
    }
    if (fd >= 0) {
        forget_descriptor(fd);
        forget_wal_descriptor(fd);
        struct arena_file *adopted = is_plain && !is_wal ? adopt_file(path) : NULL;
        if (adopted != NULL)
            track_descriptor(fd, adopted, flags);
        if (is_wal) {
            room_found(&wait, "WAL");
            track_wal_descriptor(fd, path, flags);
        }
    }
    return fd;
}

#define MODE_ARGUMENT(mode)                                                                                            \
    mode_t mode = 0;                                                                                                   \
    if ((flags & (O_CREAT | __O_TMPFILE)) != 0) {                                                                      \
        va_list arguments;                                                                                             \
        va_start(arguments, flags);                                                                                    \
        mode = va_arg(arguments, mode_t);                                                                              \
        va_end(arguments);                                                                                             \
    }

INTERPOSE(int, open, const char *path, int flags, ...)
{
    MODE_ARGUMENT(mode)
    return hydrated_openat_path(AT_FDCWD, path, flags, mode);
}

INTERPOSE(int, open64, const char *path, int flags, ...)
{
    MODE_ARGUMENT(mode)
    return hydrated_openat_path(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}

INTERPOSE(int, __open_2, const char *path, int flags)
{
    return hydrated_openat_path(AT_FDCWD, path, flags, 0);
}

INTERPOSE(int, __open64_2, const char *path, int flags)
{
    return hydrated_openat_path(AT_FDCWD, path, flags | O_LARGEFILE, 0);
}

INTERPOSE(int, openat, int directory, const char *path, int flags, ...)
{
    MODE_ARGUMENT(mode)
    return hydrated_openat_path(directory, path, flags, mode);
}

INTERPOSE(int, openat64, int directory, const char *path, int flags, ...)
{
    MODE_ARGUMENT(mode)
    return hydrated_openat_path(directory, path, flags | O_LARGEFILE, mode);
}

INTERPOSE(int, creat, const char *path, mode_t mode)
{
    return hydrated_openat_path(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

INTERPOSE(int, creat64, const char *path, mode_t mode)
{
    return hydrated_openat_path(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC | O_LARGEFILE, mode);
}

/* open() flags of an fopen() mode, or -1. */
static int flags_of_mode(const char *mode)
{
    int flags = mode[0] == 'r' ? 0 : mode[0] == 'w' ? O_CREAT | O_TRUNC : mode[0] == 'a' ? O_CREAT | O_APPEND : -1;
    if (flags < 0)
        return -1;
    int access = mode[0] == 'r' ? O_RDONLY : O_WRONLY;
    for (const char *letter = mode + 1; *letter != '\0' && *letter != ','; letter++) {
        if (*letter == '+')
            access = O_RDWR;
        else if (*letter == 'x')
            flags |= O_EXCL;
        else if (*letter == 'e')
            flags |= O_CLOEXEC;
    }
    return flags | access;
}

/* glibc's streams read inside glibc, where nobody hydrates: a tracked file is hydrated whole, before. */
static FILE *hydrated_stream(const char *path, const char *mode)
{
    int flags = flags_of_mode(mode);
    if (flags < 0) {
        errno = EINVAL;
        return NULL;
    }
    if ((flags & O_TRUNC) == 0 && hydrate_path(path) < 0)
        return NULL;
    if ((flags & O_CREAT) != 0 && check_backup_end(path) < 0)
        return NULL;
    int fd = hydrated_openat_path(AT_FDCWD, path, flags, 0666);
    if (fd < 0)
        return NULL;
    forget_descriptor(fd); /* fclose() will not tell us */
    FILE *stream = fdopen(fd, mode);
    if (stream == NULL) {
        int error = errno;
        system_close(fd);
        errno = error;
    }
    return stream;
}

INTERPOSE(FILE *, fopen, const char *restrict path, const char *restrict mode)
{
    return hydrated_stream(path, mode);
}

INTERPOSE(FILE *, fopen64, const char *restrict path, const char *restrict mode)
{
    return hydrated_stream(path, mode);
}

INTERPOSE(DIR *, opendir, const char *path)
{
    complete_directory(path);
    int fd = system_openat(AT_FDCWD, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NONBLOCK, 0);
    if (fd < 0)
        return NULL;
    forget_descriptor(fd);
    DIR *directory = fdopendir(fd);
    if (directory == NULL) {
        int error = errno;
        system_close(fd);
        errno = error;
    }
    return directory;
}

INTERPOSE(int, close, int fd)
{
    forget_descriptor(fd);
    forget_wal_descriptor(fd);
    return system_close(fd);
}

INTERPOSE(int, dup, int fd)
{
    int copy = system_dup(fd);
    copy_descriptor(fd, copy);
    return copy;
}

INTERPOSE(int, dup3, int from, int to, int flags)
{
    int copy = system_dup3(from, to, flags);
    copy_descriptor(from, copy);
    return copy;
}

INTERPOSE(int, dup2, int from, int to)
{
    if (from == to) /* dup3 refuses that; dup2 only checks */
        return system_fcntl(from, F_GETFD, NULL) < 0 ? -1 : to;
    int copy = system_dup3(from, to, 0);
    copy_descriptor(from, copy);
    return copy;
}

static int hydrated_fcntl(int fd, int command, void *argument)
{
    int result = system_fcntl(fd, command, argument);
    if (command == F_DUPFD || command == F_DUPFD_CLOEXEC)
        copy_descriptor(fd, result);
    return result;
}

INTERPOSE(int, fcntl, int fd, int command, ...)
{
    va_list arguments;
    va_start(arguments, command);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    return hydrated_fcntl(fd, command, argument);
}

INTERPOSE(int, fcntl64, int fd, int command, ...)
{
    va_list arguments;
    va_start(arguments, command);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    return hydrated_fcntl(fd, command, argument);
}
