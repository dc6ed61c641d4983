/* Files made on first use, and files that end.
 *
 * A start would spend most of its time creating thousands of files that nobody opens, so the manager creates almost
 * none. Whatever names a LISTED file first makes it, sparse and at its full size; deleting one that was never made
 * deletes nothing. Each change of state happens under the file's state lock, so a half-made file is never seen.
 *
 * Only directory listings would miss a LISTED file: opendir() therefore completes the directory, but only once the
 * manager has said that PostgreSQL is up, because start-up itself lists every database's directory.
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>

#define FILE_MODE 0600

static void set_state(struct arena_file *file, enum arena_file_state state)
{
    if (__atomic_exchange_n(&file->state, state, __ATOMIC_ACQ_REL) == ARENA_LISTED)
        __atomic_fetch_sub(&arena.header->listed, 1, __ATOMIC_ACQ_REL);
}

void full_path(const struct arena_file *file, char *buffer)
{
    snprintf(buffer, FULL_PATH_SIZE, "%s/%s", arena.header->data_dir, file->path);
}

static int create_sparse(const struct arena_file *file)
{
    char path[FULL_PATH_SIZE];
    struct stat status;
    full_path(file, path);
    int fd = system_openat(AT_FDCWD, path, O_RDWR | O_CREAT | O_CLOEXEC, FILE_MODE);
    if (fd < 0)
        return -1;
    off_t size = (off_t)file->blocks * BLOCK_SIZE;
    int result = system_fstat(fd, &status);
    if (result == 0 && status.st_size < size) /* shorter: its maker died half-way */
        result = system_ftruncate(fd, size);
    int error = errno;
    system_close(fd);
    errno = error;
    return result;
}

int make_file(struct arena_file *file)
{
    if (file_state(file) != ARENA_LISTED)
        return 0;
    int error = errno, result = 0;
    if (lock_state(file) < 0)
        return -1;
    if (file_state(file) == ARENA_LISTED) {
        result = create_sparse(file);
        if (result == 0) {
            set_state(file, ARENA_MADE);
            COUNT(files_made, 1);
        }
    }
    unlock_state(file);
    if (result == 0)
        errno = error;
    return result;
}

/* A standby replays before it is ready: CREATE DATABASE lists the directory that it copies. Start-up lists directories
 * before it replays. */
static bool is_replaying(void)
{
    struct arena_settings settings;
    if (!replays_wal())
        return false;
    arena_read_settings(arena.header, &settings);
    return settings.lsn != UINT64_MAX && replayed_lsn() != 0;
}

void complete_directory(const char *path)
{
    struct arena_header *header = arena.header;
    if (header == NULL || (__atomic_load_n(&header->ready, __ATOMIC_ACQUIRE) == 0 && !is_replaying()) ||
        __atomic_load_n(&header->listed, __ATOMIC_ACQUIRE) == 0 || (path = path_in_data_dir(path)) == NULL)
        return;
    size_t size = strlen(path);
    while (size > 0 && path[size - 1] == '/')
        size--;
    if (size == 0)
        return;
    uint32_t count = arena_file_count(header);
    for (uint32_t index = 0; index < count; index++) {
        struct arena_file *file = &arena.files[index];
        if (file_state(file) == ARENA_LISTED && strncmp(file->path, path, size) == 0 && file->path[size] == '/' &&
            strchr(file->path + size + 1, '/') == NULL && make_file(file) < 0)
            report("making %s: %s; it is missing from a listing of its directory", file->path, strerror(errno));
    }
}

/* An open that may create waits for a deletion of the same path to be over: otherwise a new file could be taken
 * for the old one. O_TRUNC becomes a truncation that respects fetches under way. */
int open_tracked(struct arena_file *file, const char *path, int flags, mode_t mode)
{
    bool may_create = (flags & O_CREAT) != 0;
    if (make_file(file) < 0 || (may_create && lock_state(file) < 0))
        return -1;
    int fd = system_openat(AT_FDCWD, path, flags & ~O_TRUNC, mode);
    if (fd >= 0)
        track_descriptor(fd, file_state(file) == ARENA_GONE ? NULL : file, flags);
    if (may_create)
        unlock_state(file);
    if (fd >= 0 && (flags & O_TRUNC) != 0 && truncate_open_file(fd, 0) < 0) {
        int error = errno;
        forget_descriptor(fd);
        system_close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

int remove_file(const char *path)
{
    struct arena_file *file = find_file(path);
    if (file == NULL)
        return system_unlink(path);
    if (lock_state(file) < 0)
        return -1;
    uint32_t before = file_state(file);
    int result = system_unlink(path);
    if (result < 0 && errno == ENOENT && before == ARENA_LISTED)
        result = 0;
    if (result == 0 || errno == ENOENT)
        set_state(file, ARENA_GONE);
    unlock_state(file);
    return result;
}

/* Makes every block of a file present, and so it stays: it no longer needs its name. */
static int hydrate_whole(struct arena_file *file)
{
    char path[FULL_PATH_SIZE];
    uint64_t end = arena_mapped_end(file);
    if (make_file(file) < 0)
        return -1;
    if (is_evictable(file)) {
        keep_file(file);
        if (lock_install(file, 0, ARENA_SEGMENT_BLOCKS) < 0) /* until who is at it has seen that */
            return -1;
        unlock_install(file, 0, ARENA_SEGMENT_BLOCKS);
    }
    if (first_absent(file, 0, end) == end)
        return 0;
    full_path(file, path);
    int fd = system_openat(AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    track_descriptor(fd, file, O_RDWR);
    int result = hydrate_bytes(fd, 0, (size_t)end * BLOCK_SIZE);
    int error = errno;
    forget_descriptor(fd);
    system_close(fd);
    errno = error;
    return result;
}

int hydrate_path(const char *path)
{
    struct arena_file *file = find_file(path);
    return file == NULL ? 0 : hydrate_whole(file);
}

int rename_file(const char *from, const char *to)
{
    if (is_settings_file(to))
        return keep_settings();
    if (keep_slot(from, to) < 0)
        return -1;
    struct arena_file *source = find_file(from), *target = find_file(to);
    if (source != NULL && hydrate_whole(source) < 0)
        return -1;
    int result = system_rename(from, to);
    if (result == 0 && source != NULL)
        set_state(source, ARENA_GONE);
    if (result == 0 && target != NULL)
        set_state(target, ARENA_GONE);
    return result;
}
