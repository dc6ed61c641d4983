/* What PostgreSQL changes itself, beside hydration and eviction: writes, truncation, allocation.
 *
 * Each takes the install lock of the absent blocks it touches, changes the file, marks them present and unlocks. So
 * a fetch under way finds them present and throws its answer away (H1), and never waits for us nor we for it.
 * Blocks that are present already, which is nearly always, cost one look at the map; or the lock as well, and a mark that they
 * are changed, where they might be taken out in the middle of a write.
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <errno.h>
#include <fcntl.h>

/* The bytes of a relation go one way, by pwrite() and pwritev(). What comes otherwise is a copy of a file (CREATE DATABASE),
 * of which WAL may say something only later. */
void begin_copy(int fd)
{
    const struct open_file *open_file = open_file_of(fd);
    if (open_file != NULL && is_evictable(open_file->file))
        keep_file(open_file->file);
}

/* A block of which only a part is written must be here first. */
static int hydrate_edges(int fd, off_t offset, size_t size)
{
    if (offset % BLOCK_SIZE != 0 && hydrate_bytes(fd, offset, 1) < 0)
        return -1;
    off_t end = offset + (off_t)size;
    if (end % BLOCK_SIZE != 0 && hydrate_bytes(fd, end - 1, 1) < 0)
        return -1;
    return 0;
}

static bool are_edges_present(const struct arena_file *file, off_t offset, size_t size)
{
    off_t end = offset + (off_t)size;
    return (offset % BLOCK_SIZE == 0 || is_present(file, (uint64_t)offset / BLOCK_SIZE)) &&
           (end % BLOCK_SIZE == 0 || is_present(file, (uint64_t)end / BLOCK_SIZE));
}

/* The blocks of a write to a file whose blocks may be taken out, present or not. */
static struct block_range blocks_written(off_t offset, size_t size)
{
    uint64_t block = (uint64_t)offset / BLOCK_SIZE, end = ((uint64_t)offset + size + BLOCK_SIZE - 1) / BLOCK_SIZE;
    return (struct block_range){block, end < ARENA_SEGMENT_BLOCKS ? end : ARENA_SEGMENT_BLOCKS};
}

/* The install lock of the range, with both edges of the write present. */
static int lock_for_write(int fd, off_t offset, size_t size, const struct arena_file *file, struct block_range range)
{
    for (;;) {
        if (hydrate_edges(fd, offset, size) < 0 || lock_install(file, range.block, range.end - range.block) < 0)
            return -1;
        if (are_edges_present(file, offset, size))
            return 0;
        unlock_install(file, range.block, range.end - range.block); /* taken out in between */
    }
}

/* Under the lock and before the write: the evictor, who looks under the lock, leaves these blocks alone. The end of WAL that
 * it asks for after it has cleared this mark covers all that is written here. */
static void mark_written(const struct arena_file *file, struct block_range range)
{
    for (uint64_t block = range.block; block < range.end; block++) {
        uint8_t *byte = presence_of(file, block);
        if (byte != NULL)
            __atomic_fetch_or(byte, ARENA_WRITTEN | ARENA_LOCAL, __ATOMIC_SEQ_CST);
    }
}

int begin_write(int fd, off_t offset, size_t size, struct write_guard *guard)
{
    const struct open_file *open_file = open_file_of(fd);
    struct stat status;
    guard->file = NULL;
    if (open_file == NULL || (open_file->flags & O_APPEND) != 0)
        return 0; /* what is appended lies past the tracked blocks */
    const struct arena_file *file = open_file->file;
    struct block_range range = blocks_of(file, offset, size);
    bool is_whole = first_absent(file, range.block, range.end) == range.end;
    if (is_evictable(file) && offset >= 0 && size > 0)
        range = blocks_written(offset, size);
    else if (is_whole)
        return 0;
    if (range.block >= range.end)
        return 0;
    if (!is_whole && !is_same_file(fd, &status)) {
        COUNT(stale_descriptors, 1);
        forget_descriptor(fd);
        return 0;
    }
    if (lock_for_write(fd, offset, size, file, range) < 0)
        return -1;
    if (is_evictable(file))
        mark_written(file, range);
    COUNT(write_guards, !is_whole);
    *guard = (struct write_guard){file, range.block, range.end, offset};
    return 0;
}

void end_write(const struct write_guard *guard, ssize_t written)
{
    if (guard->file == NULL)
        return;
    for (uint64_t block = guard->block; block < guard->end; block++)
        if (written > 0 && (off_t)((block + 1) * BLOCK_SIZE) <= guard->offset + written &&
            !is_present(guard->file, block))
            set_changed(guard->file, block);
    unlock_install(guard->file, guard->block, guard->end - guard->block);
}

static void set_present_from(const struct arena_file *file, uint64_t block)
{
    uint64_t end = arena_mapped_end(file);
    for (; block < end; block++)
        if (!is_present(file, block))
            set_changed(file, block);
}

/* Cuts or lengthens; then nothing past the cut is remote any more. fd -1: by path. */
static int truncate_tail(const struct arena_file *file, int fd, const char *path, off_t size)
{
    uint64_t first_gone = ((uint64_t)size + BLOCK_SIZE - 1) / BLOCK_SIZE;
    uint64_t end = is_evictable(file) ? ARENA_SEGMENT_BLOCKS : arena_mapped_end(file);
    if (size < 0 || first_gone >= end)
        return fd >= 0 ? system_ftruncate(fd, size) : system_truncate(path, size);
    if (lock_install(file, first_gone, end - first_gone) < 0)
        return -1;
    int result = fd >= 0 ? system_ftruncate(fd, size) : system_truncate(path, size);
    if (result == 0) {
        set_present_from(file, first_gone);
        COUNT(truncations, 1);
    }
    unlock_install(file, first_gone, end - first_gone);
    return result;
}

int truncate_open_file(int fd, off_t size)
{
    const struct open_file *open_file = open_file_of(fd);
    struct stat status;
    if (open_file == NULL || !is_same_file(fd, &status))
        return system_ftruncate(fd, size);
    if (size % BLOCK_SIZE != 0 && hydrate_bytes(fd, size, 1) < 0)
        return -1;
    return truncate_tail(open_file->file, fd, NULL, size);
}

int truncate_path(const char *path, off_t size)
{
    struct arena_file *file = find_file(path);
    if (file == NULL)
        return system_truncate(path, size);
    if (make_file(file) < 0)
        return -1;
    if (size % BLOCK_SIZE == 0)
        return truncate_tail(file, -1, path, size);
    int fd = open_tracked(file, path, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    int result = truncate_open_file(fd, size), error = errno;
    forget_descriptor(fd);
    system_close(fd);
    errno = error;
    return result;
}

/* New blocks are zeros, not what the page server has; old ones stay what they are. */
int allocate(int fd, int mode, off_t offset, off_t size)
{
    const struct open_file *open_file = open_file_of(fd);
    struct stat status;
    throttle_bulk();
    if (open_file == NULL || mode != 0 || !is_same_file(fd, &status) ||
        (uint64_t)status.st_size / BLOCK_SIZE >= open_file->file->blocks)
        return system_fallocate(fd, mode, offset, size);
    const struct arena_file *file = open_file->file;
    if (lock_install(file, 0, file->blocks) < 0)
        return -1;
    int result = system_fstat(fd, &status);
    if (result == 0)
        result = system_fallocate(fd, mode, offset, size);
    if (result == 0 && (uint64_t)(offset + size) > (uint64_t)status.st_size)
        set_present_from(file, (uint64_t)status.st_size / BLOCK_SIZE);
    unlock_install(file, 0, file->blocks);
    return result;
}
