/* libc's names that move bytes: read*, write*, copy_file_range. */
#define _GNU_SOURCE
#include "hydrate.h"
#include "interposed.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define COPY_SIZE_MAX ((size_t)RUN_BLOCKS_MAX * BLOCK_SIZE)

static size_t total_size(const struct iovec *vector, int count)
{
    size_t size = 0;
    for (int index = 0; index < count; index++)
        size += vector[index].iov_len;
    return size;
}

/* The same for calls that use the descriptor's own position. */
static int hydrate_next_bytes(int fd, size_t size)
{
    return open_file_of(fd) == NULL ? 0 : hydrate_bytes(fd, system_lseek(fd, 0, SEEK_CUR), size);
}

static int begin_next_write(int fd, size_t size, struct write_guard *guard)
{
    guard->file = NULL;
    return open_file_of(fd) == NULL ? 0 : begin_write(fd, system_lseek(fd, 0, SEEK_CUR), size, guard);
}

static ssize_t hydrated_read_at(int fd, void *buffer, size_t size, off_t offset)
{
    throttle_bulk();
    if (check_wal_read(fd, offset, size) < 0 || hydrate_bytes(fd, offset, size) < 0)
        return -1;
    return system_pread(fd, buffer, size, offset);
}

static ssize_t hydrated_read_next(int fd, void *buffer, size_t size)
{
    return hydrate_next_bytes(fd, size) < 0 ? -1 : system_read(fd, buffer, size);
}

static ssize_t hydrated_read_vector(int fd, const struct iovec *vector, int count, off_t offset)
{
    throttle_bulk();
    if (open_file_of(fd) != NULL && hydrate_bytes(fd, offset, total_size(vector, count)) < 0)
        return -1;
    return system_preadv(fd, vector, count, offset);
}

INTERPOSE(ssize_t, read, int fd, void *buffer, size_t size)
{
    return hydrated_read_next(fd, buffer, size);
}

INTERPOSE(ssize_t, __read_chk, int fd, void *buffer, size_t size, size_t buffer_size)
{
    if (size > buffer_size)
        abort();
    return hydrated_read_next(fd, buffer, size);
}

INTERPOSE(ssize_t, readv, int fd, const struct iovec *vector, int count)
{
    if (open_file_of(fd) != NULL && hydrate_next_bytes(fd, total_size(vector, count)) < 0)
        return -1;
    return system_readv(fd, vector, count);
}

INTERPOSE(ssize_t, pread, int fd, void *buffer, size_t size, off_t offset)
{
    return hydrated_read_at(fd, buffer, size, offset);
}

INTERPOSE(ssize_t, pread64, int fd, void *buffer, size_t size, off_t offset)
{
    return hydrated_read_at(fd, buffer, size, offset);
}

INTERPOSE(ssize_t, __pread_chk, int fd, void *buffer, size_t size, off_t offset, size_t buffer_size)
{
    if (size > buffer_size)
        abort();
    return hydrated_read_at(fd, buffer, size, offset);
}

INTERPOSE(ssize_t, __pread64_chk, int fd, void *buffer, size_t size, off_t offset, size_t buffer_size)
{
    if (size > buffer_size)
        abort();
    return hydrated_read_at(fd, buffer, size, offset);
}

INTERPOSE(ssize_t, preadv, int fd, const struct iovec *vector, int count, off_t offset)
{
    return hydrated_read_vector(fd, vector, count, offset);
}

INTERPOSE(ssize_t, preadv64, int fd, const struct iovec *vector, int count, off_t offset)
{
    return hydrated_read_vector(fd, vector, count, offset);
}

static ssize_t guarded_write_at(int fd, const void *buffer, size_t size, off_t offset)
{
    struct write_guard guard;
    throttle_bulk();
    if (begin_write(fd, offset, size, &guard) < 0)
        return -1;
    ssize_t written = write_or_wait(fd, buffer, size, offset);
    end_write(&guard, written);
    return written;
}

static ssize_t guarded_write_vector(int fd, const struct iovec *vector, int count, off_t offset)
{
    struct write_guard guard;
    throttle_bulk();
    if (begin_write(fd, offset, total_size(vector, count), &guard) < 0)
        return -1;
    ssize_t written = system_pwritev(fd, vector, count, offset);
    end_write(&guard, written);
    return written;
}

INTERPOSE(ssize_t, write, int fd, const void *buffer, size_t size)
{
    struct write_guard guard;
    if (begin_next_write(fd, size, &guard) < 0)
        return -1;
    ssize_t written = system_write(fd, buffer, size);
    end_write(&guard, written);
    return written;
}

INTERPOSE(ssize_t, writev, int fd, const struct iovec *vector, int count)
{
    struct write_guard guard;
    if (begin_next_write(fd, total_size(vector, count), &guard) < 0)
        return -1;
    ssize_t written = system_writev(fd, vector, count);
    end_write(&guard, written);
    return written;
}

INTERPOSE(ssize_t, pwrite, int fd, const void *buffer, size_t size, off_t offset)
{
    return guarded_write_at(fd, buffer, size, offset);
}

INTERPOSE(ssize_t, pwrite64, int fd, const void *buffer, size_t size, off_t offset)
{
    return guarded_write_at(fd, buffer, size, offset);
}

INTERPOSE(ssize_t, pwritev, int fd, const struct iovec *vector, int count, off_t offset)
{
    return guarded_write_vector(fd, vector, count, offset);
}

INTERPOSE(ssize_t, pwritev64, int fd, const struct iovec *vector, int count, off_t offset)
{
    return guarded_write_vector(fd, vector, count, offset);
}

/* PostgreSQL 18's CREATE DATABASE. Copies a part at a time, which callers must expect anyway. */
INTERPOSE(ssize_t, copy_file_range, int in, off_t *in_offset, int out, off_t *out_offset, size_t size, unsigned flags)
{
    struct write_guard guard = {NULL, 0, 0, 0};
    if (open_file_of(in) != NULL || open_file_of(out) != NULL)
        size = size < COPY_SIZE_MAX ? size : COPY_SIZE_MAX;
    off_t in_start = in_offset != NULL ? *in_offset : system_lseek(in, 0, SEEK_CUR);
    off_t out_start = out_offset != NULL ? *out_offset : system_lseek(out, 0, SEEK_CUR);
    if (hydrate_bytes(in, in_start, size) < 0 || begin_write(out, out_start, size, &guard) < 0)
        return -1;
    ssize_t copied = system_copy_file_range(in, in_offset, out, out_offset, size, flags);
    end_write(&guard, copied);
    return copied;
}
