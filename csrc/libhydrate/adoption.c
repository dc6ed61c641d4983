/* Files that PostgreSQL makes itself, where the cache is bounded: entered into the arena when a process first opens them,
 * so that the manager may take out blocks of theirs, too.
 *
 * Every process enters, or finds, the entry before it uses its descriptor. So a file is known to all who have it open, or
 * to nobody. One for which there is no room stays unknown, and wholly local. Only relations' main forks are entered:
 * nothing else is ever evicted (eviction.h).
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <string.h>

#define DEFAULT_TABLESPACE 1663u

static bool take_number(const char **text, uint64_t limit, uint32_t *number)
{
    uint64_t value = 0;
    const char *start = *text;
    for (; **text >= '0' && **text <= '9' && value <= limit; (*text)++)
        value = value * 10 + (uint64_t)(**text - '0');
    *number = (uint32_t)value;
    return *text > start && value <= limit;
}

/* base/DATABASE/RELATION[.SEGMENT] */
static bool parse_main_fork(const char *path, struct arena_file *file)
{
    uint32_t segment = 0;
    if (strlen(path) >= ARENA_PATH_SIZE || strncmp(path, "base/", 5) != 0)
        return false;
    const char *text = path + 5;
    if (!take_number(&text, UINT32_MAX, &file->database) || *text++ != '/' ||
        !take_number(&text, UINT32_MAX, &file->relation))
        return false;
    if (*text == '.' && (text++, !take_number(&text, UINT32_MAX / ARENA_SEGMENT_BLOCKS, &segment)))
        return false;
    file->space = DEFAULT_TABLESPACE;
    file->kind = ARENA_RELATION;
    file->fork = ARENA_MAIN_FORK;
    file->first_block = segment * ARENA_SEGMENT_BLOCKS;
    file->state = ARENA_MADE;
    strcpy(file->path, path);
    return *text == '\0';
}

/* Under the adoption lock. The entry is whole before anybody can find it. */
static struct arena_file *enter(const struct arena_file *file)
{
    struct arena_header *header = arena.header;
    uint32_t number = header->file_count, mask = header->bucket_count - 1;
    if (number == header->file_capacity)
        return NULL;
    arena.files[number] = *file;
    __atomic_store_n(&header->file_count, number + 1, __ATOMIC_RELEASE);
    uint32_t bucket = arena_hash(file->path, strlen(file->path)) & mask;
    while (arena.buckets[bucket] != 0)
        bucket = (bucket + 1) & mask;
    __atomic_store_n(&arena.buckets[bucket], number + 1, __ATOMIC_RELEASE);
    COUNT(adopted, 1);
    return &arena.files[number];
}

struct arena_file *adopt_file(const char *path)
{
    struct arena_file file = {.state = ARENA_MADE};
    if (arena.header == NULL || arena.header->evicts == 0 || path == NULL || (path = path_in_data_dir(path)) == NULL ||
        !parse_main_fork(path, &file) || lock_adoption() < 0)
        return NULL;
    struct arena_file *entry = find_entry(path);
    if (entry == NULL)
        entry = enter(&file);
    unlock_adoption();
    return entry == NULL || file_state(entry) == ARENA_GONE ? NULL : entry;
}

void keep_file(struct arena_file *file)
{
    __atomic_store_n(&file->is_kept, 1, __ATOMIC_SEQ_CST);
}
