#define _GNU_SOURCE
#include "hydrate.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

struct arena arena = {.fd = -1};

static const char *const TRACKED_PREFIXES[] = {"base/", "global/", "pg_xact/", "pg_multixact/", "pg_commit_ts/"};

const char *arena_open(const char *path)
{
    struct stat status;
    int fd = system_openat(AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0 || system_fstat(fd, &status) < 0)
        return strerror(errno);
    if (status.st_size < (off_t)ARENA_FILES_OFFSET)
        return "it is not an arena";
    fd = system_move_up(fd);
    void *start = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (start == MAP_FAILED)
        return strerror(errno);
    struct arena_header *header = start;
    const char *fault = arena_fault(header, (uint64_t)status.st_size);
    if (fault != NULL)
        return fault;
    arena.fd = fd; /* never opened twice: closing any descriptor of it would drop this process's locks */
    arena.files = (struct arena_file *)((char *)start + ARENA_FILES_OFFSET);
    arena.buckets = (uint32_t *)((char *)start + header->buckets_offset);
    arena.misses = (struct arena_miss *)((char *)start + header->misses_offset);
    arena.map = (uint8_t *)start + header->map_offset;
    arena.data_dir_size = strlen(header->data_dir);
    arena.header = header;
    return NULL;
}

const char *path_in_data_dir(const char *path)
{
    const struct arena_header *header = arena.header;
    if (path[0] == '/') {
        size_t size = arena.data_dir_size;
        if (strncmp(path, header->data_dir, size) != 0 || path[size] != '/')
            return NULL;
        path += size + 1;
    }
    while (path[0] == '.' && path[1] == '/')
        path += 2;
    return path;
}

struct arena_file *find_entry(const char *path)
{
    uint32_t mask = arena.header->bucket_count - 1;
    for (uint32_t bucket = arena_hash(path, strlen(path)) & mask;; bucket = (bucket + 1) & mask) {
        uint32_t number = __atomic_load_n(&arena.buckets[bucket], __ATOMIC_ACQUIRE);
        if (number == 0)
            return NULL;
        if (strcmp(arena.files[number - 1].path, path) == 0)
            return &arena.files[number - 1];
    }
}

struct arena_file *find_file(const char *path)
{
    if (arena.header == NULL || path == NULL || (path = path_in_data_dir(path)) == NULL)
        return NULL;
    size_t prefixes = sizeof TRACKED_PREFIXES / sizeof *TRACKED_PREFIXES, index = 0;
    while (index < prefixes && strncmp(path, TRACKED_PREFIXES[index], strlen(TRACKED_PREFIXES[index])) != 0)
        index++;
    if (index == prefixes)
        return NULL;
    struct arena_file *file = find_entry(path);
    return file == NULL || file_state(file) == ARENA_GONE ? NULL : file;
}

void record_miss(const struct arena_file *file, uint32_t block, uint32_t count, uint32_t needed)
{
    uint64_t slot = COUNT(misses, 1);
    if (slot < arena.header->miss_capacity)
        arena.misses[slot] = (struct arena_miss){(uint32_t)(file - arena.files), block, count, needed};
}
