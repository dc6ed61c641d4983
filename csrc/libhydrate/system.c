#define _GNU_SOURCE
#include "system.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define FD_MIN_OWN 700

_Static_assert(sizeof(off_t) == 8 && sizeof(long) == 8, "64-bit Linux");

int system_openat(int directory, const char *path, int flags, mode_t mode)
{
    return (int)syscall(SYS_openat, directory, path, flags, mode);
}

int system_close(int fd)
{
    return (int)syscall(SYS_close, fd);
}

ssize_t system_read(int fd, void *buffer, size_t size)
{
    return syscall(SYS_read, fd, buffer, size);
}

ssize_t system_readv(int fd, const struct iovec *vector, int count)
{
    return syscall(SYS_readv, fd, vector, count);
}

ssize_t system_pread(int fd, void *buffer, size_t size, off_t offset)
{
    return syscall(SYS_pread64, fd, buffer, size, offset);
}

ssize_t system_preadv(int fd, const struct iovec *vector, int count, off_t offset)
{
    return syscall(SYS_preadv, fd, vector, count, offset, 0);
}

ssize_t system_write(int fd, const void *buffer, size_t size)
{
    return syscall(SYS_write, fd, buffer, size);
}

ssize_t system_writev(int fd, const struct iovec *vector, int count)
{
    return syscall(SYS_writev, fd, vector, count);
}

ssize_t system_pwrite(int fd, const void *buffer, size_t size, off_t offset)
{
    return syscall(SYS_pwrite64, fd, buffer, size, offset);
}

ssize_t system_pwritev(int fd, const struct iovec *vector, int count, off_t offset)
{
    return syscall(SYS_pwritev, fd, vector, count, offset, 0);
}

off_t system_lseek(int fd, off_t offset, int whence)
{
    return syscall(SYS_lseek, fd, offset, whence);
}

int system_fstat(int fd, struct stat *status)
{
    return (int)syscall(SYS_fstat, fd, status);
}

int system_stat(const char *path, struct stat *status, int flags)
{
    return (int)syscall(SYS_newfstatat, AT_FDCWD, path, status, flags);
}

int system_access(const char *path, int mode)
{
    return (int)syscall(SYS_faccessat, AT_FDCWD, path, mode);
}

int system_symlink(const char *target, const char *path)
{
    return (int)syscall(SYS_symlinkat, target, AT_FDCWD, path);
}

int system_mkdir(const char *path, mode_t mode)
{
    return (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}

int system_ftruncate(int fd, off_t size)
{
    return (int)syscall(SYS_ftruncate, fd, size);
}

int system_truncate(const char *path, off_t size)
{
    return (int)syscall(SYS_truncate, path, size);
}

int system_unlink(const char *path)
{
    return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

int system_rename(const char *from, const char *to)
{
    return (int)syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to);
}

int system_fallocate(int fd, int mode, off_t offset, off_t size)
{
    return (int)syscall(SYS_fallocate, fd, mode, offset, size);
}

int system_fadvise(int fd, off_t offset, off_t size, int advice)
{
    return (int)syscall(SYS_fadvise64, fd, offset, size, advice);
}

ssize_t system_copy_file_range(int in, off_t *in_offset, int out, off_t *out_offset, size_t size, unsigned flags)
{
    return syscall(SYS_copy_file_range, in, in_offset, out, out_offset, size, flags);
}

int system_dup(int fd)
{
    return (int)syscall(SYS_dup, fd);
}

int system_dup3(int from, int to, int flags)
{
    return (int)syscall(SYS_dup3, from, to, flags);
}

int system_fcntl(int fd, int command, void *argument)
{
    return (int)syscall(SYS_fcntl, fd, command, argument);
}

int system_getpid(void)
{
    return (int)syscall(SYS_getpid);
}

int system_epoll_wait(int fd, struct epoll_event *events, int capacity, int timeout_ms)
{
    return (int)syscall(SYS_epoll_pwait, fd, events, capacity, timeout_ms, NULL, 8); /* size of the kernel's signal set */
}

int system_move_up(int fd)
{
    int moved = (int)syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, FD_MIN_OWN);
    if (moved < 0)
        return fd;
    system_close(fd);
    return moved;
}

uint64_t system_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void system_futex_wait(uint32_t *word, uint32_t seen, int ms)
{
    struct timespec limit = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &limit, NULL, 0);
}

void system_futex_wake_all(uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}
