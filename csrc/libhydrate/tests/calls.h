/* The library's functions by the names they have under HYDRATE_PREFIXED, where libc keeps its own: AddressSanitizer
 * and a preloaded library would get into each other's way. */
#ifndef HYDRATE_TESTS_CALLS_H
#define HYDRATE_TESTS_CALLS_H

#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>

int preloaded_open(const char *path, int flags, ...);
int preloaded_close(int fd);
int preloaded_dup(int fd);
ssize_t preloaded_read(int fd, void *buffer, size_t size);
ssize_t preloaded_pread(int fd, void *buffer, size_t size, off_t offset);
ssize_t preloaded_preadv(int fd, const struct iovec *vector, int count, off_t offset);
ssize_t preloaded_pwrite(int fd, const void *buffer, size_t size, off_t offset);
ssize_t preloaded_copy_file_range(int in, off_t *in_offset, int out, off_t *out_offset, size_t size, unsigned flags);
int preloaded_ftruncate(int fd, off_t size);
int preloaded_truncate(const char *path, off_t size);
int preloaded_posix_fallocate(int fd, off_t offset, off_t size);
int preloaded_posix_fadvise(int fd, off_t offset, off_t size, int advice);
int preloaded_stat(const char *path, struct stat *status);
int preloaded_access(const char *path, int mode);
int preloaded_unlink(const char *path);
int preloaded_rename(const char *from, const char *to);
FILE *preloaded_fopen(const char *path, const char *mode);
DIR *preloaded_opendir(const char *path);

#endif
