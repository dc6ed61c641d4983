/* libc's names that look at files or change their size, their space or their name. */
#define _GNU_SOURCE
#include "hydrate.h"
#include "interposed.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

_Static_assert(sizeof(struct stat) == sizeof(struct stat64), "stat64 is stat");

static int hydrated_stat(const char *path, void *status, int flags)
{
    struct arena_file *file = find_file(path);
    if (file != NULL && make_file(file) < 0)
        return -1;
    return system_stat(path, status, flags);
}

INTERPOSE(int, stat, const char *restrict path, struct stat *restrict status)
{
    return hydrated_stat(path, status, 0);
}

INTERPOSE(int, stat64, const char *restrict path, struct stat64 *restrict status)
{
    return hydrated_stat(path, status, 0);
}

INTERPOSE(int, lstat, const char *restrict path, struct stat *restrict status)
{
    return hydrated_stat(path, status, AT_SYMLINK_NOFOLLOW);
}

INTERPOSE(int, lstat64, const char *restrict path, struct stat64 *restrict status)
{
    return hydrated_stat(path, status, AT_SYMLINK_NOFOLLOW);
}

/* What binaries built against glibc before 2.33 import; the version of struct stat has never changed on 64 bits. */
INTERPOSE(int, __xstat, int version, const char *path, struct stat *status)
{
    (void)version;
    return hydrated_stat(path, status, 0);
}

INTERPOSE(int, __xstat64, int version, const char *path, struct stat64 *status)
{
    (void)version;
    return hydrated_stat(path, status, 0);
}

INTERPOSE(int, __lxstat, int version, const char *path, struct stat *status)
{
    (void)version;
    return hydrated_stat(path, status, AT_SYMLINK_NOFOLLOW);
}

INTERPOSE(int, __lxstat64, int version, const char *path, struct stat64 *status)
{
    (void)version;
    return hydrated_stat(path, status, AT_SYMLINK_NOFOLLOW);
}

INTERPOSE(int, access, const char *path, int mode)
{
    struct arena_file *file = find_file(path);
    if (file != NULL && make_file(file) < 0)
        return -1;
    return system_access(path, mode);
}

INTERPOSE(int, ftruncate, int fd, off_t size)
{
    return truncate_open_file(fd, size);
}

INTERPOSE(int, ftruncate64, int fd, off_t size)
{
    return truncate_open_file(fd, size);
}

INTERPOSE(int, truncate, const char *path, off_t size)
{
    return truncate_path(path, size);
}

INTERPOSE(int, truncate64, const char *path, off_t size)
{
    return truncate_path(path, size);
}

INTERPOSE(int, unlink, const char *path)
{
    return remove_file(path);
}

INTERPOSE(int, rename, const char *from, const char *to)
{
    return rename_file(from, to);
}

INTERPOSE(int, fallocate, int fd, int mode, off_t offset, off_t size)
{
    return allocate(fd, mode, offset, size);
}

INTERPOSE(int, fallocate64, int fd, int mode, off_t offset, off_t size)
{
    return allocate(fd, mode, offset, size);
}

/* Unlike the rest, the posix_ family returns the error instead of setting errno. */
static int hydrated_posix_fallocate(int fd, off_t offset, off_t size)
{
    int error = errno, result = allocate(fd, 0, offset, size) < 0 ? errno : 0;
    errno = error;
    return result;
}

INTERPOSE(int, posix_fallocate, int fd, off_t offset, off_t size)
{
    return hydrated_posix_fallocate(fd, offset, size);
}

INTERPOSE(int, posix_fallocate64, int fd, off_t offset, off_t size)
{
    return hydrated_posix_fallocate(fd, offset, size);
}

static int hydrated_fadvise(int fd, off_t offset, off_t size, int advice)
{
    const struct open_file *open_file = open_file_of(fd);
    if (open_file != NULL && advice == POSIX_FADV_WILLNEED && size > 0) {
        struct block_range range = blocks_of(open_file->file, offset, (size_t)size);
        uint64_t block = first_absent(open_file->file, range.block, range.end);
        if (block < range.end) {
            remember_hint(open_file->file, block, range.end);
            return 0; /* reading a hole ahead would be wasted */
        }
    }
    int error = errno, result = system_fadvise(fd, offset, size, advice) < 0 ? errno : 0;
    errno = error;
    return result;
}

INTERPOSE(int, posix_fadvise, int fd, off_t offset, off_t size, int advice)
{
    return hydrated_fadvise(fd, offset, size, advice);
}

INTERPOSE(int, posix_fadvise64, int fd, off_t offset, off_t size, int advice)
{
    return hydrated_fadvise(fd, offset, size, advice);
}
