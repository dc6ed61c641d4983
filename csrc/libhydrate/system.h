/* Raw system calls. The library replaces libc's functions, so it cannot call them itself.
 *
 * Functions rather than macros, so that the race tests can slow single ones down (ld --wrap).
 * All return -1 and set errno, as libc's do.
 */
#ifndef HYDRATE_SYSTEM_H
#define HYDRATE_SYSTEM_H

#include <stdint.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>

int system_openat(int directory, const char *path, int flags, mode_t mode);
int system_close(int fd);
ssize_t system_read(int fd, void *buffer, size_t size);
ssize_t system_readv(int fd, const struct iovec *vector, int count);
ssize_t system_pread(int fd, void *buffer, size_t size, off_t offset);
ssize_t system_preadv(int fd, const struct iovec *vector, int count, off_t offset);
ssize_t system_write(int fd, const void *buffer, size_t size);
ssize_t system_writev(int fd, const struct iovec *vector, int count);
ssize_t system_pwrite(int fd, const void *buffer, size_t size, off_t offset);
ssize_t system_pwritev(int fd, const struct iovec *vector, int count, off_t offset);
off_t system_lseek(int fd, off_t offset, int whence);
int system_fstat(int fd, struct stat *status);
int system_stat(const char *path, struct stat *status, int flags);
int system_access(const char *path, int mode);
int system_ftruncate(int fd, off_t size);
int system_truncate(const char *path, off_t size);
int system_unlink(const char *path);
int system_symlink(const char *target, const char *path);
int system_mkdir(const char *path, mode_t mode);
int system_rename(const char *from, const char *to);
int system_fallocate(int fd, int mode, off_t offset, off_t size);
int system_fadvise(int fd, off_t offset, off_t size, int advice);
ssize_t system_copy_file_range(int in, off_t *in_offset, int out, off_t *out_offset, size_t size, unsigned flags);
int system_dup(int fd);
int system_dup3(int from, int to, int flags);
int system_fcntl(int fd, int command, void *argument);
int system_getpid(void);
int system_epoll_wait(int fd, struct epoll_event *events, int capacity, int timeout_ms);

/* Moves fd far up, out of the way of numbers that PostgreSQL counts on; keeps it if there is no room. */
int system_move_up(int fd);

uint64_t system_now_ns(void);

/* Wait while *word is `seen`, at most `ms`. Returns early for a wake-up or a signal. */
void system_futex_wait(uint32_t *word, uint32_t seen, int ms);
void system_futex_wake_all(uint32_t *word);

#endif
