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

static int begin_next_write(int fd, size_t size, struct write_guard *guard)
{
    guard->file = NULL;
    begin_copy(fd);
    return open_file_of(fd) == NULL ? 0 : begin_write(fd, system_lseek(fd, 0, SEEK_CUR), size, guard);
}

/* Whether what was just read of a descriptor holds: no block was taken out meanwhile. */
static bool holds(int fd, uint32_t evictions)
{
    if (file_evictions(fd) == evictions)
        return true;
    COUNT(reads_again, 1);
    return false;
}

static ssize_t hydrated_read_at(int fd, void *buffer, size_t size, off_t offset)
{
    throttle_bulk();
    if (check_wal_read(fd, offset, size) < 0)
        return -1;
    for (;;) {
        uint32_t evictions = file_evictions(fd);
        if (hydrate_for_read(fd, offset, size) < 0)
            return -1;
        ssize_t got = system_pread(fd, buffer, size, offset);
        if (holds(fd, evictions))
            return got;
    }
}

static ssize_t hydrated_read_vector(int fd, const struct iovec *vector, int count, off_t offset)
{
    throttle_bulk();
    for (;;) {
        uint32_t evictions = file_evictions(fd);
        if (open_file_of(fd) != NULL && hydrate_for_read(fd, offset, total_size(vector, count)) < 0)
            return -1;
        ssize_t got = system_preadv(fd, vector, count, offset);
        if (holds(fd, evictions))
            return got;
    }
}

/* The same for calls that use the descriptor's own position, and move it. */
static ssize_t hydrated_read_next_vector(int fd, const struct iovec *vector, int count)
{
    if (open_file_of(fd) == NULL)
        return system_readv(fd, vector, count);
    off_t offset = system_lseek(fd, 0, SEEK_CUR);
    if (offset < 0)
        return -1;
    ssize_t got = hydrated_read_vector(fd, vector, count, offset);
    return got > 0 && system_lseek(fd, offset + got, SEEK_SET) < 0 ? -1 : got;
}

static ssize_t hydrated_read_next(int fd, void *buffer, size_t size)
{
    if (open_file_of(fd) == NULL)
        return system_read(fd, buffer, size);
    return hydrated_read_next_vector(fd, &(struct iovec){buffer, size}, 1);
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
    return hydrated_read_next_vector(fd, vector, count);
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

/* Where a copy has come to, at the place its caller gave or the descriptor's own. */
static int moved(int fd, off_t *given, off_t at)
{
    if (given == NULL)
        return system_lseek(fd, at, SEEK_SET) < 0 ? -1 : 0;
    *given = at;
    return 0;
}

/* PostgreSQL 18's CREATE DATABASE. Copies a part at a time, which callers must expect anyway. */
INTERPOSE(ssize_t, copy_file_range, int in, off_t *in_offset, int out, off_t *out_offset, size_t size, unsigned flags)
{
    struct write_guard guard = {NULL, 0, 0, 0};
    if (open_file_of(in) != NULL || open_file_of(out) != NULL)
        size = size < COPY_SIZE_MAX ? size : COPY_SIZE_MAX;
    off_t in_start = in_offset != NULL ? *in_offset : system_lseek(in, 0, SEEK_CUR);
    off_t out_start = out_offset != NULL ? *out_offset : system_lseek(out, 0, SEEK_CUR);
    begin_copy(out);
    for (;;) {
        uint32_t evictions = file_evictions(in);
        if (hydrate_for_read(in, in_start, size) < 0 || begin_write(out, out_start, size, &guard) < 0)
            return -1;
        off_t from = in_start, to = out_start;
        bool both_at = in_start >= 0 && out_start >= 0;
        ssize_t copied = system_copy_file_range(in, both_at ? &from : in_offset, out, both_at ? &to : out_offset, size, flags);
        end_write(&guard, copied);
        if (!holds(in, evictions))
            continue;
        if (both_at && copied > 0)
            copied = moved(in, in_offset, from) < 0 || moved(out, out_offset, to) < 0 ? -1 : copied;
        return copied;
    }
}
